"""Prediction: sliding window, RFMedSAM 2's refinement, whole volumes, export of label maps slab by slab."""
