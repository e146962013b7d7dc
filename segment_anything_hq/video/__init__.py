"""Track prompted objects through videos with SAM 2 and the refiners built on it."""
