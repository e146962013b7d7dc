"""Creating a raw dataset folder atomically, and writing its dataset.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.records.base import dump_json
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.store.layout import DATASET_FOLDER
from rfmedsam2.store.lock import move_into_place, placing, workplace
from rfmedsam2.system.atomic import write_text, writing_to

BUILDING = ".building-"
"""How names of folders begin that hold an unfinished dataset."""


@contextmanager
def new_dataset(raw: Path, name: str, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder in `raw`; on success it is renamed to `name`, on an error it is removed.

    Raises:
        UsageError: the name is not a dataset name, or the dataset exists and `force` is not set.
        StoreError: the folder cannot be written or the disk is full.
    """
    if DATASET_FOLDER.fullmatch(name) is None or Path(name).name != name:
        raise UsageError("Invalid dataset name", expected="a name like Dataset217_BTCV", found=name)
    target = raw / name
    _require_free(target, force=force)
    if raw.exists() and not raw.is_dir():
        remedy = "Choose another raw folder"
        raise StoreError("Expected a folder, but a file exists at this path", where=raw, remedy=remedy)
    with workplace(raw, BUILDING) as work:
        building = work / name
        with writing_to(target):
            building.mkdir()
            yield building
        with placing(target):
            _require_free(target, force=force)  # another run, or a person, may have made it meanwhile
            move_into_place(building, target)


def _require_free(target: Path, *, force: bool) -> None:
    if target.exists() and not force:
        raise UsageError(
            "The dataset exists already",
            where=target,
            remedy=f"Choose another name or raw folder, or replace it with {option('force', True)}",
        )


def write_dataset_json(
    folder: Path,
    *,
    channels: tuple[str, ...],
    labels: Mapping[str, int],
    training: int,
    further: Mapping[str, object] | None = None,
) -> None:
    """Write nnU-Net v2's dataset.json for NIfTI files, validated; `further` fields are added unchanged."""
    record = DatasetJson.parse(
        {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": dict(labels),
            "numTraining": training,
            "file_ending": ".nii.gz",
            **(further or {}),
        },
        where=folder / "dataset.json",
    )
    write_text(folder / "dataset.json", dump_json(record.model_dump(mode="json", exclude_none=True)) + "\n")
