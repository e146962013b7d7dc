"""Task that trains a U-Net: a plain nnU-Net, also Step 0 of RFMedSAM 2.

Cross-entropy + Dice with deep supervision; validated on patches (nnU-Net's pseudo Dice) and, if the plan says so, on
whole volumes by sliding window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rfmedsam2 import models
from rfmedsam2.engine.optimizers import build_optimizer, freeze, rate_groups
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.inference.sliding_window import Execution, predict_logits
from rfmedsam2.losses import deep_supervision_losses, loss_of, memberships
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import LogitsStore
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.tasks.feed import PatchFeed
from rfmedsam2.tasks.patches import Beside, PatchBatch


class UNetTask:
    """The engine's Task for a U-Net, or any network of the same inputs and outputs.

    Args:
        plan: the plan.
        stage_name: name of one of its stages.
        store: preprocessed cases of the stage.
        split: training and validation cases.
        runtime: device and ranks.
        track: shows the progress of validation.
        previous: labels of a cascade's first stage; None: the stage is not the second of a cascade.
    """

    def __init__(
        self,
        plan: Plan,
        stage_name: str,
        *,
        store: CaseStore,
        split: Split,
        runtime: Runtime,
        track: Track = silent,
        previous: LogitsStore | None = None,
    ) -> None:
        self.plan, self.stage = plan, plan.stages[stage_name]
        self._runtime, self._track = runtime, track
        torch.manual_seed(self.stage.train.seed)  # the same first weights on every rank
        self.model: nn.Module = models.build_stage(plan, self.stage).to(runtime.device)
        freeze(self.model, self.stage.train.rate_factors)
        self._loss = loss_of(self.stage, plan.labels)
        self._feed = PatchFeed(
            self.stage,
            labels=plan.labels,
            store=store,
            split=split,
            runtime=runtime,
            track=track,
            beside=Beside(previous=previous),
        )

    def optimizer(self) -> torch.optim.Optimizer:
        """Optimizer of all parameters, with the plan's learning rates."""
        return build_optimizer(rate_groups(self.model.named_parameters(), self.stage.train), self.stage.train)

    def batches(self, start: int) -> Iterator[PatchBatch]:
        """Training batches from number `start` on."""
        return self._feed.training(start)

    def loss(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Cross-entropy and Dice losses over all supervised resolutions."""
        outputs = self.model(batch.image)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return deep_supervision_losses(outputs, batch.target, self._loss, lowest=self.stage.loss.lowest_level)

    def validate(self) -> dict[str, float]:
        """Dice per foreground class over validation patches or volumes; `score` is their mean."""
        self.model.eval()
        try:
            with torch.inference_mode():
                counts = self._volume_counts() if self.stage.validation.cases_while_training else self._patch_counts()
        finally:
            self.model.train()
        return scores_of(counts, self.plan.labels)

    def _patch_counts(self) -> np.ndarray:
        total = np.zeros((len(self.plan.labels.foreground), 3))
        for batch in self._feed.validation():
            with self._runtime.autocast():
                logits = self.model(batch.image)
            total += overlap_counts(logits, batch.target, self.plan.labels)
        return total

    def _volume_counts(self) -> np.ndarray:
        total = np.zeros((len(self.plan.labels.foreground), 3))
        for case, target in self._feed.whole_cases():
            logits = predict_logits(
                [self.model],
                self._feed.whole_input(case),
                patch_size=self.stage.patch_size,
                inference=self.stage.inference,
                mirror_axes=self.stage.augmentation.mirror_axes,
                device=self._runtime.device,
                outputs=self.plan.labels.num_outputs,
                execution=Execution(track=self._track),
            )
            total += overlap_counts(torch.as_tensor(logits)[None], target, self.plan.labels)
        return total


def overlap_counts(logits: Tensor, target: Tensor, labels: LabelSet) -> np.ndarray:
    """True positives, false positives and false negatives of each foreground class: (classes, 3).

    Args:
        logits: (B, K, ...).
        target: (B, ...) label values; ignored voxels are excluded.
        labels: labels that define the outputs.
    """
    members = memberships(target, labels)
    if labels.has_regions:
        predicted = logits > 0
    else:
        index = logits.argmax(1, keepdim=True)
        predicted = torch.zeros_like(members).scatter_(1, index, True)[:, 1:]
        members = members[:, 1:]
    if labels.ignore is not None:
        known = (target != labels.ignore)[:, None]
        predicted, members = predicted & known, members & known
    axes = (0, *range(2, logits.ndim))
    both = (predicted & members).sum(axes)
    counts = torch.stack([both, predicted.sum(axes) - both, members.sum(axes) - both], 1).double().cpu().numpy()
    if labels.has_regions:
        return counts
    # channels are in ascending order of values, but names may be declared in any order
    return counts[[labels.values.index(values[0]) - 1 for values in labels.foreground.values()]]


def scores_of(counts: np.ndarray, labels: LabelSet) -> dict[str, float]:
    """Dice by class name, and their mean as `score`; classes that do not occur are left out."""
    scores: dict[str, float] = {}
    for name, (both, wrong, missed) in zip(labels.foreground, counts, strict=True):
        if both + wrong + missed > 0:
            scores[f"dsc/{name}"] = float(2 * both / (2 * both + wrong + missed))
    scores["score"] = float(np.mean(list(scores.values()))) if scores else 0.0
    return scores
