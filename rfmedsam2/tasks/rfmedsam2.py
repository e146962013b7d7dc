"""Task that trains RFMedSAM 2: Steps 0, 1 and 2 jointly, with summed losses (paper, sections 3.3, 3.4, appendix G)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfmedsam2 import models
from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.inference.refined_tiles import Request, Tiling
from rfmedsam2.inference.refinement import predict_refined_slabs, steps_of
from rfmedsam2.inference.sliding_window import Execution
from rfmedsam2.losses import (
    LossFunction,
    deep_supervision_losses,
    generalized_box_iou_loss,
    loss_of,
    memberships,
)
from rfmedsam2.nn.disturbance import with_noise
from rfmedsam2.nn.refinement_state import StepOutputs
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.prompts import Prompts, prompts_from_labels, prompts_from_members
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import LogitsStore
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.tasks.feed import PatchFeed
from rfmedsam2.tasks.patches import PatchBatch
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
        self.model: RFMedSam2 = model.to(runtime.device)
        self._loss = loss_of(self.stage, plan.labels)
        self._feed = PatchFeed(
            self.stage, labels=plan.labels, store=store, split=split, runtime=runtime, track=track, step0=step0
        )

    def optimizer(self) -> torch.optim.Optimizer:
        """Optimizer with one learning rate for adapters, prompt generator and all else, but gates, if there are any."""
        gates = self.model.gates
        if gates is None:
            return build_optimizer(self.model.parameters(), self.stage.train)
        others = [p for name, p in self.model.named_parameters() if not name.startswith("gates.")]
        own = {"params": list(gates.parameters()), "lr": self.model.config.gate_learning_rate, "weight_decay": 0.0}
        return build_optimizer([{"params": others}, own], self.stage.train)

    def batches(self, start: int) -> Iterator[PatchBatch]:
        """Training batches from number `start` on."""
        return self._feed.training(start)

    def loss(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Cross-entropy and Dice of every step, and the losses of the prompt generator."""
        reference = reference_prompts(batch.target, self.plan.labels)
        steps = self.model.steps(batch.image, self._given(reference), step0=self._disturbed(batch.step0))
        parts: dict[str, Tensor] = {}
        for number, logits in steps.logits.items():
            if number == 0 and batch.step0 is not None:
                continue
            if isinstance(logits, Tensor) and number and steps.frames is not None:
                together = self.stage.loss.batch_dice
                found = losses_of_frames(logits.float(), batch.target, steps.frames, self._loss, together=together)
            elif isinstance(logits, Tensor):
                found = self._loss(logits.float(), batch.target)
            else:
                lowest = self.stage.loss.lowest_level
                found = deep_supervision_losses(logits, batch.target, self._loss, lowest=lowest)
            parts |= {f"step{number}/{name}": part for name, part in found.items()}
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
    clean = target if labels.ignore is None else torch.where(target != labels.ignore, target, 0)
    clean = clean.clamp_min(0).flatten(0, 1)
    members = memberships(clean, labels)
    if labels.has_regions:
        return prompts_from_members(members)
    return prompts_from_labels(members.to(torch.uint8).argmax(1), len(labels.values) - 1)


def generator_losses(steps: StepOutputs, reference: Prompts, size: int) -> dict[str, Tensor]:
    """Losses of box generators: presence (binary cross-entropy), L1 and generalized IoU of the boxes.

    Args:
        steps: outputs of the network.
        reference: boxes in pixels of frames of side `size`.
        size: side length of the frames in pixels.
    """
    parts: dict[str, Tensor] = {}
    if steps.presence is not None:
        parts["step0/presence"] = F.binary_cross_entropy_with_logits(steps.presence.float(), reference.present.float())
    if steps.found is not None:
        found = steps.found.float()[reference.present]
        wanted = reference.boxes[reference.present] / max(1, size - 1)
        # a sum over an empty selection is 0 and stays connected to the graph
        count = max(1, len(found))
        parts["step0/box_l1"] = (found - wanted).abs().sum() / count
        parts["step0/box_giou"] = generalized_box_iou_loss(found, wanted).sum() / count
    return parts


def losses_of_frames(
    logits: Tensor, target: Tensor, frames: Tensor, loss: LossFunction, *, together: bool
) -> dict[str, Tensor]:
    """Losses of some frames, as if each volume were these alone.

    Args:
        logits: (B, outputs, D, H, W).
        target: (B, D, H, W) label values.
        frames: (B * D,) bool.
        loss: loss of patches.
        together: the frames of all volumes are one patch (batch Dice), else the losses of volumes are averaged.
    """
    chosen = frames.unflatten(0, (len(logits), -1))
    parts = [(own[:, rows], labels[rows]) for own, labels, rows in zip(logits, target, chosen, strict=True)]
    parts = [(own, labels) for own, labels in parts if len(labels)]
    if together:
        parts = [(torch.cat([own for own, _ in parts], 1), torch.cat([labels for _, labels in parts]))]
    found = [loss(own[None], labels[None]) for own, labels in parts]
    return {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}


def object_score_loss(steps: StepOutputs, reference: Prompts) -> dict[str, Tensor]:
    """Binary cross-entropy of the decoder's object scores: 1 where the class is on the slice, 0 where it is not."""
    if steps.scores is None or steps.objects is None or not len(steps.scores):
        return {}
    present = reference.present[steps.objects[:, 0], steps.objects[:, 1]]
    return {"step1/object_score": F.binary_cross_entropy_with_logits(steps.scores.float(), present.float())}


def scores_by_step(totals: dict[int, np.ndarray], labels: LabelSet) -> dict[str, float]:
    """Dice per class: of the last step by class name, of every step with the prefix `stepN/`, means as `stepN/dsc`."""
    scores: dict[str, float] = {}
    for number, counts in sorted(totals.items()):
        own = scores_of(counts, labels)
        scores |= {f"step{number}/{name}": value for name, value in own.items() if name != "score"}
        scores[f"step{number}/dsc"] = own["score"]
    return scores | scores_of(totals[max(totals)], labels)
