"""nnU-Net's stronger training augmentation, DA5: its transforms of batchgeneratorsv2, with its figures.

What it shares with the default augmentation, `transforms.augment` adds: the spatial transform, mirroring, the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.local.brightness_gradient import BrightnessGradientAdditiveTransform
from batchgeneratorsv2.transforms.local.local_gamma import LocalGammaTransform
from batchgeneratorsv2.transforms.noise.blank_rectangle import BlankRectangleTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.noise.median_filter import MedianFilterTransform
from batchgeneratorsv2.transforms.noise.sharpen import SharpeningTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform

SPATIAL = {
    "p_rotation": 0.4,
    "p_rot_per_axis": 0.5,
    "p_scaling": 0.2,
    "scaling": (0.7, 1.43),
    "p_synchronize_scaling_across_axes": 0,
}
"""Rotation and scaling; axes are rotated one by one, and scaled apart."""
CHANGED_LABELS = 1.0
"""Share of a first stage's labels that are changed, where they are."""
HALF: dict[str, Any] = {"synchronize_channels": False, "p_per_channel": 0.5}


def before_mirroring(
    patch_size: Sequence[int], *, low_resolution_ignores: tuple[int, ...] | None
) -> list[BasicTransform]:
    """Quarter turns among equally long axes, then blur, noise, brightness, contrast, low resolution, gamma."""
    softened = [
        _sometimes(MedianFilterTransform((2, 8), p_same_for_each_channel=0, p_per_channel=0.5), 0.2),
        _sometimes(GaussianBlurTransform((0.3, 1.5), synchronize_axes=True, benchmark=False, **HALF), 0.2),
    ]
    contrasts = [
        _sometimes(ContrastTransform(contrast_range=_towards_one(0.5, 2), preserve_range=keep, **HALF), 0.2)
        for keep in (True, False)
    ]
    low_resolution = SimulateLowResolutionTransform(
        scale=(0.25, 1), synchronize_axes=True, **cast(Any, {"ignore_axes": low_resolution_ignores}), **HALF
    )
    return [
        *_quarter_turns(patch_size),
        OneOfTransform(softened),
        _sometimes(GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        _sometimes(BrightnessAdditiveTransform(mu=0, sigma=0.5, **HALF), 0.1),
        OneOfTransform(contrasts),
        _sometimes(low_resolution, 0.15),
        # inverted both times, as nnU-Net has it
        *(_sometimes(_inverted_gamma(), 0.1) for _ in range(2)),
    ]


def after_mirroring(patch_size: Sequence[int]) -> list[BasicTransform]:
    """Blank boxes, then brightness and gamma that vary within the patch, and sharpening."""
    boxes = BlankRectangleTransform(
        rectangle_size=cast(Any, [[max(1, n // 10), n // 3] for n in patch_size]),
        rectangle_value=cast(Any, torch.mean),
        num_rectangles=(1, 5),
        force_square=False,
        p_per_channel=0.5,
    )
    local: dict[str, Any] = {
        "scale": _width,
        "loc": (-0.5, 1.5),
        "same_for_all_channels": False,
        "p_per_channel": 0.5,
    }
    return [
        _sometimes(boxes, 0.4),
        _sometimes(
            BrightnessGradientAdditiveTransform(max_strength=cast(Any, _strength), mean_centered=False, **local), 0.3
        ),
        _sometimes(LocalGammaTransform(gamma=cast(Any, _local_gamma), **local), 0.3),
        _sometimes(SharpeningTransform(strength=(0.1, 1), p_same_for_each_channel=0, p_per_channel=0.5), 0.2),
    ]


def _quarter_turns(patch_size: Sequence[int]) -> list[BasicTransform]:
    equal = [sum(other == n for other in patch_size) for n in patch_size]
    if max(equal) == 1:
        return []
    axes: Any = {axis for axis, count in enumerate(equal) if count == max(equal)}
    turn = Rot90Transform(num_axis_combinations=1, num_rot_per_combination=(0, 1, 2, 3), allowed_axes=axes)
    return [_sometimes(turn, 0.5), _sometimes(TransposeAxesTransform(allowed_axes=axes), 0.5)]


def _inverted_gamma() -> BasicTransform:
    return GammaTransform(
        gamma=_towards_one(0.7, 1.5), p_invert_image=1, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
    )


def _sometimes(change: BasicTransform, probability: float) -> BasicTransform:
    return RandomTransform(change, apply_probability=probability)


def _towards_one(low: float, high: float) -> Any:
    """Factors below and above 1 equally often."""
    return BGContrast((low, high))


# named functions, because worker processes are given copies of the transforms


def _width(shape: Sequence[int], axis: int) -> float:
    """Standard deviation of a local change along an axis, log-uniform from a sixth of the patch to all of it."""
    return np.exp(np.random.uniform(np.log(shape[axis] // 6), np.log(shape[axis])))  # noqa: NPY002


def _strength(*_: object) -> float:
    return _from_either((-5, -1), (1, 5))


def _local_gamma(*_: object) -> float:
    return _from_either((0.01, 0.8), (1.5, 4))


def _from_either(first: tuple[float, float], second: tuple[float, float]) -> float:
    low, high = first if np.random.uniform() < 0.5 else second  # noqa: NPY002 - the generator of batchgeneratorsv2
    return np.random.uniform(low, high)  # noqa: NPY002
