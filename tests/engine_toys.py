"""Small tasks and records for the engine's tests; importable by the processes that the tests start."""

from __future__ import annotations

from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.plan import Plan


def make_plan(name: str = "toy") -> Plan:
    """A plan of the smallest size."""
    stage = {
        "spacing_mm": [1, 1, 1],
        "median_shape": [8, 8, 8],
        "patch_size": [8, 8, 8],
        "batch_size": 2,
        "normalisation": [{"kind": "zscore"}],
        "model": {
            "features": [4, 8],
            "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [2, 2, 2]],
            "encoder_blocks": [1, 1],
            "decoder_blocks": [1],
        },
    }
    keys = ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5")
    return Plan.parse(
        {
            "name": name,
            "dataset": "Dataset001_Toy",
            "fingerprint": "0",
            "channels": ["CT"],
            "labels": {"names": {"background": 0, "thing": 1}},
            "file_ending": ".nii.gz",
            "intensities": [dict.fromkeys(keys, 1.0)],
            "stages": {"3d_fullres": stage},
        }
    )


def make_record(step: int = 0, scores: dict[str, float] | None = None, *, plan: str = "toy", fold: str = "0"):
    """A checkpoint record of the toy plan."""
    return CheckpointRecord(
        plan=make_plan(plan),
        stage="3d_fullres",
        fold=fold,
        step=step,
        scores=scores or {},
        weights_sha256="",
        code_version="0",
        torch_version="0",
        created="2025-01-01T00:00:00Z",
    )
