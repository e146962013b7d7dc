"""Two runs at once: on the same folder the second is told so, elsewhere both work; no lock outlives its run."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.changed_labels import relabel
from support.commands import PLANNING
from support.live_process import Launcher, Process

from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.preprocessed import CaseStore

pytestmark = pytest.mark.timeout(200)
FOLD = Path("results/Dataset900_PhantomCT/rfmed_cpu__3d_fullres/fold_0")
CASES = Path("preprocessed/Dataset900_PhantomCT/rfmed_cpu_3d_fullres")
RAW = Path("raw/Dataset900_PhantomCT")

Words = tuple[object, ...]


def training(root: Path) -> tuple[Path, Words]:
    short = ("--epochs", 1, "--iterations", 2, "--no-validate")
    return root / FOLD, ("train", "3d_fullres", 0, *short, "--root", root)


def preprocessing(root: Path) -> tuple[Path, Words]:
    return root / CASES, ("plan_and_preprocess", *PLANNING, "--root", root)


def prediction(root: Path) -> tuple[Path, Words]:
    images = root / "raw" / "Dataset900_PhantomCT" / "imagesTs"
    return root / "out", ("predict", "-i", images, "-o", root / "out", "--root", root)


RUNS = {"raw": preprocessing, "planned": training, "trained": prediction}


@pytest.mark.parametrize("start", RUNS)
def test_the_second_run_is_told_so(request, root_of, launcher: Launcher, tmp_path, start):
    root = root_of(request.getfixturevalue(f"{start}_root"))
    make: Callable[[Path], tuple[Path, Words]] = RUNS[start]
    folder, words = make(root)
    lock = folder / ".lock"
    name, *rest = words
    first = launcher.start(str(name), *rest, folder=tmp_path)
    first.until(lambda: lock.exists() and lock.stat().st_size)
    first.signal(signal.SIGSTOP)
    try:
        told = launcher.finished(str(name), *rest, folder=tmp_path, code=2)
    finally:
        first.signal(signal.SIGCONT)
    assert f"rfmed_{name}: Another run is working in this folder: {folder}. Found process {first.pid} on " in told
    assert "Traceback" not in told
    assert first.wait() == 0, first.text()
    assert not lock.exists()
    launcher.finished(str(name), *rest, folder=tmp_path)


def locked_by_a_part(folder: Path) -> Callable[[], bool]:
    """Tell whether the run of part 1/2 holds both its locks: a lock file is empty until then."""
    locks = (folder / ".part-1-of-2" / ".lock", folder / ".lock")
    return lambda: all(lock.exists() and lock.stat().st_size > 0 for lock in locks)


@contextmanager
def stopped(process: Process, *, but_while: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Keep a process from going on inside the `with` block; it is not stopped `but_while` that holds."""
    process.signal(signal.SIGSTOP)
    time.sleep(0.05)
    while but_while():
        process.signal(signal.SIGCONT)
        time.sleep(0.01)
        process.signal(signal.SIGSTOP)
        time.sleep(0.05)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def contents(folder: Path) -> dict[str, str]:
    store = CaseStore(folder)
    assert all(store.looks_complete(name) for name in store.ids())
    return {name: store.open(name).record.contents for name in store.ids()}


def weights(root: Path, fold: int = 0) -> str:
    return read_record_of(root / FOLD.parent / f"fold_{fold}" / "checkpoint_final.safetensors").weights_sha256


def planned_besides(root: Path) -> Callable[[], bool]:
    """Tell whether the first plan is written and its cases are being made."""
    dataset = root / CASES.parent
    return lambda: (
        (root / CASES / ".lock").exists() and (dataset / "rfmed_cpu.json").exists() and not (dataset / ".lock").exists()
    )


def test_two_plans_of_one_dataset_are_made_at_once(raw_root, planned_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(raw_root)
    _, (name, *words) = preprocessing(root)
    first = launcher.start(str(name), *words, folder=tmp_path)
    first.until(planned_besides(root))
    with stopped(first):
        told = launcher.finished(str(name), *words, "-p", "other", folder=tmp_path)
    assert "Preprocessed: 5 new" in told
    assert first.wait() == 0, first.text()
    # of spacings of their own: else they would use the cases that are there
    spacings = {plan: f"3d_fullres.spacing_mm=[{mm},{mm},{mm}]" for plan, mm in (("third", 7), ("fourth", 8))}
    both = [
        launcher.start(str(name), *PLANNING, change, "-p", plan, "--root", root, folder=tmp_path)
        for plan, change in spacings.items()
    ]
    for process in both:
        assert process.wait() == 0, process.text()
        assert "Preprocessed: 5 new" in process.text()
    expected = contents(planned_root / CASES)
    assert len(expected) == 5
    for plan in ("rfmed_cpu", "other"):
        assert contents(root / CASES.with_name(f"{plan}_3d_fullres")) == expected
    for plan in spacings:
        assert contents(root / CASES.with_name(f"{plan}_3d_fullres")).keys() == expected.keys()
    splits = CASES.with_name("splits_final.json")
    assert (root / splits).read_bytes() == (planned_root / splits).read_bytes()


def test_parts_are_predicted_at_once_and_nothing_else_beside_them(trained_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(trained_root)
    out, (name, *words) = prediction(root)
    first = launcher.start(str(name), *words, "--part", "1/2", folder=tmp_path)
    first.until(locked_by_a_part(out))
    with stopped(first, but_while=(out / ".listing").exists):
        for part in ("1/2", None):
            more = () if part is None else ("--part", part)
            told = launcher.finished(str(name), *words, *more, folder=tmp_path, code=2)
            assert f"Another run is working in this folder: {out}" in told
        launcher.finished(str(name), *words, "--part", "2/2", folder=tmp_path)
    assert first.wait() == 0, first.text()
    images = {path.name.replace("_0000", "") for path in (root / RAW / "imagesTs").iterdir()}
    assert {path.name for path in out.iterdir()} == images | {"predictions.json"}
    assert len(json.loads((out / "predictions.json").read_text())["cases"]) == len(images) > 1
    assert "kept" in launcher.finished(str(name), *words, "--continue", folder=tmp_path)


def test_parts_of_the_cases_are_made_at_once(planned_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(planned_root)
    expected = contents(root / CASES)
    shutil.rmtree(root / CASES)
    words = ("plan_and_preprocess", "--root", root, "-c", "3d_fullres")
    first = launcher.start(*words, "--part", "1/2", folder=tmp_path)
    first.until(locked_by_a_part(root / CASES))
    with stopped(first):
        told = launcher.finished(*words, "--part", "1/2", folder=tmp_path, code=2)
        assert "Another run is working in this folder" in told
        assert "Preprocessed part 2/2 of rfmed_cpu: 2 new" in launcher.finished(
            *words, "--part", "2/2", folder=tmp_path
        )
    assert first.wait() == 0, first.text()
    assert contents(root / CASES) == expected
    relabel(root / RAW, "phantom_001")
    told = launcher.finished(*words, "--part", "1/2", folder=tmp_path, code=2)
    assert "1 case(s) of part 1/2 are damaged, or were made from other files or by another plan" in told
    assert "Found phantom_001. Make all cases without --part" in told
    assert contents(root / CASES) == expected
    told = launcher.finished(*words, "--part", "1/2", "--preset", "cpu", folder=tmp_path, code=2)
    assert "nothing is planned: --part 1/2" in told


def test_cases_are_not_rebuilt_under_a_training(planned_root, trained_root, root_of, launcher: Launcher, tmp_path):
    """A training reads what it began with; who would change it is told so, and may when it has ended."""
    root = root_of(planned_root)
    _, (name, *words) = preprocessing(root)
    before = contents(root / CASES)
    _, (train, *fold) = training(root)
    process = launcher.start(str(train), *fold, folder=tmp_path)
    process.until(lambda: (root / CASES / ".lock").exists() and (root / FOLD / ".lock").exists())
    with stopped(process):
        assert "0 rebuilt, 5 finished before" in launcher.finished(str(name), *words, folder=tmp_path)
        relabel(root / RAW, "phantom_001")
        told = launcher.finished(str(name), *words, folder=tmp_path, code=2)
    assert f"Another run is working in this folder: {root / CASES}. Found process {process.pid} on " in told
    assert "that must be made: phantom_001" in told
    assert process.wait() == 0, process.text()
    assert contents(root / CASES) == before
    assert weights(root) == weights(trained_root)
    assert not list(root.rglob(".lock"))
    launcher.finished(str(name), *words, folder=tmp_path)
    after = contents(root / CASES)
    assert after["phantom_001"] != before["phantom_001"]


def test_a_training_does_not_begin_while_its_cases_are_made(planned_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(planned_root)
    for path in (root / CASES).glob("*.b2nd"):
        path.unlink()
    _, (name, *words) = preprocessing(root)
    process = launcher.start(str(name), *words, folder=tmp_path)
    process.until(lambda: (root / CASES / ".lock").exists() and (root / CASES / ".lock").stat().st_size)
    _, (train, *fold) = training(root)
    with stopped(process):
        told = launcher.finished(str(train), *fold, folder=tmp_path, code=2)
    assert f"Another run is working in this folder: {root / CASES}. Found process {process.pid} on " in told
    assert process.wait() == 0, process.text()
    launcher.finished(str(train), *fold, folder=tmp_path)


def test_two_folds_train_at_once(planned_root, trained_root, root_of, launcher: Launcher, tmp_path):
    root = root_of(planned_root)
    _, (name, stage, _, *short) = training(root)
    both = [launcher.start(str(name), stage, fold, *short, folder=tmp_path) for fold in (0, 1)]
    for process in both:
        assert process.wait() == 0, process.text()
    assert weights(root) == weights(trained_root) != weights(root, fold=1)
    assert not list(root.rglob(".lock"))


def test_predictions_read_a_model_that_a_training_writes(planned_root, root_of, launcher: Launcher, tmp_path, whole):
    """Each finds whole checkpoints, and labels of one step."""
    root = root_of(planned_root)
    often = ("--set", "3d_fullres.train.checkpoint_minutes=1e-9")
    words = ("3d_fullres", 0, "--epochs", 60, "--iterations", 2, "--no-validate", *often, "--root", root)
    training = launcher.start("train", *words, folder=tmp_path)
    training.until(lambda: (root / FOLD / "checkpoint_best.safetensors").exists())
    images = root / "raw" / "Dataset900_PhantomCT" / "imagesTs"
    for number, kind in enumerate(("latest", "best", "final") * (4 if whole else 1)):
        out = tmp_path / str(number)
        said = launcher.finished(
            "predict", "-i", images, "-o", out, "--checkpoint", kind, "--root", root, folder=tmp_path
        )
        assert "Predicted 2 case(s)" in said
    training.signal(signal.SIGTERM)
    assert training.wait() == 143, training.text()


def test_two_predictions_run_at_once(trained_root, launcher: Launcher, tmp_path):
    images = trained_root / "raw" / "Dataset900_PhantomCT" / "imagesTs"
    words = ("-i", images, "--root", trained_root, "-o")
    both = [launcher.start("predict", *words, tmp_path / name, folder=tmp_path) for name in ("one", "two")]
    for process in both:
        assert process.wait() == 0, process.text()
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.nii.gz")} for name in ("one", "two"))
    assert len(one) == 2
    assert one == two


def test_a_fold_is_not_selected_while_it_is_trained_nor_trained_while_it_is_selected(
    trained_root, root_of, launcher: Launcher, tmp_path
):
    """What is packed and the rule beside it would be of other weights than the scores."""
    root = root_of(trained_root)
    selecting = ("select", "--root", root, "-o", tmp_path / "model.zip")
    longer = ("train", "3d_fullres", 0, "--epochs", 40, "--no-validate", "--root", root)
    validating = ("train", "3d_fullres", 0, "--validate-only", "--root", root)
    launcher.finished(*validating, folder=tmp_path)
    locks = (root / FOLD / ".lock", root / FOLD / "validation" / ".lock")
    locked = lambda: all(lock.exists() and lock.stat().st_size for lock in locks)  # noqa: E731
    chosen = launcher.start(*selecting, folder=tmp_path)
    chosen.until(locked)
    with stopped(chosen):
        for words in (longer, (*longer, "--restart"), validating):
            told = launcher.finished(*words, folder=tmp_path, code=2)
            assert f"Another run is working in this folder: {root / FOLD}" in told
            assert f"Found process {chosen.pid} on " in told
    assert chosen.wait() == 0, chosen.text()
    assert not any(lock.exists() for lock in locks)
    (tmp_path / "model.zip").unlink()
    training = launcher.start(*longer, folder=tmp_path)
    training.until(lambda: locks[0].exists() and locks[0].stat().st_size)
    with stopped(training):
        told = launcher.finished(*selecting, folder=tmp_path, code=2)
        assert f"Another run is working in this folder: {root / FOLD}" in told
        assert not (tmp_path / "model.zip").exists()
    training.kill()
