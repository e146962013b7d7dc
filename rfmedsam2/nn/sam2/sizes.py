"""Sizes of the backbones: SAM 2's four, our smaller nano, and SAMs with a TinyViT encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import assert_never

from rfmedsam2.choices import Backbone

FITTED_WINDOWS = (8, 4, 16, 8)
"""Attention windows that divide the maps of 256 and 512 pixels without padding; large has them as published."""
LITE_SIZE = 256
"""Side length in pixels of LiteMedSAM's training images; its embedding has one position per 4 x 4 pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HieraSizes:
    """SAM 2's image encoder Hiera (four stages, channels double at each stage).

    Attributes:
        channels: channels of the first stage.
        heads: attention heads of the first stage.
        stages: number of blocks per stage.
        global_blocks: blocks with attention over the whole map; the others use windows.
        windows: side of the windows of each stage.
        background: side of the position embedding that is interpolated to the map.
    """

    channels: int
    heads: int
    stages: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    background: int = 7

    @property
    def pyramid(self) -> list[int]:
        """Channels of the stages, coarsest first."""
        return [self.channels * factor for factor in (8, 4, 2, 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """All sizes that differ between backbones.

    Attributes:
        hiera: the image encoder; None: TinyViT.
        scaling: how TinyViT scales frames, see `TinyVitEncoder`.
        channels: C, channels of the embedding.
        memory_channels: M, channels of a memory.
        memory_layers: number of layers of memory attention.
        memory_width: hidden width of their MLPs.
        decoder_width: hidden width of the mask decoder's MLPs.
        quality_width: hidden width of the decoder's IoU prediction head.
        from_sam: whether prompt encoder and mask decoder are SAM's, pre-trained; parts that SAM lacks start at zero.
        residual_memory: whether memory attention is added to the embedding and starts at zero (no published weights).
    """

    hiera: HieraSizes | None = None
    scaling: Literal["none", "unit"] = "none"
    channels: int = 256
    memory_channels: int = 64
    memory_layers: int = 4
    memory_width: int = 2048
    decoder_width: int = 2048
    quality_width: int = 256
    from_sam: bool = False
    residual_memory: bool = False


HIERA = {
    "sam2_tiny": HieraSizes(channels=96, heads=1, stages=(1, 2, 7, 2), global_blocks=(5, 7, 9)),
    "sam2_small": HieraSizes(channels=96, heads=1, stages=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "sam2_base_plus": HieraSizes(
        channels=112, heads=2, stages=(2, 3, 16, 3), global_blocks=(12, 16, 20), background=14
    ),
    "sam2_large": HieraSizes(
        channels=144, heads=2, stages=(2, 6, 36, 4), global_blocks=(23, 33, 43), windows=FITTED_WINDOWS
    ),
}
"""SAM 2's own: sam2/configs/sam2.1/*.yaml of the sam2 package."""
NANO = Sizes(
    hiera=HieraSizes(channels=24, heads=1, stages=(1, 1, 3, 1), global_blocks=(3, 4), windows=(8, 4, 4, 4)),
    channels=64,
    memory_channels=16,
    memory_layers=2,
    memory_width=128,
    decoder_width=128,
    quality_width=64,
    residual_memory=True,
)


def sizes_of(
    backbone: Backbone,
    *,
    fitted_windows: bool = False,
    memory_layers: int | None = None,
    memory_width: int | None = None,
) -> Sizes:
    """Sizes of a backbone, with another memory attention where one is given.

    `fitted_windows` only affects tiny, small and base_plus.
    """
    sizes = _sizes_of(backbone, fitted_windows=fitted_windows)
    return replace(
        sizes, memory_layers=memory_layers or sizes.memory_layers, memory_width=memory_width or sizes.memory_width
    )


def _sizes_of(backbone: Backbone, *, fitted_windows: bool = False) -> Sizes:
    match backbone:
        case "sam2_tiny" | "sam2_small" | "sam2_base_plus" | "sam2_large":
            hiera = HIERA[backbone]
            return Sizes(hiera=replace(hiera, windows=FITTED_WINDOWS) if fitted_windows else hiera)
        case "nano":
            return NANO
        case "mobile_sam":
            return Sizes(from_sam=True, residual_memory=True)
        case "lite_medsam":
            return Sizes(scaling="unit", from_sam=True, residual_memory=True)
        case _:
            assert_never(backbone)


def seen_side(side: int, frame_size: int) -> int:
    """Side length at which LiteMedSAM encodes frames of `side`, if the decoder's frames have `frame_size`.

    This is a quarter of `frame_size` unless the frames have more detail, then up to LiteMedSAM's training size.
    """
    return max(min(side, frame_size, LITE_SIZE), frame_size // 4)
