"""Readers and writers of image file formats, one module per family."""
