"""Learning a postprocessing rule on validation cases: a step is taken only where it clearly raises the mean DSC.

As in nnU-Net the whole foreground comes first and then each class, and means leave out cases in which a class is absent
from both label maps. Besides the largest component, smallest volumes and holes are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import blosc2
import numpy as np

from rfmedsam2.errors import ImageError, UsageError
from rfmedsam2.metrics.volumes import confusion, overlaps
from rfmedsam2.pipeline.prediction.postprocessing import voxel_ml_of
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PostprocessingRule, PostprocessingStep
from rfmedsam2.store.formats.image_header import grids_differ
from rfmedsam2.store.images import read_label
from rfmedsam2.store.packed_arrays import require_packable
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.transforms.postprocess import postprocess

SMALLEST_ML = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Volumes that are tried. Few and round, as the best of many fits the validation cases alone."""
SAME_SCORE = 1e-9
LEAST_GAIN = 1e-4
"""A rise that four decimals show; a smaller one does not justify changing every label map to come."""
Action = Literal["keep_largest", "drop_small", "fill_holes"]
ACTIONS: tuple[Action, ...] = ("keep_largest", "drop_small", "fill_holes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationCase:
    """A predicted label map and its reference."""

    id: str
    prediction: Path
    reference: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """A rule, and the mean DSC of every class over the cases without and with it; NaN: undefined in all cases.

    Attributes:
        rule: the rule.
        before: class -> mean DSC without it.
        after: class -> mean DSC with it.
        scores: case -> DSC of every class with it.
    """

    rule: PostprocessingRule
    before: dict[str, float]
    after: dict[str, float]
    scores: dict[str, tuple[float, ...]]


@dataclass(slots=True, kw_only=True)
class _Packed:
    """Both label maps of a case around what is not background in either, compressed in memory."""

    id: str
    prediction: bytes
    reference: bytes
    voxel_ml: float


def learn_rule(
    cases: Sequence[ValidationCase],
    labels: LabelSet,
    dataset: str,
    *,
    actions: Sequence[Action] = ACTIONS,
    workers: int = 1,
    track: Track = silent,
) -> Learned:
    """Choose steps one after the other, each on what those before have made; the same cases give the same rule.

    Of the foreground and then of every class, the removal (largest component, or a smallest volume) and then the
    filling of holes that raises the mean DSC most is taken: of the class, or the mean over classes for the foreground,
    and only if that rises by LEAST_GAIN and the mean of no other class falls.

    Args:
        cases: validation cases of all folds, each predicted by a model that was not trained on it.
        labels: names of the label values.
        dataset: name of the dataset, kept in the rule.
        actions: what is tried.
        workers: number of cases processed in parallel.
        track: progress display over cases, for each decision.

    Raises:
        UsageError: there are no cases.
        ImageError: label maps cannot be read, or hold values without a name.
        GeometryError: prediction and reference of a case are on different grids.
    """
    if not cases:
        raise UsageError("There are no validation cases to learn from")
    name = _name_of
    packing = partial(_packed, labels=labels)
    packed = [*map_cases(packing, cases, workers=workers, name=lambda c: c.id, track=track, description="Reading")]
    scores = np.stack([_scores(_unpacked(case.prediction), _unpacked(case.reference), labels) for case in packed])
    before = _means(scores)
    steps: list[PostprocessingStep] = []
    for of, tried in _decisions(labels, actions):
        trying = partial(_tried, steps=tried, labels=labels)
        of_cases = map_cases(trying, packed, workers=workers, name=name, track=track, description=of or "foreground")
        results = np.stack([*of_cases], axis=1)
        column = None if of is None else [*labels.foreground].index(of)
        gains = [_gain(scores, result, column) for result in results]
        best = int(np.argmax(gains))  # the first of equal ones
        if gains[best] < LEAST_GAIN:
            continue
        steps.append(tried[best].model_copy(update={"gain": gains[best]}))
        scores = results[best]
        changing = partial(_change, step=tried[best], labels=labels)
        for _ in map_cases(changing, packed, workers=workers, name=name):
            pass
    rule = PostprocessingRule(
        dataset=dataset,
        labels=dict(labels.names),
        regions_class_order=labels.regions_class_order,
        ignore=labels.ignore,
        steps=tuple(steps),
        cases=len(cases),
    )
    names = tuple(labels.foreground)
    after = _means(scores)
    return Learned(
        rule=rule,
        before=dict(zip(names, before.tolist(), strict=True)),
        after=dict(zip(names, after.tolist(), strict=True)),
        scores={case.id: tuple(row.tolist()) for case, row in zip(packed, scores, strict=True)},
    )


def _decisions(labels: LabelSet, actions: Sequence[Action]) -> Iterator[tuple[str | None, list[PostprocessingStep]]]:
    """What is tried against each other; of a single class the foreground says it all."""
    names = tuple(labels.foreground)
    for of in (None, *(names if len(names) > 1 else ())):
        removals = [PostprocessingStep(action="keep_largest", of=of)] if "keep_largest" in actions else []
        if "drop_small" in actions:
            removals += [PostprocessingStep(action="drop_small", of=of, smallest_ml=ml) for ml in SMALLEST_ML]
        if removals:
            yield of, removals
        if "fill_holes" in actions:
            yield of, [PostprocessingStep(action="fill_holes", of=of)]


def _name_of(case: _Packed) -> str:
    return case.id


def _packed(case: ValidationCase, *, labels: LabelSet) -> _Packed:
    (predicted, header), (reference, other) = read_label(case.prediction), read_label(case.reference)
    if (differ := grids_differ(other, header)) is not None:
        raise ImageError("Prediction and reference are on different grids", where=case.prediction, found=differ[0])
    maps = predicted.array[0], reference.array[0]
    confusion(maps[1], maps[0], labels)  # names undeclared values
    box = _surroundings((maps[0] != 0) | (maps[1] != 0))
    inside = [_compressed(array[box]) for array in maps]
    return _Packed(id=case.id, prediction=inside[0], reference=inside[1], voxel_ml=voxel_ml_of(predicted.grid))


def _surroundings(mask: np.ndarray) -> tuple[slice, ...]:
    """Bounding box with a voxel around it, which keeps open what is open at the border of a box; all if it is empty."""
    box = []
    for axis, length in enumerate(mask.shape):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(0, found[0] - 1), min(length, found[-1] + 2)) if found.size else slice(0, min(length, 2)))
    return tuple(box)


def _scores(prediction: np.ndarray, reference: np.ndarray, labels: LabelSet) -> np.ndarray:
    """DSC of every class, NaN where it is in neither."""
    found = overlaps(confusion(reference, prediction, labels)[0], labels).values()
    return np.array([2 * both / (a + b) if a + b else np.nan for both, a, b in found])


def _tried(case: _Packed, *, steps: Sequence[PostprocessingStep], labels: LabelSet) -> np.ndarray:
    """DSC (steps, classes) of a case after each of several steps."""
    prediction, reference = _unpacked(case.prediction), _unpacked(case.reference)
    unchanged = _scores(prediction, reference, labels)
    rows = []
    for step in steps:
        after = postprocess(prediction, [step], labels, voxel_ml=case.voxel_ml)
        rows.append(unchanged if np.array_equal(after, prediction) else _scores(after, reference, labels))
    return np.stack(rows)


def _change(case: _Packed, *, step: PostprocessingStep, labels: LabelSet) -> None:
    after = postprocess(_unpacked(case.prediction), [step], labels, voxel_ml=case.voxel_ml)
    case.prediction = _compressed(after)


def _compressed(array: np.ndarray) -> bytes:
    require_packable(array)
    return bytes(blosc2.pack_array2(np.ascontiguousarray(array)))


def _unpacked(data: bytes) -> np.ndarray:
    return np.asarray(blosc2.unpack_array2(data))


def _means(scores: np.ndarray) -> np.ndarray:
    """Mean over cases (cases, classes) -> (classes,), NaN where no case has a score."""
    defined = ~np.isnan(scores)
    count = defined.sum(axis=0)
    return np.where(count > 0, np.where(defined, scores, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _gain(before: np.ndarray, after: np.ndarray, column: int | None) -> float:
    """Rise of the mean DSC, of a class or of the mean over classes (None); 0 if the mean of any class falls."""
    rises = _means(after) - _means(before)
    if np.any(rises < -SAME_SCORE):
        return 0.0
    wanted = rises if column is None else rises[column : column + 1]
    wanted = wanted[~np.isnan(wanted)]
    return float(wanted.mean()) if wanted.size else 0.0
