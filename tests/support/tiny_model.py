"""A model of two small networks that nobody trained, and images for it: all that predicting needs, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from rfmedsam2 import models
from rfmedsam2.records.checkpoint import CheckpointRecord, TrainedCases
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Augmentation, Normalization, Plan, Stage
from rfmedsam2.store.checkpoints import write_checkpoint

NAME = "Dataset900_Tiny"


def make_plan(**changes) -> Plan:
    network = UNetConfig(
        features=(4, 8),
        kernel_sizes=((3, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (2, 2, 2)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    stage = Stage(
        spacing_mm=(1.5, 1.0, 1.0),
        median_shape=(16, 20, 20),
        patch_size=(8, 16, 16),
        batch_size=2,
        normalization=(Normalization(kind="zscore"),),
        augmentation=Augmentation(mirror_axes=(0, 1)),
        model=network,
    )
    flat = stage.model_copy(
        update={
            "patch_size": (16, 16),
            "model": UNetConfig(
                features=(4, 8),
                kernel_sizes=((3, 3), (3, 3)),
                strides=((1, 1), (2, 2)),
                encoder_blocks=(1, 1),
                decoder_blocks=(1,),
            ),
        }
    )
    statistics = IntensityStatistics(
        mean=0,
        std=1,
        median=0,
        min=-3,
        max=3,
        percentile_00_5=-2,
        percentile_99_5=2,
    )
    plan = {
        "name": "rfmed",
        "dataset": NAME,
        "fingerprint": "none",
        "channels": ("CT",),
        "labels": LabelSet.model_validate({"names": {"background": 0, "liver": 1, "spleen": 2}}),
        "file_ending": ".nii.gz",
        "intensities": (statistics,),
        "stages": {"3d_fullres": stage, "2d": flat},
    }
    return Plan(**{**plan, **changes})


def write_model(
    folder: Path,
    plan: Plan,
    *,
    fold: str = "0",
    stage: str = "3d_fullres",
    which: str = "final",
    cases: TrainedCases | None = None,
) -> Path:
    torch.manual_seed(int(fold) if fold.isdigit() else 99)
    network = models.build_stage(plan, plan.stages[stage])
    record = CheckpointRecord(
        plan=plan,
        stage=stage,
        fold=fold,
        step=10,
        weights_sha256="",
        code_version="0",
        torch_version=torch.__version__,
        created="2026-01-01T00:00:00Z",
        cases=cases,
    )
    path = folder / f"fold_{fold}" / f"checkpoint_{which}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, record, {f"model/{k}": v for k, v in network.state_dict().items()}, {})
    return path


def write_image(path: Path, seed: int = 0, shape=(22, 25, 14)) -> Path:
    """An oblique NIfTI image (x, y, z) with blobs."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-100, 300, shape).astype(np.int16)
    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.9, 0.8, 2.0])
    affine[:3, 3] = [11.5, -20.25, 300.0]
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path
