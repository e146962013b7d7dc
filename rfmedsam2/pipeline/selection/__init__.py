"""What follows cross-validation: all trained models of a dataset compared, and postprocessing learned for the best."""
