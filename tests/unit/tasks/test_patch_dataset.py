"""PatchDataset: the same patches in any order and from any worker, for a plain DataLoader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.geometry import Grid
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.tasks.patch_dataset import PatchDataset
from rfmedsam2.transforms.prepare import Restore

SHAPE = (12, 16, 14)


def make_plan() -> Plan:
    stage = {
        "spacing_mm": [1, 1, 1],
        "median_shape": SHAPE,
        "patch_size": [8, 8, 8],
        "batch_size": 3,
        "normalization": [{"kind": "zscore"}],
        "train": {"epochs": 2, "iterations_per_epoch": 5},
        "model": {
            "kind": "unet",
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
            "name": "toy",
            "dataset": "Dataset001_Toy",
            "fingerprint": "0",
            "channels": ["CT"],
            "labels": {"names": {"background": 0, "thing": 1}},
            "file_ending": ".nii.gz",
            "intensities": [dict.fromkeys(keys, 1.0)],
            "stages": {"3d_fullres": stage},
        }
    )


@pytest.fixture
def folder(tmp_path):
    """Three cases of noise, each with one voxel of the class."""
    store = CaseStore(tmp_path, (8, 8, 8))
    where = Restore(
        source_grid=Grid(shape_zyx=SHAPE, spacing_zyx_mm=(1.0, 1.0, 1.0)),
        box=((0, 12), (0, 16), (0, 14)),
        transpose_forward=(0, 1, 2),
        shape_cropped=SHAPE,
        shape_planned=SHAPE,
        spacing_source=(1.0, 1.0, 1.0),
        spacing_planned=(1.0, 1.0, 1.0),
    ).to_record()
    for number in range(3):
        image = np.random.default_rng(number).normal(size=(1, *SHAPE)).astype(np.float32)
        label = np.zeros(SHAPE, np.int16)
        label[5, 6, 7] = 1
        place = np.array([np.ravel_multi_index((5, 6, 7), SHAPE)], np.int32)
        store.write(f"case{number}", image, label, geometry=where, foreground=[(1, 1, place)], source="x")
    return tmp_path


def equal(one, other) -> bool:
    return (
        one["id"] == other["id"]
        and torch.equal(one["image"], other["image"])
        and torch.equal(one["target"], other["target"])
    )


def test_a_patch_depends_on_seed_and_number_alone(folder) -> None:
    one, again, other = (PatchDataset(folder, make_plan(), "3d_fullres", seed=seed) for seed in (1, 1, 2))
    forward = [one[i] for i in range(6)]
    backward = [again[i] for i in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not any(equal(a, other[i]) for i, a in enumerate(forward))
    assert not any(equal(forward[0], patch) for patch in forward[1:])
    assert equal(one[-1], one[len(one) - 1])


def test_the_callers_random_numbers_are_left_alone(folder) -> None:
    dataset = PatchDataset(folder, make_plan(), "3d_fullres")
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    dataset[0]
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(2) == expected[1]).all()  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch, on a single core
def test_a_plain_loader_collates_them_whatever_its_workers(folder) -> None:
    dataset = PatchDataset(folder, make_plan(), "3d_fullres", length=6)
    here, there = (list(DataLoader(dataset, batch_size=3, num_workers=n)) for n in (0, 2))
    assert len(here) == len(there) == 2
    for one, other in zip(here, there, strict=True):
        assert one["image"].shape == (3, 1, 8, 8, 8)
        assert one["target"].shape == (3, 8, 8, 8)
        assert (one["image"].dtype, one["target"].dtype) == (torch.float32, torch.int64)
        assert one["id"] == other["id"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"], other["target"])


def test_a_third_of_the_patches_is_made_to_hold_the_class(folder) -> None:
    plain = PatchDataset(folder, make_plan(), "3d_fullres", augment=False, length=30)
    assert all((plain[i]["target"] == 1).any() for i in range(2, 30, 3))
    assert plain[0]["target"].min() >= 0
    assert len(PatchDataset(folder, make_plan(), "3d_fullres")) == 2 * 5 * 3


def test_only_the_cases_asked_for_are_drawn(folder) -> None:
    dataset = PatchDataset(folder, make_plan(), "3d_fullres", cases=["case1"], length=5)
    assert {dataset[i]["id"] for i in range(5)} == {"case1"}


def test_an_index_may_be_any_whole_number(folder) -> None:
    """Samplers of other libraries give NumPy's integers or tensors."""
    dataset = PatchDataset(folder, make_plan(), "3d_fullres", length=5, seed=np.int64(3))
    for index in (np.int64(2), np.uint8(2), torch.tensor(2), np.int64(-3)):
        assert torch.equal(dataset[index]["image"], dataset[2]["image"])
    assert list(DataLoader(dataset, sampler=np.random.default_rng(0).permutation(5), batch_size=5))
    with pytest.raises(TypeError, match="integer"):
        dataset[1.0]  # type: ignore[index]
    single = PatchDataset(folder, make_plan(), "3d_fullres", cases="case1", length=2)
    assert single.cases == ("case1",)


def test_wrong_arguments_are_sentences(folder, tmp_path) -> None:
    plan = make_plan()
    with pytest.raises(UsageError, match="no preprocessed cases here"):
        PatchDataset(tmp_path / "nothing", plan, "3d_fullres")
    with pytest.raises(UsageError, match=r"not preprocessed.*case9"):
        PatchDataset(folder, plan, "3d_fullres", cases=["case1", "case9"])
    for wrong in ({"length": 2.5}, {"length": "2"}, {"seed": -1}, {"seed": None}, {"cases": 5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            PatchDataset(folder, plan, "3d_fullres", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="length must be a whole number from 1"):
        PatchDataset(folder, plan, "3d_fullres", length=0)
    with pytest.raises(PlanError, match="3d_lowres"):
        PatchDataset(folder, plan, "3d_lowres")
    with pytest.raises(IndexError):
        PatchDataset(folder, plan, "3d_fullres", length=2)[2]
    cascade = plan.with_overrides("3d_fullres.previous_stage=3d_lowres")
    with pytest.raises(PlanError, match="second stage of a cascade"):
        PatchDataset(folder, cascade, "3d_fullres")
