"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each an optional package.

A tracker gets what metrics.jsonl holds, never decides anything, and cannot stop a training: one that fails while steps
run is left out from then on, with a warning. Where it sends its data, its own environment variables say
(WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from rfmedsam2.arguments import choice_of, names_of
from rfmedsam2.choices import TrackerName
from rfmedsam2.errors import MissingPackageError, UsageError
from rfmedsam2.system.atomic import write_text

logger = logging.getLogger(__name__)
Ending = Literal["finished", "stopped", "failed"]
PROJECT = "rfmedsam2"
"""Project (Weights & Biases) or experiment (MLflow) of runs whose environment names none."""
RUN_FILE = "{}_run.txt"
"""File in the training's folder with the run that a resumed training goes on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """What is tracked, and as what.

    Attributes:
        names: trackers.
        title: name of the run.
        settings: the plan of the training, as JSON values.

    Raises:
        UsageError: there is no such tracker.
        MissingPackageError: a tracker's package is not installed.
    """

    names: tuple[TrackerName, ...] = ()
    title: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in names_of(self.names, "trackers"):  # programs give one alone, and any text
            choice_of(name, tuple(TITLES), "trackers")
            if importlib.util.find_spec(name) is None:
                raise MissingPackageError(
                    f"{TITLES[name]} is not installed", remedy=f"Install it with: pip install 'rfmedsam2[{name}]'"
                )
        object.__setattr__(self, "names", names_of(self.names, "trackers"))


class Tracker(Protocol):
    """A run in one tracker."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step; steps ascend, except that a resumed training repeats those after its checkpoint."""
        ...

    def flush(self) -> None:
        """Hand over what is buffered."""
        ...

    def close(self, ending: Ending) -> None:
        """End the run; a later one may resume it."""
        ...


class Trackers:
    """All trackers of a training.

    Args:
        tracking: which ones.
        folder: folder of the training.
        step: completed steps; 0: a new run begins, else the one before goes on.

    Raises:
        UsageError: one cannot be started, for instance without a login.
    """

    def __init__(self, tracking: Tracking, folder: Path, step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(tracking.names):
            try:
                self._open[name] = _KINDS[name](tracking, folder, step)
            except Exception as error:  # of any package, about a login, a server, a disk
                raise UsageError(
                    f"{TITLES[name]} cannot be started ({_line(error)})",
                    where=folder,
                    remedy="Set it up as its documentation says, or train without it",
                ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step for all trackers."""
        self._each(lambda tracker: tracker.add(step, values))

    def flush(self) -> None:
        """Hand over what is buffered."""
        self._each(lambda tracker: tracker.flush())

    def close(self, ending: Ending) -> None:
        """End all runs."""
        self._each(lambda tracker: tracker.close(ending))
        self._open.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:  # noqa: BLE001 - a training outlives its display
                del self._open[name]
                logger.warning(
                    "%s failed (%s) and gets nothing more; the training goes on.", TITLES[name], _line(error)
                )


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


class TensorBoard:
    """Event files in `tensorboard/` of the training's folder."""

    def __init__(self, tracking: Tracking, folder: Path, step: int) -> None:  # noqa: ARG002
        module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write events to disk."""
        self._writer.flush()

    def close(self, ending: Ending) -> None:  # noqa: ARG002
        """Write and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; with WANDB_MODE=offline its files lie in `wandb/` of the training's folder."""

    def __init__(self, tracking: Tracking, folder: Path, step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        known = _known_run(folder, "wandb", step)
        self._run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            name=tracking.title or None,
            config=dict(tracking.settings),
            dir=str(folder),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        _keep_run(folder, "wandb", self._run.id)
        # Its own counter of steps never goes back, as a resumed training does.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._run.log({**values, "step": step})

    def flush(self) -> None:
        """Nothing: its own process writes at once."""

    def close(self, ending: Ending) -> None:
        """Send what is left, and end the run."""
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class MLflow:
    """A run of MLflow, sent in batches."""

    BATCH = 500
    """Metrics a call; MLflow takes at most 1000."""
    PARAMS = 100
    """Parameters a call, which is the most that MLflow takes."""

    def __init__(self, tracking: Tracking, folder: Path, step: int) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._metric, self._param, self._client = mlflow.entities.Metric, mlflow.entities.Param, mlflow.MlflowClient()
        experiment = mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        known = _known_run(folder, "mlflow", step)
        if known is None:
            known = self._new_run(tracking, experiment)
        else:
            self._client.update_run(known, status="RUNNING")
        self._run, self._buffer = known, []
        _keep_run(folder, "mlflow", known)

    def _new_run(self, tracking: Tracking, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=tracking.title or None).info.run_id
        params = [self._param(_mlflow_name(key), value) for key, value in _flat(tracking.settings)]
        for first in range(0, len(params), self.PARAMS):
            self._client.log_batch(run, params=params[first : first + self.PARAMS])
        return run

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        now = int(1000 * time.time())
        self._buffer += [self._metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        if len(self._buffer) >= self.BATCH:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered."""
        while self._buffer:
            self._client.log_batch(self._run, metrics=self._buffer[: self.BATCH])
            del self._buffer[: self.BATCH]

    def close(self, ending: Ending) -> None:
        """Send what is left, and end the run."""
        self.flush()
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending]
        self._client.set_terminated(self._run, status)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their path (`train.learning_rate`), as text of at most the 6000 characters that MLflow keeps."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, (value if isinstance(value, str) else json.dumps(value))[:6000]


def _mlflow_name(name: str) -> str:
    """A name as MLflow takes it: letters, digits, `_ - . /` and spaces.

    One slash at most: kept in files, train/loss would have to be a file and, for train/loss/ce, a folder.
    """
    group, slash, rest = re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII).partition("/")
    return group + slash + rest.replace("/", ".")


def _known_run(folder: Path, name: str, step: int) -> str | None:
    """The run that a training at this step goes on with."""
    path = folder / RUN_FILE.format(name)
    return path.read_text(encoding="utf-8").strip() if step and path.is_file() else None


def _keep_run(folder: Path, name: str, run: str) -> None:
    write_text(folder / RUN_FILE.format(name), run + "\n")


TITLES: Mapping[str, str] = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}
_KINDS: Mapping[TrackerName, Callable[[Tracking, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
