"""The machine: devices, memory limits, threads, the cache of compiled loops."""
