"""What the values of label maps mean: tables that lie beside them, which must not contradict each other."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import DatasetError, ImageError, RecordError, UsageError, require_type
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.records.report import CaseMetrics, ClassMetrics
from rfmedsam2.store.raw import read_dataset_json
from rfmedsam2.system.atomic import read_record

logger = logging.getLogger(__name__)
DATASET = "dataset.json"
MANY_VALUES = 1000
"""Largest number of label values that are scored without a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTable:
    """Names of label values, and where they are written."""

    labels: LabelSet
    source: str


def agreed_labels(predictions: Path, references: Path, given: LabelSet | LabelTable | None = None) -> LabelSet | None:
    """The label table of an evaluation: the given one, else the one beside the references, else the predictions'.

    Searched are dataset.json and predictions.json beside the label maps, and dataset.json one folder up. A table one
    folder above the predictions is only used where there is no other: it need not be theirs.

    Args:
        predictions: folder of label maps, or one file.
        references: folder of label maps, or one file.
        given: the table that the caller means, compared with those beside the label maps; a `LabelTable` is known to be
            that of both, and is not compared.

    Returns:
        None if there is no table.

    Raises:
        UsageError: `given` is not a table; or two tables disagree on the name of a value, or the value of a name.
        RecordError: a file with a table is damaged.
    """
    if isinstance(given, LabelTable):
        return given.labels
    if given is not None:
        require_type(
            given, LabelSet, "labels", remedy="Give the labels of a dataset or plan; a folder to write is out="
        )
    known = [] if given is None else [LabelTable(labels=given, source="the given table")]
    here, there = _folder(references), _folder(predictions)
    beside = [folder / name for folder in (here, there) for name in (DATASET, PREDICTIONS)]
    tables = _read([*beside[:2], here.parent / DATASET, *beside[2:]], known=known)
    pairs = [pair for one, other in combinations(tables, 2) for pair in contradictions(one, other)]
    if pairs:
        raise UsageError(
            "The label tables of this evaluation contradict each other",
            found="; ".join(pairs),
            remedy="Convert the label maps to one table; where only names differ, write the same into both files",
        )
    tables = tables or _read([there.parent / DATASET], known=[])
    return tables[0].labels if tables else None


def numbered(*label_maps: np.ndarray) -> LabelSet:
    """A table that names every value of label maps by its number.

    Raises:
        ImageError: there are more values than labels can be meant to have.
    """
    values = sorted({int(value) for labels in label_maps for value in np.unique(labels)} - {0})
    if len(values) > MANY_VALUES:
        raise ImageError(
            "The label maps hold too many values to be scored by number",
            expected=f"at most {MANY_VALUES} different values",
            found=len(values),
            remedy=f"Check that these are label maps, or name the values that are meant with {option('labels')}",
        )
    return LabelSet(names={"background": 0, **{str(value): value for value in values}})


def with_all_values(cases: Sequence[CaseMetrics], absent: ClassMetrics) -> list[CaseMetrics]:
    """Cases scored by number, each with all values of all cases, ascending.

    Args:
        cases: scores of each case by the numbers of its own values.
        absent: scores of a value that a case does not hold.

    Raises:
        UsageError: no label map holds a value above 0.
    """
    names = sorted({name for case in cases for name in case.classes}, key=int)
    if not names:
        raise UsageError("There is nothing to score", found="only the value 0 in all label maps")
    return [
        case.model_copy(update={"classes": {name: case.classes.get(name, absent) for name in names}}) for case in cases
    ]


def _read(paths: Iterable[Path], *, known: list[LabelTable]) -> list[LabelTable]:
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


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


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
