"""Odd folders of nnU-Net's models: what prediction and import say of them, which is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import run_error, run_ok
from support.tiny_model import NAME, make_plan, write_image, write_model

from rfmedsam2 import Predictor
from rfmedsam2.errors import CheckpointError


def model_of_nnunet(folder: Path, *, stage: str = "3d_fullres", folds: int = 2) -> Path:
    """A model in nnU-Net's format; fold 0 has a best checkpoint, too."""
    for fold in range(folds):
        write_model(folder / "ours", make_plan(), fold=str(fold), stage=stage)
    write_model(folder / "ours", make_plan(), stage=stage, which="best")
    run_ok("export_model", "--to", "nnunet", "-m", folder / "ours", "-o", folder / "nnunet")
    (model,) = (folder / "nnunet" / NAME).iterdir()
    return model


def rewrite(checkpoint: Path, **entries: object) -> None:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=False)
    torch.save(content | entries, checkpoint)


def both_say(model: Path, tmp_path: Path) -> list[str]:
    """What import and prediction say of a model that neither takes."""
    image = write_image(tmp_path / "image.nii.gz")
    return [
        run_error("import_model", model, "--root", tmp_path / "root"),
        run_error("predict", "-i", image, "-o", tmp_path / "out", "-m", model, "--device", "cpu"),
    ]


@pytest.mark.parametrize(
    ("stage", "axes", "named"),
    [
        ("3d_fullres", (0, 0), "inference_allowed_mirroring_axes (0, 0)"),
        ("2d", (0, 2), "mirrors an axis that its patches do not have"),
        ("3d_fullres", (0, 3), "inference_allowed_mirroring_axes (0, 3)"),
    ],
)
def test_axes_that_nnunet_cannot_flip_are_refused(tmp_path: Path, stage: str, axes: tuple, named: str) -> None:
    model = model_of_nnunet(tmp_path, stage=stage, folds=1)
    rewrite(model / "fold_0" / "checkpoint_final.pth", inference_allowed_mirroring_axes=axes)
    for said in both_say(model, tmp_path):
        assert named in said


@pytest.mark.parametrize("which", ["fold_1/checkpoint_final.pth", "fold_0/checkpoint_best.pth"])
def test_trainers_of_other_names_train_one_model(tmp_path: Path, which: str) -> None:
    """nnU-Net's predictor takes the first fold's; folds trained for other numbers of epochs belong together."""
    model = model_of_nnunet(tmp_path)
    rewrite(model / which, trainer_name="nnUNetTrainer_250epochs")
    run_ok("import_model", model, "--root", tmp_path / "root")
    (imported,) = (tmp_path / "root" / "results" / NAME).iterdir()
    assert imported.name == "rfmed_rfmed__3d_fullres"
    image = np.random.default_rng(0).normal(size=(8, 16, 16))
    chosen = {"checkpoint": "best", "folds": ["0"]} if "best" in which else {}
    one, two = (Predictor.load(place, device="cpu", **chosen) for place in (model, imported))
    assert one.made_by() == two.made_by()
    assert np.array_equal(*(each(image, spacing_zyx_mm=(1.5, 1, 1)).labels for each in (one, two)))


@pytest.mark.parametrize("which", ["fold_1/checkpoint_final.pth", "fold_0/checkpoint_best.pth"])
def test_checkpoints_that_mirror_otherwise_are_no_model(tmp_path: Path, which: str) -> None:
    model = model_of_nnunet(tmp_path)
    rewrite(model / which, trainer_name="nnUNetTrainerNoMirroring", inference_allowed_mirroring_axes=None)
    said = run_error("import_model", model, "--root", tmp_path / "root")
    assert "of different trainings" in said
    assert which in said
    assert list((tmp_path / "root" / "results").iterdir()) == []
    if "final" in which:
        with pytest.raises(CheckpointError, match="mirror_axes"):
            Predictor.load(model, device="cpu")
