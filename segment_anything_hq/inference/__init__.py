"""Interactive prediction, prediction of files, loading networks, the embedding cache."""
