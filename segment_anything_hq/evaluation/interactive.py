"""Evaluation by simulated clicks: NoC, NoF, k-mIoU and seconds per click, following RITM's evaluation loop.

NoC@t is the number of clicks until the IoU is at least t, or the maximum number of clicks if it never is. NoF@t counts
the samples that never reach t; the published count (here: legacy) also includes those that reach it only with the very
last click.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import numpy as np

from rfmedsam2.errors import UsageError
from rfmedsam2.system.progress import Track, silent
from segment_anything_hq.data.checks import why_empty
from segment_anything_hq.data.datasets import Fault, ImageSet, read_ahead
from segment_anything_hq.evaluation.protocols import predicted_mask, require_unique_names
from segment_anything_hq.evaluation.scores import (
    Chart,
    Column,
    Curve,
    ProtocolResult,
    SamplePrediction,
    SampleScore,
    WorstK,
    mean,
)
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.prompts.clicks import MOST_CLICKS, iou, next_click
from segment_anything_hq.prompts.prompt import Click, Prompt

THRESHOLD = 0.49
"""Probability above which a pixel belongs to the mask (RITM's default)."""

ClickFn = Callable[[np.ndarray, np.ndarray, Sequence[Click]], Click]
"""Ground truth (H, W) int8, prediction (H, W) bool and the clicks so far -> the next click."""


class Interactive(Protocol):
    """A model for interactive segmentation with clicks."""

    def set_image(self, image: np.ndarray) -> None:
        """Set the image, (H, W, 3) uint8 RGB, and forget all clicks."""
        ...

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        """Probabilities (H, W) after all clicks so far.

        `previous` are the probabilities of the last call: those after all but the last click or, where the clicks are
        others (SAT latency), those of the prompt before; None at the first click of an object.
        """
        ...


class ClickedPredictor:
    """An `InteractivePredictor` as evaluations ask a model: with all clicks of an object at every call.

    Args:
        predictor: the wrapped predictor; it receives only the new clicks.
    """

    def __init__(self, predictor: InteractivePredictor) -> None:
        self.predictor = predictor

    def set_image(self, image: np.ndarray) -> None:
        """See `Interactive`."""
        self.predictor.set_image(image)

    def segment(self, prompt: Prompt) -> np.ndarray:
        """See `protocols.Promptable`."""
        return self.predictor.segment(prompt)

    def predict(self, clicks: Sequence[Click], previous: np.ndarray | None) -> np.ndarray:
        """See `Interactive`; the mask before is the predictor's own last one."""
        if previous is None:
            self.predictor.reset()
            for click in clicks[:-1]:
                self.predictor.click(click.x, click.y, positive=click.positive)
        elif tuple(clicks[:-1]) != self.predictor.prompt.clicks:
            return self.predictor.segment(Prompt(clicks=tuple(clicks)), after_last=True)
        last = clicks[-1]
        return self.predictor.click(last.x, last.y, positive=last.positive)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickProtocol:
    """Settings of a click evaluation.

    Attributes:
        targets: IoU targets of NoC and NoF.
        max_clicks: maximum number of clicks per object.
        miou_at: click counts at which the mean IoU is reported; every sample gets at least the largest of them.
        threshold: probability above which a pixel belongs to the mask.
        stop: stop at the largest target (RITM); False: always make all clicks.
    """

    targets: tuple[float, ...] = (0.90, 0.95)
    max_clicks: int = MOST_CLICKS
    miou_at: tuple[int, ...] = (5,)
    threshold: float = THRESHOLD
    stop: bool = True

    def __post_init__(self) -> None:
        if self.max_clicks < 1 or any(not 1 <= k <= self.max_clicks for k in self.miou_at):
            raise UsageError(
                "max_clicks must be at least 1, and miou_at must lie within it",
                found=f"max_clicks {self.max_clicks}, miou_at {self.miou_at}",
            )
        if not self.targets or not all(isinstance(t, Real) and 0 < t <= 1 for t in self.targets):
            raise UsageError("targets must be IoUs", expected="one or more, above 0 and up to 1", found=self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionTrace:
    """Clicks and results on one object.

    Attributes:
        clicks: the clicks, in order.
        ious: IoU after each click.
        prediction: (H, W) bool, the mask after the last click.
        seconds: time spent in the model's `predict`.
    """

    clicks: tuple[Click, ...]
    ious: tuple[float, ...]
    prediction: np.ndarray
    seconds: float


def simulate_clicks(
    model: Interactive, ground_truth: np.ndarray, protocol: ClickProtocol, *, choose_click: ClickFn = next_click
) -> InteractionTrace:
    """Simulate clicks on one object until the target IoU or the maximum number of clicks is reached.

    Args:
        model: a model whose image has been set.
        ground_truth: (H, W) int8: 1 object, 0 background, -1 ignored.
        protocol: targets and maximum number of clicks.
        choose_click: places the next click; RITM's rule by default.

    Raises:
        UsageError: more clicks are asked for than the image has pixels, or a prediction has another size than the
            ground truth.
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
    min_clicks = max(protocol.miou_at, default=1)
    seconds = 0.0
    for number in range(1, protocol.max_clicks + 1):
        clicks.append(choose_click(ground_truth, predicted, clicks))
        started = time.perf_counter()
        previous = model.predict(tuple(clicks), previous)
        seconds += time.perf_counter() - started
        predicted = predicted_mask(previous, ground_truth, protocol.threshold)
        ious.append(iou(ground_truth, predicted))
        if protocol.stop and number >= min_clicks and ious[-1] >= max(protocol.targets):
            break
    return InteractionTrace(clicks=tuple(clicks), ious=tuple(ious), prediction=predicted, seconds=seconds)


def noc(ious: Sequence[float], target: float, max_clicks: int = MOST_CLICKS) -> int:
    """Number of clicks until the IoU reaches the target; `max_clicks` if it never does."""
    return next((number for number, value in enumerate(ious, 1) if value >= target), max_clicks)


def failed(ious: Sequence[float], target: float) -> bool:
    """Whether the IoU never reaches the target."""
    return not any(value >= target for value in ious)


def miou_at(runs: Sequence[Sequence[float]], clicks: int) -> float:
    """Mean IoU after a number of clicks.

    Args:
        runs: for each sample, the IoU after each click.
        clicks: number of clicks, at least 1.

    Raises:
        UsageError: a sample has fewer clicks.
    """
    short = [len(ious) for ious in runs if len(ious) < clicks]
    if short:
        raise UsageError(
            f"The mean IoU after {clicks} clicks is undefined",
            found=f"{len(short)} samples that stopped earlier",
            remedy="List that number of clicks in miou_at, so that no sample stops before it",
        )
    return mean([ious[clicks - 1] for ious in runs])


def evaluate_clicks(
    model: Interactive,
    sets: Sequence[ImageSet],
    protocol: ClickProtocol | None = None,
    *,
    choose_click: ClickFn = next_click,
    worst: int = 6,
    track: Track = silent,
) -> ProtocolResult:
    """Evaluate a model with simulated clicks on whole sets.

    An image shared by consecutive samples is set once. Seconds per click include setting the image, as published, but
    not reading files. Samples with an empty mask are skipped and listed in the result.

    Args:
        model: the model to evaluate.
        sets: data sets, each with at least one sample.
        protocol: targets and clicks; None: those of RITM and SAM-REF.
        choose_click: places the next click; RITM's rule by default.
        worst: number of worst predictions (by last IoU) to keep.
        track: shows progress by sample.

    Raises:
        DatasetError: a set has no samples.
        ImageError: a file cannot be read.
        UsageError: two sets have the same name, more clicks are asked for than an image has pixels, or a prediction has
            another size than its image.
    """
    protocol, kept = protocol or ClickProtocol(), WorstK(worst)
    scores: list[SampleScore] = []
    skipped: list[Fault] = []
    runs: dict[str, list[InteractionTrace]] = {}
    encoding: dict[str, float] = {}
    for images in require_unique_names(sets):
        runs[images.name], encoding[images.name] = [], 0.0
        current: np.ndarray | None = None
        samples = track(read_ahead(images.require_samples().samples), images.name, len(images.samples))
        for sample, image, ground_truth in samples:
            if not (ground_truth == 1).any():
                skipped.append(Fault(where=f"{images.name} {sample.id}", what=why_empty(sample)))
                continue
            if image is not current:
                started = time.perf_counter()
                model.set_image(image)
                encoding[images.name] += time.perf_counter() - started
                current = image
            run = simulate_clicks(model, ground_truth, protocol, choose_click=choose_click)
            runs[images.name].append(run)
            scores.append(SampleScore(set=images.name, id=sample.id, values=_sample_values(run, protocol)))
            kept.update(
                SamplePrediction(
                    set=images.name,
                    sample=sample,
                    score=run.ious[-1],
                    prediction=run.prediction,
                    prompt=Prompt(clicks=run.clicks),
                )
            )
    return ProtocolResult(
        protocol=_describe(protocol),
        columns=_columns(protocol),
        sets={name: _metrics(traces, encoding[name], protocol) for name, traces in runs.items()},
        overall=_metrics([trace for traces in runs.values() for trace in traces], sum(encoding.values()), protocol),
        overall_rule="all samples together",
        sample_columns=_sample_columns(protocol),
        samples=tuple(scores),
        chart=_iou_chart(runs, protocol),
        worst=kept.worst_first(),
        skipped=tuple(skipped),
    )


def _percent(target: float) -> str:
    return f"{100 * target:g}"


def _metrics(runs: Sequence[InteractionTrace], encoding: float, protocol: ClickProtocol) -> dict[str, float]:
    """NoC, both NoF counts, k-mIoU and seconds per click over samples."""
    ious = [run.ious for run in runs]
    metrics: dict[str, float] = {}
    for target in protocol.targets:
        numbers = [noc(values, target, protocol.max_clicks) for values in ious]
        metrics[f"noc{_percent(target)}"] = mean(numbers)
        metrics[f"nof{_percent(target)}"] = sum(failed(values, target) for values in ious)
        metrics[f"nof{_percent(target)}_legacy"] = sum(number == protocol.max_clicks for number in numbers)
    metrics |= {f"miou_at_{k}": miou_at(ious, k) for k in protocol.miou_at}
    clicks = sum(len(values) for values in ious)
    metrics["spc_s"] = (encoding + sum(run.seconds for run in runs)) / max(clicks, 1)
    return metrics | {"samples": len(runs)}


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
    spc = Column(name="spc_s", title="SPC", meaning="Seconds per click, image encoding included", unit="s", digits=4)
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
    """The CSV values of a sample; NoC is None for a target that is not reached."""
    values: dict[str, float | None] = {"clicks": len(run.clicks), "iou_last": run.ious[-1], "seconds": run.seconds}
    for target in protocol.targets:
        reached = None if failed(run.ious, target) else noc(run.ious, target, protocol.max_clicks)
        values[f"noc{_percent(target)}"] = reached
    return values | {
        f"iou_{k}": run.ious[k - 1] if k <= len(run.ious) else None for k in range(1, protocol.max_clicks + 1)
    }


def _iou_chart(runs: dict[str, list[InteractionTrace]], protocol: ClickProtocol) -> Chart:
    """Mean IoU after each click; samples that stopped early keep their last IoU."""
    numbers = tuple(float(k) for k in range(1, protocol.max_clicks + 1))
    curves = []
    for name, found in runs.items():
        rows = [(*run.ious, *[run.ious[-1]] * (protocol.max_clicks - len(run.ious))) for run in found]
        curves.append(Curve(name=name, x=numbers, y=tuple(np.mean(rows, axis=0).tolist())))
    return Chart(title="Mean IoU after each click", x_title="click", y_title="mean IoU", curves=tuple(curves))


def _describe(protocol: ClickProtocol) -> str:
    end = (
        f"until the IoU is {_percent(max(protocol.targets))} % or {protocol.max_clicks} clicks are made"
        if protocol.stop
        else f"{protocol.max_clicks} for every sample"
    )
    min_clicks = max(protocol.miou_at, default=1)
    at_least = f", at least {min_clicks}" if protocol.stop and min_clicks > 1 else ""
    return (
        f"Clicks in the center of the largest error (RITM), {end}{at_least}; mask threshold {protocol.threshold:g}; "
        "ignored pixels are left out."
    )
