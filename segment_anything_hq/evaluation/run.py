"""Protocols by the names that commands know them by: run on one model, and written as CSV, one page and one record."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

from rfmedsam2.errors import UsageError
from rfmedsam2.records.base import Record, VersionedRecord
from rfmedsam2.store.atomic import write_record
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.evaluation.interactive import ClickProtocol, Interactive, evaluate_clicks
from segment_anything_hq.evaluation.latency import SatLatency, sat_latency
from segment_anything_hq.evaluation.protocols import (
    BoxRule,
    CenterRule,
    Promptable,
    PromptRule,
    RandomRule,
    evaluate_prompted,
)
from segment_anything_hq.evaluation.report import write_page
from segment_anything_hq.evaluation.scores import Evaluation, write_csv
from segment_anything_hq.prompts.clicks import MOST_CLICKS

EVALUATION = "evaluation.json"
PAGE = "evaluation.html"
SAT = "sat"
WORDS = "box, box_NOISE (box_0.2, box_0.4), center, points_N (points_1, points_10), clicks, sat"


class Model(Promptable, Interactive, Protocol):
    """What all protocols ask (`interactive_predictor.InteractivePredictor`)."""


class Track(Protocol):
    """Shows progress around what it passes on."""

    def __call__(self, items: Iterable[str], description: str, total: int) -> Iterable[str]:
        """The items, one after the other."""
        ...


class ResultRecord(Record):
    """What one protocol found."""

    rule: str
    """In words."""
    sets: dict[str, dict[str, float | None]]
    """Set -> figure -> value: IoUs of 0 to 1, counts, seconds."""
    overall: dict[str, float | None]
    overall_rule: str
    skipped: tuple[str, ...]
    csv: str
    """File of all samples."""
    seconds: float


class LatencyRecord(Record):
    """Latency of segmenting anything, seconds."""

    total_s: float
    encode_s: float
    point_median_s: float
    point_95_s: float
    points: int


class EvaluationRecord(VersionedRecord):
    """The file evaluation.json."""

    format: Literal[1] = 1
    network: dict[str, str]
    """What was evaluated: method, backbone, files of weights ..."""
    weights_sha256: str
    device: str
    seed: int
    data: dict[str, int]
    """Set -> its samples."""
    data_words: tuple[str, ...]
    """As they were named."""
    held_out: float | None
    """Only this share of the data, which a training held out; None: all of it."""
    protocols: dict[str, ResultRecord]
    latency: LatencyRecord | None
    code_version: str
    created: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What the protocols found, by name.

    Attributes:
        evaluations: of all but `sat`.
        seconds: that each took.
        latency: None: was not asked for.
    """

    evaluations: dict[str, Evaluation]
    seconds: dict[str, float]
    latency: SatLatency | None = None


def rule_of(name: str, *, clicks: int = MOST_CLICKS) -> PromptRule | ClickProtocol | None:
    """What a protocol's name stands for; None: `sat`, which has no rule.

    Args:
        name: one of `WORDS`.
        clicks: the most that `clicks` makes.

    Raises:
        UsageError: no protocol has this name, or its figure cannot be.
    """
    if name == SAT:
        return None
    if name == "clicks":
        return ClickProtocol(max_clicks=clicks, miou_at=(5,) if clicks >= 5 else ())
    if name == "center":
        return CenterRule()
    noise = re.fullmatch(r"box(?:_(\d*\.?\d+))?", name)
    if noise is not None and float(noise[1] or 0) <= 1:
        return BoxRule(noise=float(noise[1] or 0))
    points = re.fullmatch(r"points_(\d{1,6})", name)
    if points is not None:
        return RandomRule(count=int(points[1]))
    raise UsageError("There is no such protocol", where=name, expected=WORDS)


def run_protocols(
    model: Model,
    sets: Sequence[ImageSet],
    names: Sequence[str],
    *,
    clicks: int = MOST_CLICKS,
    seed: int = 0,
    track: Track | None = None,
) -> Results:
    """Run protocols one after the other.

    Args:
        model: what is evaluated.
        sets: with at least one sample each; none are needed for `sat` alone, whose picture is one of noise.
        names: see `WORDS`; each once.
        clicks: the most that `clicks` makes.
        seed: of noise and random points.
        track: shows progress by protocol.

    Raises:
        UsageError: an unknown protocol, or one whose data were not named; what the protocols raise.
        DatasetError: a set without samples.
        ImageError: a file that cannot be read.
    """
    rules = {name: rule_of(name, clicks=clicks) for name in names}
    if not sets and set(rules) != {SAT}:
        raise UsageError("These protocols need data", found=", ".join(rules), remedy="Name it with --data")
    evaluations: dict[str, Evaluation] = {}
    seconds: dict[str, float] = {}
    latency = None
    for name in track(rules, "protocols", len(rules)) if track else rules:
        started, rule = time.perf_counter(), rules[name]
        if rule is None:
            latency = sat_latency(model)
        elif isinstance(rule, ClickProtocol):
            evaluations[name] = evaluate_clicks(model, sets, rule)
        else:
            evaluations[name] = evaluate_prompted(model, sets, rule, seed=seed)
        seconds[name] = time.perf_counter() - started
    return Results(evaluations=evaluations, seconds=seconds, latency=latency)


def result_records(found: Results) -> tuple[dict[str, ResultRecord], LatencyRecord | None]:
    """Plain figures of what was found, for the record."""
    protocols = {
        name: ResultRecord(
            rule=evaluation.protocol,
            sets={images: _defined(figures) for images, figures in evaluation.sets.items()},
            overall=_defined(evaluation.overall),
            overall_rule=evaluation.overall_rule,
            skipped=tuple(map(str, evaluation.skipped)),
            csv=f"{name}.csv",
            seconds=round(found.seconds[name], 3),
        )
        for name, evaluation in found.evaluations.items()
    }
    if found.latency is None:
        return protocols, None
    names = ("total_s", "encode_s", "point_median_s", "point_95_s")
    taken = {name: cast(float, getattr(found.latency, name)) for name in names}
    return protocols, LatencyRecord(**taken, points=len(found.latency.points_s))


def require_free(out: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Make sure that a folder holds no evaluation yet.

    Raises:
        UsageError: it does; names the files.
    """
    files = [out / name for name in (EVALUATION, PAGE, *(f"{name}.csv" for name in names if name != SAT))]
    there = [path.name for path in files if path.exists()]
    if there and not overwrite:
        raise UsageError(
            "This folder holds an evaluation already",
            where=out,
            found=", ".join(there),
            remedy="Choose another folder, or add --overwrite",
        )


def write_results(out: Path, found: Results, record: EvaluationRecord, *, about: Mapping[str, str]) -> tuple[Path, ...]:
    """Write evaluation.json, one CSV a protocol, and evaluation.html where there is more than a latency.

    Args:
        out: folder, which is made.
        found: what `run_protocols` gave.
        record: with the figures of `result_records`.
        about: facts for the head of the page.

    Returns:
        the files.

    Raises:
        StoreError: a file that cannot be written.
    """
    files = [out / f"{name}.csv" for name in found.evaluations]
    for path, evaluation in zip(files, found.evaluations.values(), strict=True):
        write_csv(path, evaluation)
    if found.evaluations:
        files.append(out / PAGE)
        title = f"{record.network['method']} on {record.network['backbone']}"
        write_page(files[-1], list(found.evaluations.values()), title=title, about=about)
    files.append(out / EVALUATION)
    write_record(files[-1], record)
    return tuple(files)


def _defined(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no figure that is none."""
    return {name: None if math.isnan(value) else value for name, value in figures.items()}
