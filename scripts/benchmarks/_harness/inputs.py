"""Images of every format whose voxels and grid are known, and files that no reader should take for an image."""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from PIL import Image

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (5, 6, 7)
"""(z, y, x) of every volume."""
SPACING = (2.5, 0.9, 0.8)
ORIGIN = (-10.0, 20.0, 30.0)
TILTED = np.array([[0.936, -0.3, -0.184], [0.275, 0.951, -0.146], [0.218, 0.086, 0.972]])
DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64", "int8", "int64", "uint64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file or folder of one image, and what it holds.

    Attributes:
        name: family/variant.
        path: the file, or the folder of a DICOM series.
        array: voxels (C, Z, Y, X); None if the file must be refused.
        affine_lps: index (x, y, z) -> LPS mm; None if the format stores no world (pictures).
        spacing_zyx: mm.
    """

    name: str
    path: Path
    array: np.ndarray | None
    affine_lps: np.ndarray | None = None
    spacing_zyx: tuple[float, float, float] = (1.0, 1.0, 1.0)


def affine_of(direction: np.ndarray | None = None, spacing_zyx=SPACING, origin=ORIGIN) -> np.ndarray:
    """4x4, index (x, y, z) -> LPS mm."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if direction is None else direction) * np.array(spacing_zyx[::-1])
    affine[:3, 3] = origin
    return affine


def volume(dtype: str, number: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Random voxels of a dtype, whole numbers that every format can hold."""
    rng = np.random.default_rng(number)
    low, high = (-100, 100) if np.dtype(dtype).kind in "if" else (0, 200)
    return rng.integers(low, high, shape).astype(dtype)


def orthonormal(matrix: np.ndarray) -> np.ndarray:
    """The nearest rotation."""
    u, _, v = np.linalg.svd(matrix)
    return u @ v


def all_directions() -> Iterator[tuple[str, np.ndarray]]:
    """The 48 ways in which axes can run along the patient's."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            for column, (row, sign) in enumerate(zip(order, signs, strict=True)):
                matrix[row, column] = sign
            letters = "".join("LPS"[r] if s > 0 else "RAI"[r] for r, s in zip(order, signs, strict=True))
            yield letters, matrix


def make_inputs(folder: Path) -> list[Input]:
    """Write all inputs below a folder."""
    from _harness import inputs_dicom, inputs_faulty  # they import this module

    makers: tuple[Callable[[Path], Iterator[Input]], ...] = (
        nifti_files,
        nifti_headers,
        itk_files,
        mgh_files,
        pictures,
        inputs_dicom.series,
        inputs_dicom.single_files,
        inputs_faulty.faulty_files,
    )
    found: list[Input] = []
    for maker in makers:
        place = folder / maker.__name__
        place.mkdir(parents=True)
        found += maker(place)
    return found


def save_nifti(
    path: Path, array: np.ndarray, affine_lps: np.ndarray, kind: Any = nib.Nifti1Image, **fields: Any
) -> Path:
    """Write (Z, Y, X) voxels as they are (no scaling); fields of the header are set afterwards, as raw bytes."""
    image = kind(array.T, RAS_TO_LPS @ affine_lps, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    plain = path if path.suffix == ".nii" else path.with_name(f"unpacked-{path.stem}")
    image.to_filename(plain)
    if fields:
        raw = bytearray(plain.read_bytes())
        size = image.header.sizeof_hdr
        header = image.header_class(bytes(raw[:size]), check=False)
        for name, value in fields.items():
            header[name] = value
        raw[:size] = header.binaryblock
        plain.write_bytes(raw)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes(), 1))
        plain.unlink()
    return path


def nifti_files(folder: Path) -> Iterator[Input]:
    """Voxel types, endings, byte orders, orientations and axes."""
    straight = affine_of()
    for number, (dtype, ending) in enumerate(itertools.product(DTYPES, (".nii", ".nii.gz"))):
        array = volume(dtype, number)
        path = save_nifti(folder / f"{dtype}{'-packed' if ending == '.nii.gz' else ''}{ending}", array, straight)
        yield Input(
            name=f"nifti/{dtype}{ending}", path=path, array=array[None], affine_lps=straight, spacing_zyx=SPACING
        )
    for letters, direction in all_directions():
        array, affine = volume("int16", 3), affine_of(direction)
        path = save_nifti(folder / f"{letters}.nii", array, affine)
        yield Input(name=f"nifti/{letters}", path=path, array=array[None], affine_lps=affine, spacing_zyx=SPACING)
    beside = volume("int16", 2)
    save_nifti(folder / "twin.nii", beside + 1, straight)
    path = save_nifti(folder / "twin.nii.gz", beside, straight)
    yield Input(
        name="nifti/an unpacked file of the same name beside",
        path=path,
        array=beside[None],
        affine_lps=straight,
        spacing_zyx=SPACING,
    )
    tilted = affine_of(orthonormal(TILTED))
    array = volume("int16", 4)
    for name, kind in (("nifti-1", nib.Nifti1Image), ("nifti-2", nib.Nifti2Image)):
        path = save_nifti(folder / f"tilted-{name}.nii.gz", array, tilted, kind)
        yield Input(name=f"nifti/tilted {name}", path=path, array=array[None], affine_lps=tilted, spacing_zyx=SPACING)
    for dtype in (">i2", ">f4", ">u2", ">i4"):
        header = nib.Nifti1Header(endianness=">")
        header.set_data_dtype(np.dtype(dtype))
        header.set_xyzt_units("mm")
        image = nib.Nifti1Image(array.clip(0).T.astype(dtype), RAS_TO_LPS @ straight, header)
        image.to_filename(folder / f"big{dtype[1:]}.nii")
        yield Input(
            name=f"nifti/big-endian {dtype[1:]}",
            path=folder / f"big{dtype[1:]}.nii",
            array=array.clip(0)[None],
            affine_lps=straight,
            spacing_zyx=SPACING,
        )
    for axes in (4, 5):
        path = save_nifti(folder / f"axes{axes}.nii.gz", array[(None,) * (axes - 3)], straight)
        yield Input(
            name=f"nifti/{axes} axes, one time", path=path, array=array[None], affine_lps=straight, spacing_zyx=SPACING
        )
    flat = array[:1]
    path = save_nifti(folder / "one_slice.nii.gz", flat, straight)
    yield Input(name="nifti/one slice", path=path, array=flat[None], affine_lps=straight, spacing_zyx=SPACING)


def nifti_headers(folder: Path) -> Iterator[Input]:
    """Units, scaling, and forms with their codes: ITK takes the sform if its code is 1 or there is no qform."""
    array, straight = volume("int16", 5), affine_of()

    def written(name: str, affine: np.ndarray = straight, values: np.ndarray = array, **fields: Any) -> Input:
        path = save_nifti(folder / f"{name.replace(' ', '_').replace('/', '_')}.nii", array, straight, **fields)
        spacing = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
        return Input(name=f"nifti/{name}", path=path, array=values[None], affine_lps=affine, spacing_zyx=spacing)  # type: ignore[arg-type]

    for unit, (code, factor) in {
        "metre": (1, 1000.0),
        "mm": (2, 1.0),
        "micron": (3, 0.001),
        "unknown": (0, 1.0),
    }.items():
        scaled = np.diag([factor, factor, factor, 1.0]) @ straight
        yield written(f"unit {unit}", scaled, xyzt_units=code)
        yield written(f"unit {unit} and seconds", scaled, xyzt_units=code | 8)
    for slope, intercept in ((1, 0), (0, 7), (2, -1024), (0.5, 0.25), (-1, 5), (1, -1024), (np.nan, np.nan), (1000, 0)):
        plain = slope == 0 or np.isnan(slope)
        values = array.astype(np.float64) if plain else array * float(slope) + float(intercept)
        yield written(f"slope {slope} intercept {intercept}", values=values, scl_slope=slope, scl_inter=intercept)
    # the sform lies elsewhere: which of the two was used can be seen
    moved = straight.copy()
    moved[:3, 3] += (3, -4, 5)
    rows = dict(zip(("srow_x", "srow_y", "srow_z"), (RAS_TO_LPS @ moved)[:3], strict=True))
    for qform, sform in itertools.product((0, 1, 2, 3, 4), repeat=2):
        if qform == sform == 0:
            continue  # without forms, readers disagree on the directions by design
        takes_sform = sform == 1 or (qform == 0 and sform > 0)
        yield written(
            f"qform {qform} sform {sform}",
            moved if takes_sform else straight,
            qform_code=qform,
            sform_code=sform,
            **rows,
        )
    pixdim = np.array([1, 0.8, 0.9, 2.5, 0, 0, 0, 0], np.float32)
    yield written(
        "qfac 0", sform_code=0, qform_code=1, pixdim=np.array([0, *pixdim[1:]], np.float32), quatern_c=0, quatern_d=1
    )
    yield written(
        "pixdim 3 is 0, good sform", sform_code=1, qform_code=0, pixdim=np.array([1, 0.8, 0.9, 0, 0, 0, 0, 0])
    )
    yield written(
        "negative pixdim, good sform", sform_code=1, qform_code=0, pixdim=np.array([1, -0.8, 0.9, 2.5, 0, 0, 0, 0])
    )
    yield written(
        "quaternion a hair too long", sform_code=1, qform_code=1, quatern_b=0, quatern_c=0, quatern_d=1.0000005
    )
    yield written("descrip not ASCII", descrip=b"M\xfcller")


def itk_files(folder: Path) -> Iterator[Input]:
    """NRRD, NHDR, MHA and MHD: voxel types, compression, detached data, orientations."""
    straight = affine_of()
    for ending, compressed in itertools.product((".nrrd", ".nhdr", ".mha", ".mhd"), (False, True)):
        for number, dtype in enumerate(DTYPES):
            path = folder / f"{dtype}{'-packed' if compressed else ''}{ending}"
            array = volume(dtype, 40 + number)
            write_itk(path, array, straight, compressed=compressed)
            packed = ", compressed" if compressed else ""
            yield Input(
                name=f"itk/{dtype} {ending}{packed}",
                path=path,
                array=array[None],
                affine_lps=straight,
                spacing_zyx=SPACING,
            )
    array = volume("int16", 9)
    tilted = affine_of(orthonormal(TILTED))
    for ending in (".nrrd", ".mha"):
        for number, (letters, direction) in enumerate(all_directions()):
            if number % 4 == 0:
                affine = affine_of(direction)
                write_itk(folder / f"{letters}{ending}", array, affine)
                yield Input(
                    name=f"itk/{letters} {ending}",
                    path=folder / f"{letters}{ending}",
                    array=array[None],
                    affine_lps=affine,
                    spacing_zyx=SPACING,
                )
        write_itk(folder / f"tilted{ending}", array, tilted)
        yield Input(
            name=f"itk/tilted {ending}",
            path=folder / f"tilted{ending}",
            array=array[None],
            affine_lps=tilted,
            spacing_zyx=SPACING,
        )
    yield from nrrd_headers(folder)
    big = array.astype(">i2").tobytes()
    header = mha_header("MET_SHORT", "BinaryDataByteOrderMSB = True")
    (folder / "big.mha").write_bytes(header.encode() + big)
    yield Input(
        name="itk/big-endian .mha", path=folder / "big.mha", array=array[None], affine_lps=straight, spacing_zyx=SPACING
    )


def mha_header(kind: str, *lines: str, data: str = "LOCAL") -> str:
    """A MetaImage header of the standard volume."""
    size, spacing = " ".join(map(str, SHAPE[::-1])), " ".join(map(str, SPACING[::-1]))
    common = ("ObjectType = Image", "NDims = 3", "BinaryData = True", "TransformMatrix = 1 0 0 0 1 0 0 0 1")
    place = (f"Offset = {' '.join(map(str, ORIGIN))}", f"ElementSpacing = {spacing}", f"DimSize = {size}")
    return "\n".join((*common, *lines, *place, f"ElementType = {kind}", f"ElementDataFile = {data}")) + "\n"


def write_itk(path: Path, array: np.ndarray, affine_lps: np.ndarray, *, compressed: bool = False) -> None:
    """Write (Z, Y, X) voxels by SimpleITK."""
    image = sitk.GetImageFromArray(array)
    spacing = np.linalg.norm(affine_lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine_lps[:3, 3].tolist())
    image.SetDirection((affine_lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, path, compressed)


def nrrd_headers(folder: Path) -> Iterator[Input]:
    """NRRD's own worlds and encodings, written by hand."""
    array, straight = volume("int16", 11), affine_of()
    worlds = {
        "left-posterior-superior": np.eye(4),
        "right-anterior-superior": RAS_TO_LPS,
        "left-anterior-superior": np.diag([1.0, -1.0, 1.0, 1.0]),
        "LPS": np.eye(4),
        "RAS": RAS_TO_LPS,
    }
    encodings: dict[str, bytes] = {
        "raw": array.tobytes(),
        "gzip": gzip.compress(array.tobytes()),
        "ascii": " ".join(map(str, array.ravel())).encode() + b"\n",
    }
    for (world, turn), (encoding, data) in itertools.product(worlds.items(), encodings.items()):
        matrix = turn @ straight
        vectors = " ".join("(" + ",".join(map(repr, map(float, matrix[:3, j]))) + ")" for j in range(3))
        origin = ",".join(map(repr, map(float, matrix[:3, 3])))
        header = (
            f"NRRD0004\ntype: short\ndimension: 3\nspace: {world}\nsizes: {SHAPE[2]} {SHAPE[1]} {SHAPE[0]}\n"
            f"space directions: {vectors}\nkinds: domain domain domain\nendian: little\nencoding: {encoding}\n"
            f"space origin: ({origin})\n\n"
        )
        path = folder / f"{world}-{encoding}.nrrd"
        path.write_bytes(header.encode() + data)
        yield Input(
            name=f"itk/nrrd {world} {encoding}", path=path, array=array[None], affine_lps=straight, spacing_zyx=SPACING
        )


def mgh_files(folder: Path) -> Iterator[Input]:
    """FreeSurfer's MGH and MGZ."""
    for dtype, ending in itertools.product(("uint8", "int16", "int32", "float32"), (".mgh", ".mgz")):
        for name, direction in (("straight", None), ("tilted", orthonormal(TILTED))):
            array, affine = volume(dtype, 60), affine_of(direction)
            path = folder / f"{dtype}-{name}{ending}"
            nib.MGHImage(array.T, RAS_TO_LPS @ affine).to_filename(path)
            yield Input(
                name=f"mgh/{dtype} {name}{ending}", path=path, array=array[None], affine_lps=affine, spacing_zyx=SPACING
            )


def pictures(folder: Path) -> Iterator[Input]:
    """2D pictures, gray and RGB, and 3D TIFF."""
    gray, rgb = volume("uint8", 70, (6, 7)), volume("uint8", 71, (6, 7, 3))
    deep = volume("uint16", 72, (6, 7)) + 1000
    for ending in (".png", ".bmp", ".tif"):
        Image.fromarray(gray).save(folder / f"gray{ending}")
        yield Input(name=f"picture/gray {ending}", path=folder / f"gray{ending}", array=gray[None, None])
        Image.fromarray(rgb).save(folder / f"rgb{ending}")
        yield Input(name=f"picture/RGB {ending}", path=folder / f"rgb{ending}", array=np.moveaxis(rgb, -1, 0)[:, None])
    for ending in (".png", ".tif"):
        Image.fromarray(deep).save(folder / f"deep{ending}")
        yield Input(name=f"picture/16 bits {ending}", path=folder / f"deep{ending}", array=deep[None, None])
    import tifffile

    for dtype, packing in itertools.product(("uint8", "uint16", "float32"), (None, "zlib")):
        array = volume(dtype, 73)
        path = folder / f"{dtype}-{packing}.tif"
        tifffile.imwrite(path, array, photometric="minisblack", compression=packing)
        path.with_suffix(".json").write_text(f'{{"spacing": {list(SPACING)}}}')
        yield Input(name=f"picture/3D TIFF {dtype} {packing}", path=path, array=array[None], spacing_zyx=SPACING)


def png_of_size(width: int, height: int) -> bytes:
    """The head of a PNG of a size, without its voxels."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 0, 0, 0, 0)
