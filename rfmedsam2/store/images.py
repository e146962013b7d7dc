"""Reading images and writing label maps in every supported format, with the geometry preserved.

Formats: NIfTI (.nii, .nii.gz), NRRD, MHA, MHD, MGZ, PNG, BMP, TIFF and DICOM series folders. Arrays are (C,Z,Y,X);
integer types stay as they are, everything else is float32. Spacings and arrays equal those of nnU-Net's SimpleITKIO.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rfmedsam2.errors import GeometryError, ImageError, UsageError
from rfmedsam2.store.exchange.dicom_segmentation import (
    is_dicom_segmentation,
    read_segmentation,
    read_segmentation_header,
)
from rfmedsam2.store.formats.detached import data_files, spacing_file, write_stack_spacing
from rfmedsam2.store.formats.dicom import read_dicom, read_dicom_header
from rfmedsam2.store.formats.dicom_files import dicom_files, is_dicom_file, is_dicom_folder
from rfmedsam2.store.formats.image_header import (
    ImageHeader,
    grids_differ,
    parsing,
    require_ordinary_file,
    unchanged,
)
from rfmedsam2.store.formats.itk import mhd_data_file, read_itk, read_itk_header, write_itk_label, write_mhd_label
from rfmedsam2.store.formats.label_values import NRRD_ENDINGS, SLICER_ENDINGS, as_labels, merged_layers
from rfmedsam2.store.formats.mgz import read_mgz, read_mgz_header, write_mgz_label
from rfmedsam2.store.formats.nifti import read_nifti, read_nifti_header, write_nifti_label
from rfmedsam2.store.formats.raster import (
    ONE_PLANE_ENDINGS,
    RASTER_ENDINGS,
    is_for_pillow,
    read_pillow,
    read_pillow_header,
    stored_indices,
)
from rfmedsam2.system.atomic import atomic, writing_to
from rfmedsam2.system.ordinary_files import add_file
from rfmedsam2.volume import Volume

_NIFTI = (".nii.gz", ".nii")
_ITK = (*SLICER_ENDINGS, ".nrrd", ".nhdr", ".mha", ".mhd")
_MGZ = (".mgz", ".mgh")
_LABEL_WRITERS = {
    **dict.fromkeys(_NIFTI, write_nifti_label),
    **dict.fromkeys((".nrrd", ".seg.nrrd", ".mha", *RASTER_ENDINGS), write_itk_label),
    **dict.fromkeys(_MGZ, write_mgz_label),
}
"""By ending; an MHD is two files and has a writer of its own."""
IMAGE_ENDINGS = (*_NIFTI, *_ITK, *_MGZ, *RASTER_ENDINGS, ".dcm")
"""Endings of files that can be read; folders of DICOM files are read whatever the files are called."""


def image_ending(path: Path) -> str | None:
    """The image ending of a file name, with its letter case; None for other files."""
    lower = path.name.lower()
    return next((path.name[-len(e) :] for e in IMAGE_ENDINGS if lower.endswith(e)), None)


def read_header(path: Path) -> ImageHeader:
    """Read the header of an image file or DICOM folder; no voxels are read.

    Raises:
        ImageError: missing, unreadable or of an unknown format.
        GeometryError: impossible spacing or direction.
    """
    ending = _known_ending(path)
    with parsing(path):
        if ending == ".dcm":
            return read_segmentation_header(path) if is_dicom_segmentation(path) else read_dicom_header(path)
        if ending in _NIFTI:
            return read_nifti_header(path)
        if ending in RASTER_ENDINGS and is_for_pillow(path):
            return read_pillow_header(path)
        return read_mgz_header(path) if ending in _MGZ else read_itk_header(path)


def read_image(path: Path) -> tuple[Volume, ImageHeader]:
    """Read the volume (C,Z,Y,X) and header of one file of any format, or of a folder with one DICOM series.

    Raises:
        ImageError: missing, unreadable, of an unknown format.
        TruncatedImageError: an `ImageError`; the file ends early or its compressed data are damaged.
        ChangedWhileReadingError: an `ImageError`; another program wrote to the file.
        GeometryError: impossible spacing or direction, missing slices, tilted gantry.
    """
    ending = _known_ending(path)
    with parsing(path), unchanged(dicom_files(path) if path.is_dir() else image_files(path)):
        if ending == ".dcm":
            array, header = read_dicom(path)
        elif ending in _NIFTI:
            array, header = read_nifti(path)
        elif ending in _MGZ:
            array, header = read_mgz(path)
        elif ending in RASTER_ENDINGS and is_for_pillow(path):
            array, header = read_pillow(path)
        else:
            array, header = read_itk(path)
    return Volume(array=array, grid=header.grid), header


def image_files(path: Path) -> list[Path]:
    """All files that an image consists of, in a fixed order.

    A DICOM series has one per slice, a detached header (.mhd, .nhdr) names its data files, and a TIFF stack can have
    its spacing in a JSON file. Files that do not exist are listed too, but for the JSON.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    beside = spacing_file(path)
    if beside is not None:
        return [path, *([beside] if beside.is_file() else [])]
    return [path, *data_files(path)]


def digest_of(images: Sequence[Path], *, also: bytes = b"") -> bytes:
    """SHA-256 of `also` and the bytes of all files that images consist of, in order.

    Raises:
        ImageError: a file cannot be read.
    """
    digest = hashlib.sha256(also)
    for path in (file for image in images for file in image_files(image)):
        require_ordinary_file(path)
        try:
            add_file(digest, path)
        except OSError as error:
            raise ImageError(f"The file cannot be read ({error.strerror})", where=path) from None
    return digest.digest()


def read_channels(paths: Sequence[Path]) -> tuple[Volume, ImageHeader]:
    """Read all channels of a case, from one file per channel or one file with all; the header is the first file's.

    Origins and directions may differ by less than half a voxel at the corners; the first file's are used.

    Raises:
        ImageError: a file cannot be read.
        GeometryError: grids differ; says which files and how.
    """
    if not paths:
        raise ImageError("No image files were given", expected="one file for each channel, or one with all")
    first, header = read_image(paths[0])
    if len(paths) == 1:
        return first, header
    stack = with_channel(None, first.array, index=0, count=len(paths), where=paths[0])
    del first
    for index, path in enumerate(paths[1:], start=1):
        volume, other = read_image(path)
        differ = grids_differ(header, other)
        if differ is not None and not differ[1]:
            raise GeometryError(
                "The channels of a case are not on the same grid",
                where=path,
                expected=f"the grid of {paths[0].name}",
                found=differ[0],
                remedy="Resample the channels to one grid first",
            )
        stack = with_channel(stack, volume.array, index=index, count=len(paths), where=path)
    return Volume(array=stack, grid=header.grid), header


def with_channel(stack: np.ndarray | None, array: np.ndarray, *, index: int, count: int, where: object) -> np.ndarray:
    """Write `array` (1,Z,Y,X) into channel `index` of the stack (count,Z,Y,X), which the first call allocates.

    Only one channel is in memory twice at a time. Different dtypes are promoted to a common one, float32 at most.

    Raises:
        ImageError: the array has several channels.
    """
    if array.shape[0] != 1:
        raise ImageError(
            "A file has several channels, but its case has one file for each channel",
            where=where,
            expected=1,
            found=array.shape[0],
            remedy="Give either one file for each channel, or one file with all of them",
        )
    whole = np.empty((count, *array.shape[1:]), dtype=array.dtype) if stack is None else stack
    if whole.dtype != array.dtype:
        common = np.result_type(whole, array)
        whole = whole.astype(np.float32 if common.kind == "f" else common, copy=False)
    whole[index] = array[0]
    return whole


def read_label(path: Path) -> tuple[Volume, ImageHeader]:
    """Read a label map (1,Z,Y,X) into the smallest unsigned integer type that holds its values.

    Raises:
        ImageError: several channels, or values that are fractional, negative or above 65535.
    """
    if _known_ending(path) == ".dcm" and is_dicom_segmentation(path):
        with unchanged([path]):
            array, header = read_segmentation(path)
        return Volume(array=as_labels(array, where=path), grid=header.grid), header
    volume, header = read_image(path)
    array = volume.array
    with parsing(path):
        if header.format == "raster" and (indices := stored_indices(path)) is not None:
            array = indices
        elif array.shape[0] != 1 and path.name.lower().endswith(NRRD_ENDINGS):
            merged = merged_layers(array, path)
            array = array if merged is None else merged
    if array.shape[0] != 1:
        raise ImageError("A label file has several channels", where=path, expected=1, found=array.shape[0])
    scaling = None if header.nifti is None else header.nifti.scaling
    return Volume(array=as_labels(array, where=path, scaling=scaling), grid=volume.grid), header


def label_files(path: Path) -> list[Path]:
    """All files that `write_label` replaces: the label map itself first, then the data file of an MHD header.

    The spacing beside a TIFF stack is not among them: it is merged into a file that is there.
    """
    return [path, *([mhd_data_file(path)] if path.suffix.lower() == ".mhd" else [])]


def require_label_ending(path: Path) -> str:
    """The ending, in lower case, of a file that a label map is to be written to.

    Raises:
        UsageError: it is not that of a writable format.
    """
    ending = (image_ending(path) or "").lower()
    if ending not in (*_LABEL_WRITERS, ".mhd"):
        raise UsageError(
            "Label maps cannot be written in this format",
            where=path,
            expected="a file name ending in .nii.gz, .nii, .nrrd, .mha, .mhd or .mgz",
        )
    return ending


def require_output(path: Path, images: Sequence[str | Path]) -> None:
    """Check that a label map can be written to a file, and that it is none of the images that are read.

    Raises:
        UsageError: it cannot, or is one of them.
    """
    require_label_ending(path)
    places = {os.path.realpath(image) for image in images}
    if os.path.realpath(path) in places:
        raise UsageError("The label map would overwrite an image that is read", where=path, remedy="Name another file")


def write_label(path: Path, labels_zyx: np.ndarray, header: ImageHeader) -> None:
    """Write a label map (Z,Y,X) with exactly the geometry of `header`, atomically; the ending selects the format.

    uint8, or uint16 for values above 255; no scaling. A NIfTI source keeps its affine, qform and sform with codes,
    pixdim and units; a DICOM source gives the series' geometry.

    Raises:
        GeometryError: the shape differs from the header's.
        UsageError: the ending is not that of a writable format, or of one that holds all planes.
        StoreError: the folder cannot be written, the disk is full.
    """
    ending = require_label_ending(path)
    if labels_zyx.shape != header.grid.shape_zyx:
        raise GeometryError(
            "The shape of the labels differs from their image's",
            where=path,
            expected=f"{header.grid.shape_zyx} (z, y, x)",
            found=labels_zyx.shape,
        )
    if ending in ONE_PLANE_ENDINGS and len(labels_zyx) > 1:
        raise UsageError(
            "A volume of labels cannot be written in a format with one plane",
            where=path,
            found=f"{len(labels_zyx)} planes",
            remedy="Choose .nii.gz, .nrrd, .mha, .mgz or .tif",
        )
    labels = as_labels(labels_zyx, where=path)
    if ending == ".mhd":
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mhd_label(path, labels, header)
        return
    with atomic(path) as temporary:
        _LABEL_WRITERS[ending](temporary, labels, header)
        if spacing_file(path) is not None and not header.flat:
            write_stack_spacing(path, header.grid.spacing_zyx_mm)


def _known_ending(path: Path) -> str:
    """The ending that selects the format, in lower case; ".dcm" for all DICOM."""
    try:
        if not path.exists():
            link = f"a link to {path.readlink()}" if path.is_symlink() else None
            raise ImageError("The image file does not exist", where=path, found=link)
    except OSError as error:
        raise ImageError(f"The system refuses this path ({error.strerror})", where=path) from None
    if not path.is_dir():
        require_ordinary_file(path)
    ending = image_ending(path) if path.is_file() else None
    if path.is_dir() and not is_dicom_folder(path):
        files = sorted(file.name for file in path.iterdir() if (image_ending(file) or ".dcm").lower() != ".dcm")
        if files:  # else the reader of DICOM says what its files are, or looks into deeper folders
            raise ImageError(
                "The folder holds no DICOM series",
                where=path,
                expected="one image: a file, or a folder with the DICOM files of a series",
                found=f"images such as {files[0]}",
                remedy="Give the files of one case",
            )
    if path.is_dir() or ending == ".dcm" or (ending is None and is_dicom_file(path)):
        return ".dcm"
    if ending is None:
        raise ImageError(
            "The file has no known image ending", where=path, expected=f"one of {' '.join(IMAGE_ENDINGS)}, or DICOM"
        )
    return ending.lower()
