"""The engine's task for all methods: HQ-SAM, HQ-SAM 2, SAM-REF, SAM2-REF, SAM2Refiner and SAM's mask decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.system.progress import Track, silent
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.evaluation.interactive import ClickedPredictor, ClickProtocol, evaluate_clicks
from segment_anything_hq.evaluation.protocols import BoxRule, evaluate_prompted
from segment_anything_hq.inference.embedding_cache import EmbeddingCache
from segment_anything_hq.inference.interactive import InteractivePredictor
from segment_anything_hq.models import Network
from segment_anything_hq.nn.trainable_subset import TrainedPart
from segment_anything_hq.records import ClickConfig, PromptConfig, RefinerPlan
from segment_anything_hq.tasks.click_simulation import segment_with_clicks
from segment_anything_hq.tasks.method_losses import method_losses
from segment_anything_hq.tasks.object_feed import ObjectBatch, ObjectFeed

VALIDATION_CLICKS = 5


class RefinerTask:
    """The engine's `Task` for one method; its model is the trainable part of the network.

    Args:
        plan: all settings of the training.
        network: the plan's network, with its base's weights.
        training: sets to train on.
        validation: held-out sets.
        runtime: device and ranks.
        cache: folder of the embedding cache; None: frames are encoded every time.
        track: progress display of validation.
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
        track: Track = silent,
    ) -> None:
        self.plan, self.network, self._track = plan, network, track
        self.model = TrainedPart(network).to(runtime.device)
        self._cache = EmbeddingCache(network, folder=cache)
        self._feed = ObjectFeed(training, plan, runtime)
        self._held = _samples_of_rank(validation, plan.validation_samples, runtime)

    def optimizer(self) -> Optimizer:
        """One optimizer for all trainable parameters, with a single learning rate."""
        return build_optimizer(self.model.parameters(), self.plan.train)

    def batches(self, start: int) -> Iterator[ObjectBatch]:
        """Training batches, from number `start` on."""
        return self._feed.training(start)

    def loss(self, batch: ObjectBatch) -> dict[str, Tensor]:
        """The loss terms of a batch, by name."""
        embedded = self._cache.embed(batch.images)
        prompting = self.plan.prompting
        if isinstance(prompting, ClickConfig):
            rng = np.random.default_rng([self.plan.train.seed, batch.number])
            answer = segment_with_clicks(self.network, embedded, batch.ground_truths, config=prompting, rng=rng)
        else:
            assert batch.prompted is not None
            answer = self.network.segment(embedded, batch.prompted)
        return method_losses(self.plan.method, answer, batch.ground_truths)

    def validate(self) -> dict[str, float]:
        """Score held-out objects at their images' original size.

        With box prompts: mean IoU and mean boundary IoU, which is the `score`. With clicks: mean IoU after five clicks,
        which is the `score`.
        """
        if not self._held:
            return {"score": 0.0}
        self.network.eval()
        predictor = ClickedPredictor(InteractivePredictor(self.network))
        prompting, scores = self.plan.prompting, {}
        if isinstance(prompting, PromptConfig) or prompting.box:
            found = evaluate_prompted(predictor, self._held, BoxRule(), worst=0, track=self._track).overall
            scores |= {"box/iou": found["iou"], "box/boundary_iou": found["boundary_iou"]}
            scores["score"] = found["boundary_iou"]
        if isinstance(prompting, ClickConfig):
            clicks = min(VALIDATION_CLICKS, prompting.max_clicks)
            protocol = ClickProtocol(max_clicks=clicks, miou_at=(clicks,), stop=False)
            found = evaluate_clicks(predictor, self._held, protocol, worst=0, track=self._track).overall
            scores[f"clicks/iou_{clicks}"] = scores["score"] = found[f"miou_at_{clicks}"]
        return scores


def _samples_of_rank(sets: Sequence[ImageSet], max_samples: int, runtime: Runtime) -> tuple[ImageSet, ...]:
    """A rank's share of up to `max_samples` samples, evenly spaced over all sets."""
    samples = [(number, sample) for number, images in enumerate(sets) for sample in images.samples]
    places = np.unique(np.linspace(0, len(samples) - 1, min(max_samples, len(samples))).round().astype(int))
    mine = [samples[place] for place in places[runtime.rank :: runtime.world_size]]
    parts = [tuple(s for n, s in mine if n == number) for number in range(len(sets))]
    return tuple(replace(images, samples=part) for images, part in zip(sets, parts, strict=True) if part)
