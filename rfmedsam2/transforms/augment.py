"""Training augmentation: nnU-Net's transforms from batchgeneratorsv2, with every parameter from the plan.

Randomness comes from numpy's and torch's global RNGs, because batchgeneratorsv2 draws from them; the engine's loader
seeds both per batch, so that a batch depends only on its number. For the same reason the blur's choice of algorithm by
timing (`benchmark`) stays off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from batchgenerators.augmentations.utils import rotate_coords_2d, rotate_coords_3d
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform

from rfmedsam2.errors import PlanError
from rfmedsam2.records.plan import Normalization
from rfmedsam2.records.training import DA5, Augmentation, AugmentationConfig, NoAugmentation
from rfmedsam2.system.private_apis import private
from rfmedsam2.transforms import augment_da5
from rfmedsam2.transforms.augment_kernels import distinct_labels, sample_labels
from rfmedsam2.transforms.crop import OUTSIDE_LABEL

_ANISOTROPIC_PATCH = 3.0
"""A 3D patch whose longest edge is over 3 times its first is augmented in plane only (nnU-Net's dummy 2D)."""
_READ_SCALE = {"nnunet": 0.85, "da5": 0.7}
"""nnU-Net reads patches larger by 1/0.85, so that rotated corners contain data; its DA5 by 1/0.7."""


def in_plane_only(patch_size: Sequence[int]) -> bool:
    """Whether a 3D patch is so flat that only its slices are rotated and scaled."""
    return len(patch_size) == 3 and max(patch_size) / patch_size[0] > _ANISOTROPIC_PATCH


def rotation_range(config: Augmentation | DA5, patch_size: Sequence[int]) -> tuple[float, float]:
    """Range of rotation angles in radians; nnU-Net's choice by patch shape unless the plan gives a range in degrees."""
    if isinstance(config, Augmentation) and config.rotation_degrees != "nnunet":
        low, high = config.rotation_degrees
        return float(np.radians(low)), float(np.radians(high))
    if len(patch_size) == 2:
        limit = 15.0 if max(patch_size) / min(patch_size) > 1.5 else 180.0
    else:
        limit = 180.0 if in_plane_only(patch_size) else 30.0
    return -float(np.radians(limit)), float(np.radians(limit))


def read_size(config: AugmentationConfig, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Size of the region to read so that a rotated, scaled patch is still filled (nnU-Net's initial patch size).

    Equals the patch size along axes that are neither rotated nor scaled.
    """
    if isinstance(config, NoAugmentation):
        return tuple(patch_size)
    if isinstance(config, Augmentation) and config.rotation_probability == 0 and config.scale_probability == 0:
        return tuple(patch_size)
    angle = min(np.pi / 2, max(abs(a) for a in rotation_range(config, patch_size)))
    edges = np.array(patch_size, dtype=float)
    if len(patch_size) == 3:
        turned = [rotate_coords_3d(edges, *np.eye(3)[axis] * angle) for axis in range(3)]
    else:
        turned = [rotate_coords_2d(edges, angle)]
    reach = np.max(np.abs([*turned, edges]), axis=0)
    size = (reach / _READ_SCALE[config.kind]).astype(int).tolist()
    if in_plane_only(patch_size):
        size[0] = patch_size[0]
    return tuple(size)


def training_transforms(
    config: AugmentationConfig,
    patch_size: Sequence[int],
    normalization: Sequence[Normalization],
    *,
    previous: Sequence[int] = (),
) -> BasicTransform:
    """nnU-Net's training transforms with the plan's parameters.

    The result is called with `image` (C, *read_size) float32 and `segmentation` (1, *read_size) int16 tensors and
    returns a dict with both at `patch_size`; label -1 (outside) has become 0.

    Args:
        config: the plan's augmentation.
        patch_size: of the stage.
        normalization: of the image's channels.
        previous: for the second stage of a cascade, the foreground labels: `segmentation` (2, ...) has the first
            stage's labels behind the reference's, and they end up one-hot behind the image's channels, changed at
            random.

    Raises:
        PlanError: even the narrowest blur reaches over the whole patch along an axis; wider ones are left out.
    """
    if isinstance(config, NoAugmentation):
        return plain_transforms(normalization, previous=previous)
    if isinstance(config, Augmentation):
        config = _blurred_within(config, patch_size)
    flat = in_plane_only(patch_size)
    in_plane = (0,) if flat else None
    steps: list[BasicTransform] = [Convert3DTo2DTransform()] if flat else []
    steps.append(_spatial(config, tuple(patch_size[1:]) if flat else tuple(patch_size), patch_size))
    if flat:
        steps.append(Convert2DTo3DTransform())
    if isinstance(config, DA5):
        steps += augment_da5.before_mirroring(patch_size, low_resolution_ignores=in_plane)
    else:
        steps += _intensity(config, low_resolution_ignores=in_plane)
    if config.mirror_axes:
        steps.append(MirrorTransform(allowed_axes=tuple(a for a in config.mirror_axes if a < len(patch_size))))
    if isinstance(config, DA5):
        steps += augment_da5.after_mirroring(patch_size)
    steps += [*_closing(normalization), *_one_hot(previous)]
    share = augment_da5.CHANGED_LABELS if isinstance(config, DA5) else 0.5
    return ComposeTransforms([*steps, *_mistakes(len(previous), share)] if previous else steps)


def _blurred_within(config: Augmentation, patch_size: Sequence[int]) -> Augmentation:
    """The same with a blur that fits into the patch: batchgeneratorsv2 mirrors patches at their edges for it.

    Its kernel is the odd number nearest to 6 sigma + 0.5, and half of it must be shorter than every axis.
    """
    below = (min(patch_size) - 0.25) / 3
    narrow, wide = sorted(config.blur_sigma)
    if config.blur_probability == 0 or wide < below:
        return config
    if narrow >= below:
        raise PlanError(
            "The blur of the augmentation is wider than the patch",
            expected=f"blur_sigma below {below:.3g}, whose kernel reaches less than {min(patch_size)} voxels",
            found=f"sigma from {narrow:g}, in a patch of {tuple(patch_size)}",
            remedy="Choose a smaller blur_sigma or a larger patch, or set augmentation.blur_probability to 0",
        )
    return config.model_copy(update={"blur_sigma": (narrow, 0.999 * below)})


def plain_transforms(normalization: Sequence[Normalization], *, previous: Sequence[int] = ()) -> BasicTransform:
    """Transforms of validation patches: label -1 (outside) becomes 0, nothing random; see `training_transforms`."""
    return ComposeTransforms([*_closing(normalization), *_one_hot(previous)])


def _one_hot(labels: Sequence[int]) -> list[BasicTransform]:
    """Move the second label map to the image, with a channel for each label."""
    if not labels:
        return []
    second: Any = {"source_channel_idx": 1, "remove_channel_from_source": True}
    return [MoveSegAsOneHotToDataTransform(all_labels=list(labels), **second)]


def _mistakes(channels: int, share: float) -> list[BasicTransform]:
    """Random changes of a share of a first stage's one-hot labels, the image's last channels; figures are nnU-Net's."""
    last = range(-channels, 0)
    shapes = _MovedBorders(channel_idx=list(last), strel_size=(1, 8), p_per_label=share)
    parts = _MissingParts(
        channel_idx=list(last), fill_with_other_class_p=0, dont_do_if_covers_more_than_x_percent=0.15, p_per_label=share
    )
    return [RandomTransform(shapes, apply_probability=0.4), RandomTransform(parts, apply_probability=0.2)]


class _MovedBorders(ApplyRandomBinaryOperatorTransform):
    """Begins with the same order of channels, which it shuffles in place: a patch depends on its seed alone."""

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        self.channel_idx = sorted(self.channel_idx)
        return super().get_parameters(**data_dict)


class _MissingParts(RemoveRandomConnectedComponentFromOneHotEncodingTransform):
    """The same."""

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        self.channel_idx = sorted(self.channel_idx)
        return super().get_parameters(**data_dict)


def _spatial(config: Augmentation | DA5, target: tuple[int, ...], patch_size: Sequence[int]) -> BasicTransform:
    # without it our own pass would silently not be used
    private(SpatialTransform, "_apply_to_segmentation", package="batchgeneratorsv2")
    changes: dict[str, Any] = augment_da5.SPATIAL
    if isinstance(config, Augmentation):
        changes = {
            "p_rotation": config.rotation_probability,
            "p_scaling": config.scale_probability,
            "scaling": config.scale,
            "p_synchronize_scaling_across_axes": 1,
        }
    return _Spatial(
        target,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        rotation=rotation_range(config, patch_size),
        **changes,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=OUTSIDE_LABEL,
    )


class _Spatial(SpatialTransform):
    """SpatialTransform that samples 3D label maps in one pass: equal results, 15 times as fast.

    In 2D torch's order of summation depends on the processor, so the original implementation is kept.
    """

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        grid = params.get("grid")
        # batchgeneratorsv2 releases without a tie-break choose labels by another rule
        if grid is None or segmentation.ndim != 4 or not hasattr(self, "seg_tiebreak"):
            return super()._apply_to_segmentation(segmentation, **params)
        if len(segmentation) > 1:
            return torch.cat([self._apply_to_segmentation(channel[None], **params) for channel in segmentation])
        labels = np.ascontiguousarray(segmentation[0].numpy())
        reaches_outside = self._may_reach_outside(grid, segmentation.shape[1:])
        found, *values = distinct_labels(labels.ravel())
        if reaches_outside and found < 3 and OUTSIDE_LABEL not in values:
            found, values = found + 1, [values[0], OUTSIDE_LABEL]
        if found == 1:
            return torch.full((1, *self.patch_size), values[0], dtype=segmentation.dtype)
        two = (1, min(values), max(values)) if found == 2 else (0, 0, 0)
        sampled = np.empty(tuple(self.patch_size), labels.dtype)
        sample_labels(labels, grid.contiguous().numpy(), OUTSIDE_LABEL, reaches_outside, two, sampled)
        return torch.from_numpy(sampled)[None]


def _intensity(config: Augmentation, *, low_resolution_ignores: tuple[int, ...] | None) -> list[BasicTransform]:
    def gamma(inverted: bool) -> BasicTransform:
        return GammaTransform(
            gamma=_towards_one(config.gamma),
            p_invert_image=int(inverted),
            synchronize_channels=False,
            p_per_channel=1,
            p_retain_stats=1,
        )

    choices = [
        (
            GaussianNoiseTransform(noise_variance=config.noise_variance, p_per_channel=1, synchronize_channels=True),
            config.noise_probability,
        ),
        (
            GaussianBlurTransform(
                blur_sigma=config.blur_sigma,
                synchronize_channels=False,
                synchronize_axes=False,
                p_per_channel=0.5,
                benchmark=False,
            ),
            config.blur_probability,
        ),
        (
            MultiplicativeBrightnessTransform(
                multiplier_range=_towards_one(config.brightness), synchronize_channels=False, p_per_channel=1
            ),
            config.brightness_probability,
        ),
        (
            ContrastTransform(
                contrast_range=_towards_one(config.contrast),
                preserve_range=True,
                synchronize_channels=False,
                p_per_channel=1,
            ),
            config.contrast_probability,
        ),
        (
            SimulateLowResolutionTransform(
                scale=config.low_resolution,
                synchronize_channels=False,
                synchronize_axes=True,
                **cast(Any, {"ignore_axes": low_resolution_ignores, "allowed_channels": None}),
                p_per_channel=0.5,
            ),
            config.low_resolution_probability,
        ),
        (gamma(True), config.gamma_inverted_probability),
        (gamma(False), config.gamma_probability),
    ]
    return [RandomTransform(change, apply_probability=p) for change, p in choices if p > 0]


def _towards_one(limits: tuple[float, float]) -> Any:
    """Sample factors below and above 1 equally often (nnU-Net's BGContrast, whose class lacks a call signature)."""
    return BGContrast(limits)


def _closing(normalization: Sequence[Normalization]) -> list[BasicTransform]:
    masked = [channel for channel, scheme in enumerate(normalization) if scheme.use_mask]
    steps: list[BasicTransform] = []
    if masked:
        steps.append(MaskImageTransform(apply_to_channels=masked, channel_idx_in_seg=0, set_outside_to=0))
    steps.append(RemoveLabelTransform(OUTSIDE_LABEL, 0))
    return steps
