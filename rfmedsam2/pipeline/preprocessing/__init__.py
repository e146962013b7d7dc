"""Fingerprinting and preprocessing of a raw dataset."""
