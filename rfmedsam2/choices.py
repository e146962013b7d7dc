"""Names that plans and commands share. Standard library only: `--help` lists them before anything heavy is loaded."""

from __future__ import annotations

from typing import Literal

Preset = Literal[
    "default", "cpu", "8gb", "24gb", "80gb", "nnunet", "nnunet_resenc_m", "nnunet_resenc_l", "nnunet_resenc_xl"
]
"""Sizes of a plan, for what is at hand."""
Model = Literal["unet", "rfmedsam2", "segresnet", "swinunetr", "primus_s", "primus_b", "primus_m", "primus_l"]
"""Networks that plans are made for: a U-Net, one refined by SAM 2, MONAI's, and Primus in its four sizes."""
Backbone = Literal["sam2_tiny", "sam2_small", "sam2_base_plus", "sam2_large", "nano", "mobile_sam", "lite_medsam"]
"""Image encoders: SAM 2's Hiera in its four sizes or our own smaller one, or a TinyViT encoder with SAM's decoder."""
Step0Training = Literal["joint", "crossfit"]
"""When Step 0 of RFMedSAM 2 is trained: with Steps 1 and 2, or before them."""
Backend = Literal["auto", "torch", "openvino"]
"""What runs networks when predicting; auto: the faster one, as measured on this machine."""
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
"""Experiment trackers, each an extra of this name."""
ComparedMetric = Literal["dsc", "iou", "nsd", "hd95_mm"]
"""Metrics by which two sets of predictions are compared; titles are in records/report.py."""
LabelFormat = Literal["nifti", "nrrd", "seg.nrrd", "mha", "dicom-seg", "dicom-seg-labelmap"]
"""Formats in which label maps are given to other programs."""
