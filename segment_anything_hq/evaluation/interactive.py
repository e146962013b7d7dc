"""Evaluation by simulated clicks: NoC, NoF, k-mIoU and seconds per click, by RITM's loop on any model.

NoC@t is the number of the first click after which the IoU is t or more, or the most clicks allowed where it never is.
NoF@t counts samples that never reach t; the published count (here: legacy) also takes those that reach it with the
very last click.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rfmedsam2.errors import UsageError
from segment_anything_hq.data.datasets import Fault, ImageSet, read_ahead
from segment_anything_hq.evaluation.protocols import named_apart, predicted_mask
from segment_anything_hq.evaluation.scores import Case, Chart, Column, Curve, Evaluation, SampleScore, WorstK, mean
from segment_anything_hq.prompts.clicks import MOST_CLICKS, Click, iou, next_click

THRESHOLD = 0.49
"""A pixel is predicted where its probability is above this (RITM's default)."""

Clicker = Callable[[np.ndarray, np.ndarray, Sequence[Click]], Click]
"""Truth (H, W) int8, prediction (H, W) bool and the clicks so far -> the next click."""


class Interactive(Protocol):
    """A model that is guided by clicks."""

    def set_image(self, image: np.ndarray) -> None:
        """Take a picture (H, W, 3) uint8, RGB; what was clicked before is forgotten."""
        ...

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        """Probabilities (H, W) after all clicks so far.

        `previous` is the answer to all but the last click, None at the first click of an object.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickProtocol:
    """The figures of a click evaluation.

    Attributes:
        targets: IoUs that NoC and NoF are given for.
        max_clicks: clicks allowed.
        miou_at: numbers of clicks that the mean IoU is given for; no sample stops before the largest of them.
        threshold: a pixel is predicted where its probability is above this.
        stop: stop at the largest target (RITM); False: always make all clicks.
    """

    targets: tuple[float, ...] = (0.90, 0.95)
    max_clicks: int = MOST_CLICKS
    miou_at: tuple[int, ...] = (5,)
    threshold: float = THRESHOLD
    stop: bool = True

    def __post_init__(self) -> None:
        if self.max_clicks < 1 or any(not 1 <= k <= self.max_clicks for k in self.miou_at):
            found = f"{self.max_clicks} clicks, mean IoU at {self.miou_at}"
            raise UsageError("The clicks do not fit together", expected="1 or more, mean IoU within them", found=found)
        if not self.targets or any(not 0 < t <= 1 for t in self.targets):
            raise UsageError("Clicks need a target", expected="IoUs above 0, up to 1", found=self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionTrace:
    """What happened on one object.

    Attributes:
        clicks: as made.
        ious: after each click.
        prediction: (H, W) bool after the last.
        seconds: spent in the model.
    """

    clicks: tuple[Click, ...]
    ious: tuple[float, ...]
    prediction: np.ndarray
    seconds: float


def simulate_clicks(
    model: Interactive, ground_truth: np.ndarray, protocol: ClickProtocol, *, clicker: Clicker = next_click
) -> InteractionTrace:
    """Click one object of the picture that was set, until it fits or the clicks are used up.

    Args:
        model: with the object's picture set.
        ground_truth: (H, W) int8: 1 object, 0 background, -1 ignored.
        protocol: when to stop.
        clicker: who clicks.

    Raises:
        UsageError: more clicks than pixels; an answer of another size than the truth.
    """
    if protocol.max_clicks > ground_truth.size:
        raise UsageError(
            "There are more clicks than pixels",
            expected=f"up to {ground_truth.size} clicks",
            found=f"{protocol.max_clicks} clicks",
        )
    clicks: list[Click] = []
    ious: list[float] = []
    predicted = np.zeros(ground_truth.shape, bool)
    previous: np.ndarray | None = None
    least = max(protocol.miou_at, default=1)
    seconds = 0.0
    for number in range(1, protocol.max_clicks + 1):
        clicks.append(clicker(ground_truth, predicted, clicks))
        started = time.perf_counter()
        previous = model.predict(tuple(clicks), previous)
        seconds += time.perf_counter() - started
        predicted = predicted_mask(previous, ground_truth, protocol.threshold)
        ious.append(iou(ground_truth, predicted))
        if protocol.stop and number >= least and ious[-1] >= max(protocol.targets):
            break
    return InteractionTrace(clicks=tuple(clicks), ious=tuple(ious), prediction=predicted, seconds=seconds)


def noc(ious: Sequence[float], target: float, max_clicks: int = MOST_CLICKS) -> int:
    """Number of the first click that reaches the target; `max_clicks` where none does."""
    return next((number for number, value in enumerate(ious, 1) if value >= target), max_clicks)


def failed(ious: Sequence[float], target: float) -> bool:
    """Whether no click reaches the target."""
    return not any(value >= target for value in ious)


def miou_at(runs: Sequence[Sequence[float]], clicks: int) -> float:
    """Mean IoU after so many clicks.

    Args:
        runs: IoUs after each click, one run a sample.
        clicks: 1 or more.

    Raises:
        UsageError: a run that stopped before.
    """
    short = [len(ious) for ious in runs if len(ious) < clicks]
    if short:
        raise UsageError(
            f"The mean IoU after {clicks} clicks is not known",
            found=f"{len(short)} samples that stopped before",
            remedy="Name that number of clicks in miou_at, so that no sample stops before it",
        )
    return mean([ious[clicks - 1] for ious in runs])


def evaluate_clicks(
    model: Interactive,
    sets: Sequence[ImageSet],
    protocol: ClickProtocol | None = None,
    *,
    clicker: Clicker = next_click,
    worst: int = 6,
) -> Evaluation:
    """Click through whole sets.

    A picture that several samples in a row share is set once; the seconds per click hold the seconds of setting it, as
    published, but not those of reading files. Samples with an empty truth are skipped, and named.

    Args:
        model: what is evaluated.
        sets: with at least one sample each.
        protocol: targets and clicks; RITM's and SAM-REF's where left out.
        clicker: who clicks.
        worst: cases to keep with their masks, by the last IoU.

    Raises:
        DatasetError: a set without samples.
        ImageError: a file that cannot be read.
        UsageError: two sets of one name; more clicks than pixels; an answer of another size than its picture.
    """
    protocol = protocol or ClickProtocol()
    kept = WorstK(worst)
    scores: list[SampleScore] = []
    skipped: list[Fault] = []
    runs: dict[str, list[InteractionTrace]] = {}
    encoding: dict[str, float] = {}
    for images in named_apart(sets):
        runs[images.name], encoding[images.name] = [], 0.0
        current: np.ndarray | None = None
        for sample, image, ground_truth in read_ahead(images.require_samples().samples):
            if not (ground_truth == 1).any():
                skipped.append(Fault(where=f"{images.name} {sample.id}", what="the mask is empty"))
                continue
            if image is not current:
                started = time.perf_counter()
                model.set_image(image)
                encoding[images.name] += time.perf_counter() - started
                current = image
            run = simulate_clicks(model, ground_truth, protocol, clicker=clicker)
            runs[images.name].append(run)
            scores.append(SampleScore(set=images.name, id=sample.id, values=_sample_values(run, protocol)))
            kept.update(
                Case(
                    set=images.name,
                    sample=sample,
                    score=run.ious[-1],
                    prediction=run.prediction,
                    clicks=run.clicks,
                )
            )
    return Evaluation(
        protocol=_words(protocol),
        columns=_columns(protocol),
        sets={name: _figures(found, encoding[name], protocol) for name, found in runs.items()},
        overall=_figures([r for found in runs.values() for r in found], sum(encoding.values()), protocol),
        overall_rule="all samples together",
        sample_columns=_sample_columns(protocol),
        samples=tuple(scores),
        chart=_progress(runs, protocol),
        worst=kept.cases(),
        skipped=tuple(skipped),
    )


def _percent(target: float) -> str:
    return f"{100 * target:g}"


def _figures(runs: Sequence[InteractionTrace], encoding: float, protocol: ClickProtocol) -> dict[str, float]:
    """NoC, both NoF, k-mIoU and seconds per click of some samples."""
    ious = [run.ious for run in runs]
    figures: dict[str, float] = {}
    for target in protocol.targets:
        numbers = [noc(values, target, protocol.max_clicks) for values in ious]
        figures[f"noc{_percent(target)}"] = mean(numbers)
        figures[f"nof{_percent(target)}"] = sum(failed(values, target) for values in ious)
        figures[f"nof{_percent(target)}_legacy"] = sum(number == protocol.max_clicks for number in numbers)
    figures |= {f"miou_at_{k}": miou_at(ious, k) for k in protocol.miou_at}
    clicks = sum(len(values) for values in ious)
    figures["spc_s"] = (encoding + sum(run.seconds for run in runs)) / max(clicks, 1)
    return figures | {"samples": len(runs)}


def _columns(protocol: ClickProtocol) -> tuple[Column, ...]:
    columns: list[Column] = []
    for target in protocol.targets:
        t = _percent(target)
        last = f"or only with click {protocol.max_clicks}, as published"
        columns += [
            Column(name=f"noc{t}", title=f"NoC{t}", meaning=f"Mean number of clicks to an IoU of {t} %"),
            Column(name=f"nof{t}", title=f"NoF{t}", meaning=f"Samples that never reach {t} %", digits=0),
            Column(
                name=f"nof{t}_legacy",
                title=f"NoF{t} legacy",
                meaning=f"Samples that never reach {t} %, {last}",
                digits=0,
            ),
        ]
    columns += [
        Column(name=f"miou_at_{k}", title=f"{k}-mIoU", meaning=f"Mean IoU after {k} clicks", unit="%", scale=100)
        for k in protocol.miou_at
    ]
    spc = Column(
        name="spc_s", title="SPC", meaning="Seconds per click, encoding of pictures included", unit="s", digits=4
    )
    return (*columns, spc, Column(name="samples", title="Samples", meaning="Objects clicked", digits=0))


def _sample_columns(protocol: ClickProtocol) -> tuple[Column, ...]:
    nocs = [
        Column(
            name=f"noc{_percent(t)}", title=f"NoC{_percent(t)}", meaning=f"First click with {_percent(t)} %", digits=0
        )
        for t in protocol.targets
    ]
    at = [
        Column(name=f"iou_{k}", title=f"IoU at {k}", meaning=f"IoU after {k} clicks", unit="%", scale=100)
        for k in protocol.miou_at
    ]
    last = Column(name="iou_last", title="Last IoU", meaning="IoU after the last click", unit="%", scale=100)
    return (last, *nocs, *at, Column(name="clicks", title="Clicks", meaning="Clicks made", digits=0))


def _sample_values(run: InteractionTrace, protocol: ClickProtocol) -> dict[str, float | None]:
    """What the CSV holds of a sample; a target that is not reached has no number of clicks."""
    values: dict[str, float | None] = {"clicks": len(run.clicks), "iou_last": run.ious[-1], "seconds": run.seconds}
    for target in protocol.targets:
        reached = None if failed(run.ious, target) else noc(run.ious, target, protocol.max_clicks)
        values[f"noc{_percent(target)}"] = reached
    return values | {
        f"iou_{k}": run.ious[k - 1] if k <= len(run.ious) else None for k in range(1, protocol.max_clicks + 1)
    }


def _progress(runs: dict[str, list[InteractionTrace]], protocol: ClickProtocol) -> Chart:
    """Mean IoU by click; the last IoU of a sample that stopped stands for the clicks it did not need."""
    numbers = tuple(float(k) for k in range(1, protocol.max_clicks + 1))
    curves = []
    for name, found in runs.items():
        rows = [(*run.ious, *[run.ious[-1]] * (protocol.max_clicks - len(run.ious))) for run in found]
        curves.append(Curve(name=name, x=numbers, y=tuple(np.mean(rows, axis=0).tolist())))
    return Chart(title="Mean IoU after each click", x_title="click", y_title="mean IoU", curves=tuple(curves))


def _words(protocol: ClickProtocol) -> str:
    end = (
        f"until the IoU is {_percent(max(protocol.targets))} % or {protocol.max_clicks} clicks are made"
        if protocol.stop
        else f"{protocol.max_clicks} for every sample"
    )
    least = max(protocol.miou_at, default=1)
    at_least = f", at least {least}" if protocol.stop and least > 1 else ""
    return (
        f"Clicks in the middle of the largest error (RITM), {end}{at_least}; a pixel is predicted where its "
        f"probability is above {protocol.threshold:g}; ignored pixels count for nothing."
    )
