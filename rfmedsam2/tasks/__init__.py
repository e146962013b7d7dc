"""Training tasks (U-Net, RFMedSAM 2) and their patch sampling."""
