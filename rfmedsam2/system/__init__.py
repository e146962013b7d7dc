"""The machine: devices, memory limits, thread pools, numba's compilation cache."""
