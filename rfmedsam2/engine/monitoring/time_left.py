"""How long a training still takes, by the recent speed of its steps and of its validations."""

from __future__ import annotations

import math

from rfmedsam2.records.training import TrainConfig
from rfmedsam2.system.progress import Speed


class TimeLeft:
    """Seconds until a training ends; what has not been timed yet counts nothing."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._steps, self._validations = Speed(), Speed()

    def add_step(self, seconds: float) -> None:
        """Record the duration of a step in seconds."""
        self._steps.add(1, seconds)

    def add_validation(self, seconds: float) -> None:
        """Record the duration of a validation in seconds."""
        self._validations.add(1, seconds)

    def seconds(self, step: int, validated: int) -> float:
        """Seconds left after `step` steps; `validated` is the last step that was validated."""
        config, every = self._config, self._config.validate_every_epochs
        validations = math.ceil(config.epochs / every) - math.ceil(validated / config.iterations_per_epoch / every)
        steps = (config.iterations - step) * (self._steps.seconds_per_unit or 0.0)
        return steps + validations * (self._validations.seconds_per_unit or 0.0)
