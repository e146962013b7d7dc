"""Planning: presets, network topology, memory estimates, published plans and nnU-Net's plans."""
