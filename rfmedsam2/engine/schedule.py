"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from typing_extensions import assert_never

from rfmedsam2.records.training import (
    CosineSchedule,
    OneCycleSchedule,
    PolySchedule,
    StepSchedule,
    TrainConfig,
    WarmupPolySchedule,
)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor of the learning rate at optimizer step `step` (0 <= step < config.iterations).

    Poly: RFMedSAM 2, appendix G, eq. 1. One-cycle: Smith and Topin 2018, with cosines as in torch's OneCycleLR.
    """
    schedule = config.schedule
    epoch = step // config.iterations_per_epoch
    match schedule:
        case PolySchedule(per="epoch"):
            return _poly(epoch, config.epochs, schedule.power)
        case PolySchedule():
            return _poly(step, config.iterations, schedule.power)
        case WarmupPolySchedule():
            warmup = schedule.warmup_iterations
            if step < warmup:
                return schedule.start_factor + (1 - schedule.start_factor) * step / warmup
            return _poly(step - warmup, config.iterations - warmup, schedule.power)
        case StepSchedule():
            return schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
        case OneCycleSchedule():
            return _one_cycle(schedule, step, config.iterations)
        case CosineSchedule(per="epoch"):
            return _cosine(1.0, schedule.end_factor, epoch / config.epochs)
        case CosineSchedule():
            return _cosine(1.0, schedule.end_factor, step / config.iterations)
        case _:
            assert_never(schedule)


def endless_warmup(config: TrainConfig) -> str | None:
    """Sentence about a warm-up that is as long as the training or longer, None if it ends."""
    warmup = getattr(config.schedule, "warmup_iterations", 0)
    if warmup < config.iterations:
        return None
    return (
        f"The learning rate warms up for {warmup} iterations, and the training has {config.iterations}: the full rate "
        "is never reached. Train for longer, or set train.schedule.warmup_iterations to less."
    )


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set every group's rate to its initial rate times `factor`; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def _poly(done: int, total: int, power: float) -> float:
    return max(0.0, 1 - done / max(total, 1)) ** power


def _one_cycle(schedule: OneCycleSchedule, step: int, total: int) -> float:
    peak = max(1.0, schedule.warmup_share * total - 1)
    if step <= peak:
        return _cosine(schedule.start_factor, 1.0, step / peak)
    return _cosine(1.0, schedule.end_factor, (step - peak) / max(1.0, total - 1 - peak))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
