"""Transforms of arrays: crop, resample, normalize, augment, and the way back to the source grid."""
