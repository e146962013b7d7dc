"""`--trackers`: what trackers hold is what metrics.jsonl holds, also of a training that was interrupted."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from support.commands import run, run_ok
from support.wandb_file import history

from rfmedsam2.engine.monitoring.log import MetricsLog

FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")


def losses(folder: Path) -> dict[int, float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def test_trackers_hold_the_metrics_of_an_interrupted_training(planned_root, tmp_path, monkeypatch):
    import mlflow

    offline = {"WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in (offline | {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri()}).items():
        monkeypatch.setenv(name, value)
    root = Path(shutil.copytree(planned_root, tmp_path / "root"))
    words = ("train", "3d_fullres", 0, "--no-validate", "--iterations", 2, "--root", root)
    words = (*words, "--trackers", "tensorboard", "wandb", "mlflow")
    with monkeypatch.context() as interrupted:
        stop_in_the_second_epoch(interrupted)
        assert run(*words, "--epochs", 3).code == 130
    run_ok(*words, "--epochs", 3)

    expected = losses(root / FOLD)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'rfmedsam2'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "Dataset900_PhantomCT rfmed_cpu 3d_fullres fold 0"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.iterations_per_epoch"] == "2"
    kept = client.get_metric_history(found.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in kept} == pytest.approx(expected)
    rows = [row for row in history(root / FOLD) if "train/loss" in row]
    assert {row["step"]: row["train/loss"] for row in rows} == pytest.approx(expected)
    assert list((root / FOLD / "tensorboard").iterdir())


def stop_in_the_second_epoch(monkeypatch):
    write = MetricsLog.write

    def written(self, event):
        write(self, event)
        if event["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "write", written)


def test_a_tracker_that_does_not_exist_is_refused_before_anything_is_read(tmp_path):
    told = run("train", "3d_fullres", 0, "--trackers", "comet", "--root", tmp_path)
    assert told.code == 2
    assert "comet" in told.err
    assert "tensorboard" in told.err
