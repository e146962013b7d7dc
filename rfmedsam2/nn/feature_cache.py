"""Features of a frozen image encoder, kept for frames that come again.

A frame is recognized by its content, not by the place it was cut from: whatever reaches the encoder with the same
values in every pixel has the same features. So nothing between the stored case and the network has to be known here,
and validation patches, padding and frames of overlapping patches are found too.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Levels = tuple[Tensor, ...]
"""Feature maps (N, C, h, w) of N frames, one tensor a level."""


class FeatureCache:
    """Feature maps of the frames seen last, in main memory, at 16 bit a value.

    Whether a frame was found or is new does not change what comes back: new features are rounded as kept ones are.

    Args:
        limit_mb: most that is kept, 1e6 bytes; the frame whose use lies longest back goes first.

    Attributes:
        asked: frames asked for since the last `tally`.
        found: of them, those that were there.
        kept_bytes: size of what is kept.
    """

    def __init__(self, limit_mb: float) -> None:
        self._limit = int(limit_mb * 1e6)
        self._frames: OrderedDict[bytes, Tensor] = OrderedDict()
        self._shapes: list[torch.Size] = []
        self.asked = self.found = self.kept_bytes = 0

    def levels(self, frames: Tensor, encode: Callable[[Tensor], Levels]) -> Levels:
        """Features of frames.

        Args:
            frames: (N, M, H, W).
            encode: called with those that are not kept.

        Returns:
            Levels on the frames' device, without gradients; float32 unless `encode` gave bfloat16.
        """
        keys = [_key(frame) for frame in frames.detach().cpu()]
        new = {key: i for i, key in enumerate(keys) if key not in self._frames}
        rows = {key: self._frames[key] for key in keys if key in self._frames}
        self.asked += len(keys)
        self.found += sum(key in rows for key in keys)
        if new:
            rows |= zip(new, self._packed(encode(frames[list(new.values())])), strict=True)
        for key in keys:
            self._keep(key, rows[key])
        packed = torch.stack([rows[key] for key in keys]).to(frames.device)
        packed = packed.float() if packed.dtype == torch.float16 else packed
        parts = packed.split([shape.numel() for shape in self._shapes], 1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True))

    def tally(self) -> str:
        """Say how many frames were found, and begin counting anew."""
        said = f"Features of {self.found} of {self.asked} frames were kept from before ({self.kept_bytes / 1e6:.0f} MB)"
        self.asked = self.found = 0
        return said

    def _packed(self, levels: Levels) -> list[Tensor]:
        """One vector of all levels for each frame, which shares memory with none of the others."""
        self._shapes = [level.shape[1:] for level in levels]
        flat = torch.cat([level.detach().flatten(1) for level in levels], 1)
        limit = torch.finfo(torch.float16).max
        half = flat if flat.dtype == torch.bfloat16 else flat.clamp(-limit, limit).half()
        return [row.clone() for row in half.cpu()]

    def _keep(self, key: bytes, row: Tensor) -> None:
        """Make it the one that was used last; others go where it would be too much."""
        if key in self._frames:
            self._frames.move_to_end(key)
            return
        if row.nbytes > self._limit:
            return
        self._frames[key] = row
        self.kept_bytes += row.nbytes
        while self.kept_bytes > self._limit:
            _, oldest = self._frames.popitem(last=False)
            self.kept_bytes -= oldest.nbytes


def _key(frame: Tensor) -> bytes:
    """Digest of the values of a frame on the CPU, 16 bytes."""
    return hashlib.blake2b(frame.contiguous().view(torch.uint8).numpy().data, digest_size=16).digest()
