"""Training augmentation: what a plan may ask of it."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.engine.rng import seed_all
from rfmedsam2.errors import PlanError
from rfmedsam2.records.plan import Normalization
from rfmedsam2.records.training import Augmentation
from rfmedsam2.transforms.augment import training_transforms

ZSCORE = (Normalization(kind="zscore"),)


def always_blurred(sigma: float) -> Augmentation:
    """Nothing but a blur of this sigma in every patch."""
    never = {name: 0.0 for name in Augmentation.model_fields if name.endswith("_probability")}
    return Augmentation.model_validate(never | {"blur_probability": 1.0, "blur_sigma": (sigma, sigma)})


@pytest.mark.parametrize(("patch", "widest", "too_wide"), [((8, 24, 24), 2.5, 2.6), ((16, 12), 3.9, 4.1)])
def test_a_blur_wider_than_the_patch_is_refused_and_the_widest_within_is_made(patch, widest, too_wide) -> None:
    transforms = training_transforms(always_blurred(widest), patch, ZSCORE)
    seed_all(0)
    noise = torch.randn(1, *patch)
    blurred = [
        transforms(image=noise.clone(), segmentation=torch.zeros((1, *patch), dtype=torch.int16))["image"]
        for _ in range(8)
    ]
    assert min(float(one.std()) for one in blurred) < 0.5 * float(noise.std())  # of one channel every second time
    with pytest.raises(PlanError, match=rf"wider than the patch.*less than {min(patch)} voxels.*sigma from {too_wide}"):
        training_transforms(always_blurred(too_wide), patch, ZSCORE)
    either = always_blurred(too_wide).model_copy(update={"blur_sigma": (0.5, too_wide)})
    for _ in range(20):  # wider ones are left out
        training_transforms(either, patch, ZSCORE)(
            image=noise.clone(), segmentation=torch.zeros((1, *patch), dtype=torch.int16)
        )
    never = always_blurred(too_wide).model_copy(update={"blur_probability": 0.0})
    training_transforms(never, patch, ZSCORE)
