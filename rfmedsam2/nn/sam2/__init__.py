"""SAM 2 from the `sam2` package, built from figures, run on frames as one batch."""
