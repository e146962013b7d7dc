"""The rows of refinement_evidence.py: what is trained on what, for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

DATASETS = {
    "hippocampus": "hippocampus/Dataset004_Hippocampus",
    "oasis": "oasis-subcortical/Dataset115_OASISSubcortical",
}
"""Real manual labels: where they lie in RFMED_TEST_DATA."""
WEIGHTS = {"lite_medsam": "weights-litemedsam/lite_medsam.pth", "mobile_sam": "weights-mobilesam/mobile_sam.pt"}
FEW = {"hippocampus": 10, "oasis": 5}
LightBackbone = Literal["nano", "lite_medsam", "mobile_sam"]
MINUTES, MINUTES_OF_FEW = 60.0, 20.0
COARSE = [2, 2, 2]
COARSE_PATCH = "patch_size=[32,64,64]"
"""A multiple of a coarse U-Net's total stride, and what planning chooses for RFMedSAM 2."""
COARSE_UNET = (
    "model.unet.features=[16,32,64,128]",
    "model.unet.kernel_sizes=[[3,3,3],[3,3,3],[3,3,3],[3,3,3]]",
    "model.unet.strides=[[1,1,1],[2,2,2],[2,2,2],[2,2,2]]",
    "model.unet.encoder_blocks=[1,2,2,2]",
    "model.unet.decoder_blocks=[2,2,1]",
)
"""The network that planning chooses for the U-Net alone; for the patches of RFMedSAM 2 it would choose a level more."""
PATCHES = 2
"""Patches that are scored at the end of a training: whole cases are predicted afterwards."""
UNET_SHARE = 0.6
"""Part of a row's processor time that goes into Step 0, cross-fitted or not."""
REFINEMENT_SHARE = 0.6
"""Part of it that Steps 1 and 2 get where Step 0 is a row of its own, as a coarse one may be: its errors at edges are
the same on cases that it has learned from."""
SHORT = (
    "model.step0=joint",
    'train.rate_factors={"unet.":0}',
    "train.schedule.warmup_iterations=5",
    "model.gate_learning_rate=0.05",
    "sampling.max_prompted_objects=16",
)
"""Steps 1 and 2 on a Step 0 that stays as it is, in so few iterations that a warm-up of 50 would not end."""
PARTS = 2
"""U-Nets of the cross-fitting, besides the one of all cases."""
VIEWS = {"hippocampus": 0, "oasis": 1}
VIEWS_OF_FEW = 2
"""Cached views of every training case where published weights make features that stay the same. One takes as long as
two steps and pays from its third use on: not where there are more cases than steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trained model.

    Attributes:
        name: of the row.
        dataset: key of `DATASETS`.
        backbone: of RFMedSAM 2; None: the U-Net alone.
        few: whether it is trained on `FEW` cases alone.
        coarse: whether Step 0, or the U-Net alone, works on means of blocks of `COARSE` voxels, at twice the spacing.
        step0_of: row of a U-Net alone that is Step 0 and stays as it is; None: Step 0 is trained in this row.
        share: part of the processor time of a row that this one takes; the rest is that of `step0_of`.
        changes: fields of the plan's stage that differ from what planning chooses, FIELD=VALUE.
    """

    name: str
    dataset: str
    backbone: LightBackbone | None = None
    few: bool = False
    coarse: bool = False
    step0_of: str | None = None
    share: float = 1.0
    changes: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of the plan's stage that differ from what planning chooses, FIELD=VALUE."""
        own = (f"model.crossfit.folds={PARTS}", "model.step0=crossfit") if self.crossfit else ()
        cached = (f"model.cached_views={self.cached_views}",) if self.cached_views else ()
        unet = "model" if self.backbone is None else "model.unet"
        coarse = (f"{unet}.input_stride={COARSE}".replace(" ", ""),) if self.coarse else ()
        fixed = () if self.step0_of is None else SHORT
        return (*own, *cached, *coarse, *fixed, f"validation.patches_while_training={PATCHES}", *self.changes)

    @property
    def minutes(self) -> float:
        """Processor minutes of training."""
        return self.share * (MINUTES_OF_FEW if self.few else MINUTES)

    @property
    def cached_views(self) -> int:
        """Views whose features are computed once."""
        if self.backbone not in WEIGHTS:
            return 0
        if self.step0_of is not None:
            return 1
        return VIEWS_OF_FEW if self.few else VIEWS[self.dataset]

    @property
    def crossfit(self) -> bool:
        """Whether Steps 1 and 2 learn from out-of-fold logits."""
        return self.backbone is not None and self.step0_of is None and "model.step0=joint" not in self.changes

    @property
    def baseline(self) -> str:
        """Name of the row of the U-Net alone that it is compared with."""
        return f"{self.dataset}{'_few' if self.few else ''}_unet"

    def weights(self, data: Path) -> Path | None:
        """Published weights of the backbone, None if it has none."""
        return data / WEIGHTS[self.backbone] if self.backbone in WEIGHTS else None


def _rows() -> list[Row]:
    rows = []
    for dataset in DATASETS:
        for few in (False, True):
            prefix = f"{dataset}_few" if few else dataset
            rows.append(Row(name=f"{prefix}_unet", dataset=dataset, few=few))
            backbones: tuple[LightBackbone, ...] = ("nano", "lite_medsam")
            rows += [Row(name=f"{prefix}_{name}", dataset=dataset, backbone=name, few=few) for name in backbones]
            learned = ("model.refinement_loss.own_masks=1", "model.refinement_loss.box_margin=0.25")
            rows.append(replace(rows[-2], name=f"{prefix}_nano_own_masks", changes=learned))
    rows.append(Row(name="oasis_mobile_sam", dataset="oasis", backbone="mobile_sam"))
    whole = next(row for row in rows if row.name == "oasis_lite_medsam")
    ablations = {
        "raw_correction": "model.output=correct",
        "random_prompts": "sampling.prompted_runs=false",
        "class_map_prompt": "model.step2_mask_prompt=class_map",
        "small_frames": "model.frame_size=64",
        "joint_step0": "model.step0=joint",
        "undisturbed": "model.disturbance={}",
    }
    rows += [replace(whole, name=f"{whole.name}_{name}", changes=(change,)) for name, change in ablations.items()]
    for few in (False, True):
        prefix = "oasis_few" if few else "oasis"
        rows.append(
            coarse := Row(name=f"{prefix}_coarse_unet", dataset="oasis", few=few, coarse=True, changes=(COARSE_PATCH,))
        )
        rows.append(start := replace(coarse, name=f"{prefix}_coarse_step0", share=1 - REFINEMENT_SHARE))
        light = next(row for row in rows if row.name == f"{prefix}_lite_medsam")
        refined = replace(light, name=f"{prefix}_coarse_lite_medsam", step0_of=start.name, share=REFINEMENT_SHARE)
        rows.append(replace(refined, coarse=True, changes=COARSE_UNET))
    return rows


ROWS = {row.name: row for row in _rows()}
