"""BTCV ("Beyond the Cranial Vault", Synapse syn3193805): the official download -> Dataset217_BTCV."""

from __future__ import annotations

from pathlib import Path

from rfmedsam2.pipeline.datasets.conversion import (
    Conversion,
    ConvertOptions,
    Download,
    Source,
    convert,
    folder_of,
    listed,
    pair,
)
from rfmedsam2.pipeline.datasets.label_tables import BTCV_LABELS
from rfmedsam2.system.progress import Track, silent

NAME = "Dataset217_BTCV"

# the official training numbers leave a gap from 11 to 20
_OFFICIAL_TRAINING = {*range(1, 11), *range(21, 41)}
_OFFICIAL_TEST_CASES = 20


def convert_btcv(
    download: Path, raw: Path, *, options: ConvertOptions | None = None, track: Track = silent
) -> Conversion:
    """Build Dataset217_BTCV from Training/img, Training/label and, if it exists, Testing/img.

    `download` is the folder with `Training`, or one or two levels above it (`RawData`, `Abdomen/RawData`). Cases
    keep the official names: img0001 ...

    Raises:
        DatasetError: the folder is not a BTCV download, or cases have faults; lists all of them.
        UsageError: the dataset exists and `options.force` is not set.
        StoreError: the raw folder cannot be written, or files cannot be linked.
    """
    home = folder_of(
        download,
        ("Training", "RawData/Training", "Abdomen/RawData/Training"),
        what="BTCV",
        expected="Training/img/img0001.nii.gz and Training/label/label0001.nii.gz",
    ).parent
    found = Download(
        what="BTCV",
        folder=home,
        name=NAME,
        channels=("CT",),
        labels=BTCV_LABELS,
        further={
            "description": "BTCV abdomen, 13 organs",
            "reference": "https://www.synapse.org/#!Synapse:syn3193805",
        },
    )
    images = _cases(home / "Training" / "img", "img")
    pair(found, images, _cases(home / "Training" / "label", "label"))
    for case, path in _cases(home / "Testing" / "img", "img").items():
        if case in images:
            found.faults.append(f"{case}: the same case is in Training and in Testing")
        found.sources.append(Source(id=case, image=path))
    _compare_with_official(found, images)
    return convert(found, raw, options=options or ConvertOptions(), track=track)


def _cases(folder: Path, prefix: str) -> dict[str, Path]:
    """Case id img0001 -> file, for names like img0001.nii.gz or label0001.nii.gz."""
    return {f"img{number}": path for number, path in listed(folder, prefix + r"(\d{4})").items()}


def _compare_with_official(found: Download, images: dict[str, Path]) -> None:
    numbers = {int(case[3:]) for case in images}
    for word, difference in (
        ("missing", _OFFICIAL_TRAINING - numbers),
        ("not among the official ones", numbers - _OFFICIAL_TRAINING),
    ):
        if difference:
            names = ", ".join(f"img{n:04d}" for n in sorted(difference))
            found.warnings.append(f"{len(difference)} training case(s) {word} (of 30 official): {names}")
    tests = sum(source.label is None for source in found.sources)
    if tests not in (0, _OFFICIAL_TEST_CASES):
        found.warnings.append(f"{tests} test cases, the official download has {_OFFICIAL_TEST_CASES}")
