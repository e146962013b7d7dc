"""Image file formats: one module per family, all giving voxels and a header."""
