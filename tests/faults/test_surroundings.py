"""The commands, as processes of their own, where a machine is odd: its clock, home, rights, names, locale or limits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import commands_in_a_row
from support.changed_labels import relabel
from support.commands import OURS, PLANNING, run_ok

from rfmedsam2.engine.monitoring.log import read_events
from rfmedsam2.records.report import Evaluation
from rfmedsam2.store import lock
from rfmedsam2.system.atomic import read_record

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and mounts are Linux's"),
]
DATASET = "Dataset900_PhantomCT"
FOLD = Path("results", DATASET, "rfmed_cpu__3d_fullres", "fold_0")
REPOSITORY = Path(__file__).resolve().parents[2]
LITTLE_SHARED_MEMORY = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
YEAR_SECONDS = 365 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where a command runs.

    Attributes:
        variables: of the environment; None: not there.
        before: what a shell does before the command begins.
        mounts: that shell may mount what nobody else sees.
    """

    variables: Mapping[str, str | None]
    before: str = "true"
    mounts: bool = False

    def run(self, name: str, *words: object) -> str:
        """Run rfmed_NAME to its good end; gives all that it said."""
        return self._run(Path(sys.executable).with_name(f"rfmed_{name}"), *words)

    def run_in_a_row(self, *commands: tuple[object, ...]) -> list[str]:
        """Run several commands (NAME, words ...) in one process; gives all that each of them said."""
        script = Path(commands_in_a_row.__file__)
        row = json.dumps([list(map(str, command)) for command in commands])
        return self._run(sys.executable, script, row).split(commands_in_a_row.SEPARATOR)[:-1]

    def _run(self, *words: object) -> str:
        shell = ["sh", "-ec", f'{self.before}; exec "$@"', "sh", *map(str, words)]
        environment = {key: value for key, value in os.environ.items() if key not in OURS} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*(["unshare", "--mount"] if self.mounts else []), *shell],
            env={k: v for k, v in (environment | dict(self.variables)).items() if v is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=200,
        )
        said = done.stdout.decode("utf-8", errors="surrogateescape")
        assert done.returncode == 0, said[-3000:]
        assert "Traceback" not in said, said[-3000:]
        return said


@pytest.fixture(scope="module")
def may_mount() -> None:
    """Skip where this user may not mount a file system of their own."""
    try:
        done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode:
        pytest.skip("this user may not mount")


def read_only(folder: Path) -> str:
    """What a shell does so that nobody may write to a folder, root included."""
    return f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}"'


def training(root: Path | None, *, workers: int | None) -> list[object]:
    words = ["3d_fullres", 0, "--epochs", 1, "--iterations", 2, "--no-validate"]
    count = "null" if workers is None else workers
    return [*words, "--set", f"3d_fullres.train.workers={count}", *([] if root is None else ["--root", root])]


def renamed(raw: Path) -> Path:
    """The phantom under other names: of the dataset, two cases and a class."""
    folder = shutil.copytree(raw, raw.with_name("Dataset900_Phäntom"))
    for path in [*folder.rglob("phantom_001*"), *folder.rglob("phantom_007*")]:
        path.rename(path.with_name(path.name.replace("phantom", "pha nöm")))
    described = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    names = {("Leber ß 肝" if name == "liver" else name): value for name, value in described["labels"].items()}
    text = json.dumps(described | {"labels": names}, ensure_ascii=False)
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    shutil.rmtree(raw)
    return folder


def test_spaces_and_foreign_letters_in_a_locale_without_utf8(raw_root, tmp_path):
    root = tmp_path / "Ein Ördner mit 数据"
    shutil.copytree(raw_root, root)
    raw = renamed(root / "raw" / DATASET)
    out = root / "zwei Wörter"
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    here = Surroundings(variables=variables)
    helped, planned, trained, _, scored, _ = here.run_in_a_row(
        ("train", "--help"),
        ("plan_and_preprocess", *PLANNING, "--root", root),
        ("train", *training(root, workers=1)),
        ("predict", "-i", raw / "imagesTs", "-o", out, "--root", root),
        ("evaluate", "-p", out, "-g", raw / "labelsTs", "-o", out / "Maße", "--root", root),
        ("report", "-e", out / "Maße" / "metrics.json", "-o", out / "Seite.html"),
    )
    assert "Train one fold" in helped
    assert "Preprocessed: 5 new" in planned
    assert "Trained 2 steps" in trained
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["pha nöm_007.nii.gz", "phantom_006.nii.gz"]
    assert "Leber \\xdf \\u809d" in scored  # what this locale cannot show
    scores = read_record(out / "Maße" / "metrics.json", Evaluation)
    assert "Leber ß 肝" in scores.classes
    assert "pha nöm_007" in {case.id for case in scores.cases}
    assert "Leber ß 肝" in (out / "Seite.html").read_text(encoding="utf-8")


def test_an_unknown_time_zone_and_files_of_the_future(raw_root, root_of):
    root = root_of(raw_root)
    future = time.time() + YEAR_SECONDS
    for path in root.rglob("*"):
        os.utime(path, (future, future))
    here = Surroundings(variables={"TZ": "Nowhere/Nothing"})
    words = (*PLANNING, "--root", root)
    run_ok("plan_and_preprocess", *words)
    for path in (root / "preprocessed").rglob("*"):
        os.utime(path, (future, future))
    assert "0 rebuilt, 5 finished before" in here.run("plan_and_preprocess", *words)


def test_a_clock_that_was_set_back(trained_root, root_of, tmp_path):
    """All files are from the future, made before the clock was set back: none is made again, and training goes on."""
    root, out = root_of(trained_root), tmp_path / "out"
    predicting = ("predict", "-i", root / "raw" / DATASET / "imagesTs", "-o", out, "--root", root)
    run_ok(*predicting)
    future = time.time() + YEAR_SECONDS
    for path in (*root.rglob("*"), *out.iterdir()):
        os.utime(path, (future, future))
    assert "0 rebuilt, 5 finished before" in run_ok("plan_and_preprocess", *PLANNING, "--root", root).out
    assert "Predicted 0 case(s)" in run_ok(*predicting, "--continue").out
    longer = ["3d_fullres", 0, "--epochs", 2, "--iterations", 2, "--no-validate", "--root", root]
    assert "Trained 4 steps" in run_ok("train", *longer).out
    steps = [event["step"] for event in read_events(root / FOLD / "metrics.jsonl") if event["event"] == "step"]
    assert steps == [1, 2, 3, 4]
    relabel(root / "raw" / DATASET, "phantom_001")  # at an earlier time than before
    assert "0 new, 5 rebuilt" in run_ok("plan_and_preprocess", *PLANNING, "--root", root).out  # as intensities changed


@pytest.mark.parametrize("number", [errno.ENOLCK, pytest.param(errno.ENOSYS, marks=pytest.mark.whole)])
def test_a_file_system_without_locks(raw_root, root_of, tmp_path, monkeypatch, caplog, number):
    """NFS without its lock service: every command works, and says that it cannot keep another from its folder."""

    def flock(handle, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    root = root_of(raw_root)
    raw = root / "raw" / DATASET
    for words in (
        ("plan_and_preprocess", *PLANNING, "--root", root),
        ("train", *training(root, workers=1)),
        ("predict", "-i", raw / "imagesTs", "-o", tmp_path / "out", "--root", root),
    ):
        run_ok(*words)
    for folder in (root / "preprocessed" / DATASET, root / FOLD, tmp_path / "out"):
        told = f"{folder} cannot be locked ({os.strerror(number)}): do not start a second run in it"
        assert [record.message for record in caplog.records].count(told) == 1
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert not list(root.rglob(".lock"))


@pytest.mark.whole
def test_no_home(trained_root, root_of, tmp_path):
    root = root_of(trained_root)
    here = Surroundings(variables={"HOME": None, "XDG_CACHE_HOME": None})
    here.run("train", "--restart", *training(root, workers=0))
    here.run("report", "-t", root / FOLD, "-o", tmp_path / "page.html")


def test_a_home_that_is_not_there_and_a_package_that_may_not_be_written(trained_root, tmp_path, may_mount):
    """Compiled loops can then be kept nowhere."""
    here = Surroundings(
        variables={"HOME": "/proc/nothing", "XDG_CACHE_HOME": None, "NUMBA_CACHE_DIR": None},
        before=read_only(REPOSITORY),
        mounts=True,
    )
    raw, out = trained_root / "raw" / DATASET, tmp_path / "out"
    here.run_in_a_row(
        ("predict", "-i", raw / "imagesTs", "-o", out, "--root", trained_root),
        ("evaluate", "-p", out, "-g", raw / "labelsTs", "-o", out, "--root", trained_root),
        ("report", "-e", out / "metrics.json", "-i", raw / "imagesTs", "-o", tmp_path / "page.html"),
    )


@pytest.mark.whole
def test_inputs_that_may_not_be_written(trained_root, root_of, tmp_path, may_mount):
    root, other = root_of(trained_root), tmp_path / "other"
    raw, ours = root / "raw" / DATASET, {"nnUNet_raw": f"{root}/raw", "nnUNet_results": f"{other}/results"}
    before = read_only(root)
    making = Surroundings(variables=ours | {"nnUNet_preprocessed": f"{other}/made"}, before=before, mounts=True)
    assert "Preprocessed: 5 new" in making.run("plan_and_preprocess", *PLANNING)
    using = Surroundings(variables=ours | {"nnUNet_preprocessed": f"{root}/preprocessed"}, before=before, mounts=True)
    trained, _ = using.run_in_a_row(
        ("train", *training(None, workers=0)),
        ("predict", "-m", (root / FOLD).parent, "-i", raw / "imagesTs", "-o", other / "out"),
    )
    assert "Trained 2 steps" in trained
    assert not list(root.rglob(".lock"))


@pytest.mark.whole
def test_few_open_files_and_little_shared_memory(planned_root, root_of, may_mount):
    root = root_of(planned_root)
    here = Surroundings(variables={}, before=f"{LITTLE_SHARED_MEMORY} && ulimit -n 256", mounts=True)
    assert "Trained 2 steps" in here.run("train", *training(root, workers=2))


@pytest.mark.whole
def test_few_open_files(raw_root, root_of):
    root = root_of(raw_root)
    here = Surroundings(variables={}, before="ulimit -n 256")
    assert "5 new" in here.run("plan_and_preprocess", *PLANNING, "--workers", 4, "--root", root)
    assert "Trained 2 steps" in here.run("train", *training(root, workers=2))


@pytest.mark.whole
def test_little_shared_memory_is_told_where_workers_are_not_named(planned_root, root_of, may_mount):
    root = root_of(planned_root)
    here = Surroundings(variables={}, before=LITTLE_SHARED_MEMORY, mounts=True)
    said = here.run("train", *training(root, workers=None))
    assert "Trained 2 steps" in said
    assert "/dev/shm holds only 64 MiB: batches are made in this process" in said
