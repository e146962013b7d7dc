"""Every kind of file that is read, cut and with bytes flipped at random places: a sentence or a correct result.

Files with checksums (ours, and gzipped images) never give a result that differs; the others never anything but a result
or an error of ours. Nothing hangs.
"""

from __future__ import annotations

import hashlib
import json
import locale
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from support.commands import PLANNING, run_error, run_ok

from rfmedsam2.errors import RfMedSamError
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.archive import unpack_archive
from rfmedsam2.store.checkpoints import read_all
from rfmedsam2.store.images import read_image
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import open_dataset
from rfmedsam2.system.atomic import read_record

pytestmark = pytest.mark.timeout(120)
PLACES, PLACES_OF_THE_SHORT_FORM = 200, 60
HEAD = 1000
"""Bytes at the beginning where half of the places lie: headers are short, and the worst places to damage."""
SLOWEST_SECONDS = 10.0
FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")
CASES = Path("preprocessed/Dataset900_PhantomCT/rfmed_cpu_3d_fullres")


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """A library that fails on a damaged file may leave its own locale behind, in which text is read otherwise."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        file: what is damaged.
        read: what is done with it; gives something to compare.
        checked: it has checksums: no damage may change the result.
    """

    file: Path
    read: Callable[[], object]
    checked: bool


def image_digest(path: Path) -> str:
    volume, header = read_image(path)
    digest = hashlib.sha256(np.ascontiguousarray(volume.array).tobytes())
    digest.update(repr((volume.array.shape, volume.array.dtype.str, header.grid)).encode())
    return digest.hexdigest()


def image(root: Path, folder: Path, ending: str, *, checked: bool = False) -> Kind:
    source = next((root / "raw" / "Dataset900_PhantomCT" / "imagesTr").glob("*.nii.gz"))
    path = folder / f"image{ending}"
    packed = ending in (".nii.gz", ".packed.nrrd", ".packed.mha")
    sitk.WriteImage(sitk.ReadImage(str(source)), str(path), useCompression=packed)
    return Kind(file=path, read=lambda: image_digest(path), checked=checked)


def dicom(root: Path, folder: Path) -> Kind:
    source = sitk.ReadImage(str(next((root / "raw" / "Dataset900_PhantomCT" / "imagesTr").glob("*.nii.gz"))))
    series = folder / "series"
    series.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(source.GetDepth()):
        plane = source[:, :, index]
        x, y, z = source.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{index + 1}",
            "0020|0013": str(index + 1),
            "0020|0032": f"{x:.4f}\\{y:.4f}\\{z:.4f}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(series / f"{index:03d}.dcm"))
        writer.Execute(plane)
    return Kind(file=series / "007.dcm", read=lambda: image_digest(series), checked=False)


def dataset_json(root: Path, folder: Path) -> Kind:
    raw = folder / "Dataset900_PhantomCT"
    shutil.copytree(root / "raw" / "Dataset900_PhantomCT", raw)
    return Kind(file=raw / "dataset.json", read=lambda: open_dataset(raw).json, checked=False)


def plan(root: Path, folder: Path) -> Kind:
    path = folder / "plan.json"
    shutil.copy((root / CASES).with_name("rfmed_cpu.json"), path)
    return Kind(file=path, read=lambda: read_record(path, Plan), checked=False)


def checkpoint(root: Path, folder: Path) -> Kind:
    path = folder / "checkpoint_latest.safetensors"
    shutil.copy(root / FOLD / path.name, path)

    def read() -> object:
        record, tensors, state = read_all(path)
        return record, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, json.dumps(state)

    return Kind(file=path, read=read, checked=True)


def archive(root: Path, folder: Path) -> Kind:
    path = folder / "model.zip"
    run_ok("export_model", "-o", path, "--root", root)

    def read() -> object:
        target = folder / "unpacked"
        target.mkdir()
        try:
            manifest = unpack_archive(path, target)
            return manifest, {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        finally:
            shutil.rmtree(target)

    return Kind(file=path, read=read, checked=True)


def case(suffix: str) -> Callable[[Path, Path], Kind]:
    """A preprocessed case, as a training reads it; its times stay as they were, as on a disk that loses bits."""

    def kind(root: Path, folder: Path) -> Kind:
        for path in (root / CASES).glob("phantom_002*"):
            shutil.copy2(path, folder / path.name)
        store, file = CaseStore(folder), folder / f"phantom_002{suffix}"
        written = file.stat().st_mtime_ns

        def read() -> object:
            os.utime(file, ns=(written, written))
            found = store.open("phantom_002")
            places = {key: index.tobytes() for key, index in found.foreground.items()}
            return found.record.geometry, found.image().tobytes(), found.label().tobytes(), places

        return Kind(file=file, read=read, checked=True)

    return kind


def of_image(ending: str, *, checked: bool = False) -> Callable[[Path, Path], Kind]:
    return lambda root, folder: image(root, folder, ending, checked=checked)


KINDS = {
    "nii": of_image(".nii"),
    "nii.gz": of_image(".nii.gz", checked=True),
    "nrrd": of_image(".nrrd"),
    "packed nrrd": of_image(".packed.nrrd"),
    "mha": of_image(".mha"),
    "packed mha": of_image(".packed.mha"),
    "dicom": dicom,
    "dataset.json": dataset_json,
    "plan": plan,
    "checkpoint": checkpoint,
    "archive": archive,
    "case image": case(".b2nd"),
    "case label": case("_label.b2nd"),
    "case foreground": case("_foreground.npy"),
    "case record": case(".json"),
}


@pytest.fixture
def many(whole) -> int:
    """At how many places each file is damaged."""
    return PLACES if whole else PLACES_OF_THE_SHORT_FORM


def places(size: int, many: int, rng: np.random.Generator) -> list[int]:
    """Half of them anywhere, half near the beginning."""
    anywhere, near = rng.integers(size, size=many // 2), rng.integers(min(size, HEAD), size=many // 2)
    return [int(place) for place in (*anywhere, *near)]


def outcome(kind: Kind) -> object:
    """What reading gives; None for an error of ours. Anything else fails the test."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind.read()
    except RfMedSamError:
        return None
    finally:
        assert time.process_time() - began < SLOWEST_SECONDS


@pytest.mark.parametrize("name", KINDS)
def test_a_cut_file_is_refused(trained_root, tmp_path, many, fault_seed, name):
    kind = KINDS[name](trained_root, tmp_path)
    content, sound = kind.file.read_bytes(), outcome(kind)
    assert sound is not None
    rng = np.random.default_rng((5, fault_seed))
    for place in places(len(content), many, rng):
        kind.file.write_bytes(content[:place])
        found = outcome(kind)
        assert found is None or found == sound, f"cut at {place} of {len(content)}"


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte_is_refused_or_read_as_what_it_says(trained_root, tmp_path, many, fault_seed, name):
    kind = KINDS[name](trained_root, tmp_path)
    content, sound = kind.file.read_bytes(), outcome(kind)
    assert sound is not None
    rng = np.random.default_rng((6, fault_seed))
    for place in places(len(content), many, rng):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        kind.file.write_bytes(damaged)
        found = outcome(kind)
        if kind.checked:
            assert found is None or found == sound, (
                f"byte {place} of {len(content)}: {content[place]} -> {damaged[place]}"
            )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_the_commands_say_it_in_a_sentence(trained_root, root_of, tmp_path, share):
    root = root_of(trained_root)
    raw = root / "raw" / "Dataset900_PhantomCT"
    run_ok("export_model", "-o", tmp_path / "model.zip", "--root", root)
    files = {
        root / FOLD / "checkpoint_final.safetensors": ("predict", "-i", raw / "imagesTs", "-o", tmp_path / "out"),
        root / FOLD / "checkpoint_latest.safetensors": ("train", "3d_fullres", 0, "--epochs", 1, "--iterations", 2),
        (root / CASES).with_name("rfmed_cpu.json"): ("train", "3d_fullres", 0),
        raw / "dataset.json": ("plan_and_preprocess", *PLANNING),
        raw / "labelsTr" / "phantom_001.nii.gz": ("plan_and_preprocess", *PLANNING),
        tmp_path / "model.zip": ("import_model", tmp_path / "model.zip", "--force"),
    }
    for path, words in files.items():
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        assert path.name.removesuffix(".nii.gz") in run_error(words[0], *words[1:], "--root", root)
        path.write_bytes(whole)


@pytest.mark.parametrize("suffix", [".b2nd", "_label.b2nd", "_foreground.npy"])
def test_a_case_that_the_disk_has_changed_stops_a_training_and_is_rebuilt(trained_root, root_of, suffix):
    root = root_of(trained_root)
    words = ("3d_fullres", 0, "--restart", "--epochs", 1, "--iterations", 9, "--no-validate", "--root", root)
    for path in sorted((root / CASES).glob(f"phantom_00?{suffix}")):
        before = path.stat()
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 16
        path.write_bytes(damaged)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    sentence = run_error("train", *words)
    assert "A file of a preprocessed case is damaged" in sentence
    assert "Run rfmed_plan_and_preprocess again" in sentence
    assert "5 rebuilt" in run_ok("plan_and_preprocess", *PLANNING, "--root", root).out
    run_ok("train", *words)
