"""Training the real U-Net task on the phantom: repeatable, resumable, over ranks, with faults named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run_error, unfinished_files

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.errors import RfMedSamError, UsageError
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.progress import OnStep

PHANTOM = "Dataset900_PhantomCT"
QUIET = TrainOptions(device="cpu", validate=False)
RANK = """
import os, sys
from pathlib import Path
import rfmedsam2.pipeline.training.train as pipeline
from rfmedsam2.cli.pipeline import train_command
from rfmedsam2.store.checkpoints import weights_sha256

real, folder = pipeline.fit, Path(__file__).parent

def fit(task, *rest, **named):
    progress = real(task, *rest, **named)
    (folder / f"rank_{os.environ['RANK']}.txt").write_text(weights_sha256(task.model.state_dict()))
    return progress

pipeline.fit = fit
train_command()
"""


@pytest.fixture
def layout(planned_root, tmp_path) -> Layout:
    """The planned phantom, read in place, with results of its own."""
    return Layout(raw=planned_root / "raw", preprocessed=planned_root / "preprocessed", results=tmp_path / "results")


@pytest.fixture
def plan(layout) -> Plan:
    whole = read_record(layout.plan_file(PHANTOM, "rfmed_cpu"), Plan)
    return with_figures(whole, "epochs=2", "iterations_per_epoch=2", "validate_every_epochs=1", "workers=0")


def with_figures(plan: Plan, *figures: str) -> Plan:
    return plan.with_overrides(*(f"3d_fullres.train.{figure}" for figure in figures))


def weights_of(folder: Path, which: str = "final") -> str:
    return read_record_of(folder / f"checkpoint_{which}.safetensors").weights_sha256


def untimed(folder: Path) -> list[dict]:
    clocks = ("time", "seconds", "eta_seconds", "memory_mb", "resident_mb", "data_seconds", "ram_mb")
    return [{k: v for k, v in e.items() if k not in clocks} for e in read_events(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(planned_root, tmp_path_factory) -> Path:
    """Fold 0, four steps, in one go."""
    layout = Layout.under(planned_root)
    layout = Layout(raw=layout.raw, preprocessed=layout.preprocessed, results=tmp_path_factory.mktemp("unbroken"))
    whole = read_record(layout.plan_file(PHANTOM, "rfmed_cpu"), Plan)
    figures = with_figures(whole, "epochs=2", "iterations_per_epoch=2", "validate_every_epochs=1", "workers=0")
    return train(layout, figures, "3d_fullres", fold="0", options=QUIET).folder


def test_the_same_seed_gives_the_same_weights_with_any_workers(layout, plan, unbroken):
    again = train(layout, with_figures(plan, "workers=1"), "3d_fullres", fold="0", options=QUIET)
    assert (again.progress.status, again.progress.step) == ("finished", 4)
    assert weights_of(again.folder) == weights_of(unbroken)
    assert [e["loss"] for e in untimed(again.folder) if e["event"] == "step"] == [
        e["loss"] for e in untimed(unbroken) if e["event"] == "step"
    ]


def test_another_seed_or_fold_gives_other_weights(layout, plan, unbroken):
    for figures, fold in ((with_figures(plan, "seed=1"), "0"), (plan, "1")):
        other = train(layout, figures, "3d_fullres", fold=fold, options=QUIET)
        assert weights_of(other.folder) != weights_of(unbroken)
        shutil.rmtree(other.folder)


@pytest.mark.parametrize("at", [1, 2])
def test_a_training_that_was_stopped_goes_on_exactly(layout, plan, unbroken, at):
    """Stopped within an epoch, and between an epoch's last step and its validation."""

    def show(report):
        if report.step == at and report.scores is None:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = TrainOptions(device="cpu", validate=False, progress=OnStep(show))
    first = train(layout, plan, "3d_fullres", fold="0", options=stopping)
    assert first.progress.status == "stopped"
    assert first.progress.step < 4
    assert first.evaluation is None
    second = train(layout, plan, "3d_fullres", fold="0", options=QUIET)
    assert (second.progress.status, second.progress.step) == ("finished", 4)
    assert weights_of(second.folder) == weights_of(unbroken)


def test_without_validation_no_volume_is_predicted(unbroken):
    assert not (unbroken / "validation").exists()
    assert (unbroken / "report.html").is_file()
    assert (unbroken / "progress.png").is_file()


def test_fold_all_trains_on_every_case(layout, plan):
    short = with_figures(plan, "epochs=1", "iterations_per_epoch=1")
    result = train(layout, short, "3d_fullres", fold="all", options=TrainOptions(device="cpu"))
    assert result.evaluation is not None
    assert len(result.evaluation.cases) == 5
    assert read_record_of(result.folder / "checkpoint_final.safetensors").fold == "all"


def test_whole_volumes_can_be_validated_while_training(layout, plan):
    whole = plan.with_overrides("3d_fullres.validation.cases_while_training=1", "3d_fullres.train.epochs=1")
    result = train(layout, whole, "3d_fullres", fold="0", options=QUIET)
    assert 0 <= result.progress.scores["score"] <= 1
    assert "dsc/liver" in result.progress.scores


def test_without_the_raw_dataset_it_trains_and_says_that_it_cannot_score(layout, plan, tmp_path, caplog):
    apart = Layout(raw=tmp_path / "no_raw", preprocessed=layout.preprocessed, results=layout.results)
    short = with_figures(plan, "epochs=1", "iterations_per_epoch=1")
    result = train(apart, short, "3d_fullres", fold="0", options=TrainOptions(device="cpu"))
    assert result.evaluation is None
    assert result.progress.status == "finished"
    assert "skipping validation on whole volumes" in caplog.text


def test_a_case_that_is_not_preprocessed_is_named_with_the_remedy(planned_root, root_of, plan):
    layout = Layout.under(root_of(planned_root))
    (layout.cases_folder(PHANTOM, plan.name, "3d_fullres") / "phantom_002.json").unlink()
    with pytest.raises(UsageError, match=r"1 of 5 cases are not preprocessed.*phantom_002.*rfmed_plan_and_preprocess"):
        train(layout, plan, "3d_fullres", fold="0", options=QUIET)
    assert not layout.results.exists()


@pytest.mark.parametrize(
    ("workers", "suffix"), [(0, ".b2nd"), (1, ".b2nd"), (0, "_label.b2nd"), (0, "_foreground.npy")]
)
def test_a_broken_preprocessed_case_is_named(planned_root, root_of, plan, workers, suffix):
    layout = Layout.under(root_of(planned_root))
    for path in layout.cases_folder(PHANTOM, plan.name, "3d_fullres").glob(f"phantom_00?{suffix}"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RfMedSamError, match=r"phantom_00\d") as caught:
        train(layout, with_figures(plan, f"workers={workers}"), "3d_fullres", fold="0", options=QUIET)
    assert "rfmed_plan_and_preprocess" in str(caught.value)


def test_a_training_that_diverges_names_its_cases_and_keeps_the_last_good_checkpoint(planned_root, root_of):
    root = root_of(planned_root)
    words = ("3d_fullres", 0, "--epochs", 4, "--iterations", 5, "--lr", 1e30, "--no-validate", "--root", root)
    sentence = run_error("train", *words, "--set", "3d_fullres.train.schedule.warmup_iterations=0")
    assert "phantom_00" in sentence
    assert "diverged" in sentence
    assert unfinished_files(root) == []


def test_two_ranks_end_with_the_same_weights(planned_root, root_of, tmp_path):
    root, script = root_of(planned_root), tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script), "3d_fullres", "fold", "0", "--epochs", "1"]
    command += ["--iterations", "2", "--device", "cpu", "--root", str(root)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RFMED", "nnUNet"))}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    final = root / "results" / PHANTOM / "rfmed_cpu__3d_fullres" / "fold_0"
    assert {(tmp_path / f"rank_{n}.txt").read_text() for n in (0, 1)} == {weights_of(final)}
    assert done.stdout.count("Trained 2 steps") == 1
    assert (final / "validation" / "metrics.json").is_file()
