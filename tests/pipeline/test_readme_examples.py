"""The Python examples of the READMEs run as they stand, after the trainings that they name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from rfmedsam2.records.overrides import with_overrides
from segment_anything_hq import models
from segment_anything_hq.data.open_data import open_data
from segment_anything_hq.tasks.defaults import default_plan
from segment_anything_hq.tasks.train import RefinerTrainOptions, train_refiner

ROOT = Path(__file__).resolve().parents[2]


def example(page: str, line: str) -> str:
    """The Python example of a README that holds this line."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if line in block)


def test_predicting_by_the_readme(trained_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rfmed_data").symlink_to(trained_root)
    image = min((trained_root / "raw").glob("*/imagesTs/*.nii.gz"))
    shutil.copy(image, "ct.nii.gz")
    names: dict[str, object] = {}
    exec(compile(example("README.md", "from rfmedsam2 import Predictor"), "README.md", "exec"), names)
    written, given = nib.load("labels.nii.gz"), nib.load(image)
    assert written.shape == given.shape
    assert np.array_equal(written.affine, given.affine)
    assert names["labels"].shape == (40, 96, 96)
    assert np.array_equal(np.asarray(names["image"].dataobj), np.asarray(written.dataobj))


def test_box_and_click_by_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / "photos" / part).mkdir(parents=True)
    ground_truth = np.zeros((300, 400), np.uint8)
    ground_truth[60:260, 60:280] = 255
    image = rng.integers(0, 200, (300, 400, 3), np.uint8) // 2 + ground_truth[..., None] // 3
    Image.fromarray(image).save("cat.jpg")
    Image.fromarray(image).save("photos/images/cat.png")
    Image.fromarray(ground_truth).save("photos/masks/cat.png")
    # a file of MobileSAM's names and sizes, with weights of our own
    torch.manual_seed(0)
    torch.save(models.build("sam", "vit_tiny").state_dict(), "mobile_sam.pt")
    short = ["batch_size=1", "train.epochs=1", "train.iterations_per_epoch=1", "train.workers=0"]
    plan = with_overrides(default_plan("hq_sam", "vit_tiny", samples=1), short, where="test")
    sets = open_data(["photos"])
    options = RefinerTrainOptions(device="cpu", weights=Path("mobile_sam.pt"), score_base=False)
    train_refiner(plan, sets, sets, Path("runs/hq"), options)

    code = example("segment_anything_hq/README.md", "from segment_anything_hq import models")
    assert len(code.strip().splitlines()) <= 15
    exec(compile(code, "segment_anything_hq/README.md", "exec"), {})
    mask = np.asarray(Image.open("cat.png"))
    assert mask.shape == (300, 400)
    assert mask.dtype == np.bool_
