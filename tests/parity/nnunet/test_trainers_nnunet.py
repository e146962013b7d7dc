"""nnU-Net's trainer classes against the plan fields that stand for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainerCosAnneal import nnUNetTrainerCosAnneal
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import (
    nnUNetTrainerAdam,
    nnUNetTrainerVanillaAdam,
)
from support.commands import run_ok
from support.tiny_model import make_plan, write_model

from rfmedsam2 import Predictor
from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.schedule import learning_rate_factor
from rfmedsam2.models import shapes_of
from rfmedsam2.nn.library_networks import build_library_network
from rfmedsam2.records.model import PrimusConfig
from rfmedsam2.records.training import Adam, AdamW, CosineSchedule, TrainConfig


def trainer_of(trainer: Any, network: torch.nn.Module) -> Any:
    """What its `configure_optimizers` looks at."""
    fields = {"network": network, "initial_lr": 1e-2, "weight_decay": 3e-5, "num_epochs": 20}
    return trainer.configure_optimizers(SimpleNamespace(**fields))


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        (nnUNetTrainerAdam, AdamW(amsgrad=True)),
        (nnUNetTrainerVanillaAdam, Adam()),
    ],
)
def test_optimizers_take_the_same_steps(trainer, settings):
    weights = []
    for ours in (True, False):
        torch.manual_seed(0)
        network = torch.nn.Linear(5, 3)
        if ours:
            config = TrainConfig(learning_rate=1e-2, optimizer=settings)
            optimizer = build_optimizer(network.parameters(), config)
        else:
            optimizer, _ = trainer_of(trainer, network)
        for _ in range(5):
            optimizer.zero_grad()
            network(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
        weights.append(network.weight.detach())
    assert torch.equal(*weights)


# nnU-Net steps by number of epoch, before its optimizer does
@pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call of", "ignore:Seems like")
def test_the_cosine_schedule_is_the_same_by_epoch():
    optimizer, schedule = trainer_of(nnUNetTrainerCosAnneal, torch.nn.Linear(2, 2))
    config = TrainConfig(learning_rate=1e-2, epochs=20, iterations_per_epoch=2, schedule=CosineSchedule())
    for epoch in range(20):
        schedule.step(epoch)
        rate = config.learning_rate * learning_rate_factor(config, 2 * epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_primus_is_the_trainers(size):
    trainer = getattr(primus_trainers, f"nnUNet_Primus_{size}_Trainer")
    configuration = SimpleNamespace(patch_size=(16, 24, 16))

    def theirs() -> torch.nn.Module:
        return trainer.build_network_architecture(None, configuration, 2, 3, enable_deep_supervision=False)

    if size != "S":  # the others take gigabytes
        with torch.device("meta"):
            network = build_library_network(PrimusConfig(size=size), channels=2, outputs=3, patch_size=(16, 24, 16))
            expected = theirs()
        shapes = [{name: value.shape for name, value in n.state_dict().items()} for n in (network, expected)]
        assert shapes[0] == shapes[1]
        return
    torch.manual_seed(0)
    network = build_library_network(PrimusConfig(size=size), channels=2, outputs=3, patch_size=(16, 24, 16)).eval()
    torch.manual_seed(0)
    patch = torch.randn(1, 2, 16, 24, 16)
    torch.manual_seed(0)
    expected = theirs().eval()
    with torch.no_grad():
        assert torch.equal(network(patch), expected(patch))


@pytest.mark.parametrize("stage", ["3d_fullres", "2d"])
def test_batch_norm_goes_both_ways(tmp_path: Path, stage: str) -> None:
    plan = make_plan().with_overrides(f"{stage}.model.norm=batch")
    checkpoint = write_model(tmp_path / "model", plan, stage=stage)
    assert any(name.endswith("running_mean") for name in shapes_of(plan, plan.stages[stage]))
    run_ok("export_model", "--to", "nnunet", "-m", tmp_path / "model", "-o", tmp_path / "out")
    (folder,) = (tmp_path / "out").glob("*/*")
    # nnUNetTrainerBN leaves instance norm in its plans
    plans = json.loads((folder / "plans.json").read_text())
    arguments = plans["configurations"][stage]["architecture"]["arch_kwargs"]
    dimensions = 2 if stage == "2d" else 3
    assert arguments["norm_op"] == f"torch.nn.modules.batchnorm.BatchNorm{dimensions}d"
    arguments["norm_op"] = f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d"
    (folder / "plans.json").write_text(json.dumps(plans))
    final = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(final, weights_only=False)
    torch.save({**content, "trainer_name": "nnUNetTrainerBN"}, final)

    theirs = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(folder), (0,))
    theirs.network.load_state_dict(theirs.list_of_parameters[0])
    own = Predictor.load(checkpoint.parent.parent, device="cpu")
    back = Predictor.load(folder, device="cpu")
    assert back.config.model.norm == "batch"
    patch = torch.rand(1, 1, *plan.stages[stage].patch_size)
    with torch.no_grad():
        expected = theirs.network.eval()(patch)
        assert torch.equal(own.networks[0](patch), expected)
        assert torch.equal(back.networks[0](patch), expected)
