"""Planning: rules by hand-made fingerprints, presets, changes, plans of nnU-Net that cannot be had."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import get_args
from unittest import mock

import numpy as np
import pytest

from rfmedsam2.choices import Preset
from rfmedsam2.errors import PlanError, RecordError, RfMedSamError, UsageError
from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.pipeline.planning import topology
from rfmedsam2.pipeline.planning.overrides import adapt_plan_to_dataset
from rfmedsam2.pipeline.planning.plan import channel_normalizations, plan
from rfmedsam2.pipeline.planning.presets import PRESETS
from rfmedsam2.pipeline.planning.spacing import target_spacing
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.records.training import AdamW, Sgd

NAME = "Dataset001_A"
HIPPOCAMPUS = {"shape": (36, 50, 35), "spacing": (1, 1, 1), "classes": 2, "channels": ("MRI",), "cases": 260}
BTCV = {"shape": (100, 512, 512), "spacing": (3.0, 0.76, 0.76), "classes": 13, "cases": 30}
BODY_CT = {"shape": (450, 512, 512), "spacing": (1.0, 0.8, 0.8), "classes": 15, "cases": 200}
SAGITTAL = {"shape": (320, 300, 20), "spacing": (0.6, 0.6, 4.0), "classes": 1, "cases": 20}


def described(
    *, shape=(32, 32, 32), spacing=(1, 1, 1), classes=1, channels=("CT",), cases=10, crop=1.0, **extra
) -> tuple[SimpleNamespace, Fingerprint]:
    """A dataset and fingerprint of equal cases."""
    labels = {"background": 0} | {f"c{i}": i for i in range(1, classes + 1)}
    plain = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": labels,
        "file_ending": ".nii.gz",
        **extra,
    }
    found = [
        CaseFingerprint(
            id=f"{i}", shape_zyx=shape, shape_after_crop_zyx=shape, spacing_zyx_mm=spacing, voxels_by_label={1: 5}
        )
        for i in range(cases)
    ]
    flat = IntensityStatistics(mean=0, median=0, std=1, min=-1, max=1, percentile_00_5=-1, percentile_99_5=1)
    fingerprint = Fingerprint(
        dataset=NAME,
        digest="abc",
        cases=tuple(found),
        intensities=(flat,) * len(channels),
        median_relative_size_after_crop=crop,
    )
    return SimpleNamespace(name=NAME, json=DatasetJson.parse(plain)), fingerprint


def with_spacings(fingerprint: Fingerprint, spacings) -> Fingerprint:
    pairs = zip(fingerprint.cases, spacings, strict=True)
    return fingerprint.model_copy(
        update={"cases": tuple(case.model_copy(update={"spacing_zyx_mm": s}) for case, s in pairs)}
    )


def test_the_target_spacing_is_the_median():
    _, fingerprint = described(cases=3)
    found = target_spacing(with_spacings(fingerprint, [(1, 1, 1), (2, 1, 1), (2.5, 1, 3)]))
    assert found.tolist() == [2, 1, 1]


def test_thick_slices_take_the_tenth_percentile():
    _, fingerprint = described(shape=(10, 200, 200), cases=11)
    found = target_spacing(with_spacings(fingerprint, [(5.0 + i, 1, 1) for i in range(11)]))
    assert found.tolist() == [6, 1, 1]


def test_thick_slices_never_become_finer_than_the_other_axes():
    _, fingerprint = described(shape=(10, 200, 200), cases=3)
    found = target_spacing(with_spacings(fingerprint, [(0.5, 1, 1), (9, 1, 1), (9, 1, 1)]))
    assert found[0] == pytest.approx(2.2)  # the percentile lies between 0.5 and 9
    found = target_spacing(with_spacings(fingerprint, [(0.5, 1.5, 1.5), (6, 1.5, 1.5), (6, 1.5, 1.5)]))
    assert found[0] == pytest.approx(1.6)
    found = target_spacing(with_spacings(fingerprint, [(0.5, 1.7, 1.7), (6, 1.7, 1.7), (6, 1.7, 1.7)]))
    assert found[0] == pytest.approx(1.70001)


@pytest.mark.parametrize(
    ("channel", "kind"),
    [("CT", "ct"), ("ct", "ct"), ("T1", "zscore"), ("noNorm", "none"), ("rescale_to_0_1", "rescale_0_1")],
)
def test_the_channel_name_decides_the_normalization(channel, kind):
    assert channel_normalizations((channel,), 1.0)[0].kind == kind


def test_only_zscore_uses_the_mask_and_only_where_the_crop_takes_much():
    assert [n.use_mask for n in channel_normalizations(("CT", "T1"), 0.74)] == [False, True]
    assert [n.use_mask for n in channel_normalizations(("CT", "T1"), 0.75)] == [False, False]


def test_the_default_plan_of_btcv_is_the_papers():
    found = plan(*described(**BTCV))
    stage = found.stages["3d_fullres"]
    assert found.name == "rfmed"
    assert (stage.patch_size, stage.batch_size) == ((32, 256, 256), 2)
    assert stage.model.features == (32, 64, 128, 256, 320, 320, 320)
    assert (stage.train.learning_rate, stage.train.optimizer) == (1e-3, Sgd(momentum=0.99, nesterov=True))
    assert stage.train.iterations == 250_000
    assert list(found.stages) == ["3d_fullres", "3d_lowres", "3d_cascade_fullres", "2d"]
    assert found.stages["3d_cascade_fullres"] == stage.model_copy(update={"previous_stage": "3d_lowres"})
    assert found.stages["2d"].patch_size == (512, 512)
    assert found.stages["2d"].augmentation.mirror_axes == (0, 1)


def test_a_patch_is_never_larger_than_the_cases_need():
    stage = plan(*described(**HIPPOCAMPUS)).stages["3d_fullres"]
    assert stage.patch_size == (32, 56, 40)
    assert stage.median_shape == (36, 50, 35)


def test_the_coarsest_axis_comes_first():
    found = plan(*described(**SAGITTAL))
    assert found.transpose_forward == (2, 0, 1)
    assert found.stages["3d_fullres"].median_shape == (20, 320, 300)
    assert found.stages["3d_fullres"].patch_size[0] == 20
    assert found.stages["2d"].spacing_mm == pytest.approx((4.0, 0.6, 0.6))


def test_pictures_get_a_2d_plan_only_whatever_their_slice_spacing():
    found = plan(*described(shape=(1, 400, 300), spacing=(1, 2, 2), channels=("rgb_to_0_1",)))
    assert list(found.stages) == ["2d"]
    assert found.transpose_forward == (0, 1, 2)


def test_two_dimensional_stages_describe_the_slices_as_stored():
    dataset, fingerprint = described(shape=(10, 200, 200), cases=11)
    found = plan(dataset, with_spacings(fingerprint, [(5.0 + i, 1, 1) for i in range(11)]))
    assert found.stages["2d"].spacing_mm == (10, 1, 1)
    assert found.stages["2d"].median_shape == (10, 200, 200)
    assert found.stages["3d_fullres"].median_shape == (17, 200, 200)


def test_images_of_a_few_voxels_still_get_a_network_that_can_run():
    stage = plan(*described(shape=(4, 5, 3))).stages["3d_fullres"]
    assert stage.patch_size == (12, 12, 12)
    assert len(stage.model.features) == 2


def test_a_target_spacing_may_be_given():
    found = plan(*described(**SAGITTAL), spacing_zyx_mm=(1.2, 1.2, 4.0))
    assert found.stages["3d_fullres"].spacing_mm == (4.0, 1.2, 1.2)
    with pytest.raises(PlanError, match="not positive"):
        plan(*described(), spacing_zyx_mm=(1.0, 0.0, 1.0))


def test_readers_that_reorient_are_honoured():
    assert plan(*described()).reorient is None
    assert plan(*described(overwrite_image_reader_writer="NibabelIOWithReorient")).reorient == "RAS"


@pytest.mark.parametrize("preset", get_args(Preset))
@pytest.mark.parametrize("data", [HIPPOCAMPUS, BTCV, BODY_CT, SAGITTAL], ids=["hippocampus", "btcv", "body", "thick"])
def test_every_preset_plans_every_kind_of_data_with_few_tries(preset, data, monkeypatch):
    dataset, fingerprint = described(**data)
    tries = mock.Mock(wraps=topology.topology_of)
    monkeypatch.setattr(topology, "topology_of", tries)
    found = plan(dataset, fingerprint, preset=preset)
    assert 0 < tries.call_count < 1000  # 20,000 a second
    assert found.name == PRESETS[preset].plan_name
    assert Plan.from_json(found.to_json()) == found


def test_the_cpu_preset_stays_small():
    hippocampus = plan(*described(**HIPPOCAMPUS), preset="cpu").stages["3d_fullres"]
    assert (hippocampus.patch_size, hippocampus.batch_size) == ((40, 56, 40), 2)
    assert hippocampus.model.features == (16, 32, 64, 128)
    assert hippocampus.model.encoder_blocks == (1, 2, 2, 2)
    assert hippocampus.model.decoder_blocks == (2, 2, 1)
    assert hippocampus.spacing_mm == (1, 1, 1)
    assert isinstance(hippocampus.train.optimizer, AdamW)
    body = plan(*described(**BODY_CT), preset="cpu")
    stage = body.stages["3d_fullres"]
    assert np.prod(stage.patch_size) * stage.batch_size <= 200_000
    assert np.prod(stage.median_shape) <= 2_050_000
    assert max(stage.spacing_mm) < 4
    assert "3d_lowres" not in body.stages


def test_only_the_cpu_preset_weighs_classes_and_does_not_mirror():
    for preset in get_args(Preset):
        for stage in plan(*described(**BTCV), preset=preset).stages.values():
            mirrored = () if preset == "cpu" else tuple(range(len(stage.patch_size)))
            assert stage.augmentation.mirror_axes == mirrored
            assert stage.loss.class_balance == (0.5 if preset == "cpu" else 0)


def test_memory_presets_grow_with_the_memory():
    sizes = [plan(*described(**BTCV), preset=p).stages["3d_fullres"] for p in ("8gb", "24gb", "80gb")]
    voxels = [int(np.prod(s.patch_size)) * s.batch_size for s in sizes]
    assert voxels[0] <= 2 * 32 * 256 * 256
    assert voxels[0] < voxels[1] < voxels[2]


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(UsageError, match="default, cpu, 8gb, 24gb, 80gb"):
        plan(*described(), preset="huge")  # type: ignore[arg-type]


def test_a_fingerprint_of_other_data_is_refused():
    dataset, fingerprint = described()
    for wrong in ({"dataset": "Dataset002_B"}, {"cases": ()}, {"intensities": ()}):
        with pytest.raises(PlanError, match="does not match the dataset"):
            plan(dataset, fingerprint.model_copy(update=wrong))


def test_changes_make_a_new_named_plan():
    old = plan(*described(**BTCV))
    new = old.with_overrides(
        "3d_fullres.train.epochs=50",
        "3d_fullres.train.precision=bf16",
        "2d.normalization.0.use_mask=true",
        "3d_fullres.patch_size=[64, 128, 128]",
        "file_ending=.nrrd",
        name="mine",
    )
    stage = new.stages["3d_fullres"]
    assert (new.name, stage.train.epochs, stage.train.precision, stage.patch_size) == (
        "mine",
        50,
        "bf16",
        (64, 128, 128),
    )
    assert new.stages["2d"].normalization[0].use_mask
    assert new.file_ending == ".nrrd"
    assert old.stages["3d_fullres"].train.epochs == 1000


def test_another_kind_takes_the_defaults_of_that_kind():
    old = plan(*described(), preset="nnunet")
    new = old.with_overrides(
        "3d_fullres.train.optimizer.kind=adamw", "3d_fullres.train.optimizer.eps=1e-6", name="mine"
    )
    assert new.stages["3d_fullres"].train.optimizer == AdamW(eps=1e-6)


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("3d_fullres.train.epoch=5", UsageError, "Did you mean 'epochs'"),
        ("3d_fulres.train.epochs=5", UsageError, "Did you mean '3d_fullres'"),
        ("3d_fullres.train.epochs.more=5", UsageError, "not a field below it"),
        ("3d_fullres.normalization.3.kind=ct", UsageError, "one of 0"),
        ("3d_fullres.train.epochs", UsageError, "stage.field=value"),
        ("3d_fullres.train.epochs=many", RecordError, "epochs.*many"),
        ("3d_fullres.patch_size=[33, 32, 32]", RecordError, "not a multiple"),
    ],
)
def test_a_wrong_change_is_a_sentence(assignment, error, message):
    with pytest.raises(error, match=message):
        plan(*described()).with_overrides(assignment, name="mine")


def test_a_plan_moves_to_another_dataset_with_its_intensities():
    source = plan(*described(**BTCV))
    dataset, fingerprint = described(**BODY_CT | {"classes": 13})
    dataset.name = "Dataset002_B"
    fingerprint = fingerprint.model_copy(update={"dataset": "Dataset002_B", "digest": "new"})
    found = adapt_plan_to_dataset(source, dataset, fingerprint)
    assert (found.dataset, found.fingerprint, found.stages) == ("Dataset002_B", "new", source.stages)
    with pytest.raises(PlanError, match="does not match the dataset"):
        adapt_plan_to_dataset(source, *described(**HIPPOCAMPUS))


def nnunet_file(tmp_path, change=None, **top):
    arguments = {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": 2,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    full = {
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [20.5, 20.0, 20.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
        },
    }
    if change is not None:
        change(full, arguments)
    plans = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1, 1, 1],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "configurations": {
            "3d_fullres": full,
            "3d_fullres_bs4": {"inherits_from": "3d_fullres", "batch_size": 4},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 0, "median": 0, "std": 1, "min": -1, "max": 1, "percentile_00_5": -1, "percentile_99_5": 1}
        },
        **top,
    }
    path = tmp_path / "nnUNetPlans.json"
    path.write_text(json.dumps(plans))
    return path


def imported(path, **options) -> Plan:
    return import_nnunet_plans(path, described()[0].json, **options)


def test_inherited_configurations_are_resolved(tmp_path):
    found = imported(nnunet_file(tmp_path))
    full, cascade = found.stages["3d_fullres"], found.stages["3d_cascade_fullres"]
    assert found.stages["3d_fullres_bs4"] == full.model_copy(update={"batch_size": 4})
    assert cascade == full.model_copy(update={"previous_stage": "3d_lowres"})
    assert found.inputs_of(cascade) - found.inputs_of(full) == len(found.labels.foreground)
    assert full.model.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    assert found.reorient == "RAS"


def test_the_second_stage_of_a_cascade_is_a_unet(tmp_path):
    stage = imported(nnunet_file(tmp_path)).stages["3d_cascade_fullres"].model_dump(mode="json")
    with pytest.raises(RecordError, match="previous_stage 3d_lowres, but"):
        Stage.parse({**stage, "model": {"kind": "custom", "name": "other"}}, where="a plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda full, _: full["architecture"].update(network_class_name="os.system"), "network system"),
        (lambda full, _: full.update(preprocessor_name="Mine"), "preprocessor Mine"),
        (lambda full, _: full.update(normalization_schemes=["MyNorm"]), "normalization MyNorm"),
        (lambda full, _: full.update(resampling_fn_seg="resample_torch_fornnunet"), "resample_torch_fornnunet"),
        (lambda _, arguments: arguments.update(dropout_op="torch.nn.Dropout3d"), "dropout_op"),
        (lambda _, arguments: arguments.update(norm_op="torch.nn.GroupNorm"), "norm_op"),
        (lambda _, arguments: arguments.update(squeeze=True), "squeeze"),
    ],
)
def test_what_cannot_be_had_is_listed_and_nothing_is_imported(tmp_path, change, message):
    with pytest.raises(PlanError, match=message):
        imported(nnunet_file(tmp_path, change))


def test_configurations_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"one or several of 3d_fullres.* Found 3d\."):
        imported(nnunet_file(tmp_path), stages=["3d"])


def test_configurations_that_inherit_in_a_circle_are_refused(tmp_path):
    path = nnunet_file(tmp_path, configurations={"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}})
    with pytest.raises(PlanError, match="a -> b -> a"):
        imported(path)


def test_plans_of_older_nnunet_releases_are_understood(tmp_path):
    def aged(full, arguments):
        del full["architecture"]
        full.update(
            UNet_class_name="PlainConvUNet",
            UNet_base_num_features=8,
            unet_max_num_features=20,
            n_conv_per_stage_encoder=[2, 2, 2],
            n_conv_per_stage_decoder=[2, 2],
            conv_kernel_sizes=[[3, 3, 3]] * 3,
            pool_op_kernel_sizes=[[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        )

    assert imported(nnunet_file(tmp_path, aged)).stages["3d_fullres"].model.features == (8, 16, 20)


def test_a_file_that_is_no_plan_lists_what_it_lacks(tmp_path):
    path = tmp_path / "nnUNetPlans.json"
    path.write_text("{}")
    with pytest.raises(RecordError, match="transpose_forward"):
        imported(path)


def places(value, path=()):
    """Every place in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


@pytest.mark.parametrize("damage", [None, "x", -1, [], {}, [1], 1.5])
def test_damaged_plans_of_nnunet_end_in_a_sentence_never_in_a_traceback(tmp_path, damage):
    path = nnunet_file(tmp_path)
    whole = json.loads(path.read_text())
    refused = 0
    for place in list(places(whole)):
        damaged = json.loads(json.dumps(whole))
        holder = damaged
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = damage
        path.write_text(json.dumps(damaged))
        try:
            imported(path)
        except RfMedSamError:
            refused += 1
    assert refused > 20
