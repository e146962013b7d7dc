"""Task that trains RFMedSAM 2: Steps 0, 1 and 2 jointly, with summed losses (paper, sections 3.3, 3.4, appendix G)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rfmedsam2 import models
from rfmedsam2.engine.optimizers import build_optimizer, freeze, rate_groups
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.inference.refined_tiles import Request, Tiling
from rfmedsam2.inference.refinement import predict_refined_slabs, steps_of
from rfmedsam2.inference.sliding_window import Execution
from rfmedsam2.losses import deep_supervision_losses, loss_of, memberships
from rfmedsam2.nn.refinement.disturbance import with_noise
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts, prompts_from_labels, prompts_from_members
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.store.frozen_features.views import ViewStore
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import LogitsStore
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.tasks.feed import PatchFeed
from rfmedsam2.tasks.patches import Beside, PatchBatch
from rfmedsam2.tasks.refinement_losses import (
    counted_voxels,
    generator_losses,
    losses_of_part,
    object_score_loss,
    own_mask_losses,
)
from rfmedsam2.tasks.unet import overlap_counts, scores_of

logger = logging.getLogger(__name__)

BOX_GENERATORS = ("object_queries", "scored_object_queries", "point_embeddings")
"""Generators that need the reference to select the object prompts to decode during training."""


class RFMedSam2Task:
    """The engine's Task for RFMedSAM 2.

    Args:
        plan: the plan.
        stage_name: name of one of its stages, whose model is an RFMedSam2Config.
        store: preprocessed cases of the stage.
        split: training and validation cases.
        runtime: device and ranks.
        track: shows the progress of validation.
        step0: fixed logits of Step 0 (`step0` crossfit), whose U-Net is then not trained.
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
        step0: LogitsStore | None = None,
    ) -> None:
        self.plan, self.stage = plan, plan.stages[stage_name]
        self._runtime, self._track = runtime, track
        torch.manual_seed(self.stage.train.seed)  # the same first weights on every rank
        model = models.build_stage(plan, self.stage, cache_features=True)
        assert isinstance(model, RFMedSam2)
        if step0 is not None and model.unet is not None:
            model.unet.requires_grad_(False)
        freeze(model, self.stage.train.rate_factors)
        self.model: RFMedSam2 = model.to(runtime.device)
        self._loss = loss_of(self.stage, plan.labels)
        self._feed = PatchFeed(
            self.stage,
            labels=plan.labels,
            store=store,
            split=split,
            runtime=runtime,
            track=track,
            beside=Beside(step0=step0),
        )

    def optimizer(self) -> torch.optim.Optimizer:
        """Optimizer with the plan's learning rates; that of gates, if there are any, is their own."""
        gates, config = self.model.gates, self.stage.train
        groups = rate_groups(((n, p) for n, p in self.model.named_parameters() if not n.startswith("gates.")), config)
        if gates is not None:
            rate = self.model.config.gate_learning_rate
            groups.append({"params": list(gates.parameters()), "lr": rate, "weight_decay": 0.0})
        return build_optimizer(groups, config)

    def batches(self, start: int) -> Iterator[PatchBatch]:
        """Training batches from number `start` on."""
        return self._feed.training(start)

    def view(self, name: str, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """An augmented view of a training case: image (C, D, H, W), target, Step 0's fixed class map if any."""
        return self._feed.view(name, number)

    def use_views(self, views: ViewStore) -> None:
        """Train on cached views, whose frozen features are read instead of computed."""
        self._feed.use_views(views)

    def loss(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Cross-entropy and Dice of every step, and the losses of the prompt generator."""
        reference = reference_prompts(batch.target, self.plan.labels)
        steps = self.model.steps(
            batch.image, self._given(reference), step0=self._disturbed(batch.step0), levels=batch.levels
        )
        parts: dict[str, Tensor] = {}
        counted = counted_voxels(steps, (batch.image.shape[-2], batch.image.shape[-1]), self.model.config)
        for number, logits in steps.logits.items():
            if number == 0 and batch.step0 is not None:
                continue
            if isinstance(logits, Tensor) and number in counted:
                together = self.stage.loss.batch_dice
                found = losses_of_part(logits.float(), batch.target, counted[number], self._loss, together=together)
            elif isinstance(logits, Tensor):
                found = self._loss(logits.float(), batch.target)
            else:
                lowest = self.stage.loss.lowest_level
                found = deep_supervision_losses(logits, batch.target, self._loss, lowest=lowest)
            parts |= {f"step{number}/{name}": part for name, part in found.items()}
        if self.model.config.refinement_loss.own_masks:
            parts |= own_mask_losses(steps, reference_members(batch.target, self.plan.labels), self.model.config)
        parts |= generator_losses(steps, reference, batch.image.shape[-1])
        return parts | (object_score_loss(steps, reference) if self.model.config.object_scores else {})

    def validate(self) -> dict[str, float]:
        """Dice per foreground class and step over validation patches or volumes; `score` is the last step's mean."""
        self.model.eval()
        whole = self.stage.validation.cases_while_training > 0
        totals: dict[int, np.ndarray] = {}
        try:
            with torch.inference_mode():
                for number, logits, target in self._predicted_volumes() if whole else self._predicted_patches():
                    totals[number] = totals.get(number, 0) + overlap_counts(logits, target, self.plan.labels)
        finally:
            self.model.train()
        if self.model.cache is not None:
            logger.info("%s", self.model.cache.hits())
        return scores_by_step(totals, self.plan.labels)

    def _predicted_patches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, logits, target) of every validation patch."""
        for batch in self._feed.validation():
            with self._runtime.autocast():
                steps = self.model.steps(batch.image, self._shown(batch.target), step0=batch.step0)
            for number, logits in steps.logits.items():
                assert isinstance(logits, Tensor)
                yield number, logits, batch.target

    def _predicted_volumes(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, logits, target) of every volume that is validated during training."""
        stage = self.stage
        tiling = Tiling(
            patch_size=stage.patch_size, inference=stage.inference, mirror_axes=stage.augmentation.mirror_axes
        )
        for case, target in self._feed.whole_cases():
            image = case.image_patch(tuple((0, n) for n in case.shape))
            for number in steps_of(self.model.config):
                slabs = predict_refined_slabs(
                    [self.model],
                    image,
                    tiling=tiling,
                    device=self._runtime.device,
                    request=Request(step=number, boxes=self._shown(target)),
                    execution=Execution(track=self._track),
                )
                yield number, torch.cat([slab.logits for slab in slabs], dim=1)[None], target

    def _disturbed(self, step0: Tensor | None) -> Tensor | None:
        given = self.model.config.disturbance
        return None if step0 is None else with_noise(step0, given.logit_noise, given.noise_voxels)

    def _shown(self, target: Tensor) -> Prompts | None:
        """Prompts from the reference that the model gets during validation."""
        return reference_prompts(target, self.plan.labels) if self.model.config.generator == "gt" else None

    def _given(self, reference: Prompts) -> Prompts | None:
        """Prompts from the reference that the model gets while training."""
        generator, share = self.model.config.generator, self.stage.sampling.given_box_share
        if generator == "unet":
            return reference if share and float(torch.rand(())) < share else None
        return reference if generator == "gt" or generator in BOX_GENERATORS else None


@torch.no_grad()
def reference_prompts(target: Tensor, labels: LabelSet) -> Prompts:
    """Boxes and presence from reference labels (B, D, H, W), for the B * D frames."""
    members = _memberships(target, labels)
    if labels.has_regions:
        return prompts_from_members(members)
    return prompts_from_labels(members.to(torch.uint8).argmax(1), len(labels.values) - 1)


@torch.no_grad()
def reference_members(target: Tensor, labels: LabelSet) -> Tensor:
    """Masks (B * D, K, H, W) bool of the foreground classes in reference labels (B, D, H, W)."""
    members = _memberships(target, labels)
    return members if labels.has_regions else members[:, 1:]


def _memberships(target: Tensor, labels: LabelSet) -> Tensor:
    clean = target if labels.ignore is None else torch.where(target != labels.ignore, target, 0)
    return memberships(clean.clamp_min(0).flatten(0, 1), labels)


def scores_by_step(totals: dict[int, np.ndarray], labels: LabelSet) -> dict[str, float]:
    """Dice per class: of the last step by class name, of every step with the prefix `stepN/`, means as `stepN/dsc`."""
    scores: dict[str, float] = {}
    for number, counts in sorted(totals.items()):
        own = scores_of(counts, labels)
        scores |= {f"step{number}/{name}": value for name, value in own.items() if name != "score"}
        scores[f"step{number}/dsc"] = own["score"]
    return scores | scores_of(totals[max(totals)], labels)
