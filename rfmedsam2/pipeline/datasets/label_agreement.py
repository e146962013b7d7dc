"""Whether tables of label values that lie beside label maps agree with each other, and with a model's."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rfmedsam2.errors import DatasetError, RecordError, UsageError
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.store.formats.label_values import segment_values
from rfmedsam2.store.raw import read_dataset_json
from rfmedsam2.system.atomic import read_record

logger = logging.getLogger(__name__)
DATASET = "dataset.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTable:
    """Names of label values, and where they are written."""

    labels: LabelSet
    source: str


def require_agreement(folder: Path, labels: LabelSet) -> None:
    """Check the tables beside label maps that a model is given, and the dataset.json above labelsTr and labelsTs.

    Raises:
        UsageError: one gives another name to a value of the model, or another value to a name.
    """
    model = LabelTable(labels=labels, source="the model")
    above = [folder.resolve().parent / DATASET] if folder.resolve().name.startswith("labels") else []
    tables = read_tables([folder / DATASET, folder / PREDICTIONS, *above], known=[model])
    pairs = [pair for table in tables[1:] for pair in contradictions(model, table)]
    if pairs:
        raise UsageError(
            "The label maps have other labels than the model",
            where=folder,
            found="; ".join(pairs),
            remedy="Convert the label maps to the labels of the model; where only names differ, write the model's into "
            "the file",
        )


def read_tables(paths: Iterable[Path], *, known: list[LabelTable]) -> list[LabelTable]:
    """The known tables and those in files; a damaged file is an error only if its table is needed."""
    tables = list(known)
    for path in dict.fromkeys(paths):
        if not path.is_file():
            continue
        try:
            record = read_record(path, PredictionsRecord) if path.name == PREDICTIONS else read_dataset_json(path)
        except (RecordError, DatasetError) as error:
            if not tables:
                raise
            logger.warning("This label table is not compared: %s", error)
        else:
            tables.append(LabelTable(labels=record.label_set, source=str(path)))
    return tables


def contradictions(one: LabelTable, other: LabelTable) -> list[str]:
    """What two tables say differently of the same name or value, as phrases; letter case and separators are equal.

    Names that only one of them has are no contradiction, and values are not compared with those of regions.
    """
    here, there = _named(one.labels), _named(other.labels)
    found = [
        f"{name} is {_shown(values)} in {one.source} and {_shown(there[key][1])} in {other.source}"
        for key, (name, values) in here.items()
        if key in there and there[key][1] != values
    ]
    if one.labels.has_regions or other.labels.has_regions:
        return found + [
            f"{here[key][0]} is painted with {color} in {one.source} and {other_color} in {other.source}"
            for key, color in _painted(one.labels).items()
            if (other_color := _painted(other.labels).get(key, color)) != color
        ]
    names = {values: name for key, (name, values) in there.items() if key not in here}
    return found + [
        f"{_shown(values)} is {name} in {one.source} and {names[values]} in {other.source}"
        for key, (name, values) in here.items()
        if key not in there and values in names
    ]


def segments_of(path: Path) -> dict[str, int]:
    """Names of the segments of a file of 3D Slicer with their values; none where these are not numbers."""
    try:
        return segment_values(path)
    except ValueError:
        return {}


def misnamed_segments(path: Path, declared: Mapping[str, Collection[int]], where: str) -> list[tuple[int, str]]:
    """Segments of 3D Slicer that have other values than their names have elsewhere: Slicer counts as it goes.

    Args:
        path: a readable label map of any format.
        declared: name -> its values; other names of segments mean nothing.
        where: who declares them, for the phrases.

    Returns:
        The value of each such segment, and a phrase that names both.
    """
    known = {_comparable(name): values for name, values in declared.items()}
    return [
        (value, f"{name} is {value}, in {where} {', '.join(map(str, known[_comparable(name)]))}")
        for name, value in segments_of(path).items()
        if value not in known.get(_comparable(name), (value,))
    ]


def _named(labels: LabelSet) -> dict[str, tuple[str, frozenset[int]]]:
    """Comparable name -> (name, its values), with the ignore label."""
    ignored = {} if labels.ignore is None else {"ignore": (labels.ignore,)}
    table = {**labels.foreground, **ignored}
    return {_comparable(name): (name, frozenset(values)) for name, values in table.items()}


def _painted(labels: LabelSet) -> dict[str, int]:
    """Comparable name -> value that a region is painted with."""
    return dict(zip(map(_comparable, labels.foreground), labels.regions_class_order or (), strict=False))


def _comparable(name: str) -> str:
    """A name without letter case, separators and the ways in which Unicode writes one letter; T+ is not T-."""
    return re.sub(r"[\s_.,:;/()\[\]-]+(?=\S)", " ", unicodedata.normalize("NFKC", name)).strip(" _.,:;()[]").casefold()


def _shown(values: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(values)))
