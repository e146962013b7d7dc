"""Volumes in memory: an array with its grid, and lossless conversion from and to NumPy, nibabel and SimpleITK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from typing_extensions import Self

from rfmedsam2.arrays import as_array
from rfmedsam2.errors import GeometryError, ImageError, UsageError, require_type, type_name
from rfmedsam2.geometry import IDENTITY, Grid, scaled, spacing_of, triple_of
from rfmedsam2.simpleitk import sitk

Array = np.ndarray | Sequence[Any] | Any
"""A NumPy array, a tensor of torch, or nested lists of numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """An array with axes (channel, z, y, x) and the grid of its last three axes.

    Conversions preserve every voxel, spacing, origin and direction, also oblique and skewed ones. Integer dtypes stay;
    only dtypes that a format cannot store are widened (bool to uint8, float16 to float32).
    """

    array: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray):
            remedy = "Make it with Volume.from_numpy"
            raise UsageError("A volume's array is not a NumPy array", found=type_name(self.array), remedy=remedy)
        require_type(self.grid, Grid, "grid", remedy="Make the volume with Volume.from_numpy")
        if self.array.ndim != 4 or self.array.shape[1:] != self.grid.shape_zyx:
            raise GeometryError(
                "A volume's array does not match its grid",
                expected=f"(channels, {', '.join(map(str, self.grid.shape_zyx))})",
                found=self.array.shape,
            )
        unmasked(self.array, "The array of a volume")

    @classmethod
    def from_numpy(
        cls,
        array: Array,
        *,
        spacing_zyx_mm: Sequence[float] | np.ndarray,
        origin_xyz_mm: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
        direction: Sequence[Sequence[float]] | np.ndarray = IDENTITY,
    ) -> Self:
        """Make a volume from an array, which is not copied.

        Args:
            array: (Z, Y, X) or (C, Z, Y, X), numbers or bool; also a tensor or nested lists, which are converted.
            spacing_zyx_mm: distance of voxel centers along z, y, x, mm.
            origin_xyz_mm: LPS world position of the center of voxel (0, 0, 0).
            direction: 3x3; column j is the LPS unit vector of index axis j in the order x, y, z.

        Raises:
            UsageError: not an array.
            ImageError: the number of axes is wrong, there are no voxels, or they are not numbers.
            GeometryError: spacing, origin or direction is invalid.
        """
        channels = _channels(array)
        spacing, origin = spacing_of(spacing_zyx_mm), triple_of(origin_xyz_mm, "origin_xyz_mm")
        x, y, z = (triple_of(row, "a row of direction") for row in _three_rows(direction))
        _, depth, height, width = channels.shape
        grid = Grid(shape_zyx=(depth, height, width), spacing_zyx_mm=spacing, origin_xyz_mm=origin, direction=(x, y, z))
        return cls(array=channels, grid=grid)

    def to_numpy(self) -> np.ndarray:
        """The array, not copied: (Z, Y, X) if there is one channel, else (C, Z, Y, X)."""
        return self.array[0] if len(self.array) == 1 else self.array

    @classmethod
    def from_nibabel(cls, image: SpatialImage) -> Self:
        """Make a volume from a nibabel image (x, y, z), (x, y, z, C) or (x, y, z, 1, C), scaled by its header.

        The affine is nibabel's; lengths in the meters or micrometers of a NIfTI header become mm.

        Raises:
            UsageError: not a nibabel image.
            ImageError: the number of axes is wrong, or voxels are colors or complex numbers.
            GeometryError: the affine is invalid.
        """
        if not isinstance(image, SpatialImage):
            raise UsageError("This is not a nibabel image", expected="a SpatialImage", found=type_name(image))
        voxels = np.asarray(image.dataobj)
        if voxels.ndim == 5 and voxels.shape[3] == 1:
            voxels = voxels[:, :, :, 0]
        channels = _channels(voxels.T)
        _, z, y, x = channels.shape
        grid = Grid.from_affine_ras(np.asarray(image.affine), (z, y, x))
        header = image.header
        unit = unit_mm(int(header["xyzt_units"])) if isinstance(header, nib.Nifti1Header) else 1.0
        return cls(array=channels, grid=scaled(grid, unit))

    def to_nibabel(self) -> nib.Nifti1Image:
        """Convert to a NIfTI image (x, y, z), or (x, y, z, C) for several channels, with this volume's affine."""
        voxels = _storable(self.to_numpy()).T
        image = nib.Nifti1Image(voxels, _as_stored(self.grid.affine_ras), dtype=voxels.dtype)
        image.header.set_xyzt_units("mm")
        return image

    @classmethod
    def from_sitk(cls, image: sitk.Image) -> Self:
        """Make a volume from a three-dimensional SimpleITK image; components of vector pixels become channels.

        Raises:
            UsageError: not a SimpleITK image.
            ImageError: not three dimensions, or complex voxels.
        """
        if not isinstance(image, sitk.Image):
            raise UsageError("This is not a SimpleITK image", expected="a SimpleITK.Image", found=type_name(image))
        if image.GetPixelIDTypeAsString().startswith("label of"):  # whose arrays end the process
            remedy = "Convert it with SimpleITK.LabelMapToLabel"
            raise ImageError("This image holds label objects and no voxels", remedy=remedy)
        if image.GetDimension() != 3:
            raise ImageError("The image is not a volume", expected="3 dimensions", found=image.GetDimension())
        voxels = sitk.GetArrayFromImage(image)
        return cls.from_numpy(
            np.moveaxis(voxels, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else voxels,
            spacing_zyx_mm=image.GetSpacing()[::-1],
            origin_xyz_mm=image.GetOrigin(),
            direction=np.reshape(image.GetDirection(), (3, 3)),
        )

    def to_sitk(self) -> sitk.Image:
        """Convert to a SimpleITK image; several channels become components of vector pixels."""
        several = len(self.array) > 1
        voxels = _storable(self.to_numpy())
        image = sitk.GetImageFromArray(np.moveaxis(voxels, 0, -1) if several else voxels, isVector=several)
        image.SetSpacing(self.grid.spacing_zyx_mm[::-1])
        image.SetOrigin(self.grid.origin_xyz_mm)
        image.SetDirection([cosine for row in self.grid.direction for cosine in row])
        return image


def unit_mm(xyzt_units: int) -> float:
    """The unit of length of a NIfTI header, mm: meters, mm, micrometers; unknown counts as mm, as for ITK."""
    return {1: 1000.0, 2: 1.0, 3: 0.001}.get(xyzt_units & 7, 1.0)


def unmasked(array: np.ndarray, what: str) -> np.ndarray:
    """A plain array of a masked one, which must not hide any element.

    Raises:
        ImageError: elements are masked: it is unknown what to use in their place.
    """
    if not isinstance(array, np.ma.MaskedArray):
        return array
    hidden = int(np.ma.count_masked(array))
    if hidden:
        raise ImageError(
            f"{what} is a masked array",
            expected="a value for every element",
            found=f"{hidden} masked elements",
            remedy="Give array.filled(VALUE) with the value that masked elements stand for",
        )
    return np.asarray(array.data)


def _channels(given: Array) -> np.ndarray:
    """An array as (C, Z, Y, X), in native byte order."""
    array = unmasked(as_array(given, "The image"), "The image")
    flat = "Give a single slice as array[None], with the spacing (thickness, y, x)"
    if array.ndim not in (3, 4) or array.dtype.kind not in "iufb" or array.size == 0:
        raise ImageError(
            "This array is not a volume",
            expected="numbers with axes (Z, Y, X) or (C, Z, Y, X), none of them empty",
            found=f"{array.dtype} {array.shape}",
            remedy=flat if array.ndim == 2 else None,
        )
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return native[None] if native.ndim == 3 else native


def _three_rows(direction: Any) -> list[Any]:
    rows = list(direction) if len(np.shape(direction)) == 2 else []
    if len(rows) != 3:
        raise GeometryError("A direction is not a 3x3 matrix", expected="three rows", found=repr(direction))
    return rows


def _storable(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that both NIfTI and ITK support."""
    widened = {"bool": np.uint8, "float16": np.float32}.get(array.dtype.name)
    return array if widened is None else array.astype(widened)


def _as_stored(affine: np.ndarray) -> np.ndarray:
    """Round an affine to NIfTI's single precision, undoing the rounding of separating spacing and direction."""
    stored = affine.astype(np.float32).astype(np.float64)
    near = np.abs(stored - affine) <= 8 * np.finfo(np.float64).eps * np.abs(affine).max(axis=0)
    return np.where(near, stored, affine)
