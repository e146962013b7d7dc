#!/usr/bin/env python3
"""How many of some hundred images of every format come out right: this package, nnU-Net's readers, MONAI, SimpleITK.

usage: python scripts/benchmarks/inputs.py [--verbose] [--only NAME]

Every image is made here from known voxels and a known grid. Each side reads them as its documentation says, in
a process of its own: nnU-Net by the reader it picks for the ending, MONAI by `LoadImage()`, SimpleITK by `ReadImage`
or, for a folder, by `ImageSeriesReader` with GDCM's file names. An outcome is

    right      voxels (within 1e-3), spacing (1e-3) and, where the format stores one, the world of all voxels
               (0.01 mm); for a file that is no usable image: an error
    error      an error on a valid image
    wrong      other voxels, spacing or world, or a faulty file read without an error
    traceback  ours alone: an error that is not one of the package's own sentences
    slow       above 10 s, or the process died

Prints a table and, as the last line, JSON. Exits with 1 if one of ours is wrong, a traceback or slow. Needs the extra
`nnunet`; MONAI reads DICOM by pydicom or itk, whichever is installed.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import monai.transforms
import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from _harness.inputs import RAS_TO_LPS, Input, make_inputs
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from rfmedsam2.errors import RfMedSamError
from rfmedsam2.store.images import image_ending, read_image

Read = tuple[np.ndarray, "np.ndarray | None", "tuple[float, ...] | None"]
"""Voxels (C, Z, Y, X), affine (index x, y, z -> LPS mm) or None, spacing (z, y, x) in mm or None."""
TIME_LIMIT_S = 10
LOADING_S = 120
PICTURES = (".png", ".bmp", ".tif")
OUTCOMES = ("right", "error", "wrong", "traceback", "slow")


def main() -> None:
    """Make the inputs, read them by every side, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", action="store_true", help="name every input that is not right, for all sides")
    parser.add_argument("--only", default="", help="inputs whose name contains this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder:
        inputs = [item for item in make_inputs(Path(folder)) if args.only in item.name]
        names = [item.name for item in inputs]
        assert len(set(names)) == len(names), [n for n, count in collections.Counter(names).items() if count > 1]
        found = {side: outcomes_of(reader, inputs) for side, reader in SIDES.items()}
    for side, outcomes in found.items():
        for item, (kind, why) in zip(inputs, outcomes, strict=True):
            if kind != "right" and (args.verbose or side == "ours"):
                print(f"{side}: {kind}: {item.name}: {why}")
    counts = {side: collections.Counter(kind for kind, _ in outcomes) for side, outcomes in found.items()}
    print(f"\n{len(inputs)} inputs, {sum(item.array is None for item in inputs)} of them to be refused")
    print(f"{'':12}" + "".join(f"{kind:>11}" for kind in OUTCOMES))
    for side, count in counts.items():
        print(f"{side:12}" + "".join(f"{count[kind]:11}" for kind in OUTCOMES))
    print(json.dumps({"name": "inputs", "inputs": len(inputs)} | {side: dict(count) for side, count in counts.items()}))
    if any(counts["ours"][kind] for kind in ("wrong", "traceback", "slow")):
        sys.exit(1)


def outcomes_of(reader: Callable[[Path], Read], inputs: Sequence[Input]) -> list[tuple[str, str]]:
    """Read all inputs in a process of its own, and in another one after each that is slow or ends it."""
    context = multiprocessing.get_context("fork")
    found: list[tuple[str, str]] = []
    while len(found) < len(inputs):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_judge, args=(reader, inputs[len(found) :], there), daemon=True)
        process.start()
        there.close()
        try:
            here.poll(LOADING_S)
            here.recv()
            while len(found) < len(inputs) and here.poll(TIME_LIMIT_S):
                found.append(here.recv())
            if len(found) < len(inputs):
                found.append(("slow", f"above {TIME_LIMIT_S} s"))
        except EOFError:
            found.append(("slow", "the process died"))
        process.kill()
        process.join()
    return found


def _judge(reader: Callable[[Path], Read], inputs: Sequence[Input], answers: Connection) -> None:
    sys.stderr = sys.stdout = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115
    for first in {item.path.suffix: item for item in inputs if item.array is not None}.values():
        judged(reader, first)  # libraries load their parts with the first file of a format, itk for seconds
    answers.send("ready")
    for item in inputs:
        answers.send(judged(reader, item))


def judged(reader: Callable[[Path], Read], item: Input) -> tuple[str, str]:
    """Compare what a reader gives with what the input holds."""
    try:
        array, affine, spacing = reader(item.path)
    except Exception as error:  # noqa: BLE001 - any error of a reader is an outcome
        why = f"{type(error).__name__}: {error}"[:300]
        if reader is ours and not isinstance(error, RfMedSamError):
            return "traceback", why
        return ("right" if item.array is None else "error"), why
    if item.array is None:
        return "wrong", f"read as {array.shape}"
    expected = item.array
    if affine is not None and item.affine_lps is not None:
        array, affine = upright(array, affine)
        expected, true_affine = upright(expected, item.affine_lps)
        spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1])
        true_spacing = tuple(np.linalg.norm(true_affine[:3, :3], axis=0)[::-1])
        if array.shape != expected.shape:
            return "wrong", f"shape {array.shape}, not {expected.shape}"
        if not np.allclose(affine[:3, 3], true_affine[:3, 3], atol=0.01):
            return "wrong", f"origin {affine[:3, 3]}, not {true_affine[:3, 3]}"
        if expected.shape[1] == 1:  # how far the next slice would be is known to few formats
            affine[:3, 2], spacing = true_affine[:3, 2], None
        if not np.allclose(affine[:3, :3], true_affine[:3, :3], atol=2e-3):
            return "wrong", f"axes {affine[:3, :3].tolist()}, not {true_affine[:3, :3].tolist()}"
    else:
        true_spacing = item.spacing_zyx
    if array.shape != expected.shape:
        return "wrong", f"shape {array.shape}, not {expected.shape}"
    if not np.allclose(array, expected, atol=1e-3, rtol=1e-6):
        return "wrong", f"{np.mean(~np.isclose(array, expected, atol=1e-3)):.0%} of the voxels differ"
    if spacing is not None and expected.shape[1] > 1 and not np.allclose(spacing, true_spacing, rtol=1e-3):
        return "wrong", f"spacing {spacing}, not {true_spacing}"
    return "right", ""


def upright(array: np.ndarray, affine_lps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same image with its axes along the patient's as nearly as flips and transpositions allow."""
    image = nib.Nifti1Image(np.moveaxis(array, 0, -1).transpose(2, 1, 0, 3).astype(np.float64), affine_lps)
    turned = nib.as_closest_canonical(image)
    return np.moveaxis(np.asarray(turned.dataobj).transpose(2, 1, 0, 3), -1, 0), turned.affine


def ours(path: Path) -> Read:
    """rfmedsam2.store.images.read_image."""
    volume, header = read_image(path)
    world = header.source_grid if image_ending(path) not in PICTURES else None
    spacing = header.grid.spacing_zyx_mm
    return volume.array.astype(np.float64), None if world is None else world.affine_lps, spacing


def nnunet(path: Path) -> Read:
    """The reader that nnU-Net picks for a data set of this file ending; for a TIFF with spacing the one made for it."""
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    if path.with_suffix(".json").is_file():
        case = path.with_name(f"{path.stem}_0000{ending}")
        case.symlink_to(path)
        array, properties = Tiff3DIO().read_images((str(case),))
        case.unlink()
        return array.astype(np.float64), None, tuple(float(s) for s in properties["spacing"])
    reader = determine_reader_writer_from_file_ending(ending, str(path), allow_nonmatching_filename=True, verbose=False)
    array, properties = reader().read_images((str(path),))
    spacing = tuple(float(s) for s in properties["spacing"])
    stored = properties.get("sitk_stuff")
    if stored is None:
        return array.astype(np.float64), None, spacing
    origin, direction, sizes = stored["origin"], stored["direction"], stored["spacing"]
    if len(sizes) != 3:
        return array.astype(np.float64), None, spacing
    return array.astype(np.float64), _affine(origin, direction, sizes), spacing


def monai_image(path: Path) -> Read:
    """LoadImage with the readers that are installed; its arrays are (x, y, z) or (x, y, z, channel), its world RAS."""
    loaded = monai.transforms.LoadImage(image_only=True)(str(path))
    array = np.asarray(loaded, dtype=np.float64)
    if image_ending(path) in PICTURES:
        if array.ndim == 3 and array.shape[-1] != 3:
            return array.transpose(2, 1, 0)[None], None, tuple(np.abs(np.diag(np.asarray(loaded.affine)))[2::-1])
        array = array[..., None, :] if array.ndim == 3 else array[..., None, None]
        return np.moveaxis(array, -1, 0).transpose(0, 3, 2, 1), None, None
    affine = RAS_TO_LPS @ np.asarray(loaded.affine)
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim == 2:
        array = array[..., None, None]
    return np.moveaxis(array, -1, 0).transpose(0, 3, 2, 1), affine, None


def simpleitk(path: Path) -> Read:
    """ReadImage, or ImageSeriesReader for a folder."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image).astype(np.float64)
    channels = image.GetNumberOfComponentsPerPixel()
    array = np.moveaxis(array, -1, 0) if channels > 1 else array[None]
    if image.GetDimension() == 2:
        return array[:, None], None, None
    if image.GetDimension() != 3:
        array = array.reshape(1, *array.shape[-3:]) if array.size == np.prod(array.shape[-3:]) else array
        spacing = image.GetSpacing()[:3]
        direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3].ravel()
        return array, _affine(image.GetOrigin()[:3], direction, spacing), tuple(spacing[::-1])
    return array, _affine(image.GetOrigin(), image.GetDirection(), image.GetSpacing()), image.GetSpacing()[::-1]


def _affine(origin: Sequence[float], direction: Sequence[float] | np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


SIDES: dict[str, Callable[[Path], Read]] = {
    "ours": ours,
    "nnunet": nnunet,
    "monai": monai_image,
    "simpleitk": simpleitk,
}

if __name__ == "__main__":
    main()
