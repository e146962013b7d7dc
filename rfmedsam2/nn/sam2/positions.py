"""SAM 2's sine position encodings, cached per device and size, without copies per frame."""

from __future__ import annotations

from typing import Any

import torch
from sam2.modeling.position_encoding import PositionEmbeddingSine
from torch import Tensor


class SinePositions(PositionEmbeddingSine):
    """The official encoding, with the same values.

    The official class repeats the cached encoding for every frame of a batch (as much memory as the features) and may
    cache one made in inference mode, which cannot be used in training.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(num_pos_feats=channels, warmup_cache=False)

    @torch.no_grad()
    def at(self, side: int, device: torch.device) -> Tensor:
        """Encoding (channels, side, side) of a square map."""
        return self._pe(1, device, side, side)[0]

    @torch.no_grad()
    def _pe(self, B: int, device: Any, *cache_key: int) -> Tensor:  # noqa: N803 - the official name
        """Encoding (B, channels, *cache_key), a view of one map for all B."""
        place = (str(device), *cache_key)
        if place not in self.cache:
            official: dict[Any, Tensor] = {}
            self.cache, kept = official, self.cache
            try:
                with torch.inference_mode(False):
                    kept[place] = super()._pe(1, device, *cache_key)[0]
            finally:
                self.cache = kept
        return self.cache[place].expand(B, -1, -1, -1)
