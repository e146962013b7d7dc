"""Features of frozen image encoders on disk: computed once, read in every epoch."""
