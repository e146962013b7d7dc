"""The commands. What a user types becomes one call of `rfmedsam2.pipeline`."""
