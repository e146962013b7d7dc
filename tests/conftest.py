"""Shared fixtures: real data where it is at hand, small synthetic datasets everywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import run_ok

# as the commands do, before torch is imported: waiting threads sleep
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="tests/faults with all its kills, places and surroundings")
    parser.addoption("--fault-seed", type=int, default=0, metavar="N", help="other moments and places for tests/faults")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole: takes its time: only with --whole")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--whole"):
        return
    left_out = [item for item in items if item.get_closest_marker("whole")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


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
    root = tmp_path_factory.mktemp("raw_root")
    run_ok("make_phantom", "--cases", 5, "--test-cases", 2, "--shape", 16, 40, 40, "--root", root)
    return root


@pytest.fixture
def root_of(tmp_path) -> Callable[[Path], Path]:
    """Copy a root, to change the copy."""

    def copied(root: Path) -> Path:
        target = tmp_path / "root"
        shutil.copytree(root, target)
        return target

    return copied
