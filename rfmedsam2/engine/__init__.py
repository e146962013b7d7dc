"""The training engine: loop, data loading, checkpoints, ranks and logging for any task, with exact resume."""
