"""What the values of label maps mean: tables that lie beside them, which must not contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.errors import ImageError, UsageError, require_type
from rfmedsam2.pipeline.datasets.label_agreement import DATASET, LabelTable, contradictions, read_tables
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS
from rfmedsam2.records.report import CaseMetrics, ClassMetrics

MANY_VALUES = 1000
"""Largest number of label values that are scored without a table."""


def agreed_labels(predictions: Path, references: Path, given: LabelSet | LabelTable | None = None) -> LabelSet | None:
    """The label table of an evaluation: the given one, else the one beside the references, else the predictions'.

    Searched are dataset.json and predictions.json beside the label maps, and dataset.json one folder up. A table one
    folder above the predictions is only used where there is no other, as it need not be theirs, unless they are a
    dataset's labelsTr or labelsTs.

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
    above = [there.resolve().parent / DATASET] if there.resolve().name.startswith("labels") else []
    tables = read_tables([*beside[:2], here.parent / DATASET, *beside[2:], *above], known=known)
    pairs = [pair for one, other in combinations(tables, 2) for pair in contradictions(one, other)]
    if pairs:
        raise UsageError(
            "The label tables of this evaluation contradict each other",
            found="; ".join(pairs),
            remedy="Convert the label maps to one table; where only names differ, write the same into both files",
        )
    tables = tables or read_tables([there.parent / DATASET], known=[])
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


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
