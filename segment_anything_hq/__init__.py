"""Natural-image refiners on the trainer of `rfmedsam2`: HQ-SAM, SAM-REF, SAM2Refiner (not built yet)."""
