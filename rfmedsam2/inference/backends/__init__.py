"""Backends: what runs a network on the tiles of a volume, torch or OpenVINO, and which is faster on this machine."""
