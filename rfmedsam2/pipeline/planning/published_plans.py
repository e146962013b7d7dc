"""The plans in `plans/`: BTCV and AMOS22 from published statistics, and the ablations of the paper.

Made here, written by `scripts/write_plans.py`, compared with the files by a test. Intensities are unknown without the
data: a soft-tissue window is used until `overrides.adapt_plan_to_dataset` inserts those of a dataset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rfmedsam2.errors import UsageError
from rfmedsam2.geometry import Triple
from rfmedsam2.pipeline.datasets import amos22, btcv
from rfmedsam2.pipeline.datasets.label_tables import AMOS22_LABELS, BTCV_LABELS
from rfmedsam2.pipeline.planning.plan import CASCADE, plan
from rfmedsam2.pipeline.planning.presets import get_rfmedsam2_preset
from rfmedsam2.pipeline.planning.rfmedsam2 import refined_plan
from rfmedsam2.pipeline.planning.topology import FeatureWidths, topology_of
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan

UNKNOWN = "published figures, no dataset"
WINDOW = IntensityStatistics(mean=40, median=40, std=115, min=-160, max=240, percentile_00_5=-160, percentile_99_5=240)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedDataset:
    """Published statistics of a dataset: medians over its training cases, (z, y, x)."""

    name: str
    labels: dict[str, int]
    shape: tuple[int, int, int]
    spacing_mm: Triple
    cases: int
    reader: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPlan:
    """Specification of a published plan.

    Attributes:
        data: the dataset.
        model: unet, or rfmedsam2 (a U-Net refined by SAM 2).
        patch: initial patch instead of the default's 32x256x256.
        spacing_mm: target spacing instead of nnU-Net's rule.
        flat_unet: Step 0's U-Net processes single slices (Table 7's 2D).
        changes: overrides, as given to `--set`.
    """

    data: PublishedDataset
    model: Literal["unet", "rfmedsam2"] = "rfmedsam2"
    patch: tuple[int, int, int] | None = None
    spacing_mm: Triple | None = None
    flat_unet: bool = False
    changes: tuple[str, ...] = ()


BTCV = PublishedDataset(
    name=btcv.NAME, labels=BTCV_LABELS, shape=(100, 512, 512), spacing_mm=(3.0, 0.76, 0.76), cases=30
)
AMOS22_CT = PublishedDataset(
    name=amos22.NAMES[1],
    labels=AMOS22_LABELS,
    shape=(258, 512, 512),
    spacing_mm=(2.0, 0.712890625, 0.712890625),
    cases=300,
    reader="NibabelIOWithReorient",
)


def _model(**fields: str) -> tuple[str, ...]:
    """Overrides of fields of RFMedSAM 2's record."""
    return tuple(f"3d_fullres.model.{name}={value}" for name, value in fields.items())


def _generator(name: str, *, object_scores: str = "false") -> PublishedPlan:
    """Plan with another prompt generator than a U-Net; absent classes have prompts too, labeled -1 (section 3.4.1)."""
    changes = _model(generator=name, unet="null", object_scores=object_scores)
    absent = ("3d_fullres.sampling.absent_share=1",) if name != "hierarchical_masks" else ()
    return PublishedPlan(data=BTCV, changes=(*changes, *absent))


def _given_boxes(*changes: str, object_scores: str = "true") -> PublishedPlan:
    """Plan with boxes from the reference (Table 3, Fig. 4(2) and 4(3)); the paper's 0.923 is with scores (Table 4)."""
    recipe = _generator("gt", object_scores=object_scores)
    return replace(recipe, changes=(*recipe.changes, *changes))


# Fig. 4(2) was measured with plain adapters only: 91.58 + 0.47 + 0.25 is Table 3's 92.30
PLAIN = ("3d_fullres.model.adapters.blocks=plain", "3d_fullres.model.adapters.convolutions=none")
ATTENTION = "3d_fullres.model.unet.attention=true"

PUBLISHED: dict[str, PublishedPlan] = {
    "btcv": PublishedPlan(data=BTCV),
    "amos22_ct": PublishedPlan(data=AMOS22_CT),
    "btcv_unet": PublishedPlan(data=BTCV, model="unet"),
    "amos22_ct_unet": PublishedPlan(data=AMOS22_CT, model="unet"),
    # Fig. 4(2)
    "btcv_gt_memory_sam2": _given_boxes(*PLAIN, *_model(strategy="sam2")),
    "btcv_gt_memory_preceding": _given_boxes(*PLAIN, *_model(strategy="preceding")),
    "btcv_gt_memory_following": _given_boxes(*PLAIN, *_model(strategy="following")),
    "btcv_gt_memory_both": _given_boxes(*PLAIN, *_model(strategy="both")),
    # Fig. 4(3): plain adapters only is btcv_gt_memory_preceding
    "btcv_gt_adapters_dwconv": _given_boxes("3d_fullres.model.adapters.convolutions=none"),
    "btcv_gt": _given_boxes(),
    # Table 4
    "btcv_gt_no_object_scores": _given_boxes(object_scores="false"),
    "btcv_object_scores": PublishedPlan(data=BTCV, changes=_model(object_scores="true")),
    # Fig. 4(4): (f) is btcv
    "btcv_object_queries": _generator("object_queries"),
    "btcv_scored_object_queries": _generator("scored_object_queries", object_scores="true"),
    "btcv_point_embeddings": _generator("point_embeddings", object_scores="true"),
    "btcv_hierarchical_masks": _generator("hierarchical_masks"),
    # Fig. 4(4e): masks are only the source of boxes; masks as prompts come with (f)
    "btcv_one_refinement": PublishedPlan(data=BTCV, changes=_model(refinements="1", mask_prompt="false")),
    # Table 6: a slice of 512 pixels is upsampled to fill a patch of 1024
    "btcv_patch_2x1024": PublishedPlan(data=BTCV, patch=(2, 1024, 1024), spacing_mm=(3.0, 0.38, 0.38)),
    "btcv_patch_8x512": PublishedPlan(data=BTCV, patch=(8, 512, 512)),
    # Table 7: U-Nets on their own, and the same U-Nets as Step 0
    "btcv_unet_attention": PublishedPlan(
        data=BTCV,
        model="unet",
        changes=tuple(f"{s}.model.attention=true" for s in ("3d_fullres", "3d_lowres", CASCADE, "2d")),
    ),
    "btcv_step0_2d": PublishedPlan(data=BTCV, flat_unet=True),
    "btcv_step0_2d_attention": PublishedPlan(data=BTCV, flat_unet=True, changes=(ATTENTION,)),
    "btcv_step0_3d_attention": PublishedPlan(data=BTCV, changes=(ATTENTION,)),
}


def published_plan(name: str) -> Plan:
    """Make the plan of `plans/NAME.json`.

    Raises:
        UsageError: the plan does not exist; lists the existing ones.
    """
    if name not in PUBLISHED:
        raise UsageError("The published plan does not exist", where=name, expected=f"one of {', '.join(PUBLISHED)}")
    recipe = PUBLISHED[name]
    dataset, fingerprint = _Described(recipe.data), _fingerprint(recipe.data)
    if recipe.model == "unet":
        found = plan(dataset, fingerprint, name=name)
    else:
        refinement = get_rfmedsam2_preset("default")
        refinement = replace(refinement, start=recipe.patch or refinement.start)
        found = refined_plan(dataset, fingerprint, refinement, name=name, spacing_zyx_mm=recipe.spacing_mm)
    return (_flat(found) if recipe.flat_unet else found).with_overrides(*recipe.changes, name=name)


class _Described:
    """A dataset of which only published statistics are known."""

    def __init__(self, figures: PublishedDataset) -> None:
        described = {"channel_names": {"0": "CT"}, "labels": figures.labels, "file_ending": ".nii.gz"}
        self.name = figures.name
        self.json = DatasetJson.parse(described | {"overwrite_image_reader_writer": figures.reader})


def _fingerprint(figures: PublishedDataset) -> Fingerprint:
    case = CaseFingerprint(
        id="median",
        shape_zyx=figures.shape,
        shape_after_crop_zyx=figures.shape,
        spacing_zyx_mm=figures.spacing_mm,
        voxels_by_label={},
    )
    return Fingerprint(
        dataset=figures.name,
        digest=UNKNOWN,
        cases=(case,) * figures.cases,
        intensities=(WINDOW,),
        median_relative_size_after_crop=1.0,
    )


def _flat(found: Plan) -> Plan:
    """Replace Step 0's network by nnU-Net's 2D U-Net for the same slices."""
    stage = found.stage("3d_fullres")
    assert isinstance(stage.model, RFMedSam2Config)
    topology = topology_of(stage.spacing_mm[1:], stage.patch_size[1:])
    model = stage.model.model_copy(update={"unet": FeatureWidths(maximum=512).network(topology)})
    return found.model_copy(update={"stages": {"3d_fullres": stage.model_copy(update={"model": model})}})
