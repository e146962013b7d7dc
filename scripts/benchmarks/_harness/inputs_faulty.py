"""Files that every reader should refuse: truncated, damaged, of another kind, or with voxels that are no numbers."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from _harness.inputs import ORIGIN, SPACING, Input, affine_of, mha_header, png_of_size, save_nifti, volume, write_itk

ARRAY = volume("int16", 90, (12, 20, 24))


def faulty_files(folder: Path) -> Iterator[Input]:
    """One file of each fault and format."""
    for name, data in contents(folder).items():
        path = folder / name
        path.write_bytes(data)
        yield Input(name=f"faulty/{name}", path=path, array=None)


def contents(folder: Path) -> dict[str, bytes]:
    """File names with their bytes."""
    straight = affine_of()
    good: dict[str, bytes] = {}
    for ending in (".nii", ".nrrd", ".mha"):
        path = folder / f"good{ending}"
        if ending == ".nii":
            save_nifti(path, ARRAY, straight)
        else:
            write_itk(path, ARRAY, straight, compressed=ending == ".nrrd")
        good[ending] = path.read_bytes()
        path.unlink()
    packed = gzip.compress(good[".nii"], 1)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    found = {
        "empty.nii": b"",
        "empty.nii.gz": b"",
        "empty.nrrd": b"",
        "empty.mha": b"",
        "empty.png": b"",
        "empty.dcm": b"",
        "text.nii": b"This is a text.\n" * 50,
        "text.nii.gz": b"This is a text.\n" * 50,
        "text.nrrd": b"This is a text.\n" * 50,
        "text.mha": b"This is a text.\n" * 50,
        "text.dcm": b"This is a text.\n" * 50,
        "page.nii.gz": gzip.compress(b"<html><body>404 Not Found</body></html>" * 20),
        "header only.nii": good[".nii"][:352],
        "half.nii": good[".nii"][: len(good[".nii"]) // 2],
        "one byte short.nii": good[".nii"][:-1],
        "half.nii.gz": packed[: len(packed) // 2],
        "without its end.nii.gz": packed[:-8],
        "one byte differs.nii.gz": bytes(damaged),
        "wrong checksum.nii.gz": packed[:-8] + b"\0\0\0\0" + packed[-4:],
        "zlib.nii.gz": zlib.compress(good[".nii"]),
        "half.nrrd": good[".nrrd"][: len(good[".nrrd"]) // 2],
        "half.mha": good[".mha"][: len(good[".mha"]) // 2],
        "one byte short.mha": good[".mha"][:-1],
        "data file missing.mhd": mha_header("MET_SHORT", data="nowhere.raw").encode(),
        "half.png": png_of_size(500, 400),
    }
    found |= {f"{name}.nii": data for name, data in strange_headers(folder).items()}
    return found | strange_meta_headers()


def strange_headers(folder: Path) -> dict[str, bytes]:
    """NIfTI files whose header cannot be true."""
    edits = {
        "spacing 0 without forms": {"pixdim": np.array([1, 0, 0, 0, 0, 0, 0, 0]), "qform_code": 0, "sform_code": 0},
        "spacing nan": {"pixdim": np.array([1, np.nan, 1, 1, 0, 0, 0, 0]), "qform_code": 1, "sform_code": 0},
        "size 0": {"dim": np.array([3, 0, 20, 12, 1, 1, 1, 1])},
        "size negative": {"dim": np.array([3, -24, 20, 12, 1, 1, 1, 1])},
        "larger than its file": {"dim": np.array([3, 24, 20, 1200, 1, 1, 1, 1])},
        "voxel type unknown": {"datatype": 9999},
        "complex": {"datatype": 32, "bitpix": 64},
        "sform singular": {"sform_code": 1, "qform_code": 0, "srow_x": [1, 0, 0, 0], "srow_y": [1, 0, 0, 0]},
        "sform nan": {"sform_code": 1, "qform_code": 0, "srow_x": [np.nan, 0, 0, 0]},
        "offset past the end": {"vox_offset": 1e8},
    }
    found = {}
    for name, fields in edits.items():
        path = save_nifti(folder / "edited.nii", ARRAY, affine_of(), **fields)
        found[name] = path.read_bytes()
        path.unlink()
    return found


def strange_meta_headers() -> dict[str, bytes]:
    """MetaImage headers that cannot be true."""
    found = {}
    size, spacing = "24 20 12", " ".join(map(str, SPACING[::-1]))
    found["unknown element type.mha"] = mha_header("MET_NOTHING").encode() + ARRAY.tobytes()
    found["negative spacing.mha"] = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nOffset = {' '.join(map(str, ORIGIN))}\n"
        f"ElementSpacing = -{spacing}\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    ).encode() + ARRAY.tobytes()
    return found
