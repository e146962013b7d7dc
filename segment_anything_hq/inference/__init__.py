"""Interactive prediction, prediction of files, the embedding cache."""
