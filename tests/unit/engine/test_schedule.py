"""Schedules: known values by hand and torch's own one-cycle; optimizers as the plan names them."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.schedule import learning_rate_factor, set_learning_rate
from rfmedsam2.records.training import (
    AdamW,
    OneCycleSchedule,
    PolySchedule,
    StepSchedule,
    TrainConfig,
    WarmupPolySchedule,
)


def config(schedule, epochs=10, iterations_per_epoch=4, **rest):
    return TrainConfig(epochs=epochs, iterations_per_epoch=iterations_per_epoch, schedule=schedule, **rest)


def factors(c):
    return [learning_rate_factor(c, step) for step in range(c.iterations)]


def test_poly_per_epoch_is_constant_within_an_epoch():
    found = factors(config(PolySchedule()))
    assert found[:4] == [1.0] * 4
    assert found[4:8] == [0.9**0.9] * 4
    assert found[-1] == pytest.approx(0.1**0.9)


def test_poly_per_iteration_falls_at_each_step():
    found = factors(config(PolySchedule(per="iteration", power=1.0)))
    assert found == pytest.approx([1 - i / 40 for i in range(40)])


def test_warm_up_rises_in_a_line_then_poly_takes_the_rest():
    found = factors(config(WarmupPolySchedule(warmup_iterations=8, start_factor=0.2, power=1.0)))
    assert found[:9] == pytest.approx([0.2 + 0.1 * i for i in range(9)])
    assert found[8:] == pytest.approx([1 - i / 32 for i in range(32)])


def test_a_warm_up_longer_than_the_training_stays_a_warm_up():
    found = factors(config(WarmupPolySchedule(warmup_iterations=80, start_factor=0.0)))
    assert found == pytest.approx([i / 80 for i in range(40)])


def test_step_falls_at_each_milestone_epoch():
    found = factors(config(StepSchedule(milestones=(3, 5), gamma=0.5)))
    assert [found[4 * e] for e in range(10)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("total", [10, 40, 1000])
def test_one_cycle_is_torchs(total):
    c = config(OneCycleSchedule(), epochs=1, iterations_per_epoch=total, learning_rate=0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    peer = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total, cycle_momentum=False)
    expected = []
    for step in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            peer.step()
    assert [0.1 * f for f in factors(c)] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [PolySchedule(), PolySchedule(per="iteration"), WarmupPolySchedule(), StepSchedule(), OneCycleSchedule()],
)
def test_one_step_trainings_have_a_rate(schedule):
    assert 0 < learning_rate_factor(config(schedule, 1, 1), 0) <= 1


def test_groups_keep_their_own_rates_and_frozen_weights_are_left_out():
    a, b, frozen = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    frozen.requires_grad = False
    groups = [{"params": [a, frozen]}, {"params": [b], "lr": 1e-4}]
    optimizer = build_optimizer(groups, TrainConfig(learning_rate=1e-2, optimizer=AdamW()))
    for _ in range(2):
        assert set_learning_rate(optimizer, 0.5) == 0.5e-2
    assert [g["lr"] for g in optimizer.param_groups] == [0.5e-2, 0.5e-4]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_default_optimizer_is_the_papers():
    optimizer = build_optimizer(torch.nn.Linear(2, 2).parameters(), TrainConfig())
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (1e-3, 0.99, True, 3e-5)
    assert len(optimizer.param_groups) == 1
    assert len(group["params"]) == 2
