"""Run evaluation protocols by name on one model, and write their CSV files, HTML report and evaluation.json."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from rfmedsam2.arguments import option
from rfmedsam2.errors import UsageError
from rfmedsam2.system.atomic import require_possible_folder, write_record
from rfmedsam2.system.progress import Track, silent
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
from segment_anything_hq.evaluation.scores import ProtocolResult, write_csv
from segment_anything_hq.prompts.clicks import MOST_CLICKS
from segment_anything_hq.records import EvaluationRecord, LatencyRecord, ResultRecord

EVALUATION = "evaluation.json"
PAGE = "evaluation.html"
SAT = "sat"
ALIASES = {"centre": "center"}
"""Other spellings that are accepted."""
PROTOCOLS = "box, box_NOISE (box_0.2, box_0.4), center, points_N (points_1, points_10), clicks, sat"


class Model(Promptable, Interactive, Protocol):
    """A model for all protocols, such as `evaluation.interactive.ClickedPredictor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Results of all protocols that were run.

    Attributes:
        evaluations: results by protocol name, without `sat`.
        seconds: run time by protocol name.
        latency: result of `sat`; None if it was not run.
    """

    evaluations: dict[str, ProtocolResult]
    seconds: dict[str, float]
    latency: SatLatency | None = None


def parse_protocol(name: str, *, clicks: int = MOST_CLICKS) -> PromptRule | ClickProtocol | None:
    """Translate a protocol's name to its settings; None for `sat`, which has none.

    Args:
        name: one of `PROTOCOLS`, or an alias.
        clicks: maximum number of clicks of the protocol `clicks`.

    Raises:
        UsageError: the name is unknown or its number is out of range.
    """
    name = ALIASES.get(name, name)
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
    raise UsageError("Unknown protocol", where=name, expected=PROTOCOLS)


def parse_protocols(names: Sequence[str], *, clicks: int = MOST_CLICKS) -> dict[str, PromptRule | ClickProtocol | None]:
    """`parse_protocol` for several names: settings by name, with aliases replaced and repetitions dropped."""
    return {ALIASES.get(name, name): parse_protocol(name, clicks=clicks) for name in names}


def run_protocols(
    model: Model,
    sets: Sequence[ImageSet],
    names: Sequence[str],
    *,
    clicks: int = MOST_CLICKS,
    seed: int = 0,
    track: Track = silent,
) -> Results:
    """Run protocols one after the other.

    Args:
        model: the model to evaluate.
        sets: data sets, each with at least one sample; may be empty for `sat` alone, which uses a noise image.
        names: names of protocols, see `PROTOCOLS`; aliases are replaced, and each protocol runs once.
        clicks: maximum number of clicks of the protocol `clicks`.
        seed: seed of box noise and random points.
        track: shows progress by protocol and sample.

    Raises:
        UsageError: a protocol is unknown or needs data, a negative seed, and as the protocols raise.
        DatasetError: a set has no samples.
        ImageError: a file cannot be read.
    """
    rules = parse_protocols(names, clicks=clicks)
    if seed < 0:
        raise UsageError("Invalid seed", where=option("seed"), expected="0 or more", found=seed)
    if not sets and set(rules) != {SAT}:
        raise UsageError(
            "These protocols need data",
            found=", ".join(rules),
            remedy=f"Give them with {option('sets', flag='--data')}",
        )
    evaluations: dict[str, ProtocolResult] = {}
    seconds: dict[str, float] = {}
    latency = None
    for name in track(rules, "protocols", len(rules)):
        started, rule = time.perf_counter(), rules[name]
        if rule is None:
            latency = sat_latency(model)
        elif isinstance(rule, ClickProtocol):
            evaluations[name] = evaluate_clicks(model, sets, rule, track=track)
        else:
            evaluations[name] = evaluate_prompted(model, sets, rule, seed=seed, track=track)
        seconds[name] = time.perf_counter() - started
    return Results(evaluations=evaluations, seconds=seconds, latency=latency)


def result_records(found: Results) -> tuple[dict[str, ResultRecord], LatencyRecord | None]:
    """Convert results to records."""
    protocols = {
        name: ResultRecord(
            rule=evaluation.protocol,
            sets={images: _without_nan(metrics) for images, metrics in evaluation.sets.items()},
            overall=_without_nan(evaluation.overall),
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
    values = {name: cast(float, getattr(found.latency, name)) for name in names}
    return protocols, LatencyRecord(**values, points=len(found.latency.points_s))


def require_no_evaluation(out: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Check that a folder holds no evaluation yet, and can be made if it does not exist.

    Raises:
        UsageError: it does; the message names the files.
        StoreError: a file is at its place.
    """
    require_possible_folder(out)
    files = [out / name for name in (EVALUATION, PAGE, *(f"{name}.csv" for name in names if name != SAT))]
    there = [path.name for path in files if path.exists()]
    if there and not overwrite:
        raise UsageError(
            "This folder already holds an evaluation",
            where=out,
            found=", ".join(there),
            remedy=f"Choose another folder, or add {option('overwrite', True)}",
        )


def write_results(out: Path, found: Results, record: EvaluationRecord, *, about: Mapping[str, str]) -> tuple[Path, ...]:
    """Write evaluation.json, one CSV file per protocol, and evaluation.html unless only latency was measured.

    Args:
        out: output folder, created if missing.
        found: results of `run_protocols`.
        record: the record to write, with the values of `result_records`.
        about: facts shown below the report's heading.

    Returns:
        the files written.

    Raises:
        StoreError: a file cannot be written.
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


def _without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """NaN replaced by None, since JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
