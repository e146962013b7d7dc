"""Our training transforms against nnU-Net's own pipeline: same seeds, same patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from rfmedsam2.records.plan import Augmentation, Normalisation
from rfmedsam2.transforms.augment import in_plane_only, read_size, rotation_range, training_transforms

PATCHES = [(16, 20, 24), (8, 32, 32), (32, 32), (16, 40)]


def nnunet_settings(patch):
    if len(patch) == 2:
        degrees = 15 if max(patch) / min(patch) > 1.5 else 180
        return np.radians(degrees), False
    flat = max(patch) / patch[0] > 3
    return np.radians(180 if flat else 30), flat


@pytest.mark.parametrize("patch", PATCHES)
def test_read_size_equals_nnunets_initial_patch_size(patch):
    angle, flat = nnunet_settings(patch)
    expected = get_patch_size(list(patch), *[(-angle, angle)] * 3, (0.85, 1.25))
    if flat:
        expected[0] = patch[0]
    assert read_size(Augmentation(), patch) == tuple(int(n) for n in expected)
    assert in_plane_only(patch) == flat
    assert rotation_range(Augmentation(), patch) == pytest.approx((-angle, angle))


@pytest.mark.parametrize("patch", PATCHES)
def test_same_seed_gives_nnunets_patch(patch):
    config, masked = Augmentation(), (Normalisation(kind="zscore", use_mask=True), Normalisation(kind="ct"))
    angle, flat = nnunet_settings(patch)
    theirs = nnUNetTrainer.get_training_transforms(
        patch, (-angle, angle), None, tuple(range(len(patch))), flat, use_mask_for_norm=[True, False]
    )
    ours = training_transforms(config, patch, masked)
    generator = torch.Generator().manual_seed(3)
    shape = read_size(config, patch)
    image = torch.randn(2, *shape, generator=generator)
    label = torch.randint(-1, 3, (1, *shape), generator=generator).to(torch.int16)
    changed = 0
    for seed in range(24):
        results = []
        for transforms in (ours, theirs):
            np.random.seed(seed)  # noqa: NPY002 - the generator that batchgeneratorsv2 draws from
            torch.manual_seed(seed)
            results.append(transforms(image=image.clone(), segmentation=label.clone()))
        # nnU-Net picks the blur's algorithm by timing; its two algorithms agree to about 1e-4
        torch.testing.assert_close(results[0]["image"], results[1]["image"], rtol=1e-3, atol=2e-3)
        assert torch.equal(results[0]["segmentation"], results[1]["segmentation"])
        assert results[0]["segmentation"].min() >= 0
        centre = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(shape, patch, strict=True))
        changed += not torch.allclose(results[0]["image"], image[(slice(None), *centre)])
    assert changed > 12, "nearly every patch should be changed in some way"


def test_no_rotation_and_scaling_reads_only_the_patch():
    config = Augmentation(rotation_probability=0, scale_probability=0)
    assert read_size(config, (16, 20, 24)) == (16, 20, 24)
