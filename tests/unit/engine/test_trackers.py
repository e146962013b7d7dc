"""Trackers: TensorBoard, Weights & Biases and MLflow, each as its own package reads what came, without a network."""

from __future__ import annotations

import logging

import pytest
from support.wandb_file import history

from rfmedsam2.engine.monitoring.log import MetricsLog
from rfmedsam2.engine.monitoring.trackers import TITLES, Tracking
from rfmedsam2.errors import MissingPackageError, UsageError

SETTINGS = {"learning_rate": 0.01, "optimizer": {"kind": "sgd"}, "empty": None}
NAMES = {"train/loss", "train/loss/ce", "train/lr", "validation/score", "validation/dsc/left (kidney)"}


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())


def tracking(name):
    return Tracking(names=(name,), title="Dataset900 rfmed 3d_fullres fold 0", settings=SETTINGS)


def step(number, loss=1.0):
    return {
        "event": "step",
        "step": number,
        "epoch": 0,
        "loss": loss,
        "losses": {"ce": loss},
        "lr": 0.1,
        "seconds": 1.0,
    }


def validation(number, score=0.5):
    scores = {"score": score, "dsc/left (kidney)": score}
    return {"event": "validation", "step": number, "epoch": 0, "scores": scores}


def train(folder, name, first, last, *, keep=0, ending="finished"):
    log = MetricsLog(folder, keep_step=keep, tracking=tracking(name))
    for number in range(first, last + 1):
        log.write(step(number, loss=float(number)))
    log.write(validation(last))
    log.close(ending)


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard", 1, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == NAMES
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_resumed_training_goes_on_in_its_run_of_mlflow(tmp_path):
    import mlflow

    train(tmp_path, "mlflow", 1, 3, ending="stopped")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'rfmedsam2'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "Dataset900 rfmed 3d_fullres fold 0"
    assert run.info.status == "KILLED"
    train(tmp_path, "mlflow", 3, 4, keep=2)  # the checkpoint was of step 2
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == {
        *("train/loss", "train/loss.ce", "train/lr", "validation/score", "validation/dsc.left _kidney_")
    }
    assert run.data.params == {"learning_rate": "0.01", "optimizer.kind": "sgd", "empty": "null"}
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    train(tmp_path, "mlflow", 1, 1)  # from the start: a run of its own
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_resumed_training_goes_on_in_its_run_of_weights_and_biases(tmp_path):
    train(tmp_path, "wandb", 1, 3, ending="stopped")
    known = (tmp_path / "wandb_run.txt").read_text()
    train(tmp_path, "wandb", 3, 4, keep=2)
    assert (tmp_path / "wandb_run.txt").read_text() == known
    assert len({path.name for path in tmp_path.rglob("*.wandb")}) == 1  # two parts of one run, which `wandb sync` joins
    rows = history(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        *[(number, float(number)) for number in (1, 2, 3)],
        *[(number, float(number)) for number in (3, 4)],
    ]
    assert {name for row in rows for name in row if not name.startswith("_")} == {*NAMES, "step"}


def test_projects_are_named_by_the_trackers_own_variables(tmp_path, monkeypatch):
    import mlflow
    import wandb

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "livers")
    train(tmp_path, "mlflow", 1, 1)
    assert mlflow.MlflowClient().get_experiment_by_name("livers") is not None
    monkeypatch.setenv("WANDB_PROJECT", "kidneys")
    wandb.teardown()  # its settings are read once a process
    projects = []
    monkeypatch.setattr(wandb, "init", lambda **words: projects.append(words["project"]) or 1 / 0)
    with pytest.raises(UsageError, match="Weights & Biases cannot be started"):
        train(tmp_path, "wandb", 1, 1)
    monkeypatch.delenv("WANDB_PROJECT")
    wandb.teardown()
    with pytest.raises(UsageError):
        train(tmp_path, "wandb", 1, 1)
    assert projects == ["kidneys", "rfmedsam2"]


@pytest.mark.parametrize("name", TITLES)
def test_what_is_not_installed_is_named_before_anything_is_done(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(MissingPackageError, match=rf"is not installed.*rfmedsam2\[{name}\]"):
        Tracking(names=(name,))


def test_one_name_may_stand_alone_and_others_are_refused():
    assert Tracking(names="tensorboard").names == ("tensorboard",)
    with pytest.raises(UsageError, match="comet"):
        Tracking(names=("comet",))


def test_a_tracker_that_cannot_start_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://server")
    with pytest.raises(UsageError, match=r"MLflow cannot be started.*nowhere"):
        MetricsLog(tmp_path, tracking=tracking("mlflow"))


def test_a_tracker_that_fails_later_never_stops_a_training(tmp_path, monkeypatch, caplog):
    log = MetricsLog(tmp_path, tracking=tracking("mlflow"))
    monkeypatch.setattr("mlflow.MlflowClient.log_batch", lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            log.write(step(number))
            log.flush()
        log.close()
    assert [record.message for record in caplog.records] == [
        "MLflow failed (division by zero) and gets nothing more; the training goes on."
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
