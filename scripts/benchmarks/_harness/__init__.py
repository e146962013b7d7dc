"""What the benchmarks share: peers side by side, measured resources, plans and data."""
