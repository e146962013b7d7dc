"""Shared by the benchmarks: folders of both sides, measurement, small plans and real labels."""
