"""Planning RFMedSAM 2: square patches, frame sizes, backbones and their settings, what cannot be planned."""

from __future__ import annotations

import math

import pytest
import torch
from test_plan import BODY_CT, BTCV, HIPPOCAMPUS, SAGITTAL, described

from rfmedsam2.choices import Backbone, Preset
from rfmedsam2.errors import PlanError, RecordError, UsageError
from rfmedsam2.models import build_stage
from rfmedsam2.nn.sam2.sizes import sizes_of
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.planning.presets import REFINEMENTS
from rfmedsam2.pipeline.planning.rfmedsam2 import enlarged_side, plan_rfmedsam2
from rfmedsam2.pipeline.preprocessing.plan_and_preprocess import PlanOptions, plan_and_preprocess
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.store.layout import Layout

DATA = {"hippocampus": HIPPOCAMPUS, "btcv": BTCV, "body": BODY_CT, "sagittal": SAGITTAL}


def planned(data: dict, preset: Preset = "default", backbone: Backbone | None = None) -> tuple[Stage, RFMedSam2Config]:
    stage = plan_rfmedsam2(*described(**data), preset=preset, backbone=backbone).stages["3d_fullres"]
    assert isinstance(stage.model, RFMedSam2Config)
    return stage, stage.model


@pytest.mark.parametrize("preset", REFINEMENTS)
@pytest.mark.parametrize("data", DATA)
def test_frames_are_square_and_fit_the_case(data, preset):
    stage, model = planned(DATA[data], preset)
    depth, height, width = stage.patch_size
    assert height == width
    assert height % 32 == 0
    assert model.frame_size % height == 0
    assert model.frame_size % 32 == 0
    assert height < max(stage.median_shape[1:]) + 64
    assert depth < stage.median_shape[0] + 16
    # the record itself checks the U-Net's strides against the patch
    Stage.parse(stage.model_dump(mode="json"))


def test_the_default_is_the_papers():
    stage, model = planned(BTCV)
    assert (stage.patch_size, stage.batch_size, model.frame_size, model.backbone) == (
        (32, 256, 256),
        2,
        256,
        "sam2_large",
    )
    alone = plan(*described(**BTCV)).stages["3d_fullres"]
    assert (model.unet, stage.train, stage.loss) == (alone.model, alone.train, alone.loss)


def test_names_follow_the_preset():
    assert [plan_rfmedsam2(*described(), preset=p).name for p in ("default", "cpu")] == ["rfmedsam2", "rfmedsam2_cpu"]


def test_a_laptop_trains_nano_from_scratch():
    stage, model = planned(HIPPOCAMPUS, "cpu")
    assert (stage.patch_size, model.backbone, model.frame_size) == ((32, 64, 64), "nano", 128)
    assert (model.output, model.freeze_backbone, model.adapters.blocks) == ("gated", False, "none")
    assert not stage.compute.checkpointing  # all of its activations fit
    assert math.prod(planned(BODY_CT, "cpu")[0].patch_size) <= 140_000


@pytest.mark.parametrize("backbone", ["mobile_sam", "lite_medsam"])
def test_light_backbones_stay_frozen_and_correct_the_prompts(backbone):
    stage, model = planned(HIPPOCAMPUS, "cpu", backbone)
    assert (model.frame_size, model.output, model.freeze_backbone) == (256, "gated", True)
    assert (model.adapters.encoder, model.adapters.blocks, stage.batch_size) == (False, "dwconv", 1)
    assert planned(HIPPOCAMPUS, "default", backbone)[1].adapters.encoder


@pytest.mark.parametrize(
    ("backbone", "layers", "width"), [("mobile_sam", 2, 512), ("lite_medsam", 2, 512), ("nano", 2, 128)]
)
def test_a_memory_without_published_weights_is_small(backbone, layers, width):
    stage, model = planned(HIPPOCAMPUS, "cpu", backbone)
    assert (model.memory_layers, model.memory_width) == ((2, 512) if backbone != "nano" else (None, None))
    wanted = stage.model_copy(update={"model": model})
    network = build_stage(plan_rfmedsam2(*described(**HIPPOCAMPUS), preset="cpu", backbone=backbone), wanted)
    attention = network.sam.base.memory_attention
    assert (attention.num_layers, attention.layers[0].linear1.out_features) == (layers, width)


def test_published_memories_and_those_of_older_plans_keep_their_sizes():
    assert planned(HIPPOCAMPUS, "cpu", "sam2_tiny")[1].memory_layers is None
    older = planned(HIPPOCAMPUS, "cpu", "lite_medsam")[1].model_dump(
        mode="json", exclude={"memory_layers", "memory_width"}
    )
    model = RFMedSam2Config.parse(older)
    sizes = sizes_of(model.backbone, memory_layers=model.memory_layers, memory_width=model.memory_width)
    assert (sizes.memory_layers, sizes.memory_width) == (4, 2048)
    with pytest.raises(RecordError, match="those of sam2_tiny's published weights"):
        RFMedSam2Config.parse(older | {"backbone": "sam2_tiny", "memory_width": 512})


@pytest.mark.parametrize("backbone", ["nano", "lite_medsam", "mobile_sam", "sam2_tiny", "sam2_large"])
def test_new_plans_draw_runs_and_obey_a_persons_boxes(backbone):
    stage, model = planned(HIPPOCAMPUS, "cpu", backbone)
    gated = not backbone.startswith("sam2")
    assert (model.step2_mask_prompt, model.given_boxes) == ("one_against_rest", "replace")
    assert stage.sampling.prompted_runs
    assert (model.output, stage.sampling.given_box_share) == (("gated", 0.25) if gated else ("replace", 0.0))


@pytest.mark.parametrize(("channels", "learns"), [(1, False), (2, True), (3, False), (4, True)])
def test_several_modalities_are_mixed_by_a_channel_adapter_that_learns(channels, learns):
    dataset, fingerprint = described(**(HIPPOCAMPUS | {"channels": [f"MR{i}" for i in range(channels)]}))
    for backbone in ("lite_medsam", "sam2_tiny"):
        found = plan_rfmedsam2(dataset, fingerprint, preset="cpu", backbone=backbone)
        with torch.device("meta"):
            network = build_stage(found, "3d_fullres")
        assert all(p.requires_grad is learns for p in network.channel_adapter.parameters())
        assert network.config.gradients_in_encoder is learns
        assert not any(p.requires_grad for p in network.sam.base.image_encoder.parameters())


@pytest.mark.parametrize(
    ("preset", "backbone", "objects", "propagates"),
    [
        ("cpu", "nano", 96, False),
        ("cpu", "lite_medsam", 24, False),
        ("default", "lite_medsam", None, True),
        ("default", "nano", None, False),
        ("default", "sam2_large", None, True),
    ],
)
def test_short_trainings_and_those_from_scratch_leave_the_prompter_alone(preset, backbone, objects, propagates):
    stage, model = planned(HIPPOCAMPUS, preset, backbone)
    assert (stage.sampling.max_prompted_objects, model.propagate_loss) == (objects, propagates)


@pytest.mark.parametrize(
    ("side", "least", "size"), [(64, 128, 128), (32, 128, 128), (32, 192, 128), (64, 192, 256), (224, 192, 224)]
)
def test_small_frames_are_enlarged_by_whole_factors(side, least, size):
    assert enlarged_side(side, least) == size


def test_more_memory_gives_no_smaller_patch():
    sizes = [math.prod(planned(BODY_CT, preset)[0].patch_size) for preset in ("8gb", "24gb", "80gb")]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_what_the_planner_cannot_do_is_a_sentence():
    with pytest.raises(UsageError, match=r"no settings for RFMedSAM 2.*nnunet.*default, 8gb, 24gb, 80gb, cpu"):
        plan_rfmedsam2(*described(), preset="nnunet")
    with pytest.raises(UsageError, match="The preset does not exist: huge"):
        plan_rfmedsam2(*described(), preset="huge")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"single slices.*model='unet'"):
        plan_rfmedsam2(*described(shape=(1, 64, 64)))
    with pytest.raises(PlanError, match=r"no class besides background.*dataset\.json of Dataset001_A"):
        plan_rfmedsam2(*described(classes=0))
    with pytest.raises(PlanError, match="no class besides background"):
        plan(*described(classes=0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "model.backbone=hiera_xl",
            r"model\.rfmedsam2\.backbone: Input should be 'sam2_tiny'.*'lite_medsam', found 'hie",
        ),
        ("model.generator=magic", r"generator: Input should be 'unet', 'object_queries'.*or 'gt', found 'magic'"),
        ("model.strategy=past", r"strategy: Input should be 'sam2', 'preceding', 'following' or 'both', found 'past'"),
        ("model.frame_size=100", r"model\.rfmedsam2: frame_size 100 is not a multiple of 32\)"),
        ("patch_size=[32,256,192]", r"3d_fullres: RFMedSAM 2 needs square slices, but the patch is \(32, 256, 192\)"),
        ("model.generator=gt", r"generator gt cannot use unet"),
        ("model.refinements=3", r"refinements: Input should be 1 or 2, found 3"),
    ],
)
def test_bad_figures_are_named_with_what_would_be_right(change, sentence):
    found = plan_rfmedsam2(*described(**BTCV))
    with pytest.raises(RecordError, match=sentence) as caught:
        found.with_overrides(f"3d_fullres.{change}", name="mine")
    assert "Value error" not in str(caught.value)


def test_a_plan_without_classes_is_refused():
    data = plan_rfmedsam2(*described(**BTCV)).model_dump(mode="json")
    data["labels"]["names"] = {"background": 0}
    with pytest.raises(RecordError, match="labels define only background"):
        Plan.parse(data)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backbone": "nano"}, r"A U-Net has no backbone: backbone='nano'. Add model='rfmedsam2'"),
        ({"published": "a.json", "model": "rfmedsam2", "preset": "cpu"}, r"Found published, preset, model"),
        ({"published": "a.json", "nnunet_plans": "b.json"}, r"Found nnunet_plans, published"),
        ({"nnunet_plans": "b.json", "spacing_zyx_mm": (1, 1, 1)}, r"Found nnunet_plans, spacing_zyx_mm"),
        ({"plan_name": "a/b"}, r"Invalid plan name"),
    ],
)
def test_options_that_clash_are_named_before_anything_is_read(tmp_path, options, sentence):
    nothing: object = None
    with pytest.raises(UsageError, match=sentence):
        plan_and_preprocess(nothing, Layout.under(tmp_path), PlanOptions(**options))  # type: ignore[arg-type]
