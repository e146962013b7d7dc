"""Imports and exports that are killed, or run at the same time: a whole model, or none, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import run_ok, unfinished_files
from support.live_process import Launcher
from support.tiny_model import NAME, make_plan, write_model

pytestmark = pytest.mark.timeout(200)
FOLDS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with many folds: ours, as nnU-Net's, and as a zip."""
    folder = tmp_path_factory.mktemp("models")
    for fold in range(FOLDS):
        write_model(folder / "ours", make_plan(), fold=str(fold))
    run_ok("export_model", "--to", "nnunet", "-m", folder / "ours", "-o", folder / "nnunet")
    run_ok("export_model", "-m", folder / "ours", "-o", folder / "model.zip")
    return folder


def words_of(direction: str, models: Path, target: Path) -> tuple[object, ...]:
    return {
        "nnunet": ("import_model", models / "nnunet", "--root", target),
        "zip": ("import_model", models / "model.zip", "--root", target),
        "export": ("export_model", "--to", "nnunet", "-m", models / "ours", "-o", target / "results"),
    }[direction]


def models_in(target: Path) -> list[Path]:
    return list((target / "results" / NAME).glob("*"))


def is_whole(model: Path) -> bool:
    return len(list(model.glob("fold_*/checkpoint_final.*"))) == FOLDS


@pytest.mark.parametrize("direction", ["nnunet", "zip", "export"])
def test_what_is_killed_leaves_no_half_model(launcher: Launcher, models: Path, tmp_path: Path, direction: str) -> None:
    words = words_of(direction, models, tmp_path)
    process = launcher.start(*map(str, words), folder=tmp_path)
    process.until(lambda: list(tmp_path.glob(f"results/.*port-*/*/fold_{FOLDS // 2}/*")))
    process.kill()
    assert unfinished_files(tmp_path)  # it was under way
    assert models_in(tmp_path) == []
    run_ok(*words)
    (model,) = models_in(tmp_path)
    assert is_whole(model)
    assert unfinished_files(tmp_path) == []


@pytest.mark.parametrize("direction", ["nnunet", "zip", "export"])
def test_two_at_once_make_one_model(launcher: Launcher, models: Path, tmp_path: Path, direction: str) -> None:
    words = words_of(direction, models, tmp_path)
    both = [launcher.start(*map(str, words), folder=tmp_path) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    said = "".join(process.text() for process in both)
    assert "Traceback" not in said
    if direction == "export":  # the second one replaces an export of the same command
        assert codes == [0, 0], said
    else:
        assert codes == [0, 2], said
        assert "already exists" in said
    (model,) = models_in(tmp_path)
    assert is_whole(model)
    assert unfinished_files(tmp_path) == []


def test_two_at_once_may_replace_each_other(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    words = (*words_of("nnunet", models, tmp_path), "--force")
    both = [launcher.start(*map(str, words), folder=tmp_path) for _ in range(2)]
    said = [(process.wait(), process.text()) for process in both]
    assert [code for code, _ in said] == [0, 0], said
    (model,) = models_in(tmp_path)
    assert is_whole(model)
    assert unfinished_files(tmp_path) == []
