"""Patch size and U-Net topology from spacing, shape and memory: nnU-Net 2.8's rules, without building networks.

nnU-Net finds a patch by building networks and querying the size of their feature maps. The size follows from strides,
features and block counts, so here it is computed directly. All tuples are in planned axis order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rfmedsam2.errors import PlanError
from rfmedsam2.records.model import UNetConfig

MIN_EDGE = 4
"""Smallest edge length of the bottleneck's feature maps, in voxels."""
MIN_BATCH = 2
FRAME_STEP = 32
"""Side lengths of SAM 2's frames are a multiple of this many pixels."""

ENCODER_BLOCKS = {"plain": (2,) * 14, "residual": (1, 3, 4, *(6,) * 11)}
DECODER_BLOCKS = {"plain": 2, "residual": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Strides and kernel sizes of a U-Net; `patch_size` is padded to a multiple of the total stride."""

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """Total stride per axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureWidths:
    """Widths and blocks of a network: features double per stage from `base` up to `maximum`."""

    base: int = 32
    maximum: int = 320
    block: Literal["plain", "residual"] = "plain"
    finest_blocks: int | None = None
    """Blocks of the encoder's and of the decoder's stage at full resolution, where most of the time goes; None: as many
    as in the other stages."""

    def network(self, topology: Topology) -> UNetConfig:
        """The network record for a topology."""
        stages = len(topology.strides)
        encoder, decoder = list(ENCODER_BLOCKS[self.block][:stages]), [DECODER_BLOCKS[self.block]] * (stages - 1)
        if self.finest_blocks is not None:
            encoder[0] = decoder[-1] = self.finest_blocks
        return UNetConfig.model_validate(
            {
                "block": self.block,
                "features": tuple(min(self.maximum, self.base * 2**i) for i in range(stages)),
                "kernel_sizes": topology.kernel_sizes,
                "strides": topology.strides,
                "encoder_blocks": tuple(encoder),
                "decoder_blocks": tuple(decoder),
            }
        )


def topology_of(spacing_mm: Sequence[float], patch_size: Sequence[float]) -> Topology:
    """nnU-Net's pooling rule (`get_pool_and_conv_props`).

    An axis is pooled while it keeps MIN_EDGE voxels and its spacing is within a factor 2 of the finest poolable one;
    its kernel grows from 1 to 3 once its spacing is within a factor 2 of the finest of all.

    Args:
        spacing_mm: two or three spacings.
        patch_size: requested patch; may be fractional (as a median shape is).
    """
    axes = range(len(spacing_mm))
    spacing, size = [float(s) for s in spacing_mm], [float(n) for n in patch_size]
    kernel = [1] * len(spacing)
    strides, kernels = [tuple(kernel)], []
    while True:
        pooled = _poolable(spacing, size)
        if not pooled:
            break
        kernel = [3 if k == 3 or spacing[i] / min(spacing) < 2 else 1 for i, k in enumerate(kernel)]
        for i in pooled:
            spacing[i] *= 2
            size[i] = math.ceil(size[i] / 2)
        strides.append(tuple(2 if i in pooled else 1 for i in axes))
        kernels.append(tuple(kernel))
    kernels.append((3,) * len(spacing))
    divisor = [math.prod(stride[i] for stride in strides) for i in axes]
    padded = tuple(math.ceil(patch_size[i] / divisor[i]) * divisor[i] for i in axes)
    return Topology(patch_size=padded, strides=tuple(strides), kernel_sizes=tuple(kernels))


def _poolable(spacing: list[float], size: list[float]) -> list[int]:
    large = [i for i, n in enumerate(size) if n >= 2 * MIN_EDGE]
    if not large:
        return []
    finest = min(spacing[i] for i in large)
    valid = [i for i in large if spacing[i] / finest < 2]
    # a single axis is pooled only if it stays clearly above the smallest edge
    return [] if len(valid) == 1 and size[valid[0]] < 3 * MIN_EDGE else valid


def feature_map_size(config: UNetConfig, patch_size: Sequence[int], *, outputs: int) -> int:
    """Number of values in all convolution outputs of one sample (nnU-Net's `compute_conv_feature_map_size`).

    Args:
        config: the network.
        patch_size: two or three voxel counts.
        outputs: output channels of the network (without deep supervision).
    """
    first = size = tuple(n // block for n, block in zip(patch_size, config.blocks, strict=True))
    sizes = []
    for stride in config.strides:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        sizes.append(size)
    voxels = [math.prod(size) for size in sizes]
    if config.block == "plain":
        total = sum(n * f * v for n, f, v in zip(config.encoder_blocks, config.features, voxels, strict=True))
    else:
        total = _residual_encoder_size(config, first, sizes)
    # the decoder's level i works at the resolution of encoder stage i: its blocks and one transposed convolution
    lowest_first = zip(config.decoder_blocks, config.features[-2::-1], voxels[-2::-1], strict=True)
    total += sum((n + 1) * f * v for n, f, v in lowest_first)
    # interpolated logits of a coarse network are on the patch's grid, besides its own
    interpolated = math.prod(patch_size) if config.input_stride else 0
    return total + outputs * (voxels[0] + interpolated)


def _residual_encoder_size(config: UNetConfig, first: tuple[int, ...], sizes: list[tuple[int, ...]]) -> int:
    total = config.features[0] * math.prod(first)  # stem
    before, features_before = first, config.features[0]
    for blocks, features, size in zip(config.encoder_blocks, config.features, sizes, strict=True):
        projects = features != features_before or size != before
        total += features * math.prod(size) * (2 * blocks + int(projects))
        before, features_before = size, features
    return total


def isotropic_start(spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """nnU-Net's initial patch: about a cube (square) in mm with as many voxels as 256^3 (2048^2)."""
    inverse = 1 / np.asarray(spacing_mm, dtype=float)
    voxels = 256**3 if len(inverse) == 3 else 2048**2
    return tuple(round(float(n)) for n in inverse * (voxels / np.prod(inverse)) ** (1 / len(inverse)))


def fitted_topology(
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    *,
    start: Sequence[int],
    fits: Callable[[Topology], bool],
) -> Topology:
    """Find the topology of the largest patch that `fits`, from `start` clipped to the median shape.

    As in nnU-Net, the axis that is largest against the median shape shrinks first, by one step of its divisor.

    Raises:
        PlanError: not even the smallest patch fits.
    """
    first = np.minimum(start, median_shape)
    topology = topology_of(spacing_mm, first.tolist())
    if len(topology.strides) == 1:
        # images of a few voxels: a network needs at least one pooling, the loader pads the patch
        topology = topology_of(spacing_mm, np.maximum(first, 3 * MIN_EDGE).tolist())
    while not fits(topology):
        patch, divisor = list(topology.patch_size), topology.divisor
        axis = int(np.argsort([n / m for n, m in zip(patch, median_shape, strict=True)])[-1])
        if patch[axis] <= divisor[axis]:
            raise PlanError(
                "No patch is small enough for the memory budget",
                expected="at least one voxel per bottleneck position",
                found=f"patch {tuple(patch)} at spacing {tuple(spacing_mm)} mm",
                remedy="Choose a preset with more memory, or fewer classes or features",
            )
        # recompute the divisor: it may be smaller for the smaller patch, and the old one would skip valid sizes
        smaller = [n - divisor[i] if i == axis else n for i, n in enumerate(patch)]
        patch[axis] -= topology_of(spacing_mm, smaller).divisor[axis]
        topology = topology_of(spacing_mm, patch)
    return topology


def square_topology(
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    *,
    start: Sequence[int],
    fits: Callable[[Topology], bool],
) -> Topology:
    """Find a patch whose in-plane sides are equal and a multiple of FRAME_STEP, as SAM 2's frames are.

    Each side up to the start's is combined with the most slices that fit. The side is chosen whose smaller fraction of
    the start (clipped to the median shape), in plane or in slices, is largest.

    Args:
        spacing_mm: three spacings.
        median_shape: three sizes; limits the slices by the first and the side by the larger of the others.
        start: initial patch, three sizes.
        fits: whether a topology is within the limits.

    Raises:
        PlanError: not even slices of FRAME_STEP x FRAME_STEP fit.
    """
    wanted_depth = min(start[0], float(median_shape[0]))
    wanted_side = min(max(start[1:]), float(max(median_shape[1:])))
    found: dict[Topology, float] = {}
    for side in range(FRAME_STEP, math.ceil(wanted_side / FRAME_STEP) * FRAME_STEP + 1, FRAME_STEP):
        topology = _deepest(spacing_mm, wanted_depth, side, fits)
        if topology is not None:
            depth, width = topology.patch_size[0], topology.patch_size[1]
            found[topology] = min(1.0, depth / wanted_depth, width / wanted_side)
    if not found:
        raise PlanError(
            "No patch is small enough for the memory budget",
            expected=f"room for slices of {FRAME_STEP} x {FRAME_STEP} voxels",
            found=f"spacing {tuple(spacing_mm)} mm, median shape {tuple(median_shape)}",
            remedy="Choose a preset with more memory, or fewer classes",
        )
    # on ties the later, larger side
    return max(reversed(found), key=lambda topology: found[topology])


def _deepest(spacing_mm: Sequence[float], depth: float, side: int, fits: Callable[[Topology], bool]) -> Topology | None:
    """The square topology with the most slices up to `depth` that fits; None if none of this side fits."""
    while depth >= 1:
        topology = topology_of(spacing_mm, (depth, side, side))
        if topology.patch_size[1:] != (side, side):
            return None  # padded to a larger side, which is tried separately
        if len(topology.strides) > 1 and fits(topology):
            return topology
        depth = topology.patch_size[0] - topology.divisor[0]
    return None


def batch_that_fits(by_memory: float, *, patch_voxels: int, allowed_voxels: float) -> int:
    """nnU-Net's batch size: what memory and a share of the dataset allow, at least 2.

    Args:
        by_memory: number of samples that fit into memory.
        patch_voxels: number of voxels of one sample.
        allowed_voxels: largest number of voxels of a batch, a fraction of the dataset's voxels.
    """
    by_dataset = round(allowed_voxels / patch_voxels)
    return max(min(round(by_memory), by_dataset), MIN_BATCH)
