"""Command-line interface: each command parses its arguments and makes one call into `rfmedsam2.pipeline`."""
