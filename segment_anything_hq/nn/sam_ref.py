"""SAM-REF and SAM2-REF: SAM's mask, refined with image and prompts (SAM-REF paper, sections 3.2 - 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from rfmedsam2.errors import UsageError
from rfmedsam2.nn.sam import SamSegmenter
from rfmedsam2.nn.segmenter import Embedded, PromptBatch, Segmented
from segment_anything_hq.nn.global_diff import RADIUS, GlobalDiff, ImageMaps, dense_prompt_map
from segment_anything_hq.nn.patch_diff import PatchDiff, change_windows, pasted
from segment_anything_hq.nn.sam2_base import Sam2Segmenter

THETA = 1.1
"""Growth of the error map above which a click changes only its surroundings (supplement, Table 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Embedded):
    """Embedded images with GlobalDiff's features of them; see `SamRef.prepare`."""

    maps: ImageMaps


class SamRef(nn.Module):
    """A frozen SAM or SAM 2 with the GlobalDiff and PatchDiff refiners, which alone are trained.

    The result is GlobalDiff's mask unless a click makes the error map grow by a factor of more than theta. Then it is
    the previous mask, in which PatchDiff refines the window of the click (Dynamic Patch Selector).

    Args:
        base: SAM or SAM 2.
        blocks: N, number of GlobalDiff's residual blocks.
        theta: threshold of the selector; 0: always PatchDiff, None: never.
        radius: radius of the clicks' disks, in pixels of the dense prompt map.
    """

    def __init__(
        self,
        base: SamSegmenter | Sam2Segmenter,
        *,
        blocks: int = 3,
        theta: float | None = THETA,
        radius: float = RADIUS,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.frame_size = base.frame_size
        self.channels = base.channels
        self.theta = theta
        self.radius = radius
        self.global_diff = GlobalDiff(base.channels, finer=isinstance(base, Sam2Segmenter), blocks=blocks)
        self.patch_diff = PatchDiff()

    def train(self, mode: bool = True) -> SamRef:
        """Set the mode of the refiners; SAM stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """The base's frames (B, 3, S, S) of images (B, 3, h, w) with values 0 to 255."""
        return self.base.normalize(images)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Embedded:
        """The base's embedding of frames (B, 3, S, S), together with the frames."""
        return self.base.encode(frames)

    @torch.no_grad()
    def prepare(self, embedded: Embedded) -> Prepared:
        """Compute the refiners' image features once, for many clicks on the same images with the current weights."""
        given = {field.name: getattr(embedded, field.name) for field in fields(Embedded)}
        return Prepared(**given, maps=self._image_maps(embedded))

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:
        """Segment the prompted objects.

        Args:
            embedded: embedding with its frames; use `prepare` if many clicks on the same images follow.
            prompted: clicks; boxes and masks are passed to the base (the refiners also see a box, as an outline).
            previous: result of this method for the same objects at the previous click; None: the first click.

        Returns:
            `logits`: the refined masks. `extra`, for the losses: `coarse`, `global_error`, `global_mask` (P, 4s, 4s),
            `error_area` (P,) pixels. Where PatchDiff ran, in training everywhere: `rows` (p,) of the prompts,
            `windows` (p, 4) as in `patch_diff`, whose `cropped` cuts a ground truth to match `patch_coarse`,
            `patch_error`, `patch_mask` (p, 4s, 4s).

        Raises:
            UsageError: the embedding does not include its frames.
        """
        with torch.no_grad():
            base = self.base.segment(embedded, prompted)
        ready = isinstance(embedded, Prepared) and not torch.is_grad_enabled()
        maps = embedded.maps if ready else self._image_maps(embedded)  # type: ignore[union-attr]
        prompt_map = dense_prompt_map(prompted, base.logits, radius=self.radius)
        overall, features = self.global_diff(maps, prompt_map, prompted.images)
        area = (overall.error > 0).flatten(1).sum(1)
        extra = {
            "coarse": base.logits,
            "global_error": overall.error,
            "global_mask": overall.mask,
            "error_area": area,
        }
        local = self._grown(area, previous)
        rows = (torch.ones_like(local) if self.training else local).nonzero()[:, 0]
        if not len(rows):
            return Segmented(logits=overall.mask, scores=base.scores, extra=extra)
        seen = overall.mask[rows]
        before = torch.full_like(seen, -1.0) if previous is None else previous.logits[rows]
        windows = change_windows(seen, before, prompted.at(rows))
        patch, coarse = self.patch_diff(features[rows], prompt_map[rows], seen, windows)
        extra |= {"rows": rows, "windows": windows}
        extra |= {"patch_coarse": coarse, "patch_error": patch.error, "patch_mask": patch.mask}
        with torch.no_grad():
            around_click = pasted(patch.mask, before, windows)
        chosen = torch.where(local[rows, None, None], around_click, seen)
        return Segmented(logits=overall.mask.index_copy(0, rows, chosen), scores=base.scores, extra=extra)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the two refiners, with their names."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _image_maps(self, embedded: Embedded) -> ImageMaps:
        if embedded.frames is None:
            raise UsageError("SAM-REF needs the image", expected="embeddings with their frames", found="no frames")
        return self.global_diff.images(embedded)

    def _grown(self, area: Tensor, previous: Segmented | None) -> Tensor:
        """(P,) bool: the error map's area (pixels) is more than theta times that of the previous click."""
        if previous is None or self.theta is None:
            return torch.zeros_like(area, dtype=torch.bool)
        if not self.theta:
            return torch.ones_like(area, dtype=torch.bool)
        return area > self.theta * previous.extra["error_area"]
