"""Cache of a frozen image encoder's features for repeated frames.

The key is a frame's content, not its position: frames with equal pixels have equal features. The cache therefore needs
no knowledge of cases and augmentation, and also finds validation patches, padding and frames of overlapping patches.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Levels = tuple[Tensor, ...]
"""Feature maps (N, C, h, w) of N frames, one tensor per level."""


class FeatureCache:
    """Least-recently-used cache of feature maps in main memory, at 16 bit per value.

    Results do not depend on whether a frame is cached: new features are rounded like cached ones.

    Args:
        limit_mb: size limit in 1e6 bytes; the least recently used frame is evicted first.

    Attributes:
        asked: number of frames requested since the last call of `hits`.
        found: number of these that were in the cache.
        kept_bytes: size of the cache in bytes.
    """

    def __init__(self, limit_mb: float) -> None:
        self._limit = int(limit_mb * 1e6)
        self._frames: OrderedDict[bytes, Tensor] = OrderedDict()
        self._shapes: list[torch.Size] = []
        self.asked = self.found = self.kept_bytes = 0

    def levels(self, frames: Tensor, encode: Callable[[Tensor], Levels]) -> Levels:
        """Features of frames, from the cache or the encoder.

        Args:
            frames: (N, M, H, W).
            encode: encodes the frames that are not in the cache.

        Returns:
            Levels on the frames' device, without gradients; float32 unless `encode` returns bfloat16.
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

    def hits(self) -> str:
        """Text with the cache hits since the last call; resets the counters."""
        text = f"Features of {self.found} of {self.asked} slices were in the cache ({self.kept_bytes / 1e6:.0f} MB)"
        self.asked = self.found = 0
        return text

    def _packed(self, levels: Levels) -> list[Tensor]:
        """One vector of all levels for each frame, each with its own memory."""
        self._shapes = [level.shape[1:] for level in levels]
        flat = torch.cat([level.detach().flatten(1) for level in levels], 1)
        limit = torch.finfo(torch.float16).max
        half = flat if flat.dtype == torch.bfloat16 else flat.clamp(-limit, limit).half()
        return [row.clone() for row in half.cpu()]

    def _keep(self, key: bytes, row: Tensor) -> None:
        """Add an entry as the most recently used one, evicting others if necessary."""
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
    """Digest of the values of a frame on the CPU (16 bytes)."""
    return hashlib.blake2b(frame.contiguous().view(torch.uint8).numpy().data, digest_size=16).digest()
