"""An example of a package that extends rfmedsam2: a network, a loss, an augmentation, a task and a planner."""

import torch
from torch import Tensor, nn

from rfmedsam2.losses import memberships
from rfmedsam2.pipeline.planning.plan import plan
from rfmedsam2.records.base import Record
from rfmedsam2.records.plan import Plan
from rfmedsam2.tasks.unet import UNetTask

NAMED = {
    "model": {"kind": "custom", "name": "tiny", "package": "example-extension", "options": {"width": 6}},
    "extensions": {
        "loss": {"name": "focal"},
        "augmentation": [{"name": "noise", "options": {"strength": 0.1}}],
        "task": {"name": "adamax"},
    },
}


class TinyNetwork(nn.Module):
    """Images (B, channels, *patch) -> logits (B, outputs, *patch)."""

    class Options(Record):
        width: int = 8

    def __init__(self, *, channels: int, outputs: int, patch_size: tuple[int, ...], options: Options) -> None:
        super().__init__()
        conv = nn.Conv2d if len(patch_size) == 2 else nn.Conv3d
        self.first, self.last = conv(channels, options.width, 3, padding=1), conv(options.width, outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.first(image).relu())


class FocalLoss:
    """Logits (B, K, ...) and label values (B, ...) -> named parts."""

    class Options(Record):
        gamma: float = 2.0

    def __init__(self, *, labels, options: Options) -> None:
        self.labels, self.gamma = labels, options.gamma

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        log = logits.log_softmax(1)
        losses = -((1 - log.exp()) ** self.gamma) * log * memberships(target, self.labels)
        return {"focal": losses.sum(1).mean()}


class Noise:
    """A training patch (C, ...) and its labels (...) -> the same, changed."""

    class Options(Record):
        strength: float = 0.05

    def __init__(self, *, options: Options) -> None:
        self.strength = options.strength

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return image + self.strength * torch.randn_like(image), labels


class AdamaxTask(UNetTask):
    """Trains as a U-Net is trained, with another optimizer."""

    def __init__(self, *, options: dict, **given) -> None:
        super().__init__(**given)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adamax(self.model.parameters(), lr=self.stage.train.learning_rate)


def plan_tiny(*, dataset, fingerprint, name: str | None, options: dict) -> Plan:
    """The preset `cpu` with the parts above."""
    data = plan(dataset, fingerprint, preset="cpu", name=name or "tiny").model_dump()
    return Plan.parse(data | {"stages": {"3d_fullres": data["stages"]["3d_fullres"] | NAMED}})
