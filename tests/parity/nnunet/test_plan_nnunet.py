"""Plans against nnU-Net 2.8's own planners, on the same fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfmedsam2.pipeline.nnunet.plans import import_nnunet_plans
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.planning.topology import feature_map_size, topology_of
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from rfmedsam2.records.plan import Plan

default_experiment_planner = pytest.importorskip(
    "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner"
)
from nnunetv2.experiment_planning.experiment_planners import network_topology  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (  # noqa: E402
    residual_encoder_unet_planners as residual,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans  # noqa: E402

NAME = "Dataset777_Synthetic"
CASES = {
    "small isotropic MR": {"shape": (36, 50, 35), "spacing": (1, 1, 1), "cases": 260, "channels": ["MR"], "classes": 2},
    "anisotropic CT": {
        "shape": (100, 512, 512),
        "spacing": (3, 0.76, 0.76),
        "cases": 30,
        "channels": ["CT"],
        "classes": 13,
    },
    "large CT": {"shape": (480, 512, 512), "spacing": (1, 0.8, 0.8), "cases": 131, "channels": ["CT"], "classes": 2},
    "four-channel MR": {
        "shape": (140, 170, 138),
        "spacing": (1, 1, 1),
        "cases": 40,
        "channels": ["T1", "T1ce", "T2", "FLAIR"],
        "classes": 3,
        "crop": 0.4,
    },
    "thick sagittal slices": {
        "shape": (320, 320, 15),
        "spacing": (0.6, 0.6, 3.6),
        "cases": 48,
        "channels": ["T2"],
        "classes": 2,
    },
    "very thick slices": {
        "shape": (10, 256, 216),
        "spacing": (10, 1.5, 1.5),
        "cases": 100,
        "channels": ["MR"],
        "classes": 3,
    },
    "pictures": {
        "shape": (1, 600, 500),
        "spacing": (999, 1, 1),
        "cases": 50,
        "channels": ["rgb_to_0_1"] * 3,
        "classes": 1,
    },
}


def synthetic(name: str) -> tuple[dict[str, Any], Fingerprint]:
    """A dataset.json and a fingerprint whose shapes and spacings vary from case to case."""
    what = CASES[name]
    rng = np.random.default_rng(len(name))
    cases = []
    for i in range(what["cases"]):
        varied = [max(1, round(n * rng.uniform(0.85, 1.15))) if n > 1 else 1 for n in what["shape"]]
        spacing = np.asarray(what["spacing"], float) * (rng.uniform(0.8, 1.3) if name != "pictures" else 1)
        cases.append(
            CaseFingerprint(
                id=f"case_{i:04d}",
                shape_zyx=tuple(varied),
                shape_after_crop_zyx=tuple(varied),
                spacing_zyx_mm=tuple(spacing.tolist()),
                voxels_by_label={1: 10},
            )
        )
    statistics = IntensityStatistics(
        mean=80.5, median=82, std=140, min=-1000, max=2000, percentile_00_5=-950, percentile_99_5=300
    )
    labels = {"background": 0} | {f"class{i}": i for i in range(1, what["classes"] + 1)}
    dataset_json = {
        "channel_names": {str(i): channel for i, channel in enumerate(what["channels"])},
        "labels": labels,
        "numTraining": what["cases"],
        "file_ending": ".nii.gz",
    }
    return dataset_json, Fingerprint(
        dataset=NAME,
        digest="synthetic",
        cases=tuple(cases),
        intensities=(statistics,) * len(what["channels"]),
        median_relative_size_after_crop=what.get("crop", 1.0),
    )


def nnunet_plans(
    planner_class: type,
    dataset_json: dict[str, Any],
    fingerprint: Fingerprint,
    folder: Path,
    monkeypatch,
    **options: float,
) -> dict[str, Any]:
    """What nnU-Net's planner writes for this fingerprint, from folders of its own."""
    raw, preprocessed = folder / "raw", folder / "preprocessed"
    (raw / NAME / "imagesTr").mkdir(parents=True)
    (preprocessed / NAME).mkdir(parents=True)
    (raw / NAME / "dataset.json").write_text(json.dumps(dataset_json))
    for case in fingerprint.cases:
        for channel in range(len(fingerprint.intensities)):
            (raw / NAME / "imagesTr" / f"{case.id}_{channel:04d}.nii.gz").touch()
    theirs = {
        "spacings": [list(case.spacing_zyx_mm) for case in fingerprint.cases],
        "shapes_after_crop": [list(case.shape_after_crop_zyx) for case in fingerprint.cases],
        "median_relative_size_after_cropping": fingerprint.median_relative_size_after_crop,
        "foreground_intensity_properties_per_channel": {
            str(i): statistics.model_dump() for i, statistics in enumerate(fingerprint.intensities)
        },
    }
    (preprocessed / NAME / "dataset_fingerprint.json").write_text(json.dumps(theirs))
    for module in (default_experiment_planner,):
        monkeypatch.setattr(module, "nnUNet_raw", str(raw))
        monkeypatch.setattr(module, "nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setattr(default_experiment_planner, "maybe_convert_to_dataset_name", lambda name: name)
    # the networks that it builds to measure them are costly; the formula in their place is tested below
    monkeypatch.setattr(planner_class, "static_estimate_VRAM_usage", staticmethod(estimate_without_network))
    planner = planner_class(NAME, **options)
    monkeypatch.setattr(planner, "determine_reader_writer", lambda: SimpleNamespace(__name__="NibabelIO"))
    planner.plan_experiment()
    return json.loads((preprocessed / NAME / f"{planner.plans_identifier}.json").read_text())


def estimate_without_network(patch_size, input_channels, output_channels, class_name, kwargs, imports) -> int:
    """nnU-Net's own class on the meta device: same count, no memory."""
    import torch

    with torch.device("meta"):
        network = get_network_from_plans(class_name, kwargs, imports, input_channels, output_channels, allow_init=False)
    return int(network.compute_conv_feature_map_size(patch_size))


def ours(dataset_json: dict[str, Any], fingerprint: Fingerprint, preset: str, memory: float | None = None) -> Plan:
    dataset = SimpleNamespace(name=NAME, json=DatasetJson.parse(dataset_json))
    return plan(dataset, fingerprint, preset=preset, gpu_memory_gb=memory)


@pytest.mark.parametrize("name", CASES)
def test_the_nnunet_preset_plans_what_nnunet_plans(name, tmp_path, monkeypatch):
    dataset_json, fingerprint = synthetic(name)
    planner = default_experiment_planner.ExperimentPlanner
    theirs = nnunet_plans(planner, dataset_json, fingerprint, tmp_path, monkeypatch)
    assert_same(ours(dataset_json, fingerprint, "nnunet"), theirs)


@pytest.mark.parametrize(
    ("preset", "planner"),
    [
        ("nnunet_resenc_m", residual.nnUNetPlannerResEncM),
        ("nnunet_resenc_l", residual.nnUNetPlannerResEncL),
        ("nnunet_resenc_xl", residual.nnUNetPlannerResEncXL),
    ],
)
@pytest.mark.parametrize("name", ["anisotropic CT", "four-channel MR"])
def test_the_residual_presets_plan_what_nnunet_plans(preset, planner, name, tmp_path, monkeypatch):
    dataset_json, fingerprint = synthetic(name)
    theirs = nnunet_plans(planner, dataset_json, fingerprint, tmp_path, monkeypatch)
    assert_same(ours(dataset_json, fingerprint, preset), theirs)


@pytest.mark.filterwarnings("ignore:WARNING. You are running nnUNetPlannerL")
@pytest.mark.parametrize("gigabytes", [5, 16, 40.5])
@pytest.mark.parametrize(
    ("preset", "planner"),
    [
        ("nnunet", default_experiment_planner.ExperimentPlanner),
        ("nnunet_resenc_l", residual.nnUNetPlannerResEncL),
    ],
)
def test_another_gpu_memory_plans_what_nnunet_plans(preset, planner, gigabytes, tmp_path, monkeypatch):
    dataset_json, fingerprint = synthetic("anisotropic CT")
    theirs = nnunet_plans(planner, dataset_json, fingerprint, tmp_path, monkeypatch, gpu_memory_target_in_gb=gigabytes)
    mine = ours(dataset_json, fingerprint, preset, gigabytes)
    assert_same(mine, theirs)
    assert mine.name == f"{preset}_{gigabytes:g}gb"
    assert mine.stages != ours(dataset_json, fingerprint, preset).stages


def assert_same(mine: Plan, theirs: dict[str, Any]) -> None:
    every = theirs["configurations"]
    configurations = {name: {**every.get(own.get("inherits_from"), {}), **own} for name, own in every.items()}
    assert set(mine.stages) == set(configurations)
    assert list(mine.transpose_forward) == theirs["transpose_forward"]
    assert list(mine.transpose_backward) == theirs["transpose_backward"]
    for stage_name, their in configurations.items():
        stage, network = mine.stages[stage_name], their["architecture"]["arch_kwargs"]
        dimensions = len(their["patch_size"])
        assert stage.previous_stage == their.get("previous_stage")
        assert list(stage.patch_size) == their["patch_size"], stage_name
        assert stage.batch_size == their["batch_size"], stage_name
        assert list(stage.spacing_mm[-dimensions:]) == pytest.approx(their["spacing"], rel=1e-12)
        assert list(stage.median_shape[-dimensions:]) == [round(n) for n in their["median_image_size_in_voxels"]]
        assert stage.loss.batch_dice == their["batch_dice"], stage_name
        assert [list(s) for s in stage.model.strides] == network["strides"]
        assert [list(k) for k in stage.model.kernel_sizes] == network["kernel_sizes"]
        assert list(stage.model.features) == network["features_per_stage"]
        blocks = network.get("n_conv_per_stage") or network["n_blocks_per_stage"]
        assert list(stage.model.encoder_blocks) == blocks
        assert list(stage.model.decoder_blocks) == network["n_conv_per_stage_decoder"]
        assert [n.use_mask for n in stage.normalization] == their["use_mask_for_norm"]


@pytest.mark.parametrize("planner", ["ExperimentPlanner", "nnUNetPlannerResEncL"])
@pytest.mark.parametrize("name", ["anisotropic CT", "four-channel MR", "pictures"])
def test_plans_of_nnunet_are_imported_as_the_preset_would_plan_them(name, planner, tmp_path, monkeypatch):
    dataset_json, fingerprint = synthetic(name)
    residual_planner = planner != "ExperimentPlanner"
    chosen = residual.nnUNetPlannerResEncL if residual_planner else default_experiment_planner.ExperimentPlanner
    nnunet_plans(chosen, dataset_json, fingerprint, tmp_path, monkeypatch)
    path = next((tmp_path / "preprocessed" / NAME).glob("nnUNet*.json"))
    imported = import_nnunet_plans(path, DatasetJson.parse(dataset_json), fingerprint="synthetic", name="same")
    planned = ours(dataset_json, fingerprint, "nnunet_resenc_l" if residual_planner else "nnunet")
    assert set(imported.stages) == set(planned.stages)
    assert imported.model_dump(exclude={"stages", "name"}) == planned.model_dump(exclude={"stages", "name"})
    for stage, mine in planned.stages.items():
        assert imported.stages[stage] == mine.model_copy(update={"spacing_mm": imported.stages[stage].spacing_mm})
        assert imported.stages[stage].spacing_mm == pytest.approx(mine.spacing_mm)


@pytest.mark.parametrize("seed", range(40))
def test_pooling_equals_nnunets_rule(seed):
    rng = np.random.default_rng(seed)
    dimensions = 2 + seed % 2
    spacing = np.exp(rng.uniform(-1, 1.8, dimensions)).tolist()
    patch = rng.integers(3, 300, dimensions).tolist()
    _, strides, kernels, padded, divisor = network_topology.get_pool_and_conv_props(spacing, patch, 4, 999999)
    mine = topology_of(spacing, patch)
    assert mine.strides == tuple(tuple(s) for s in strides)
    assert mine.kernel_sizes == tuple(tuple(k) for k in kernels)
    assert mine.patch_size == tuple(int(n) for n in padded)
    assert mine.divisor == tuple(int(n) for n in divisor)


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize(
    ("spacing", "patch"), [((3, 0.76, 0.76), (32, 256, 256)), ((1, 1, 1), (40, 56, 40)), ((1.2, 0.5), (320, 192))]
)
def test_feature_map_size_equals_that_of_the_network(block, spacing, patch):
    import torch

    from rfmedsam2.nn.unet import _library_network
    from rfmedsam2.pipeline.planning.topology import FeatureWidths

    topology = topology_of(spacing, patch)
    config = FeatureWidths(block=block, base=24, maximum=100).network(topology)
    with torch.device("meta"):
        network = _library_network(config, 3, 14)
    expected = network.compute_conv_feature_map_size(topology.patch_size)
    assert feature_map_size(config, topology.patch_size, outputs=14) == expected
