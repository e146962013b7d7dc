"""Settings of the training loop: optimizer, learning rates, schedule, precision; nothing about the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rfmedsam2.records.base import Record
from rfmedsam2.records.model import Count, Decay, Positive, Whole


class Sgd(Record):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    momentum: Decay = 0.99
    nesterov: bool = True


class AdamW(Record):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8


class PolySchedule(Record):
    """lr = lr0 * (1 - t/T) ** power, t in epochs (appendix G, eq. 1) or iterations."""

    kind: Literal["poly"] = "poly"
    power: Positive = 0.9
    per: Literal["epoch", "iteration"] = "epoch"


class WarmupPolySchedule(Record):
    """Linear warm-up from `start_factor`, then poly per iteration over the rest."""

    kind: Literal["warmup_poly"] = "warmup_poly"
    warmup_iterations: Whole = 1500
    start_factor: Annotated[float, Field(ge=0)] = 0.01
    power: Positive = 0.9


class StepSchedule(Record):
    """Multiply by `gamma` when each epoch of `milestones` begins."""

    kind: Literal["step"] = "step"
    milestones: tuple[int, ...] = (10,)
    gamma: Positive = 0.1


class OneCycleSchedule(Record):
    """One cycle per iteration: cosine up to the full rate over `warmup_share` of the steps, cosine down after."""

    kind: Literal["one_cycle"] = "one_cycle"
    warmup_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start_factor: Positive = 0.04
    end_factor: Annotated[float, Field(ge=0)] = 4e-6


class TrainConfig(Record):
    """Settings of the training loop; nothing about the model."""

    epochs: Count = 1000
    iterations_per_epoch: Count = 250
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3e-5
    optimizer: Annotated[Sgd | AdamW, Field(discriminator="kind")] = Sgd()
    rate_factors: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    """Factors of `learning_rate` by the beginning of parameters' names (`encoder.`): the longest counts, 0 freezes."""
    schedule: Annotated[
        PolySchedule | WarmupPolySchedule | StepSchedule | OneCycleSchedule, Field(discriminator="kind")
    ] = PolySchedule()
    accumulation: Count = 1
    """Micro-batches per optimizer step."""
    clip_norm: Positive | None = 12.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware supports it (GPUs, CPUs with AMX, AVX512-BF16), else fp16 on GPUs, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA, if a trial step succeeds."""
    seed: Whole = 0
    deterministic: bool = False
    checkpoint_minutes: Positive = 10.0
    validate_every_epochs: Count = 1
    workers: Whole | None = None
    """Data loading processes; None: chosen from cores and memory, 0: load in the main process."""
    worker_timeout_seconds: Positive = 300.0

    @property
    def iterations(self) -> int:
        """Number of optimizer steps of the whole training."""
        return self.epochs * self.iterations_per_epoch
