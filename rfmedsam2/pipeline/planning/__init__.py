"""From a fingerprint to a plan: presets, topology, memory estimates, published and nnU-Net's plans."""
