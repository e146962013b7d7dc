"""Networks only: no files, no records, no training."""
