"""Our training transforms against nnU-Net's own pipeline: same seeds, same patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from rfmedsam2.engine.rng import seed_all
from rfmedsam2.records.plan import Augmentation, Normalization
from rfmedsam2.records.training import DA5, NoAugmentation
from rfmedsam2.transforms.augment import _Spatial, in_plane_only, read_size, rotation_range, training_transforms

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
    config, masked = Augmentation(), (Normalization(kind="zscore", use_mask=True), Normalization(kind="ct"))
    angle, flat = nnunet_settings(patch)
    theirs = nnUNetTrainer.get_training_transforms(
        patch, (-angle, angle), None, tuple(range(len(patch))), flat, use_mask_for_norm=[True, False]
    )
    ours = training_transforms(config, patch, masked)
    rng = torch.Generator().manual_seed(3)
    shape = read_size(config, patch)
    image = torch.randn(2, *shape, generator=rng)
    label = torch.randint(-1, 3, (1, *shape), generator=rng).to(torch.int16)
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
        center = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(shape, patch, strict=True))
        changed += not torch.allclose(results[0]["image"], image[(slice(None), *center)])
    assert changed > 12, "nearly every patch should be changed in some way"


@pytest.mark.parametrize("patch", [(16, 20, 24), (8, 32, 32), (32, 32)])
def test_the_second_stage_of_a_cascade_is_given_nnunets_patch(patch):
    """The first stage's labels lose parts and change their borders at random, one-hot behind the image."""
    config, scheme = Augmentation(), (Normalization(kind="ct"),)
    angle, flat = nnunet_settings(patch)
    own = {"is_cascaded": True, "foreground_labels": [1, 2], "use_mask_for_norm": [False]}
    axes = tuple(range(len(patch)))
    ours = training_transforms(config, patch, scheme, previous=(1, 2))
    plain = training_transforms(config, patch, scheme)
    rng = torch.Generator().manual_seed(3)
    shape = read_size(config, patch)
    image = torch.randn(1, *shape, generator=rng)
    label = torch.randint(-1, 3, (2, *(n // 4 + 1 for n in shape)), generator=rng).to(torch.int16)
    for axis in range(1, label.ndim):
        label = label.repeat_interleave(4, axis)
    label = label[(slice(None), *(slice(n) for n in shape))].contiguous()
    changed = 0
    for seed in range(24):
        # anew, as nnU-Net's keep the order of labels that they have shuffled
        theirs = nnUNetTrainer.get_training_transforms(patch, (-angle, angle), None, axes, flat, **own)
        results = []
        for transforms, given in ((ours, label), (theirs, label), (plain, label[1:])):
            seed_all(seed)
            results.append(transforms(image=image.clone(), segmentation=given.clone()))
        found, expected, unchanged = results
        assert found["image"].shape == (3, *patch)
        assert torch.equal(found["image"][1:], expected["image"][1:])
        torch.testing.assert_close(found["image"][:1], expected["image"][:1], rtol=1e-3, atol=2e-3)
        assert torch.equal(found["segmentation"], expected["segmentation"])
        changed += not torch.equal(found["image"][1] == 1, unchanged["segmentation"][0] == 1)
    assert 4 < changed < 24


@pytest.mark.parametrize("patch", [*PATCHES, (24, 24, 24), (6, 20, 20)])
def test_da5_is_its_trainers(patch):
    """The same seeds give the same patches, of the second stage of a cascade, too."""
    config, masked = DA5(), (Normalization(kind="zscore", use_mask=True), Normalization(kind="ct"))
    angle, flat = nnunet_settings(patch)
    size = get_patch_size(list(patch), *[(-angle, angle)] * 3, (0.7, 1.43))
    if flat:
        size[0] = patch[0]
    assert read_size(config, patch) == tuple(int(n) for n in size)
    fixed = (patch, (-angle, angle), None, tuple(range(len(patch))), flat)
    rng = torch.Generator().manual_seed(3)
    image = torch.randn(2, *read_size(config, patch), generator=rng)
    label = torch.randint(-1, 3, (2, *read_size(config, patch)), generator=rng).to(torch.int16)
    for previous in ((), (1, 2)):
        for seed in range(40):
            own = {"is_cascaded": bool(previous), "foreground_labels": list(previous)}
            # made for each, as nnU-Net's keep the order of labels that they have shuffled
            theirs = nnUNetTrainerDA5.get_training_transforms(*fixed, use_mask_for_norm=[True, False], **own)
            ours = training_transforms(config, patch, masked, previous=previous)
            given = label if previous else label[:1]
            results = []
            for transforms in (ours, theirs):
                seed_all(seed)
                results.append(transforms(image=image.clone(), segmentation=given.clone()))
            found, expected = results
            assert found["image"].shape == (2 + len(previous), *patch)
            torch.testing.assert_close(found["image"], expected["image"], rtol=1e-3, atol=2e-3)
            assert torch.equal(found["segmentation"], expected["segmentation"])


def test_no_augmentation_is_its_trainers():
    patch, schemes = (8, 10, 12), (Normalization(kind="ct"),)
    theirs = nnUNetTrainerNoDA.get_training_transforms(patch, (0, 0), None, None, False)
    image, label = torch.randn(1, *patch), torch.randint(-1, 3, (1, *patch)).to(torch.int16)
    assert read_size(NoAugmentation(), patch) == patch
    assert NoAugmentation().mirror_axes == ()
    ours = training_transforms(NoAugmentation(), patch, schemes)
    found, expected = (t(image=image.clone(), segmentation=label.clone()) for t in (ours, theirs))
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["segmentation"], expected["segmentation"])


def test_no_rotation_and_scaling_reads_only_the_patch():
    config = Augmentation(rotation_probability=0, scale_probability=0)
    assert read_size(config, (16, 20, 24)) == (16, 20, 24)


def label_maps(rng):
    """Noise, blocks and flat areas of one, two and many labels, some with "outside" (-1) among them."""
    shape = (22, 26, 30)
    yield np.full(shape, 5)
    for values in ([0, 7], [-1, 3], [0, 1, 2], np.arange(-1, 14)):
        noise = rng.choice(values, shape)
        yield noise
        yield np.kron(noise[:4, :5, :5], np.ones((6, 6, 6), int))[: shape[0], : shape[1], : shape[2]]


@pytest.mark.parametrize("patch", [(14, 16, 18), (30, 30, 30)])
@pytest.mark.parametrize("scale", [(0.7, 1.4), (0.5, 0.5), (2.0, 2.0)])
def test_labels_sampled_in_one_pass_equal_batchgenerators(patch, scale):
    rng = np.random.default_rng(5)
    turning = (-0.5, 0.5) if scale == (0.7, 1.4) else (0.0, 0.0)  # halves and doubles alone make ties everywhere
    figures = {"p_rotation": 1, "rotation": turning, "p_scaling": 1, "scaling": scale, "border_mode_seg": "constant"}
    figures |= {"padding_value_seg": -1, "p_synchronize_scaling_across_axes": 1}
    ours, theirs = (kind(patch, 0, False, **figures) for kind in (_Spatial, SpatialTransform))
    for labels in label_maps(rng):
        label = torch.from_numpy(labels.astype(np.int16))[None]
        results = []
        for transform in (ours, theirs):
            np.random.seed(1)  # noqa: NPY002 - the generator that batchgeneratorsv2 draws from
            results.append(transform(image=label.float(), segmentation=label.clone()))
        assert torch.equal(results[0]["segmentation"], results[1]["segmentation"])
        assert results[0]["segmentation"].dtype == torch.int16
