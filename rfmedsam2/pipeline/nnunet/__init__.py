"""What nnU-Net v2 wrote: its plans and its trained models. Classes and functions named in them are never imported."""
