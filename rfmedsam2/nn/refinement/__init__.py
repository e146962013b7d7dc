"""Parts of Steps 1 and 2 of RFMedSAM 2: which prompts a training step decodes, and the gates of masks."""
