"""--help of every command is answered before anything heavy is imported, each command in a fresh interpreter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.fresh_interpreters import run_each

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# tomllib came with Python 3.11
COMMANDS = dict(re.findall(r'^((?:rfmed|samhq)_\w+) = "([\w.]+:\w+)"', PROJECT.read_text(encoding="utf-8"), re.M))
HEAVY = {"torch", "numba", "pandas", "scipy", "nibabel", "SimpleITK", "matplotlib", "numpy", "typeguard"}
MOST_MODULES = 900
"""Time depends on the machine, how much is loaded does not."""
CODE = """
import contextlib, importlib, io, sys
module, _, function = "{entry}".partition(":")
entry = getattr(importlib.import_module(module), function)
sys.argv = ["{name}", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    entry()
answer = out.getvalue()
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[Any, set[str]]]:
    codes = {name: CODE.format(name=name, entry=entry) for name, entry in COMMANDS.items()}
    return run_each(codes, preload="import tyro, rich, pydantic")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_answered_before_anything_heavy_is_imported(name: str, helped) -> None:
    shown, modules = helped[name]
    assert f"usage: {name}" in shown
    assert not modules & HEAVY
    assert len(modules) < MOST_MODULES


def test_there_are_commands_of_both_packages() -> None:
    assert {name.partition("_")[0] for name in COMMANDS} == {"rfmed", "samhq"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_flag_for_tracebacks(name: str, helped) -> None:
    assert "--debug" in helped[name][0]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_negative_flag_says_what_the_flag_does(name: str, helped) -> None:
    """A flag --no-x is described as what happens with it, not as what x is."""
    plain = re.sub(r"[\s\u2500-\u257f]+", " ", helped[name][0])
    for flag, text in re.findall(r" (--no-[a-z-]+) ([A-Z][^.]*)\.", plain):
        assert text.startswith(("Do not", "Only")), f"{flag}: {text}"
