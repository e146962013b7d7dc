"""NRRD, MHA, MHD, PNG and TIFF through SimpleITK; what it reads wrongly through `itk_stored` and `raster`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rfmedsam2.errors import GeometryError, ImageError, StoreError
from rfmedsam2.geometry import FLAT_SPACING_MM, Grid, Triple, flattened
from rfmedsam2.simpleitk import sitk
from rfmedsam2.store.formats.decompression import damaged
from rfmedsam2.store.formats.detached import stack_spacing
from rfmedsam2.store.formats.image_header import (
    ImageHeader,
    checked_spacing,
    repaired,
    require_memory,
)
from rfmedsam2.store.formats.itk_stored import (
    METAIMAGE_ENDINGS,
    ignored_scaling,
    ignored_unit,
    metaimage_spacing,
    states_spacing,
    stored_voxels,
)
from rfmedsam2.store.formats.raster import ONE_PLANE_ENDINGS, RASTER_ENDINGS


def read_itk_header(path: Path) -> ImageHeader:
    """Read the header of an NRRD, MHA, MHD, PNG or TIFF file."""
    return _header(path, _information(path))


def read_itk(path: Path) -> tuple[np.ndarray, ImageHeader]:
    """Read voxels (C,Z,Y,X) and header. float64 becomes float32, integer types stay.

    Raises:
        TruncatedImageError: voxels are missing or the compressed stream is damaged.
        ImageError: ITK cannot read the file as an image.
        GeometryError: invalid spacing or direction.
    """
    reader = _information(path)
    header = _header(path, reader)
    require_memory(path, header)
    array = stored_voxels(path, header, components=reader.GetNumberOfComponents())
    if array is None:
        array = _itk_voxels(path, reader, header)
    return array, header


def write_itk_label(
    path: Path, labels_zyx: np.ndarray, header: ImageHeader, fields: Mapping[str, str] | None = None
) -> None:
    """Write labels (Z,Y,X), uint8 or uint16, in the format given by the ending of `path` (not atomic).

    Args:
        path: the file.
        labels_zyx: the labels.
        header: of the image whose geometry they get.
        fields: text for the header of an NRRD, MHA or MHD file, by key.

    Raises:
        StoreError: ITK could not write (it does not say whether space or permission was missing).
    """
    grid = header.itk_grid
    flat = header.flat or path.suffix.lower() in ONE_PLANE_ENDINGS
    image = sitk.GetImageFromArray(labels_zyx[0] if flat else labels_zyx)
    if header.format != "raster":
        axes = 2 if flat else 3
        image.SetSpacing(grid.spacing_zyx_mm[::-1][:axes])
        image.SetOrigin(grid.origin_xyz_mm[:axes])
        direction = np.asarray(grid.direction)[:axes, :axes]
        if abs(np.linalg.det(direction)) > 1e-3:  # a plane that stands upright has no direction in two axes
            image.SetDirection((direction / np.linalg.norm(direction, axis=0)).ravel().tolist())
    for key, value in (fields or {}).items():
        image.SetMetaData(key, value)
    named = path.with_suffix(path.suffix.lower())  # ITK knows some endings in lower case only
    try:
        sitk.WriteImage(image, str(named), useCompression=True)
        named.replace(path)
    except RuntimeError as error:
        raise StoreError(
            "The label map cannot be written",
            where=path.parent,
            found=_reason(error),
            remedy="Check free space and write permission there",
        ) from error


def mhd_data_file(path: Path) -> Path:
    """The file beside an MHD label map that `write_mhd_label` writes its voxels to."""
    return path.parent / f"{path.stem}.zraw"


def write_mhd_label(path: Path, labels_zyx: np.ndarray, header: ImageHeader) -> None:
    """Write an MHD header and its data file; the header, which makes the pair valid, is written last."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        write_itk_label(Path(folder) / f"{path.stem}.mhd", labels_zyx, header)
        for file in sorted(Path(folder).iterdir(), key=lambda f: f.suffix == ".mhd"):
            file.replace(path if file.suffix == ".mhd" else path.parent / file.name)


def _information(path: Path) -> sitk.ImageFileReader:
    if path.suffix.lower() in METAIMAGE_ENDINGS:
        checked_spacing(metaimage_spacing(path), where=path)  # ITK silently replaces invalid ones
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if path.suffix.lower() in METAIMAGE_ENDINGS:
        reader.SetImageIO("MetaImageIO")  # ITK finds it by endings in lower case only
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    return reader


def _header(path: Path, reader: sitk.ImageFileReader) -> ImageHeader:
    size, axes = reader.GetSize(), reader.GetDimension()
    components = reader.GetNumberOfComponents()
    if axes not in (2, 3, 4) or (axes == 4 and components > 1):
        raise ImageError(
            "The shape of the image is not supported",
            where=path,
            expected="2 to 3 axes, and at most one more for channels",
            found=f"{tuple(size)} with {components} component(s)",
            remedy="Split the file into one volume each",
        )
    raster = path.suffix.lower() in RASTER_ENDINGS
    stated = stack_spacing(path, planes=size[2] if axes == 3 else 1) if raster else None
    source = _grid(path, reader, raster=raster, stated=stated)
    # two axes of a tilted plane need not be perpendicular as ITK writes them, without what is along z
    straight, skew = repaired(source, where=path) if axes > 2 or raster else (flattened(source), 0.0)
    return ImageHeader(
        grid=straight,
        source_grid=source,
        channels=size[3] if axes == 4 else components,
        dtype=_dtype(path, reader.GetPixelID()).name,
        format="raster" if raster else "itk",
        skew_degrees=skew,
        flat=axes == 2 and stated is None,
        spacing_known=(axes == 2 or stated is not None) if raster else states_spacing(path, min(axes, 3)),
        ignored_unit=None if raster else ignored_unit(path),
        ignored_scaling=ignored_scaling(path),
    )


def _grid(path: Path, reader: sitk.ImageFileReader, *, raster: bool, stated: Triple | None) -> Grid:
    axes = reader.GetDimension()
    space = min(axes, 3)
    spacing, origin, direction = np.ones(3), np.zeros(3), np.eye(3)
    if raster:
        # a stack without a spacing gets 1 mm, as in nnU-Net
        spacing[:] = (stated or ((FLAT_SPACING_MM, 1.0, 1.0) if axes == 2 else (1.0, 1.0, 1.0)))[::-1]
    else:
        spacing[:space] = reader.GetSpacing()[:space]
        if axes == 2:
            spacing[2] = FLAT_SPACING_MM * spacing[:2].max()
        origin[:space] = reader.GetOrigin()[:space]
        direction[:space, :space] = np.reshape(reader.GetDirection(), (axes, axes))[:space, :space]
    size = (*reader.GetSize(), 1)[:3] if axes == 2 else reader.GetSize()[:3]
    x, y, z = checked_spacing(spacing.tolist(), where=path)
    rows = tuple(tuple(row) for row in direction.tolist())
    corner_x, corner_y, corner_z = origin.tolist()
    try:
        return Grid(
            shape_zyx=(size[2], size[1], size[0]),
            spacing_zyx_mm=(z, y, x),
            origin_xyz_mm=(corner_x, corner_y, corner_z),
            direction=rows,  # pyright: ignore[reportArgumentType] - three rows of three
        )
    except GeometryError as error:
        raise GeometryError(error.what, where=path, expected=error.expected, found=error.found) from None


def _dtype(path: Path, pixel: int) -> np.dtype:
    """NumPy dtype of the voxels that reading returns."""
    names = {
        "8-bit signed": "int8",
        "16-bit signed": "int16",
        "32-bit signed": "int32",
        "64-bit signed": "int64",
        "8-bit unsigned": "uint8",
        "16-bit unsigned": "uint16",
        "32-bit unsigned": "uint32",
        "64-bit unsigned": "uint64",
        "32-bit float": "float32",
        "64-bit float": "float32",
    }
    text = sitk.GetPixelIDValueAsString(pixel)
    for name, dtype in names.items():
        if name in text and "omplex" not in text:
            return np.dtype(dtype)
    raise ImageError("The image's data type is not supported", where=path, expected="integers or floats", found=text)


def _itk_voxels(path: Path, reader: sitk.ImageFileReader, header: ImageHeader) -> np.ndarray:
    vector = reader.GetNumberOfComponents() > 1
    if "64-bit float" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        reader.SetOutputPixelType(sitk.sitkVectorFloat32 if vector else sitk.sitkFloat32)
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    if vector:
        array = np.moveaxis(array, -1, 0)
    return np.ascontiguousarray(array).reshape(header.channels, *header.grid.shape_zyx)


def _unreadable(path: Path, error: RuntimeError) -> ImageError:
    reason = _reason(error)
    cut = ("got only", "but received", "gzFile", "data read error", "EOF")
    if any(word in str(error) for word in cut):
        return damaged(path, reason)
    if "Unknown PixelType" in reason:  # gray with transparency, in a PNG
        colors, remedy = "gray, RGB or RGBA values", "Save the image without transparency"
        return ImageError("The kind of pixels is not supported", where=path, expected=colors, remedy=remedy)
    return ImageError("The image cannot be read", where=path, found=reason, remedy="Check what wrote the file")


def _reason(error: RuntimeError) -> str:
    """The last informative line of an ITK message, which begins with source files and object addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = ("sitk::ERROR: Exception", "Exception thrown", "Reason: Success")
    informative = [line for line in lines if not line.startswith(noise)]
    return (informative or lines or ["no reason given"])[-1].split("): ")[-1][:200]
