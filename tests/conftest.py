"""Shared fixtures: real data where it is at hand, small synthetic datasets everywhere."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from support.commands import run_ok
from support.sentences import faulty_messages, listen
from support.shared import files_as_made, files_of, made_once

# as the commands do, before torch is imported: waiting threads sleep
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


LAWS = ("test_layers.py", "test_sizes.py", "test_imports.py", "test_dependencies.py", "test_readme.py")
QUICK = ("unit", "property", *LAWS)
"""Folders and files of the quick level, which also leaves out what is marked slow."""
LONGEST_FIRST = ("faults", "pipeline/training", "pipeline", "golden", "parity")
"""Folders whose files take longest. They begin, so that two workers end together."""
SHARED = {"raw_root", "planned_root", "trained_root"}
"""Folders that are made once and that every test copies before it changes them."""
NO_GPU = "no CUDA device"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only units, properties and laws, without what is slow")
    parser.addoption("--whole", action="store_true", help="tests/faults with all its kills, places and surroundings")
    parser.addoption("--fault-seed", type=int, default=0, metavar="N", help="other moments and places for tests/faults")


def pytest_configure(config: pytest.Config) -> None:
    listen()
    if hasattr(signal, "SIGHUP"):  # under nohup, children would inherit that it is ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "slow: takes seconds: not with --quick")
    config.addinivalue_line("markers", "whole: takes its time: only with --whole")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def left_out(item: pytest.Item) -> bool:
        if item.get_closest_marker("whole") and not config.getoption("--whole"):
            return True
        quick = _place(item).startswith(QUICK) and not item.get_closest_marker("slow")
        return bool(config.getoption("--quick")) and not quick

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = sorted((item for item in items if not left_out(item)), key=_rank)


def _place(item: pytest.Item) -> str:
    """The test's file below tests/."""
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _rank(item: pytest.Item) -> int:
    """Which of `LONGEST_FIRST` it belongs to."""
    place = _place(item)
    return next((i for i, folder in enumerate(LONGEST_FIRST) if place.startswith(f"{folder}/")), len(LONGEST_FIRST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skipped tests are easily overlooked: say how many a GPU would have run."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if NO_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped: {NO_GPU}", yellow=True)


@pytest.fixture(autouse=True)
def _every_message_is_made_of_sentences() -> Iterator[None]:
    """No error that a test raises, here or in a command, has a double full stop."""
    yield
    assert faulty_messages() == []


@pytest.fixture(autouse=True)
def _shared_folders_stay_as_they_were_made(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that writes into a folder of all tests would change what the others see, in the order of the day."""
    yield
    for name in SHARED & set(request.fixturenames):
        assert files_of(request.getfixturevalue(name)) == files_as_made(request.getfixturevalue(name)), name


@pytest.fixture(autouse=True, scope="session")
def _converted_networks_are_not_kept_in_the_users_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Networks that a backend converts stay in this run's folders, those of child processes too."""
    home = tmp_path_factory.mktemp("cache")
    folder = mock.patch("rfmedsam2.inference.backends.cache.default_folder", return_value=home / "rfmedsam2")
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(home)), folder:
        yield


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether the fault suite is asked for at full length."""
    return bool(request.config.getoption("--whole"))


@pytest.fixture(scope="session")
def fault_seed(request: pytest.FixtureRequest) -> int:
    """What decides where and when damage is done."""
    seed = request.config.getoption("--fault-seed")
    assert isinstance(seed, int)
    return seed


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets: RFMED_TEST_DATA, else one beside the repository that holds them."""
    named = os.environ.get("RFMED_TEST_DATA")
    places = [Path(named)] if named else sorted(Path(__file__).resolve().parents[2].glob("*/data"))
    folder = next((place for place in places if (place / "hippocampus").is_dir()), None)
    if folder is None:
        pytest.skip("the real data sets are not here: set RFMED_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def raw_root(tmp_path_factory) -> Path:
    """A root with the raw phantom alone. Nobody changes it."""

    def make(root: Path) -> None:
        run_ok("make_phantom", "--cases", 5, "--test-cases", 2, "--shape", 16, 40, 40, "--root", root)

    return made_once(tmp_path_factory, "raw_root", make)


@pytest.fixture
def root_of(tmp_path) -> Callable[[Path], Path]:
    """Copy a root, to change the copy."""

    def copied(root: Path) -> Path:
        target = tmp_path / "root"
        shutil.copytree(root, target)
        return target

    return copied
