"""RFMedSAM 2 from a raw folder of real CT to a report: nano, SAM 2's tiny, and real weights of a light SAM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.commands import run_error, run_ok

from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.store.images import read_header, read_label

pytestmark = pytest.mark.data

QUICK = (
    "3d_fullres.patch_size=[8,64,64]",
    "3d_fullres.model.frame_size=64",
    "3d_fullres.sampling.max_prompted_objects=8",
    "3d_fullres.train.workers=0",
    "3d_fullres.validation.patches_while_training=1",
)


@pytest.fixture
def weights(request, data_root, tmp_path) -> Path | None:
    """A file of weights of the backbone; of SAM 2's tiny one it holds no published values."""
    match request.param:
        case "lite_medsam":
            return data_root / "weights-litemedsam/lite_medsam.pth"
        case "sam2_tiny":
            torch.save({"model": build_base("sam2_tiny", frame_size=64).state_dict()}, tmp_path / "tiny.pt")
            return tmp_path / "tiny.pt"
    return None


@pytest.mark.parametrize(
    ("backbone", "weights"), [(name, name) for name in ("nano", "sam2_tiny", "lite_medsam")], indirect=["weights"]
)
def test_real_ct_goes_through_every_command(backbone, weights, data_root, tmp_path):
    raw = tmp_path / "raw" / "Dataset110_TSAbdomenCT"
    raw.parent.mkdir()
    raw.symlink_to(data_root / "ct-organs-totalsegmentator" / raw.name)
    planning = ("--model", "rfmedsam2", "--preset", "cpu", "--backbone", backbone, "--spacing", 12, 6, 6)
    run_ok("plan_and_preprocess", "-d", 110, *planning, "--set", *QUICK, "--root", tmp_path)
    training = ("--epochs", 1, "--iterations", 2, "--no-validate", "--root", tmp_path)
    if weights is None:
        run_ok("train", "3d_fullres", "fold", 0, *training)
    else:
        assert "--sam2" in run_error("train", "3d_fullres", "fold", 0, *training)
        run_ok("train", "3d_fullres", "fold", 0, "--sam2", weights, *training)
    image = sorted((raw / "imagesTr").iterdir())[-1]
    label = tmp_path / "labels" / image.name.replace("_0000", "")
    label.parent.mkdir()
    label.symlink_to(raw / "labelsTr" / label.name)
    for words in ((), ("--step", 1), ("--boxes", label)):
        out = tmp_path / f"predicted{len(words) and words[0]}"
        run_ok("predict", "-i", image, "-o", out, "--step-size", 1, *words, "--root", tmp_path)
        labels, header = read_label(out / label.name)
        assert header.grid.mismatch(read_header(label).grid) is None
        assert labels.array.max() <= 13
    run_ok("evaluate", "-p", out, "-g", label.parent, "-o", tmp_path / "scores", "--root", tmp_path)
    run_ok("report", "-e", tmp_path / "scores/metrics.json", "-i", image.parent, "-o", tmp_path / "page.html")
    assert "liver" in json.loads((tmp_path / "scores/metrics.json").read_text())["classes"]
    assert (tmp_path / "page.html").read_text().startswith("<!")
