"""Planning networks of libraries: patches that fit them, training settings, what cannot be planned."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext

import pytest
import torch
from test_plan import BTCV, HIPPOCAMPUS, described

from rfmedsam2.choices import Preset
from rfmedsam2.errors import MissingPackageError, PlanError, RecordError, UsageError
from rfmedsam2.models import build_stage
from rfmedsam2.nn.library_networks import build_library_network
from rfmedsam2.pipeline.planning.library_networks import MODELS, fitted_patch, parameters_of, plan_library_network
from rfmedsam2.pipeline.planning.memory_estimate import activation_terms, total_gib
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.pipeline.preprocessing.plan_and_preprocess import PlanOptions, plan_and_preprocess
from rfmedsam2.records.model import LibraryConfig
from rfmedsam2.records.plan import Stage
from rfmedsam2.records.training import AdamW, WarmupPolySchedule
from rfmedsam2.store.layout import Layout


@pytest.mark.parametrize("preset", ["default", "cpu"])
@pytest.mark.parametrize("model", MODELS)
def test_patches_are_near_the_unets_and_fit_the_network(model, preset: Preset):
    for data in (HIPPOCAMPUS, BTCV):
        unet = plan(*described(**data), preset=preset)
        found = plan_library_network(*described(**data), model=model, preset=preset)
        assert found.name == f"{unet.name}_{model}"
        assert set(unet.stages) - set(found.stages) == ({"2d"} if model.startswith("primus") else set())
        for name, stage in found.stages.items():
            network, before = stage.model, unet.stages[name]
            assert isinstance(network, LibraryConfig)
            assert all(n % network.patch_multiple == 0 for n in stage.patch_size)
            near = [
                abs(n - m) <= network.patch_multiple for n, m in zip(stage.patch_size, before.patch_size, strict=True)
            ]
            assert all(near)
            assert not stage.loss.deep_supervision
            assert (stage.spacing_mm, stage.batch_size) == (before.spacing_mm, before.batch_size)
            Stage.parse(stage.model_dump(mode="json"))


def test_fitted_patches_by_hand():
    assert fitted_patch((40, 56, 40), (36, 50, 35), 32) == (32, 64, 32)
    assert fitted_patch((28, 256, 256), (100, 512, 512), 8) == (32, 256, 256)
    assert fitted_patch((5, 130, 17), (9, 130, 17), 8) == (8, 128, 16)
    # over one position SwinUNETR has nothing to normalize
    assert fitted_patch((32, 40, 32), (30, 40, 31), 32) == (32, 64, 32)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_about_those_of_the_network(model):
    stage = plan_library_network(*described(), model=model, preset="cpu").stages["3d_fullres"]
    assert isinstance(stage.model, LibraryConfig)
    with torch.device("meta") if model.startswith("primus") else nullcontext():
        network = build_library_network(stage.model, channels=1, outputs=2, patch_size=stage.patch_size)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert parameters_of(stage.model) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("model", ["segresnet", "swinunetr", "primus_l"])
def test_patches_shrink_until_they_fit_the_memory(model):
    sizes = []
    for gigabytes in (12, 24, 80):
        found = plan_library_network(*described(**BTCV), model=model, gpu_memory_gb=gigabytes)
        assert found.name == f"rfmed_{gigabytes}gb_{model}"
        stage = found.stages["3d_fullres"]
        kept = total_gib(activation_terms(stage, outputs=1, classes=1, half=True)) * 2**30 / 1e9
        assert kept < 0.6 * gigabytes
        sizes.append(stage.batch_size * math.prod(stage.patch_size))
        Stage.parse(stage.model_dump(mode="json"))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_memory_that_is_too_small_is_said():
    with pytest.raises(PlanError, match=r"No patch is small enough for the memory: Primus L.*Found 5 GB"):
        plan_library_network(*described(**BTCV), model="primus_l", gpu_memory_gb=5)


def test_training_settings_are_nnunets_for_primus_and_adamw_for_monais():
    primus = plan_library_network(*described(), model="primus_m", preset="nnunet").stages["3d_fullres"].train
    assert (primus.learning_rate, primus.weight_decay, primus.clip_norm) == (3e-4, 5e-2, 1.0)
    assert primus.optimizer == AdamW(betas=(0.9, 0.98))
    assert primus.schedule == WarmupPolySchedule(warmup_iterations=50 * 250)
    trains = [
        plan_library_network(*described(), model="segresnet", preset=preset).stages["3d_fullres"].train
        for preset in ("default", "cpu")
    ]
    assert (trains[0].optimizer, trains[0].learning_rate, trains[0].epochs) == (AdamW(), 2e-4, 1000)
    assert trains[1] == plan(*described(), preset="cpu").stages["3d_fullres"].train


def test_single_slices_have_no_primus_and_the_others_in_2d():
    flat = {"shape": (1, 96, 96)}
    with pytest.raises(PlanError, match=r"Primus needs volumes of several slices.*model='unet'"):
        plan_library_network(*described(**flat), model="primus_s")
    assert plan_library_network(*described(**flat), model="segresnet").stages["2d"].model.dimensions == 2


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("primus_s", ("3d_fullres.patch_size=[20,64,64]",), "patch axis 0 is 20, not a multiple of .* 8"),
        ("swinunetr", ("3d_fullres.patch_size=[32,48,64]",), "patch axis 1 is 48, not a multiple of .* 32"),
        (
            "swinunetr",
            ("3d_fullres.patch_size=[32,32,32]",),
            r"SwinUNETR needs a patch that is larger than \(32, 32, 32\)",
        ),
        ("swinunetr", ("3d_fullres.model.features=32",), "features.*multiple of 12"),
        ("segresnet", ("3d_fullres.model.features=12",), "features.*multiple of 8"),
        ("segresnet", ("2d.model.kind=primus",), "patch .* does not match a 3D network"),
    ],
)
def test_what_does_not_fit_is_said_when_planning(model, changes, message):
    found = plan_library_network(*described(), model=model)
    with pytest.raises(RecordError, match=message):
        found.with_overrides(*changes)


def test_a_backbone_is_for_rfmedsam2_alone(tmp_path):
    options = PlanOptions(model="segresnet", backbone="nano")
    with pytest.raises(UsageError, match="The model segresnet has no backbone"):
        plan_and_preprocess(None, Layout.under(tmp_path), options)  # type: ignore[arg-type]


def test_without_monai_one_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    found = plan_library_network(*described(), model="segresnet")
    with pytest.raises(MissingPackageError, match=r"SegResNet needs MONAI.*rfmedsam2\[monai\]"):
        build_stage(found, "3d_fullres")
