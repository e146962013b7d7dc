"""Training any of the methods on a frozen base: HQ-SAM, HQ-SAM 2, SAM-REF, SAM2-REF, SAM2Refiner, a mask decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.runtime import Runtime
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.evaluation.interactive import ClickedPredictor, ClickProtocol, evaluate_clicks
from segment_anything_hq.evaluation.protocols import BoxRule, evaluate_prompted
from segment_anything_hq.inference.embedding_cache import EmbeddingCache
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.models import Network
from segment_anything_hq.nn.trainable_subset import TrainedPart
from segment_anything_hq.records import ClickConfig, PromptConfig, RefinerPlan
from segment_anything_hq.tasks.click_simulation import by_clicks
from segment_anything_hq.tasks.feed import ObjectBatch, ObjectFeed
from segment_anything_hq.tasks.method_losses import losses_of

VALIDATION_CLICKS = 5


class RefinerTask:
    """The engine's Task for a method; its model is what is trained, the base lies beside it.

    Args:
        plan: the plan.
        network: of the plan's method, with its base's weights.
        training: sets to train on.
        validation: sets that are held out.
        runtime: device and ranks.
        cache: folder to keep what the frozen encoder makes of frames; None: it is made again every time.
    """

    def __init__(
        self,
        plan: RefinerPlan,
        network: Network,
        *,
        training: Sequence[ImageSet],
        validation: Sequence[ImageSet],
        runtime: Runtime,
        cache: Path | None = None,
    ) -> None:
        self.plan, self.network = plan, network
        self.model = TrainedPart(network).to(runtime.device)
        self._cache = EmbeddingCache(network, folder=cache)
        self._feed = ObjectFeed(training, plan, runtime)
        self._held = _share(validation, plan.validation_samples, runtime)

    def optimizer(self) -> Optimizer:
        """All that is trained, at one rate."""
        return build_optimizer(self.model.parameters(), self.plan.train)

    def batches(self, start: int) -> Iterator[ObjectBatch]:
        """Training batches from number `start` on."""
        return self._feed.training(start)

    def loss(self, batch: ObjectBatch) -> dict[str, Tensor]:
        """The method's losses for a batch."""
        embedded = self._cache.embed(batch.images)
        figures = self.plan.prompting
        if isinstance(figures, ClickConfig):
            rng = np.random.default_rng([self.plan.train.seed, batch.number])
            answer = by_clicks(self.network, embedded, batch.ground_truths, figures=figures, rng=rng)
        else:
            assert batch.prompted is not None
            answer = self.network.segment(embedded, batch.prompted)
        return losses_of(self.plan.method, answer, batch.ground_truths)

    def validate(self) -> dict[str, float]:
        """Mean IoU of held-out objects at their pictures' own size; `score` is what the method is for.

        By boxes also mean boundary IoU, which is the score; by clicks the mean IoU after five, which is the score.
        """
        if not self._held:
            return {"score": 0.0}
        self.network.eval()
        predictor = ClickedPredictor(InteractivePredictor(self.network))
        figures, scores = self.plan.prompting, {}
        if isinstance(figures, PromptConfig) or figures.box:
            found = evaluate_prompted(predictor, self._held, BoxRule(), worst=0).overall
            scores |= {"box/iou": found["iou"], "box/boundary_iou": found["boundary_iou"]}
            scores["score"] = found["boundary_iou"]
        if isinstance(figures, ClickConfig):
            clicks = min(VALIDATION_CLICKS, figures.max_clicks)
            protocol = ClickProtocol(max_clicks=clicks, miou_at=(clicks,), stop=False)
            found = evaluate_clicks(predictor, self._held, protocol, worst=0).overall
            scores[f"clicks/iou_{clicks}"] = scores["score"] = found[f"miou_at_{clicks}"]
        return scores


def _share(sets: Sequence[ImageSet], most: int, runtime: Runtime) -> tuple[ImageSet, ...]:
    """Of at most so many samples of all sets, evenly drawn, those that this rank scores."""
    samples = [(number, sample) for number, images in enumerate(sets) for sample in images.samples]
    places = np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int))
    mine = [samples[place] for place in places[runtime.rank :: runtime.world_size]]
    parts = [tuple(s for n, s in mine if n == number) for number in range(len(sets))]
    return tuple(replace(images, samples=part) for images, part in zip(sets, parts, strict=True) if part)
