"""Shared by the benchmarks: both sides' folders, measurement, small plans and real labels."""
