"""Bytes <-> arrays: images, raw datasets, preprocessed cases, run folders, atomic writes."""
