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
UNET_SHARE = 0.6
"""Part of a row's processor time that goes into Step 0, cross-fitted or not."""
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
        changes: fields of the plan's stage that differ from what planning chooses, FIELD=VALUE.
    """

    name: str
    dataset: str
    backbone: LightBackbone | None = None
    few: bool = False
    changes: tuple[str, ...] = ()

    @property
    def minutes(self) -> float:
        """Processor minutes of training."""
        return MINUTES_OF_FEW if self.few else MINUTES

    @property
    def cached_views(self) -> int:
        """Views whose features are computed once."""
        if self.backbone not in WEIGHTS:
            return 0
        return VIEWS_OF_FEW if self.few else VIEWS[self.dataset]

    @property
    def crossfit(self) -> bool:
        """Whether Steps 1 and 2 learn from out-of-fold logits."""
        return self.backbone is not None and "model.step0=joint" not in self.changes

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
    return rows


ROWS = {row.name: row for row in _rows()}
