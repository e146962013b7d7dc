"""Files on disk: images, raw datasets, preprocessed cases, checkpoints, folder layout, atomic writes and locks."""
