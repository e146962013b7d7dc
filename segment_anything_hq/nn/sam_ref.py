"""SAM-REF and SAM2-REF: SAM's mask, mended by image and prompts together (SAM-REF paper, sections 3.2 - 3.4)."""

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
"""Growth of the error map from which on a click changes its surroundings alone (supplement, Table 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Embedded):
    """Embedded images and what GlobalDiff makes of them; see `SamRef.prepare`."""

    maps: ImageMaps


class SamRef(nn.Module):
    """A frozen SAM or SAM 2 with the GlobalDiff and PatchDiff refiners, of which alone parameters are trained.

    While the error map stays, GlobalDiff's mask is the result. Where a click makes it grow by more than theta, the
    result is the mask before, in which PatchDiff mends the window of the click (Dynamic Patch Selector).

    Args:
        base: SAM or SAM 2.
        blocks: N of GlobalDiff.
        theta: of the selector; 0: always PatchDiff, None: never.
        radius: of the disks of clicks, pixels of the dense prompt map.
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
        """The refiners alone change their mode: SAM stays as it is used."""
        super().train(mode)
        self.base.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """The base's: frames (B, 3, S, S) of images (B, 3, h, w) of 0 to 255."""
        return self.base.normalize(images)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Embedded:
        """The base's embedding of frames (B, 3, S, S), and the frames."""
        return self.base.encode(frames)

    @torch.no_grad()
    def prepare(self, embedded: Embedded) -> Prepared:
        """What the refiners need of the images alone, for many clicks on the same ones by the weights as they are."""
        given = {field.name: getattr(embedded, field.name) for field in fields(Embedded)}
        return Prepared(**given, maps=self._image_maps(embedded))

    def segment(self, embedded: Embedded, prompted: PromptBatch, *, previous: Segmented | None = None) -> Segmented:
        """Mask the prompted objects.

        Args:
            embedded: with its frames; of `prepare` where many clicks on the same images follow.
            prompted: their clicks; boxes and masks go to the base (a box is drawn for the refiners).
            previous: what this method gave for the same objects at the click before; None: the first click.

        Returns:
            `logits`: the refined masks. `extra`, for the losses: `coarse`, `global_error`, `global_mask` (P, 4s, 4s),
            `error_area` (P,) pixels. Where PatchDiff ran, in training everywhere: `rows` (p,) of the prompts,
            `windows` (p, 4) as in `patch_diff`, whose `cropped` gives a truth like `patch_coarse`, `patch_error`,
            `patch_mask` (p, 4s, 4s).

        Raises:
            UsageError: the embedding has come without its frames.
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
        """Those of the two refiners."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _image_maps(self, embedded: Embedded) -> ImageMaps:
        if embedded.frames is None:
            raise UsageError("SAM-REF looks at the image again", expected="embeddings with their frames", found="none")
        return self.global_diff.images(embedded)

    def _grown(self, area: Tensor, previous: Segmented | None) -> Tensor:
        """(P,) bool: the error map, of `area` pixels, is larger by more than theta than at the click before."""
        if previous is None or self.theta is None:
            return torch.zeros_like(area, dtype=torch.bool)
        if not self.theta:
            return torch.ones_like(area, dtype=torch.bool)
        return area > self.theta * previous.extra["error_area"]
