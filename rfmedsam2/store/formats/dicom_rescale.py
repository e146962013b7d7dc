"""From stored values to the unit of a slice (Hounsfield for CT): each slice and frame by its own transform.

The result type must hold every value that any slice of the series can have; it follows from the headers alone, so that
headers and voxels agree. Photometric interpretation MONOCHROME1 changes how values are shown, not the values
(PS3.3 C.7.6.3.1.2); RealWorldValueMapping is not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.pixels import apply_color_lut

from rfmedsam2.errors import ImageError
from rfmedsam2.store.formats.dicom_files import number
from rfmedsam2.store.formats.dicom_pixels import PixelFormat

_UNSIGNED = ("uint8", "uint16", "uint32")
_SIGNED = ("int8", "int16", "int32", "int64")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rescale:
    """The transform of one slice: value = slope * stored + intercept, or a table.

    Attributes:
        layout: format of the stored values.
        slope: RescaleSlope; 1 if it is missing or empty.
        intercept: RescaleIntercept; 0 if it is missing or empty.
        table: value (N,) or color (N,3) of the stored values from `first` on; stored values outside have the result of
            the nearest end (PS3.3 C.11.1.1.1).
        first: stored value of the table's first entry.
    """

    layout: PixelFormat
    slope: float = 1.0
    intercept: float = 0.0
    table: np.ndarray | None = None
    first: int = 0

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return 3 if self.table is not None and self.table.ndim == 2 else self.layout.samples

    @property
    def identity(self) -> bool:
        """Whether stored values stay as they are."""
        return self.table is None and (self.slope, self.intercept) == (1.0, 0.0)

    @property
    def fractional(self) -> bool:
        """Whether results may have a fractional part."""
        return self.layout.dtype.kind == "f" or not (self.slope.is_integer() and self.intercept.is_integer())

    @property
    def value_range(self) -> tuple[int, int]:
        """Smallest and largest possible result of a transform that is not fractional."""
        if self.table is not None:
            return int(self.table.min()), int(self.table.max())
        ends = [int(self.slope) * value + int(self.intercept) for value in self.layout.value_range]
        return min(ends), max(ends)

    def apply(self, stored: np.ndarray, out: np.ndarray) -> None:
        """Write the results of stored values (Y,X) or (Y,X,3) into `out` (C,Y,X).

        Raises:
            ImageError: the slope is 0 and there is something to scale.
        """
        if self.slope == 0 and stored.any():
            raise ImageError(
                "RescaleSlope of a DICOM slice is 0, so that all its voxels would be alike",
                where=self.layout.file.path,
                expected="another slope, or stored values that are all 0",
                found=f"stored values from {stored.min()} to {stored.max()}",
                remedy="Correct RescaleSlope, or export the series again",
            )
        values = stored
        if self.table is not None:
            values = self.table[np.clip(stored.astype(np.int64) - self.first, 0, len(self.table) - 1)]
        if values.ndim == 3:
            out[...] = np.moveaxis(values, -1, 0)
        elif self.identity or self.table is not None:
            out[0] = values
        elif out.dtype.kind == "f":
            out[0] = values.astype(np.float64) * self.slope + self.intercept
        else:
            # arithmetic modulo 2**n is exact where the result fits, and out.dtype was chosen so
            slope, intercept = (np.int64(value).astype(out.dtype) for value in (self.slope, self.intercept))
            np.multiply(values, slope, out=out[0], dtype=out.dtype, casting="unsafe")
            out[0] += intercept


def rescale_of(group: Any, layout: PixelFormat) -> Rescale:
    """The transform that a dataset, or a frame's functional group, states.

    Raises:
        ImageError: a slope or intercept is not a number, or a table is damaged.
    """
    data, path = layout.file.data, layout.file.path
    if layout.samples > 1:
        return Rescale(layout=layout)
    if layout.palette:
        return _palette(layout)
    if data.get("ModalityLUTSequence"):
        item = data.ModalityLUTSequence[0]
        table, first = _table(layout, item.LUTDescriptor, item.LUTData)
        return Rescale(layout=layout, table=table, first=first)
    slope = number(group, "RescaleSlope", number(data, "DoseGridScaling", 1.0, where=path), where=path)
    intercept = number(group, "RescaleIntercept", 0.0, where=path)
    if max(abs(slope * value + intercept) for value in layout.value_range) > float(np.finfo(np.float32).max):
        raise ImageError(
            "RescaleSlope and RescaleIntercept of the DICOM file give values beyond every range",
            where=path,
            found=f"{slope:g} and {intercept:g}",
            remedy="Correct these elements, or export the file again",
        )
    return Rescale(layout=layout, slope=slope, intercept=intercept)


def result_type(rescales: Sequence[Rescale]) -> np.dtype:
    """The type that holds all possible values of a series: an integer if all are whole, else float32.

    Slices that need no rescaling keep their stored type; else it is the smallest, as in GDCM.
    """
    if any(rescale.fractional for rescale in rescales):
        return np.dtype(np.float32)
    stored = {rescale.layout.dtype for rescale in rescales}
    if len(stored) == 1 and all(rescale.identity for rescale in rescales):
        return stored.pop()
    ranges = [rescale.value_range for rescale in rescales]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    fits = (n for n in (_SIGNED if low < 0 else _UNSIGNED) if np.iinfo(n).min <= low and high <= np.iinfo(n).max)
    return np.dtype(next(fits, "float32"))


def _palette(layout: PixelFormat) -> Rescale:
    data, columns, first = layout.file.data, [], 0
    if "RedPaletteColorLookupTableDescriptor" not in data:
        raise ImageError("The DICOM file is in PALETTE COLOR, but has no color table", where=layout.file.path)
    if "RedPaletteColorLookupTableData" not in data:
        count, first, bits = _descriptor(layout, data.RedPaletteColorLookupTableDescriptor)
        if count > 2**bits:  # pydicom counts entries in their own type
            raise ImageError("The color table of the DICOM file is not supported", where=layout.file.path)
        colors = apply_color_lut(np.arange(first, first + count), data)[:, :3]
        return Rescale(layout=layout, table=_as_displayed(layout, colors), first=first)
    for color in ("Red", "Green", "Blue"):
        descriptor = data[f"{color}PaletteColorLookupTableDescriptor"].value
        column, first = _table(layout, descriptor, data[f"{color}PaletteColorLookupTableData"].value)
        columns.append(column)
    return Rescale(layout=layout, table=_as_displayed(layout, np.stack(columns, axis=1)), first=first)


def _as_displayed(layout: PixelFormat, colors: np.ndarray) -> np.ndarray:
    """Colors of 8 bits for indices of 8 bits, as ITK gives them, also where the table has 16."""
    return colors >> 8 if layout.dtype.itemsize == 1 and colors.max() > 255 else colors


def _descriptor(layout: PixelFormat, descriptor: Any) -> tuple[int, int, int]:
    """Number of entries, stored value of the first, and bits of an entry."""
    count, first, bits = (int(value) for value in descriptor)
    return (count & 0xFFFF) or 2**16, first if layout.dtype.kind == "i" else first & 0xFFFF, bits


def _table(layout: PixelFormat, descriptor: Any, entries: Any) -> tuple[np.ndarray, int]:
    """Entries (N,) of a lookup table, and the stored value of the first."""
    count, first, _ = _descriptor(layout, descriptor)
    if isinstance(entries, bytes):
        # entries of 8 bits may lie in single bytes
        width = 1 if len(entries) < 2 * count else 2
        order = "<" if layout.file.data.original_encoding[1] else ">"
        entries = np.frombuffer(entries[: len(entries) // width * width], f"{order}u{width}")
    table = np.atleast_1d(np.asarray(entries, dtype=np.int64)) & 0xFFFF
    if len(table) < count:
        raise ImageError(
            "A lookup table of the DICOM file is too short",
            where=layout.file.path,
            expected=f"{count} entries",
            found=len(table),
        )
    return table[:count], first
