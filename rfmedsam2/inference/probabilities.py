"""Class probabilities, collected in memory or in a chunked blosc2 file while a volume is exported."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import blosc2
import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from rfmedsam2.errors import StoreError
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.orientation import Orientation
from rfmedsam2.system.atomic import atomic, writing_to
from rfmedsam2.transforms.prepare import Restore

CHUNK_PLANES = 8
CHUNK_EDGE = 256


def chunked(path: Path, shape: Sequence[int], chunks: Sequence[int]) -> Any:
    """A new blosc2 file of float16, lightly compressed: (K, Z, Y, X)."""
    return blosc2.empty(
        tuple(shape),
        dtype=np.dtype(np.float16),
        urlpath=str(path),
        mode="w",
        chunks=tuple(chunks),
        cparams={"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE]},
    )


def cannot_be_written(path: Path | None, error: RuntimeError) -> StoreError:
    """What to do where a chunk cannot be written; blosc2 raises a RuntimeError for any error of the system."""
    return StoreError(
        f"The probabilities cannot be written ({error})",
        where=path,
        remedy="Free space on that disk, or predict without probabilities",
    )


class ProbabilityMap:
    """An array (K, Z, Y, X) float16 in the source grid, filled plane by plane along the first planned axis.

    Outside the crop, background is 1 (with regions, all are 0).

    Args:
        restore: how the volume was preprocessed.
        labels: classes or regions.
        path: a blosc2 file, which appears when the context ends without an error, with at most `CHUNK_PLANES` planes in
            memory; None: `array` holds all planes after the context.
        orientation: how the volume was reoriented before preprocessing; the array has the original axes.
    """

    array: Any

    def __init__(
        self,
        restore: Restore,
        labels: LabelSet,
        *,
        path: Path | None = None,
        orientation: Orientation | None = None,
    ) -> None:
        self.path = path
        self.orientation = orientation or Orientation(source_axes=(0, 1, 2), flipped=(False, False, False))
        self.box = restore.box
        self.forward = restore.transpose_forward
        self.shape = restore.source_grid.shape_zyx
        self.outputs = labels.num_outputs
        self.regions = labels.has_regions
        self.axis = self.forward[0]
        self.next = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        chunk = [min(n, CHUNK_EDGE) for n in self.shape]
        chunk[self.axis] = min(self.shape[self.axis], CHUNK_PLANES)
        back = np.argsort(self.orientation.source_axes)
        shape = (self.outputs, *(self.shape[axis] for axis in back))
        if self.path is None:
            self.array = np.empty(shape, np.float16)
        else:
            self._stack.enter_context(writing_to(self.path))
            temporary = self._stack.enter_context(atomic(self.path))
            self.array = chunked(temporary, shape, (1, *(chunk[axis] for axis in back)))
        self._begin()
        self._skip_to(self.box[self.axis][0])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._skip_to(self.shape[self.axis])
        except StoreError as failure:
            self._end(type(failure), failure, failure.__traceback__)
            raise
        self._end(kind, error, trace)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path is not None:
            del self.array
        self._stack.__exit__(kind, error, trace)

    def add(self, count: int, logits: Tensor) -> None:
        """Append `count` equal planes of the crop: logits (K, B, C) in planned axes."""
        values = torch.sigmoid(logits) if self.regions else torch.softmax(logits, dim=0)
        plane = values.to(torch.float16).cpu().numpy()
        b, c = self.forward[1:]
        if b > c:
            plane = plane.transpose(0, 2, 1)
        rows, columns = (slice(*self.box[axis]) for axis in range(3) if axis != self.axis)
        for _ in range(count):
            self.buffer[self.next - self.start][:, rows, columns] = plane
            self._advance()

    def _skip_to(self, plane: int) -> None:
        while self.next < plane:
            self._advance()

    def _advance(self) -> None:
        self.next += 1
        if self.next - self.start == CHUNK_PLANES or self.next == self.shape[self.axis]:
            planes = np.moveaxis(self.buffer[: self.next - self.start], 0, 1 + self.axis)
            start, stop = self.start, self.next
            if self.orientation.flipped[self.axis]:
                start, stop = self.shape[self.axis] - stop, self.shape[self.axis] - start
            place = [slice(None)] * 4
            place[1 + self.orientation.source_axes[self.axis]] = slice(start, stop)
            block = np.ascontiguousarray(self.orientation.undo(planes))
            try:
                self.array[tuple(place)] = block
            except RuntimeError as error:
                raise cannot_be_written(self.path, error) from error
            self._begin()

    def _begin(self) -> None:
        """Start a fresh buffer (planes, K, rows, columns), the last two in the order of the source axes."""
        rows, columns = (n for axis, n in enumerate(self.shape) if axis != self.axis)
        self.start = self.next
        self.buffer = np.zeros((CHUNK_PLANES, self.outputs, rows, columns), np.float16)
        if not self.regions:
            self.buffer[:, 0] = 1
