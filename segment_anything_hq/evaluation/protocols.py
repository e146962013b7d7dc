"""Evaluation with given prompts: mIoU and mBIoU at original size, from boxes, noised boxes, center and random points.

As HQ-SAM is evaluated: one object a picture, the mean over a set's samples, then the mean over the sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rfmedsam2.errors import UsageError
from rfmedsam2.metrics.boundary import DILATION_RATIO, boundary_iou
from segment_anything_hq.data.datasets import Fault, ImageSet, read_ahead
from segment_anything_hq.evaluation.scores import Case, Chart, Column, Curve, Evaluation, SampleScore, WorstK, mean
from segment_anything_hq.prompts.clicks import IGNORE, Click, Prompt, iou, next_click

THRESHOLD = 0.5
"""A pixel is predicted where its probability is above this: where its logit is above 0."""

IOU = Column(name="iou", title="mIoU", meaning="Mean intersection over union", unit="%", scale=100)
BOUNDARY_IOU = Column(name="boundary_iou", title="mBIoU", meaning="Mean boundary IoU", unit="%", scale=100)
SAMPLE_COLUMNS = (
    Column(name="boundary_iou", title="BIoU", meaning="Boundary IoU", unit="%", scale=100),
    Column(name="iou", title="IoU", meaning="Intersection over union", unit="%", scale=100),
)


class Promptable(Protocol):
    """A model that segments what a prompt shows."""

    def set_image(self, image: np.ndarray) -> None:
        """Take a picture (H, W, 3) uint8, RGB."""
        ...

    def segment(self, prompt: Prompt) -> np.ndarray:
        """Probabilities (H, W) of the picture that was set last."""
        ...


class PromptRule(Protocol):
    """How prompts are made of a truth."""

    @property
    def words(self) -> str:
        """The rule, for reports."""
        ...

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:
        """One prompt a trial; truth (H, W) int8 with at least one pixel of the object."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxRule:
    """The truth's box, its center and size moved at random as DN-DETR does (HQ-SAM paper, Table 4: 0, 0.2 and 0.4)."""

    noise: float = 0.0

    @property
    def words(self) -> str:
        """The rule, for reports."""
        return "boxes of the truth" + (f" with noise {self.noise:g} (DN-DETR)" if self.noise else "")

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:
        """One box."""
        box = (
            noised_box(mask_box(ground_truth), self.noise, ground_truth.shape, rng)
            if self.noise
            else mask_box(ground_truth)
        )
        yield Prompt(box=box)


@dataclass(frozen=True, slots=True, kw_only=True)
class CenterRule:
    """One point: the pixel deepest inside the object (HQ-SAM supplement, section 2)."""

    @property
    def words(self) -> str:
        """The rule, for reports."""
        return "one point, deepest inside the truth"

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:  # noqa: ARG002
        """One point."""
        yield Prompt(points=(next_click(ground_truth, np.zeros(ground_truth.shape, bool)),))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRule:
    """Points drawn from the object, in several trials whose scores are averaged (HQ-SAM supplement, section 2)."""

    count: int
    trials: int = 3

    def __post_init__(self) -> None:
        if self.count < 1 or self.trials < 1:
            found = f"{self.count} points, {self.trials} trials"
            raise UsageError("Random points need a point and a trial", expected="1 or more of both", found=found)

    @property
    def words(self) -> str:
        """The rule, for reports."""
        trials = f", mean of {self.trials} trials" if self.trials > 1 else ""
        return f"{self.count} random point{'s' if self.count > 1 else ''} of the truth{trials}"

    def prompts(self, ground_truth: np.ndarray, rng: np.random.Generator) -> Iterator[Prompt]:
        """One set of points a trial; an object of fewer pixels gives each of them once."""
        pixels = np.flatnonzero(ground_truth == 1)
        for _ in range(self.trials):
            drawn = rng.choice(pixels, size=min(self.count, pixels.size), replace=False)
            rows, columns = np.unravel_index(drawn, ground_truth.shape)
            places = zip(columns.tolist(), rows.tolist(), strict=True)
            yield Prompt(points=tuple(Click(x=x, y=y, positive=True) for x, y in places))


def mask_box(ground_truth: np.ndarray) -> np.ndarray:
    """(4,) float32 xyxy: columns and rows of the first and last pixel of the object.

    Raises:
        UsageError: the object has no pixel.
    """
    rows, columns = (np.flatnonzero((ground_truth == 1).any(axis)) for axis in (1, 0))
    if not rows.size:
        raise UsageError("An empty mask has no box")
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


def noised_box(box: np.ndarray, scale: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A box (4,) xyxy moved by up to scale / 2 and resized by up to scale of its size, cut at the picture's edges.

    Args:
        box: (4,) xyxy.
        scale: 0 to 1; center and size change by independent uniform draws (DN-DETR).
        shape: (H, W) of the picture.
        rng: source of randomness.

    Raises:
        UsageError: a scale outside 0 to 1.
    """
    if not 0 <= scale <= 1:
        raise UsageError("Boxes cannot be noised so", where="noise", expected="0 to 1", found=scale)
    center, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    draws = rng.uniform(-1, 1, (2, 2)) * scale
    center, size = center + draws[0] * size / 2, size * (1 + draws[1])
    moved = np.concatenate([center - size / 2, center + size / 2])
    return np.clip(moved, 0, np.array([shape[1], shape[0]] * 2) - 1).astype(np.float32)


def evaluate_prompted(
    model: Promptable, sets: Sequence[ImageSet], rule: PromptRule, *, seed: int = 0, worst: int = 6
) -> Evaluation:
    """Score a model on whole sets at the pictures' own sizes.

    A picture that several samples in a row share is set once. A sample's random draws depend on `seed` and its place in
    its set alone. Samples with an empty truth are skipped, and named.

    Args:
        model: what is evaluated.
        sets: with at least one sample each.
        rule: how prompts are made.
        seed: of random prompts.
        worst: cases to keep with their masks, by boundary IoU.

    Raises:
        DatasetError: a set without samples.
        ImageError: a file that cannot be read.
        UsageError: two sets of one name; the model's answer has another size than the picture.
    """
    kept = WorstK(worst)
    scores: list[SampleScore] = []
    skipped: list[Fault] = []
    for images in named_apart(sets):
        current: np.ndarray | None = None
        for index, (sample, image, ground_truth) in enumerate(read_ahead(images.require_samples().samples)):
            if not (ground_truth == 1).any():
                skipped.append(Fault(where=f"{images.name} {sample.id}", what="the mask is empty"))
                continue
            if image is not current:
                model.set_image(image)
                current = image
            trials = [
                (prompt, predicted_mask(model.segment(prompt), ground_truth, THRESHOLD))
                for prompt in rule.prompts(ground_truth, np.random.default_rng([seed, index]))
            ]
            values = [(iou(ground_truth, p), _boundary_iou(ground_truth, p)) for _, p in trials]
            fits, boundary_fits = (mean(v) for v in zip(*values, strict=True))
            scores.append(
                SampleScore(set=images.name, id=sample.id, values={"iou": fits, "boundary_iou": boundary_fits})
            )
            prompt, prediction = trials[int(np.argmin([v[1] for v in values]))]
            kept.update(
                Case(
                    set=images.name,
                    sample=sample,
                    score=boundary_fits,
                    prediction=prediction,
                    clicks=prompt.points,
                    box=prompt.box,
                )
            )
    return _evaluation(rule, sets, scores, kept, skipped)


def named_apart(sets: Sequence[ImageSet]) -> Sequence[ImageSet]:
    """The sets themselves.

    Raises:
        UsageError: two of one name, whose figures would be mixed.
    """
    names = [images.name for images in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError("Sets need names of their own", found=", ".join(twice))
    return sets


def predicted_mask(probabilities: np.ndarray, ground_truth: np.ndarray, threshold: float) -> np.ndarray:
    """(H, W) bool from a model's answer.

    Raises:
        UsageError: it has another size than the picture.
    """
    if probabilities.shape != ground_truth.shape:
        raise UsageError(
            "The model's answer has another size than the picture",
            expected=" x ".join(map(str, ground_truth.shape)),
            found=" x ".join(map(str, probabilities.shape)),
        )
    return np.asarray(probabilities > threshold)


def _boundary_iou(ground_truth: np.ndarray, predicted: np.ndarray) -> float:
    ignored = ground_truth == IGNORE
    return boundary_iou(
        ground_truth == 1, predicted, dilation_ratio=DILATION_RATIO, ignored=ignored if ignored.any() else None
    )


def _evaluation(
    rule: PromptRule, sets: Sequence[ImageSet], scores: list[SampleScore], kept: WorstK, skipped: list[Fault]
) -> Evaluation:
    columns = (IOU, BOUNDARY_IOU)
    found = {
        images.name: {c.name: mean([s.values[c.name] or 0.0 for s in scores if s.set == images.name]) for c in columns}
        for images in sets
    }
    return Evaluation(
        protocol=f"Prompts: {rule.words}; masks at the pictures' own sizes, boundaries of 2 % of the diagonal.",
        columns=columns,
        sets=found,
        overall={c.name: mean([figures[c.name] for figures in found.values()]) for c in columns},
        overall_rule="mean over the sets",
        sample_columns=SAMPLE_COLUMNS,
        samples=tuple(scores),
        chart=_shares(scores, SAMPLE_COLUMNS),
        worst=kept.cases(),
        skipped=tuple(skipped),
    )


def _shares(scores: list[SampleScore], columns: Sequence[Column]) -> Chart:
    """How many samples reach which value."""
    limits = np.linspace(0, 1, 101)
    curves = []
    for column in columns:
        values = np.array([s.values[column.name] for s in scores], float)
        share = tuple(float(np.mean(values >= limit)) if values.size else 0.0 for limit in limits)
        curves.append(Curve(name=column.title, x=tuple(limits.tolist()), y=share))
    return Chart(
        title="How many samples reach which value",
        x_title="IoU, boundary IoU",
        y_title="share of samples",
        curves=tuple(curves),
    )
