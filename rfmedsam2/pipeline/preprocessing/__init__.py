"""Fingerprints and preprocessed cases of a raw dataset."""
