"""Paired comparison of two sets of predictions of the same cases: whether B is better than A, and by how much.

Differences are taken case by case before they are averaged: cases differ more from each other than two models do on one
case, so the interval of the mean difference is much narrower than those of the two means suggest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from rfmedsam2.choices import ComparedMetric
from rfmedsam2.errors import DatasetError, RecordError, UsageError, shortlist
from rfmedsam2.metrics.volumes import NSD_TOLERANCE_MM, BothEmpty
from rfmedsam2.pipeline.datasets.label_agreement import DATASET, LabelTable, contradictions, read_tables
from rfmedsam2.pipeline.evaluation.bootstrap import BOOTSTRAP_SAMPLES, CONFIDENCE, MINIMUM_CASES, bootstrap
from rfmedsam2.pipeline.evaluation.evaluate import evaluate, ids_of
from rfmedsam2.pipeline.evaluation.label_tables import agreed_labels
from rfmedsam2.pipeline.evaluation.score_plot import differences_png
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PREDICTIONS
from rfmedsam2.records.report import (
    LOWER_IS_BETTER,
    TITLES,
    Comparison,
    Evaluation,
    PairedCase,
    PairedMean,
    on_undefined,
)
from rfmedsam2.system.atomic import atomic, write_record
from rfmedsam2.system.csv_text import write_rows
from rfmedsam2.system.progress import Track

METRICS = tuple(TITLES)
FILES = ("comparison.json", "comparison.csv", "comparison.png")
SAME_SCORE = 1e-9
"""Scores that differ by less are a tie: means over classes of equal scores may differ by rounding."""
SAME_VOLUME = 1e-6


def compare(
    first: str | Path,
    second: str | Path,
    references: str | Path | None = None,
    labels: LabelSet | LabelTable | None = None,
    *,
    cases: Sequence[str] | None = None,
    nsd_tolerance_mm: float = NSD_TOLERANCE_MM,
    both_empty: BothEmpty = "skip",
    workers: int = 2,
    progress: bool | Track = False,
) -> Comparison:
    """Compare two folders of label maps, or two evaluations of `evaluate`, on the cases that both have.

    Args:
        first: A: a folder of label maps, or the folder or metrics.json of an evaluation.
        second: B: the same.
        references: folder of reference label maps; None: both are evaluations.
        labels: names of the label values, as for `evaluate`.
        cases: ids of the cases to compare; None: all that A, B and the references have.
        nsd_tolerance_mm: tolerance of the normalized surface Dice, mm, of label maps.
        both_empty: score of a class that is absent from both masks, see `metrics.empty_policy`.
        workers: number of cases scored in parallel.
        progress: True: a bar of cases, in the terminal or notebook; a `Track`: shown by it.

    Returns:
        Means, paired differences (B minus A) with confidence intervals, and the number of cases that B wins and loses.

    Raises:
        UsageError: a path does not exist, no case or class is in both, or the two were scored by different rules, by
            label tables that contradict each other, or against different references.
        DatasetError: label maps have faults; lists all of them.
    """
    paths = (Path(first), Path(second))
    given = [_given(path, references) for path in paths]
    known = [found if isinstance(found, set) else {case.id for case in found.cases} for found in given]
    in_both = known[0] & known[1]
    wanted = sorted(in_both if cases is None else in_both & set(cases))
    absent = [] if cases is None else sorted(set(cases) - in_both)
    if references is not None and not any(known):
        raise UsageError(
            "None of the label maps has a reference",
            where=f"{first}, {second}",
            expected=f"names as in {references}",
            found="no such name in A or B",
            remedy=f"Check the folder that was given with {option('references', flag='-g')}",
        )
    if absent or not wanted:
        raise UsageError(
            "Cases are not in both A and B" if absent else "A and B have no case in common",
            where=f"{first}, {second}",
            found=shortlist(absent) if absent else f"{len(known[0])} case(s) in A, {len(known[1])} in B",
            expected="label maps of the same names, each with a reference, or evaluations of the same cases",
        )
    scored = partial(evaluate, cases=wanted, nsd_tolerance_mm=nsd_tolerance_mm, both_empty=both_empty, workers=workers)
    folder = Path("" if references is None else references)  # where it is None, all that is given are evaluations
    tables = [
        entry.labels if isinstance(entry, Evaluation) else agreed_labels(path, folder, labels)
        for path, entry in zip(paths, given, strict=True)
    ]
    _require_same_labels(paths, tables)  # before hours of scoring
    found = [
        entry if isinstance(entry, Evaluation) else scored(path, folder, labels, progress=progress)
        for path, entry in zip(paths, given, strict=True)
    ]
    _require_same_rules(found[0], found[1])
    only = ([], []) if cases is not None else (sorted(known[0] - known[1]), sorted(known[1] - known[0]))
    return _compared(paths, (found[0], found[1]), wanted, only)


def compare_evaluations(a: Evaluation, b: Evaluation, *, names: tuple[str, str]) -> Comparison:
    """Compare two evaluations in memory on the cases that both have; see `compare`.

    Args:
        a: an evaluation.
        b: another one.
        names: what they are called.

    Raises:
        UsageError: no case or class is in both, or they were scored by different rules, by label tables that contradict
            each other, or against different references.
    """
    known = [{case.id for case in evaluation.cases} for evaluation in (a, b)]
    if not known[0] & known[1]:
        raise UsageError("Two evaluations have no case in common", where=", ".join(names))
    _require_same_rules(a, b)
    only = (sorted(known[0] - known[1]), sorted(known[1] - known[0]))
    return _compared((Path(names[0]), Path(names[1])), (a, b), sorted(known[0] & known[1]), only)


def write_comparison(folder: Path, comparison: Comparison, metric: ComparedMetric = "dsc") -> None:
    """Write comparison.json, comparison.csv (all cases) and comparison.png (of one metric), all or none.

    The CSV has one row per case, class and metric: case, class, metric, a, b, difference (empty if undefined).
    """
    table, chart = folder / FILES[1], folder / FILES[2]
    with atomic(table) as temporary, atomic(chart) as image:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            write_rows(stream, [("case", "class", "metric", "a", "b", "difference"), *_rows(comparison)])
        image.write_bytes(differences_png(comparison, metric))
        write_record(folder / FILES[0], comparison)


def _rows(comparison: Comparison) -> Iterator[tuple[object, ...]]:
    for case in comparison.cases:
        for name, metrics in case.classes.items():
            for metric, (a, b) in metrics.items():
                yield case.id, name, metric, a, b, None if a is None or b is None else b - a


def _compared(
    paths: tuple[Path, Path], found: tuple[Evaluation, Evaluation], ids: list[str], only: tuple[list[str], list[str]]
) -> Comparison:
    a, b = ({case.id: case.classes for case in evaluation.cases} for evaluation in found)
    names = [name for name in found[0].classes if name in found[1].classes]
    if not names:
        classes = "; ".join(shortlist(evaluation.classes) for evaluation in found)
        raise UsageError("A and B have no class in common", where=f"{paths[0]}, {paths[1]}", found=classes)
    _require_same_labels(paths, [evaluation.labels for evaluation in found])
    _require_same_references(found, ids, names)
    scores = np.array(
        [[[[_number(getattr(side[id][name], m)) for side in (a, b)] for m in METRICS] for name in names] for id in ids],
        dtype=float,
    ).reshape(len(ids), len(names), len(METRICS), 2)
    both = ~np.isnan(scores).any(-1, keepdims=True)
    count = both.sum(1)
    overall = np.where(count > 0, np.where(both, scores, 0.0).sum(1) / np.maximum(count, 1), np.nan)
    columns = np.concatenate([scores, overall[:, None]], axis=1)
    means = _means(columns)
    pairs, counted = both.sum((0, 1))[:, 0].tolist(), both.any(0).sum(0)[:, 0].tolist()
    mean: dict[ComparedMetric, PairedMean] = {
        metric: paired.model_copy(update={"difference": paired.difference.model_copy(update={"classes": classes})})
        for (metric, paired), classes in zip(means[-1].items(), counted, strict=True)
    }
    defined = dict(zip(METRICS, zip(pairs, counted, strict=True), strict=True))
    undefined = on_undefined(defined, len(ids) * len(names), len(names), what="pairs of scores", where=" in A or B")
    cases = [
        PairedCase(
            id=id,
            classes={
                name: {
                    metric: (_defined(pair[0]), _defined(pair[1])) for metric, pair in zip(METRICS, pairs, strict=True)
                }
                for name, pairs in zip(names, own, strict=True)
            },
        )
        for id, own in zip(ids, scores, strict=True)
    ]
    return Comparison(
        a=str(paths[0]),
        b=str(paths[1]),
        nsd_tolerance_mm=found[0].nsd_tolerance_mm,
        empty_policy=found[0].empty_policy,
        confidence=CONFIDENCE,
        bootstrap_samples=BOOTSTRAP_SAMPLES,
        minimum_cases=MINIMUM_CASES,
        cases=tuple(cases),
        classes=dict(zip(names, means[:-1], strict=True)),
        mean=mean,
        only_a=tuple(only[0]),
        only_b=tuple(only[1]),
        notes=(*_notes(found, only, names, len(ids)), *undefined),
    )


def _means(columns: np.ndarray) -> list[dict[ComparedMetric, PairedMean]]:
    """Paired means of (cases, classes, metrics, 2) scores, by class and metric."""
    both = np.asarray(~np.isnan(columns).any(axis=-1))
    differences = columns[..., 1] - columns[..., 0]
    intervals = bootstrap(differences.reshape(len(columns), -1))
    rows: list[dict[ComparedMetric, PairedMean]] = []
    for c in range(columns.shape[1]):
        row: dict[ComparedMetric, PairedMean] = {}
        for m, metric in enumerate(METRICS):
            pairs = columns[both[:, c, m], c, m]
            gains = (pairs[:, 1] - pairs[:, 0]) * (-1 if metric in LOWER_IS_BETTER else 1)
            wins, losses = int((gains > SAME_SCORE).sum()), int((gains < -SAME_SCORE).sum())
            row[metric] = PairedMean(
                mean_a=float(pairs[:, 0].mean()) if len(pairs) else None,
                mean_b=float(pairs[:, 1].mean()) if len(pairs) else None,
                difference=intervals[c * len(METRICS) + m],
                wins=wins,
                ties=len(pairs) - wins - losses,
                losses=losses,
            )
        rows.append(row)
    return rows


def _notes(
    found: tuple[Evaluation, Evaluation], only: tuple[list[str], list[str]], names: list[str], cases: int
) -> Iterator[str]:
    for side, absent, ids in (("A", "B", only[0]), ("B", "A", only[1])):
        if ids:
            yield f"{len(ids)} case(s) are only in {side} and left out, because {absent} lacks them: {shortlist(ids)}."
    for side, evaluation in zip("AB", found, strict=True):
        more = [name for name in evaluation.classes if name not in names]
        if more:
            yield f"Classes only in {side} are left out: {shortlist(more)}."
        if evaluation.trained_on:
            trained = shortlist(evaluation.trained_on)
            yield f"{side} was trained on {len(evaluation.trained_on)} of its cases ({trained})."
        if evaluation.labels is None:
            yield f"The evaluation of {side} does not record which values its classes have: they are not compared."
    if cases < MINIMUM_CASES:
        yield f"Confidence intervals of fewer than {MINIMUM_CASES} cases are left out."


def _require_same_rules(a: Evaluation, b: Evaluation) -> None:
    for what in ("nsd_tolerance_mm", "empty_policy"):
        if getattr(a, what) != getattr(b, what):
            raise UsageError(
                "A and B were scored by different rules",
                where=what,
                found=f"{getattr(a, what)} in A, {getattr(b, what)} in B",
                remedy=f"Evaluate both with the same {option('nsd_tolerance_mm', flag='--tolerance')} and "
                f"{option('both_empty')}, or give label maps and {option('references', flag='-g')}",
            )


def _require_same_labels(paths: tuple[Path, Path], tables: Sequence[LabelSet | None]) -> None:
    """Check that no class has different values in A and B, and no value different classes; None: not known."""
    known = [
        LabelTable(labels=labels, source=f"{side} ({path})")
        for side, path, labels in zip("AB", paths, tables, strict=True)
        if labels is not None
    ]
    if len(known) == 2 and (pairs := contradictions(*known)):
        raise UsageError(
            "The label tables of A and B contradict each other",
            found="; ".join(pairs),
            remedy="Convert the label maps to one table; where only names differ, write the same into both files. "
            "Evaluate again what was evaluated with another table",
        )


def _require_same_references(found: tuple[Evaluation, Evaluation], ids: list[str], names: list[str]) -> None:
    a, b = ({case.id: case.classes for case in evaluation.cases} for evaluation in found)
    differ = [
        id
        for id in ids
        if not all(
            math.isclose(a[id][name].reference_ml, b[id][name].reference_ml, rel_tol=SAME_VOLUME, abs_tol=SAME_VOLUME)
            for name in names
        )
    ]
    if differ:
        raise UsageError(
            "A and B were scored against different references: volumes of the reference labels differ",
            found=f"{len(differ)} of {len(ids)} case(s): {shortlist(differ)}",
            remedy="Evaluate both against the same label maps, or give the label maps and "
            f"{option('references', flag='-g')}",
        )


def _given(path: Path, references: str | Path | None) -> set[str] | Evaluation:
    """Ids of the label maps that have a reference, or an evaluation."""
    if not path.exists():
        raise UsageError("The predictions or their evaluation do not exist", where=path, remedy="Check the path")
    maps = ids_of(path) if path.is_dir() else set()
    if references is not None and maps:
        return maps & ids_of(Path(references))
    metrics = path / "metrics.json" if path.is_dir() else path
    if metrics.is_file():
        return _with_table(Evaluation.load(metrics))
    if maps:
        raise UsageError(
            "Label maps need references to be scored",
            where=path,
            remedy=f"Name the folder of references with {option('references', flag='-g')}",
        )
    raise UsageError(
        "There is nothing to compare", where=path, expected="label maps, or the metrics.json of rfmed_evaluate"
    )


def _with_table(evaluation: Evaluation) -> Evaluation:
    """An evaluation with its label table: of an earlier version, a table of its classes beside its label maps."""
    if evaluation.labels is not None or not evaluation.cases:
        return evaluation
    case = evaluation.cases[0]
    folders = [Path(path).parent for path in (case.prediction, case.reference)]
    tables: list[LabelTable] = []
    with suppress(DatasetError, RecordError):  # a damaged table says nothing
        tables = read_tables([folder / name for folder in folders for name in (DATASET, PREDICTIONS)], known=[])
    fitting = (table.labels for table in tables if set(table.labels.foreground) == set(evaluation.classes))
    return evaluation.model_copy(update={"labels": next(fitting, None)})


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
