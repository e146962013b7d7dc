"""Schedules: known values by hand and torch's own one-cycle; optimizers as the plan names them."""

from __future__ import annotations

import pytest
import timm.optim
import torch

from rfmedsam2.engine.optimizers import build_optimizer
from rfmedsam2.engine.schedule import learning_rate_factor, set_learning_rate
from rfmedsam2.records.training import (
    Adam,
    AdamW,
    Adan,
    CosineSchedule,
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


def test_cosine_is_torchs_annealing_per_epoch_or_iteration():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        annealing.step()
    assert factors(config(CosineSchedule(end_factor=0.1)))[::4] == pytest.approx(expected)
    each = config(CosineSchedule(per="iteration", end_factor=0.1), epochs=5, iterations_per_epoch=2)
    assert factors(each) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "kind", "options"),
    [
        (Adam(), torch.optim.Adam, {"betas": (0.9, 0.999), "amsgrad": False}),
        (AdamW(amsgrad=True), torch.optim.AdamW, {"betas": (0.9, 0.999), "amsgrad": True}),
        (Adan(eps=1e-6), timm.optim.Adan, {"betas": (0.98, 0.92, 0.99), "eps": 1e-6}),
    ],
)
def test_adam_and_adan_are_built_from_their_fields(settings, kind, options):
    built = build_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainConfig(optimizer=settings, weight_decay=0.5))
    assert type(built) is kind
    assert {name: built.defaults[name] for name in options} == options
    assert built.defaults["weight_decay"] == 0.5


def test_adan_follows_its_paper():
    """Algorithm 1 of Xie et al. (2022) by hand: m, v and n of gradients and their differences, bias-corrected."""
    rate, decay, keep = 0.1, 0.2, (0.98, 0.92, 0.99)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    settings = TrainConfig(optimizer=Adan(), learning_rate=rate, weight_decay=decay)
    optimizer = build_optimizer([parameter], settings)
    value, before = parameter.detach().clone(), None
    m = v = n = torch.zeros(2, dtype=torch.float64)
    for step, gradient in enumerate(torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.1]], dtype=torch.float64), 1):
        change = torch.zeros(2) if before is None else gradient - before
        m = keep[0] * m + (1 - keep[0]) * gradient
        v = keep[1] * v + (1 - keep[1]) * change
        n = keep[2] * n + (1 - keep[2]) * (gradient + keep[1] * change) ** 2
        mean, difference, square = (a / (1 - b**step) for a, b in zip((m, v, n), keep, strict=True))
        value = (value - rate * (mean + keep[1] * difference) / (square.sqrt() + 1e-8)) / (1 + rate * decay)
        before = gradient
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), value)
