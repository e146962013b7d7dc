"""Evaluate a folder of predicted label maps against references: metrics.json and metrics.csv.

Every case is checked before anything is written; all faults of all cases are reported in one error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from rfmedsam2.arguments import choice_of, names_of, number_from_zero, option, path_of, whole_number
from rfmedsam2.errors import DatasetError, RecordError, RfMedSamError, UsageError, shortlist
from rfmedsam2.metrics.volumes import NSD_TOLERANCE_MM, BothEmpty, absent_class, case_metrics, empty_policy
from rfmedsam2.pipeline.datasets.label_agreement import LabelTable, misnamed_segments, segments_of
from rfmedsam2.pipeline.evaluation.bootstrap import BOOTSTRAP_SAMPLES, CONFIDENCE, MINIMUM_CASES, summarize
from rfmedsam2.pipeline.evaluation.label_tables import agreed_labels, numbered, with_all_values
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.records.report import CaseMetrics, ClassMetrics, Evaluation
from rfmedsam2.store.case_files import label_files_in
from rfmedsam2.store.formats.image_header import (
    ImageHeader,
    assumptions,
    grids_differ,
    header_of_lengths,
    require_ordinary_file,
)
from rfmedsam2.store.images import IMAGE_ENDINGS, digest_of, image_ending, read_label
from rfmedsam2.system.atomic import atomic, read_record, write_record
from rfmedsam2.system.csv_text import write_rows
from rfmedsam2.system.ordinary_files import require_folder
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track
from rfmedsam2.system.progress_bars import progress_bars
from rfmedsam2.volume import Volume

logger = logging.getLogger(__name__)

MAX_FAULTS_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One case: reference and prediction."""

    id: str
    reference: Path
    prediction: Path


def evaluate(
    predictions: str | Path,
    references: str | Path,
    labels: LabelSet | LabelTable | None = None,
    *,
    out: str | Path | None = None,
    cases: Sequence[str] | str | None = None,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    both_empty: BothEmpty = "skip",
    workers: int = 2,
    progress: bool | Track = False,
) -> Evaluation:
    """Score label maps against references with the same file names (endings may differ).

    Args:
        predictions: folder of label maps, or one file.
        references: folder of label maps, or one file.
        labels: names of the label values, see `label_tables.agreed_labels`; None: those of a table beside the label
            maps, and without one every value is scored under its number.
        out: output folder of metrics.json and metrics.csv; None: write nothing.
        cases: ids of the cases to score, or a single one; None: all references, each of which must have a prediction.
        nsd_tolerance_mm: tolerance of the normalized surface Dice, mm.
        both_empty: score of a class that is absent from both masks, see `metrics.empty_policy`.
        workers: number of cases scored in parallel.
        progress: True: a bar of cases, in the terminal or notebook; a `Track`: shown by it.

    Returns:
        All scores, with bootstrap confidence intervals (percentile method over cases, seeded).

    Raises:
        UsageError: nothing to score, a path that does not exist, a tolerance below 0, an unknown `both_empty`, label
            tables that contradict each other.
        DatasetError: missing predictions, unreadable files, different grids, undeclared values; lists all of them.
    """
    choice_of(both_empty, get_args(BothEmpty), "both_empty")
    nsd_tolerance_mm = number_from_zero(nsd_tolerance_mm, "nsd_tolerance_mm")
    at_once = whole_number(workers, "workers", least=0)
    predictions, references = path_of(predictions, "predictions"), path_of(references, "references")
    target = None if out is None else path_of(out, "out")
    ids = None if cases is None else names_of(cases, "cases")
    pairs, faults, warnings = find_pairs(predictions, references, cases=ids)
    agreed = agreed_labels(predictions, references, labels)
    warnings += _on_training(predictions, pairs) + _on_themselves(pairs)
    score = partial(_score, labels=agreed, nsd_tolerance_mm=nsd_tolerance_mm, both_empty=both_empty)
    track = progress_bars(progress)
    results = [*map_cases(score, pairs, workers=at_once, name=lambda p: p.id, track=track, description="Evaluating")]
    scored, assumed = _sorted_out(results, faults)
    warnings += assumed
    if agreed is None:
        scored = with_all_values(scored, absent_class(both_empty))
        warnings.append("No table names the label values: every value is scored under its number")
    for warning in warnings:
        logger.warning("%s", warning)
    classes, mean = summarize(scored, tuple(scored[0].classes if agreed is None else agreed.foreground))
    evaluation = Evaluation(
        nsd_tolerance_mm=nsd_tolerance_mm,
        empty_policy=empty_policy(both_empty),
        confidence=CONFIDENCE,
        bootstrap_samples=BOOTSTRAP_SAMPLES,
        cases=tuple(scored),
        classes=classes,
        mean=mean,
        warnings=tuple(warnings),
        minimum_cases=MINIMUM_CASES,
        labels=agreed or numbered(np.array([int(name) for name in classes])),
    )
    if target is not None:
        write_evaluation(target, evaluation)
    return evaluation


def find_pairs(
    predictions: Path, references: Path, *, cases: Sequence[str] | None = None
) -> tuple[list[Pair], list[str], list[str]]:
    """Pair label maps by id (file name without ending).

    Returns:
        Pairs sorted by id, faults (missing predictions, duplicate ids, unknown `cases`), warnings (no reference).

    Raises:
        UsageError: a path does not exist, or there are no references.
        ImageError: a path is a pipe, a socket or a device.
    """
    for what, path in (("predictions", predictions), ("references", references)):
        if not path.exists():
            raise UsageError(f"The {what} do not exist", where=path, remedy="Check the path")
        if not path.is_dir():
            require_ordinary_file(path)
    if predictions.is_file() and references.is_file():
        return [Pair(id=_id_of(references), reference=references, prediction=predictions)], [], []
    if predictions.is_file() or references.is_file():
        raise UsageError("Predictions and references must both be folders or both be files", where=predictions)
    faults: list[str] = []
    wanted, found = label_files_in(references, faults), label_files_in(predictions, faults)
    warnings: list[str] = []
    if cases is None:
        ids = sorted(wanted)
        warnings = [f"{found[id].name}: no reference, skipped" for id in sorted(set(found) - set(wanted))]
    else:
        ids = sorted(set(cases))
        faults += [f"{id}: no reference in {references}" for id in ids if id not in wanted]
    if cases is not None and not ids:
        raise UsageError("No case is named", expected="ids of the cases to score", found="an empty list")
    if not wanted:
        raise UsageError(
            "The references folder holds no label maps",
            where=references,
            expected=f"label maps ({', '.join(IMAGE_ENDINGS)}) named like the predictions",
        )
    faults += [f"{id}: no prediction in {predictions}" for id in ids if id in wanted and id not in found]
    pairs = [Pair(id=id, reference=wanted[id], prediction=found[id]) for id in ids if id in wanted and id in found]
    return pairs, faults, warnings


def _on_training(predictions: Path, pairs: Sequence[Pair]) -> list[str]:
    """A sentence if predictions.json says that the model was trained on cases of these ids."""
    file = (predictions if predictions.is_dir() else predictions.parent) / PREDICTIONS
    try:
        known = read_record(file, PredictionsRecord).cases if file.is_file() else {}
    except RecordError:
        return []  # whoever needs its label table says what is wrong
    seen = [pair.id for pair in pairs if pair.id in known and known[pair.id].id_in_training]
    sentence = (
        f"The model was trained on {len(seen)} of these {len(pairs)} ids ({shortlist(seen)}). If they are the same "
        "cases, their scores do not tell how well it segments new ones"
    )
    return [sentence] if seen else []


def _on_themselves(pairs: Sequence[Pair]) -> list[str]:
    """A sentence if label maps are their own references, also by links."""
    same = [pair.id for pair in pairs if pair.prediction.resolve() == pair.reference.resolve()]
    sentence = (
        f"{len(same)} of {len(pairs)} label maps are compared with themselves: prediction and reference are one file"
    )
    return [f"{sentence} ({shortlist(same)})"] if same else []


def ids_of(folder: Path) -> set[str]:
    """Ids of the label maps in a folder.

    Raises:
        UsageError: the folder does not exist.
    """
    require_folder(folder, "folder of label maps")
    return set(label_files_in(folder, []))


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write metrics.json and metrics.csv, both or neither.

    The CSV has one row per score: case, class, metric, value (empty if undefined).
    """
    fields = tuple(ClassMetrics.model_fields)
    with atomic(folder / "metrics.csv") as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            write_rows(stream, [("case", "class", "metric", "value")])
            for case in evaluation.cases:
                for name, scores in case.classes.items():
                    write_rows(stream, ((case.id, name, field, getattr(scores, field)) for field in fields))
        write_record(folder / "metrics.json", evaluation)


def _score(
    pair: Pair, *, labels: LabelSet | None, nsd_tolerance_mm: float, both_empty: BothEmpty
) -> tuple[CaseMetrics, list[str]] | str:
    """Scores of one case and what was assumed of its lengths, or a message with its faults."""
    volumes: list[Volume] = []
    headers: list[ImageHeader] = []
    faults: list[str] = []
    for side, path in (("reference", pair.reference), ("prediction", pair.prediction)):
        try:
            volume, header = read_label(path)
            volumes.append(volume)
            headers.append(header)
        except RfMedSamError as error:
            faults.append(f"{side}: {error}")
    faults = faults or _misnamed(pair, volumes, labels)
    if faults:
        return f"{pair.id}: " + " ".join(faults)
    reference, prediction = volumes
    difference = grids_differ(*headers)
    if difference is not None:
        return (
            f"{pair.id}: reference and prediction are on different grids: {difference[0]} "
            "(reference against prediction)"
        )
    lengths = header_of_lengths(*headers)
    try:
        classes = case_metrics(
            reference.array[0],
            prediction.array[0],
            labels or numbered(reference.array[0], prediction.array[0]),
            lengths.grid.spacing_zyx_mm,
            nsd_tolerance_mm=nsd_tolerance_mm,
            both_empty=both_empty,
        )
    except RfMedSamError as error:
        return f"{pair.id}: {error}"
    # absolute, so that the report finds them from any folder
    paths = {"reference": str(pair.reference.absolute()), "prediction": str(pair.prediction.absolute())}
    digests = {f"{side}_sha256": digest_of([Path(path)]).hex() for side, path in paths.items()}
    assumed = [text for kind, text in assumptions(lengths).items() if kind in ("no-spacing", "unit-ignored")]
    return CaseMetrics(id=pair.id, **paths, **digests, classes=classes), assumed


def _misnamed(pair: Pair, volumes: Sequence[Volume], labels: LabelSet | None) -> list[str]:
    """Sentences about segments whose values are not the table's, or without a table, not those of the reference."""
    sides = {"reference": pair.reference, "prediction": pair.prediction}
    if labels is None:
        named, where = {name: (value,) for name, value in segments_of(pair.reference).items()}, "the reference"
    else:
        named, where = labels.foreground, "the label table"
    faults = []
    for (side, path), volume in zip(sides.items(), volumes, strict=True):
        misnamed = misnamed_segments(path, named, where)
        if wrong := [phrase for value, phrase in misnamed if (volume.array == value).any()]:
            faults.append(f"{side}: Segments have other values than their names elsewhere: {'; '.join(wrong)} ({path})")
    return faults


def _sorted_out(
    results: Sequence[tuple[CaseMetrics, list[str]] | str], faults: Sequence[str]
) -> tuple[list[CaseMetrics], list[str]]:
    """The scores, and what was assumed in each case; one error for all faults, those that are known first."""
    if failed := [*faults, *(result for result in results if isinstance(result, str))]:
        raise _all_faults(failed)
    done = [result for result in results if not isinstance(result, str)]
    assumed = [f"{case.id}: {text}" for case, texts in done for text in texts]
    return [case for case, _ in done], assumed


def _id_of(path: Path) -> str:
    """File name without an image ending; the whole name if it has none."""
    return path.name.removesuffix(image_ending(path) or "")


def _all_faults(faults: Sequence[str]) -> DatasetError:
    shown = list(faults[:MAX_FAULTS_SHOWN])
    if len(faults) > len(shown):
        shown.append(f"... and {len(faults) - len(shown)} more")
    return DatasetError(
        f"{len(faults)} fault(s); nothing was written",
        found="\n  ".join(["", *shown, ""]).rstrip(" "),
        remedy=f"Correct these files, or name the cases to score ({option('cases')})",
    )
