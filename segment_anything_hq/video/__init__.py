"""Objects tracked through videos by the refiners on SAM 2."""
