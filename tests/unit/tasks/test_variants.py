"""Every variant by its one plan field: trained for two steps, saved, and resumed for two more."""

from __future__ import annotations

import pytest
import torch
from support.toy_task import make_run
from test_unet_task import phantom_store, task_on, tiny_plan  # noqa: F401 - a fixture

from rfmedsam2.engine.fit import fit
from rfmedsam2.errors import RecordError
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.store.checkpoint_header import FINAL
from rfmedsam2.store.checkpoints import read_weights

FIELDS = (
    "model.norm=batch",
    "model.input_stride=[2,2,2]",
    "loss.top_k=10",
    "loss.focal_gamma=2",
    "loss.tversky=[0.3,0.7]",
    "augmentation.kind=da5",
    "augmentation.kind=none",
    "train.optimizer.kind=adam",
    "train.optimizer.kind=adan",
    "train.schedule.kind=cosine",
    "sampling.oversampling=probabilistic",
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_variant_is_one_field_and_trains(phantom_store, tmp_path, field):  # noqa: F811
    base = tiny_plan().with_overrides("3d_fullres.train.iterations_per_epoch=2")
    plan = base.with_overrides(f"3d_fullres.{field}")
    assert plan != base
    task = task_on(phantom_store, plan)
    before = {name: tensor.clone() for name, tensor in task.model.named_parameters()}
    progress = fit(task, plan.stages["3d_fullres"].train, make_run(tmp_path / "run"))
    assert progress.step == 2
    assert any(not torch.equal(before[name], tensor) for name, tensor in task.model.named_parameters())
    longer = plan.with_overrides("3d_fullres.train.epochs=2")
    progress = fit(
        task_on(phantom_store, longer), longer.stages["3d_fullres"].train, make_run(tmp_path / "run"), resume=True
    )
    assert progress.step == 4
    _, weights = read_weights(tmp_path / "run" / FINAL)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    network = plan.stages["3d_fullres"].model
    assert isinstance(network, UNetConfig)
    assert any(name.endswith("running_var") for name in weights) == (network.norm == "batch")


def test_da5_refuses_patches_of_few_slices():
    with pytest.raises(RecordError, match=r"da5 needs 6 voxels along every axis .* the patch is \(4, 32, 32\)"):
        tiny_plan((4, 32, 32)).with_overrides("3d_fullres.augmentation.kind=da5")


def test_every_variant_at_once(phantom_store):  # noqa: F811
    fields = [f"3d_fullres.{field}" for field in FIELDS if not field.endswith(("none", "adam"))]
    plan = tiny_plan().with_overrides(*fields)
    task = task_on(phantom_store, plan)
    loss = sum(task.loss(next(task.batches(0))).values())
    assert torch.isfinite(loss)
