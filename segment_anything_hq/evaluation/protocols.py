"""Evaluation with fixed prompts: mIoU and mBIoU from boxes, noisy boxes, center points and random points.

As HQ-SAM is evaluated: masks at the images' original sizes, mean over the samples of a set, then mean over the sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rfmedsam2.errors import UsageError
from rfmedsam2.metrics.boundary import DILATION_RATIO, boundary_iou
from rfmedsam2.system.progress import Track, silent
from segment_anything_hq.data.checks import why_empty
from segment_anything_hq.data.datasets import Fault, ImageSet, read_ahead
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
from segment_anything_hq.prompts.clicks import IGNORE, iou, next_click
from segment_anything_hq.prompts.prompt import Click, Prompt

THRESHOLD = 0.5
"""Probability above which a pixel belongs to the mask; a logit of 0."""

IOU = Column(name="iou", title="mIoU", meaning="Mean intersection over union", unit="%", scale=100)
BOUNDARY_IOU = Column(name="boundary_iou", title="mBIoU", meaning="Mean boundary IoU", unit="%", scale=100)
SAMPLES = Column(name="samples", title="Samples", meaning="Objects that the means count", digits=0)
SAMPLE_COLUMNS = (
    Column(name="boundary_iou", title="BIoU", meaning="Boundary IoU", unit="%", scale=100),
    Column(name="iou", title="IoU", meaning="Intersection over union", unit="%", scale=100),
)


class Promptable(Protocol):
    """A model that segments the object shown by a prompt."""

    def set_image(self, image: np.ndarray) -> None:
        """Set the image, (H, W, 3) uint8 RGB."""
        ...

    def segment(self, prompt: Prompt) -> np.ndarray:
        """Probabilities (H, W) for the image that was set last."""
        ...


class PromptRule(Protocol):
    """How prompts are derived from a ground-truth mask."""

    @property
    def description(self) -> str:
        """The rule in words, for reports."""
        ...

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:
        """Yield one prompt per trial for a ground truth (H, W) int8 with at least one object pixel."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxRule:
    """The tight box of the mask, with DN-DETR's noise on center and size (HQ-SAM paper, Table 4: 0, 0.2 and 0.4)."""

    noise: float = 0.0

    @property
    def description(self) -> str:
        """The rule in words, for reports."""
        return "ground-truth boxes" + (f" with noise {self.noise:g} (DN-DETR)" if self.noise else "")

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:
        """Yield one box."""
        box = (
            noisy_box(mask_box(ground_truth), self.noise, ground_truth.shape, rng)
            if self.noise
            else mask_box(ground_truth)
        )
        x0, y0, x1, y1 = box.tolist()
        yield Prompt(box=(x0, y0, x1, y1))


@dataclass(frozen=True, slots=True, kw_only=True)
class CenterRule:
    """One point: the pixel deepest inside the object (HQ-SAM supplement, section 2)."""

    @property
    def description(self) -> str:
        """The rule in words, for reports."""
        return "one point, deepest inside the object"

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:  # noqa: ARG002
        """Yield one point."""
        yield Prompt(clicks=(next_click(ground_truth, np.zeros(ground_truth.shape, bool)),))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRule:
    """Random points on the object, in several trials whose scores are averaged (HQ-SAM supplement, section 2)."""

    count: int
    trials: int = 3

    def __post_init__(self) -> None:
        if self.count < 1 or self.trials < 1:
            found = f"{self.count} points, {self.trials} trials"
            raise UsageError("count and trials must be at least 1", found=found)

    @property
    def description(self) -> str:
        """The rule in words, for reports."""
        trials = f", mean of {self.trials} trials" if self.trials > 1 else ""
        return f"{self.count} random point{'s' if self.count > 1 else ''} of the object{trials}"

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:
        """Yield one set of points per trial, without repetition; small objects give fewer points."""
        pixels = np.flatnonzero(ground_truth == 1)
        for _ in range(self.trials):
            drawn = rng.choice(pixels, size=min(self.count, pixels.size), replace=False)
            rows, columns = np.unravel_index(drawn, ground_truth.shape)
            places = zip(columns.tolist(), rows.tolist(), strict=True)
            yield Prompt(clicks=tuple(Click(x=x, y=y, positive=True) for x, y in places))


def mask_box(ground_truth: np.ndarray) -> np.ndarray:
    """The tight box (4,) float32 XYXY, as pixel indices of the first and last column and row.

    Raises:
        UsageError: the mask is empty.
    """
    rows, columns = (np.flatnonzero((ground_truth == 1).any(axis)) for axis in (1, 0))
    if not rows.size:
        raise UsageError("The mask is empty, so it has no box")
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


def noisy_box(box: np.ndarray, scale: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Add DN-DETR's noise to a box: shift the center by up to scale / 2 of its size, change the size by up to scale.

    Args:
        box: (4,) XYXY, pixel indices.
        scale: noise scale, 0 to 1; center and size change by independent uniform draws.
        shape: (H, W) of the image, at whose edges the box is clipped.
        rng: source of randomness.

    Raises:
        UsageError: the scale is not between 0 and 1.
    """
    if not 0 <= scale <= 1:
        raise UsageError("Box noise must be between 0 and 1", found=scale)
    center, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    draws = rng.uniform(-1, 1, (2, 2)) * scale
    center, size = center + draws[0] * size / 2, size * (1 + draws[1])
    moved = np.concatenate([center - size / 2, center + size / 2])
    return np.clip(moved, 0, np.array([shape[1], shape[0]] * 2) - 1).astype(np.float32)


def evaluate_prompted(
    model: Promptable,
    sets: Sequence[ImageSet],
    rule: PromptRule,
    *,
    seed: int = 0,
    worst: int = 6,
    track: Track = silent,
) -> ProtocolResult:
    """Evaluate a model on whole sets, at the images' original sizes.

    An image shared by consecutive samples is set once. A sample's random draws depend only on `seed` and its index in
    its set. Samples with an empty mask are skipped and listed in the result.

    Args:
        model: the model to evaluate.
        sets: data sets, each with at least one sample.
        rule: how prompts are derived from the masks.
        seed: seed of random prompts.
        worst: number of worst predictions (by boundary IoU) to keep.
        track: shows progress by sample.

    Raises:
        DatasetError: a set has no samples.
        ImageError: a file cannot be read.
        UsageError: two sets have the same name, or a prediction has another size than its image.
    """
    kept = WorstK(worst)
    scores: list[SampleScore] = []
    skipped: list[Fault] = []
    for images in require_unique_names(sets):
        current: np.ndarray | None = None
        samples = images.require_samples().samples
        tracked = track(read_ahead(samples), images.name, len(samples))
        for index, (sample, image, ground_truth) in enumerate(tracked):
            if not (ground_truth == 1).any():
                skipped.append(Fault(where=f"{images.name} {sample.id}", what=why_empty(sample)))
                continue
            if image is not current:
                model.set_image(image)
                current = image
            trials = [
                (prompt, predicted_mask(model.segment(prompt), ground_truth, THRESHOLD))
                for prompt in rule.prompts(ground_truth, np.random.default_rng([seed, index]))
            ]
            values = [(iou(ground_truth, p), _boundary_iou(ground_truth, p)) for _, p in trials]
            mean_iou, mean_boundary_iou = (mean(v) for v in zip(*values, strict=True))
            scores.append(
                SampleScore(set=images.name, id=sample.id, values={"iou": mean_iou, "boundary_iou": mean_boundary_iou})
            )
            prompt, prediction = trials[int(np.argmin([v[1] for v in values]))]
            kept.update(
                SamplePrediction(
                    set=images.name,
                    sample=sample,
                    score=mean_boundary_iou,
                    prediction=prediction,
                    prompt=prompt,
                )
            )
    return _result(rule, sets, scores, kept, skipped)


def require_unique_names(sets: Sequence[ImageSet]) -> Sequence[ImageSet]:
    """Return the sets themselves if their names differ.

    Raises:
        UsageError: two sets have the same name, so that their results would be mixed.
    """
    names = [images.name for images in sets]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise UsageError("Two sets have the same name", found=", ".join(duplicates))
    return sets


def predicted_mask(probabilities: np.ndarray, ground_truth: np.ndarray, threshold: float) -> np.ndarray:
    """Threshold a model's probabilities to a mask (H, W) bool.

    Raises:
        UsageError: the probabilities have another size than the image.
    """
    if probabilities.shape != ground_truth.shape:
        raise UsageError(
            "The model's prediction has another size than the image",
            expected=" x ".join(map(str, ground_truth.shape)),
            found=" x ".join(map(str, probabilities.shape)),
        )
    return np.asarray(probabilities > threshold)


def _boundary_iou(ground_truth: np.ndarray, predicted: np.ndarray) -> float:
    ignored = ground_truth == IGNORE
    return boundary_iou(
        ground_truth == 1, predicted, dilation_ratio=DILATION_RATIO, ignored=ignored if ignored.any() else None
    )


def _result(
    rule: PromptRule, sets: Sequence[ImageSet], scores: list[SampleScore], kept: WorstK, skipped: list[Fault]
) -> ProtocolResult:
    columns = (IOU, BOUNDARY_IOU)
    of_set = {images.name: [s.values for s in scores if s.set == images.name] for images in sets}
    by_set = {
        name: {c.name: mean([v[c.name] or 0.0 for v in found]) for c in columns} for name, found in of_set.items()
    }
    overall = {c.name: mean([metrics[c.name] for metrics in by_set.values()]) for c in columns}
    return ProtocolResult(
        protocol=f"Prompts: {rule.description}; masks at original image size, boundaries of 2 % of the diagonal.",
        columns=(*columns, SAMPLES),
        sets={name: metrics | {SAMPLES.name: len(of_set[name])} for name, metrics in by_set.items()},
        overall=overall | {SAMPLES.name: len(scores)},
        overall_rule="mean over the sets",
        sample_columns=SAMPLE_COLUMNS,
        samples=tuple(scores),
        chart=_cumulative_chart(scores, SAMPLE_COLUMNS),
        worst=kept.worst_first(),
        skipped=tuple(skipped),
    )


def _cumulative_chart(scores: list[SampleScore], columns: Sequence[Column]) -> Chart:
    """Share of samples that reach each value of the metrics."""
    limits = np.linspace(0, 1, 101)
    curves = []
    for column in columns:
        values = np.array([s.values[column.name] for s in scores], float)
        share = tuple(float(np.mean(values >= limit)) if values.size else 0.0 for limit in limits)
        curves.append(Curve(name=column.title, x=tuple(limits.tolist()), y=share))
    return Chart(
        title="Share of samples that reach each value",
        x_title="IoU, boundary IoU",
        y_title="share of samples",
        curves=tuple(curves),
    )
