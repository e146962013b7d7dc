"""Training batches of objects on frames, with prompts; batch i depends only on seed, rank and i."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfmedsam2.engine.loader import batches
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import ImageError
from rfmedsam2.nn.segmenter import PromptBatch
from segment_anything_hq.data.augment import (
    GRAY,
    Jitter,
    Placement,
    draw_visible_placement,
    full_placement,
    place_image,
    place_mask,
    place_object,
)
from segment_anything_hq.data.checks import why_empty
from segment_anything_hq.data.datasets import ImageSet, Sample
from segment_anything_hq.prompts.clicks import IGNORE
from segment_anything_hq.prompts.sampling import PromptMix, generator_of, training_prompts
from segment_anything_hq.records import PromptConfig, RefinerPlan

EPOCH, VIEW = 0, 1
"""Random streams: the order of an epoch, and the jitter of a view; seeded with (seed, stream, numbers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectBatch:
    """B objects, each on its own frame.

    Attributes:
        number: number of the batch over all ranks; it also seeds the random draws of the loss.
        ids: "set/sample id" of each object.
        images: (B, 3, S, S) uint8.
        ground_truths: (B, S, S) int8: 1 object, 0 background, -1 ignored.
        prompted: prompts sampled from the masks; None if clicks are simulated in the loss.
    """

    number: int
    ids: tuple[str, ...]
    images: Tensor
    ground_truths: Tensor
    prompted: PromptBatch | None = None


class ObjectSource:
    """Builds batches in worker processes; batch i depends only on (seed, rank, i).

    Args:
        sets: sets to train on.
        plan: frame and batch size, jitter, prompts, seed.
        rank: rank of this process.
        ranks: number of ranks.
    """

    def __init__(self, sets: Sequence[ImageSet], plan: RefinerPlan, *, rank: int = 0, ranks: int = 1) -> None:
        self._samples = tuple((images.name, sample) for images in sets for sample in images.require_samples().samples)
        self._plan, self._rank, self._ranks = plan, rank, ranks
        self._mix = None
        if isinstance(plan.prompting, PromptConfig):
            self._mix = PromptMix(**plan.prompting.model_dump(exclude={"kind"}))
        self._jitter = None if plan.jitter is None else Jitter(**plan.jitter.model_dump())

    def batch(self, number: int) -> ObjectBatch:
        """Build batch `number` of this rank."""
        overall = number * self._ranks + self._rank
        drawn = [self._draw(position) for position in self._positions(overall)]
        frames, ground_truths = zip(*(self._frame(index, view) for index, view in drawn), strict=True)
        images, masks = torch.stack(frames), torch.stack(ground_truths)
        prompted = None
        if self._mix is not None:
            rows = torch.arange(len(masks))
            rng = generator_of(self._plan.train.seed, overall)
            prompted = training_prompts(masks == 1, rows, mix=self._mix, rng=rng)
        ids = tuple("/".join((self._samples[i][0], self._samples[i][1].id)) for i, _ in drawn)
        return ObjectBatch(number=overall, ids=ids, images=images, ground_truths=masks, prompted=prompted)

    def describe(self, number: int) -> str:
        """The image files of batch `number`, for error messages; reads nothing."""
        positions = self._positions(number * self._ranks + self._rank)
        return ", ".join(str(self._samples[self._draw(position)[0]][1].image) for position in positions)

    def _positions(self, overall: int) -> range:
        return range(overall * self._plan.batch_size, (overall + 1) * self._plan.batch_size)

    def _draw(self, position: int) -> tuple[int, int]:
        """Index and view of the sample at a position of the training; every epoch contains each sample once."""
        epoch, within = divmod(position, len(self._samples))
        order = np.random.default_rng([self._plan.train.seed, EPOCH, epoch]).permutation(len(self._samples))
        view = epoch if self._plan.views_per_object is None else epoch % self._plan.views_per_object
        return int(order[within]), view

    def _frame(self, index: int, view: int) -> tuple[Tensor, Tensor]:
        """The frame (3, S, S) uint8 of a view of a sample, and its ground truth (S, S) int8."""
        sample, size = self._samples[index][1], self._plan.frame_size
        pixels, ground_truth = _read(sample)
        image, mask = torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(ground_truth == 1)
        placement, gray = full_placement((ground_truth.shape[0], ground_truth.shape[1]), size), GRAY
        if self._jitter is not None:
            words = np.random.SeedSequence([self._plan.train.seed, VIEW, index, view]).generate_state(1, np.uint64)
            rng = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
            placement = draw_visible_placement(mask, size=size, jitter=self._jitter, rng=rng)
            gray = self._jitter.gray
        frame = place_image(image, placement, size=size, gray=gray)
        return frame, _placed_ground_truth(ground_truth, mask, placement, size)


class ObjectFeed:
    """Iterates over the batches of a training, which worker processes prepare in advance."""

    def __init__(self, sets: Sequence[ImageSet], plan: RefinerPlan, runtime: Runtime) -> None:
        self._plan, self._runtime = plan, runtime
        self._source = ObjectSource(sets, plan, rank=runtime.rank, ranks=runtime.world_size)

    def training(self, start: int) -> Iterator[ObjectBatch]:
        """Batches, from number `start` on."""
        train = self._plan.train
        return batches(
            self._source.batch,
            start,
            train.iterations * train.accumulation,
            workers=train.workers,
            seed=train.seed + self._runtime.rank,
            timeout_seconds=train.worker_timeout_seconds,
            describe=self._source.describe,
        )


def _read(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Read image and ground truth, and check that they have the same size and contain the object."""
    image = sample.read_image()
    ground_truth = sample.ground_truth_for(image)
    if not (ground_truth == 1).any():
        raise ImageError(
            "The mask is empty, so there is nothing to train on",
            where=sample.mask.source,
            found=why_empty(sample),
            remedy="Leave this sample out; samhq_check_data lists all empty masks",
        )
    return image, ground_truth


def _placed_ground_truth(ground_truth: np.ndarray, mask: Tensor, placement: Placement, size: int) -> Tensor:
    """(S, S) int8 on the frame; where object and ignored pixels overlap after resizing, the object wins."""
    seen = place_object(mask, placement, size)
    placed = seen.to(torch.int8)
    ignored = ground_truth == IGNORE
    if ignored.any():
        placed[place_mask(torch.from_numpy(ignored), placement, size) & ~seen] = IGNORE
    return placed
