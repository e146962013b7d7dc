"""Networks: U-Net, SAM, SAM 2 with adapters, RFMedSAM 2. Built from records; no file access, no training."""
