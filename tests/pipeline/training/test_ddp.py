"""Two ranks on the CPU under torch's launcher: equal weights, the same training as one process, clear ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from support.blobs import NAME, write_blobs
from support.commands import run_ok
from support.ddp_worker import BRANCHES
from support.toy_task import BranchingTask, ToyTask, branching_config, make_config, make_run, timeless, weights_of

from rfmedsam2.engine.fit import fit
from rfmedsam2.records.training import Sgd
from rfmedsam2.store.checkpoint_header import FINAL
from rfmedsam2.store.checkpoints import read_all, read_weights
from rfmedsam2.store.layout import Layout

TESTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """A launcher that has ended."""

    returncode: int
    stderr: str


Launch = Callable[[Path, str], Done]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """Two ranks in a folder, in one of the modes of `ddp_worker`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, str(TESTS / "support" / "ddp_worker.py")]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def launched(folder: Path, mode: str) -> Done:
        folder.mkdir(exist_ok=True)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([str(folder), mode]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the launchers' server has ended"
        return Done(int(code), (folder / f"{mode}.txt").read_text())

    yield launched
    server.communicate()  # the end of its input ends it


@pytest.fixture(scope="module")
def together(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp") / "run"
    done = launch(folder, "plain")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the batches of both ranks; some parameters get no gradient."""
    folder = tmp_path_factory.mktemp("alone")
    config = make_config(accumulation=2, optimizer=Sgd(), learning_rate=0.01)
    fit(ToyTask(config, ranks=1, size=8, dropout=0.0, batch_norm=False, idle=True), config, make_run(folder))
    return folder


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> Path:
    """A root with a dataset of nested regions, of which some voxels are not annotated."""
    root = tmp_path_factory.mktemp("blobs")
    folder = root / "raw" / NAME
    write_blobs(folder, cases=4)
    for path in (folder / "labelsTr").iterdir():
        image = nib.load(path)
        values = np.asarray(image.dataobj).copy()
        values[:, :5] = 3
        nib.save(nib.Nifti1Image(values, image.affine), path)
    table = json.loads((folder / "dataset.json").read_text())
    table["labels"] = {"background": 0, "whole": [1, 2], "box": 2, "ignore": 3}
    (folder / "dataset.json").write_text(json.dumps(table | {"regions_class_order": [1, 2]}))
    (root / "preprocessed" / NAME).mkdir(parents=True)
    ids = [f"blob_{case}" for case in range(4)]
    folds = [{"train": ids[:2], "val": ids[2:]}, {"train": ids[2:], "val": ids[:2]}]
    (root / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps(folds))
    return root


SMALL = ("patch_size=[8,16,16]", "model.features=[4,8]", "model.kernel_sizes=[[3,3,3],[3,3,3]]",
         "model.strides=[[1,1,1],[2,2,2]]", "model.encoder_blocks=[1,1]", "model.decoder_blocks=[1]")  # fmt: skip
QUICK = ("train.workers=0", "validation.patches_while_training=1", "inference.step_size=1", "batch_size=2")


def trained(launch: Launch, folder: Path, root: Path, *words: object) -> str:
    """Train two steps on two ranks by the command; what was said."""
    folder.mkdir()
    every = [*words, "--epochs", 1, "--iterations", 2, "--device", "cpu", "--root", root]
    (folder / "words.json").write_text(json.dumps([str(word) for word in every]))
    done = launch(folder, "train")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.whole
def test_a_cascade_of_regions_with_an_ignore_label(launch, blobs, tmp_path):
    root = Path(shutil.copytree(blobs, tmp_path / "root"))
    layout = Layout.under(root)
    full, low, second = "3d_fullres", "3d_lowres", "3d_cascade_fullres"
    changes = [f"{full}.{field}" for field in (*SMALL, *QUICK)]
    run_ok("plan_and_preprocess", "--preset", "cpu", "-c", full, "--set", *changes, "--root", root)
    path = layout.plan_file(NAME, "rfmed_cpu")
    plan = json.loads(path.read_text())
    plan["stages"][low] = plan["stages"][full]
    plan["stages"][second] = plan["stages"][full] | {"previous_stage": low}
    path.write_text(json.dumps(plan))
    for stage in (low, second):
        shutil.copytree(*(layout.cases_folder(NAME, "rfmed_cpu", name) for name in (full, stage)))
    for fold in (0, 1):
        trained(launch, tmp_path / f"low{fold}", root, low, fold)
    trained(launch, tmp_path / "second", root, second, 0)
    folder = layout.model_folder(NAME, "rfmed_cpu", second)
    record, weights = read_weights(folder / "fold_0" / FINAL)
    assert record.previous_labels is not None
    assert record.step == 2
    # the image, and a channel for each value that the first stage paints
    assert any(tensor.shape == (4, 1 + 2, 3, 3, 3) for tensor in weights.values())
    made = json.loads((folder / "fold_0" / "validation" / "predictions.json").read_text())
    assert set(made["cases"]) == {"blob_2", "blob_3"}
    image = root / "raw" / NAME / "imagesTr" / "blob_0_0000.nii.gz"
    run_ok("predict", "-i", image, "-o", tmp_path / "out", "-m", folder, "--device", "cpu")
    assert set(np.unique(nib.load(tmp_path / "out" / "blob_0.nii.gz").dataobj)) <= {0, 1, 2}


LIBRARY = {
    "segresnet": ("model.features=8", "model.encoder_blocks=[1,1]", "patch_size=[16,16,16]"),
    "swinunetr": ("model.features=12", "model.depths=[1,1,1,1]", "patch_size=[32,32,64]"),
    "primus_s": ("patch_size=[16,16,16]",),
}


@pytest.mark.parametrize("model", LIBRARY)
def test_networks_of_libraries_are_trained_on_two_ranks(launch, blobs, tmp_path, model):
    root = Path(shutil.copytree(blobs, tmp_path / "root"))
    changes = [f"3d_fullres.{field}" for field in (*LIBRARY[model], *QUICK, "spacing_mm=[2,2,2]")]
    run_ok("plan_and_preprocess", "--model", model, "--preset", "cpu", "-c", "3d_fullres", "--set", *changes,
           "--root", root)  # fmt: skip
    trained(launch, tmp_path / "run", root, "3d_fullres", 0, "--no-validate")
    (final,) = root.glob(f"results/{NAME}/*/fold_0/{FINAL}")
    assert read_weights(final)[0].step == 2


def test_ranks_end_with_equal_weights(together):
    texts = [(together / f"rank_{n}.txt").read_text() for n in (0, 1)]
    assert texts[0] == texts[1] == f"finished {weights_of(together)}"


def test_two_ranks_learn_what_one_process_does_with_both_batches(together, alone):
    ours, theirs = (read_weights(f / "checkpoint_final.safetensors")[1] for f in (together, alone))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-5), name
    losses = [[e["loss"] for e in timeless(f) if e["event"] == "step"] for f in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(timeless(together)) == len(timeless(alone))


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.whole) if i else m for i, m in enumerate(BRANCHES)])
def test_a_part_without_gradient_on_one_rank_in_some_steps_neither_hangs_nor_parts_the_ranks(launch, tmp_path, mode):
    done = launch(tmp_path / "two", mode)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [(tmp_path / "two" / f"rank_{n}.txt").read_text() for n in (0, 1)]
    assert texts[0] == texts[1] == f"finished {weights_of(tmp_path / 'two')}"

    config = branching_config()
    task = BranchingTask(config, used=BRANCHES[mode], ranks=1, size=8, dropout=0.0, batch_norm=False)
    before = task.model.branch.weight.detach().clone()
    fit(task, config, make_run(tmp_path / "one"))
    ours, theirs = (read_weights(tmp_path / n / "checkpoint_final.safetensors")[1] for n in ("two", "one"))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-6), name
    assert not torch.allclose(before, ours["branch.weight"], atol=1e-3)


def test_whatever_ends_a_training_the_same_command_goes_on_exactly(launch, tmp_path, together):
    """Divergence, a signal to one rank, a killed rank: all ranks end, and nothing of it can be seen after."""
    done = launch(tmp_path, "diverge")
    assert done.returncode != 0
    assert "DivergedError: Training diverged at step 6" in done.stderr
    assert "cases case_12, case_13" in done.stderr
    assert steps_done(tmp_path) == 6

    done = launch(tmp_path, "stop")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {(tmp_path / f"rank_{n}.txt").read_text().split()[0] for n in (0, 1)} == {"stopped"}
    assert steps_done(tmp_path) == 11

    began = time.monotonic()
    done = launch(tmp_path, "die")
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert steps_done(tmp_path) == 15

    assert launch(tmp_path, "plain").returncode == 0
    assert timeless(tmp_path) == timeless(together)
    assert weights_of(tmp_path) == weights_of(together)


def steps_done(folder):
    record, tensors, _ = read_all(folder / "checkpoint_latest.safetensors")
    assert {n.split("/")[1] for n in tensors if n.startswith("random/")} == {"0", "1"}
    return record.step
