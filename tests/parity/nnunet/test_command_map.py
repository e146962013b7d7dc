"""plans/coming_from_nnunet.md names every command and every option of the installed nnU-Net, and only what is ours."""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "plans" / "coming_from_nnunet.md").read_text(encoding="utf-8")
SAID_OF_ALL = {"-np", "-npp", "-nps", "-npfp", "--verbose", "--no_pbar", "--disable_progress_bar", "-tr"}
COMMANDS = {entry.name: entry for entry in distribution("nnunetv2").entry_points}


class ParserSeenError(Exception):
    """The parser of a command, before it parses anything."""


def options_of(command: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Positional arguments and option strings of one of nnU-Net's commands."""

    def stop(parser, *_, **__):
        raise ParserSeenError([name for a in parser._actions for name in (a.option_strings or [a.dest])])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [command])
    with pytest.raises(ParserSeenError) as seen:
        COMMANDS[command].load()()
    return [name for name in seen.value.args[0] if name not in {"-h", "--help"}]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 21


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(command, monkeypatch)
    assert options
    headings = [part for part in re.split(r"\n### ", PAGE) if re.search(rf"{command}\b", part.partition("\n")[0])]
    rows = headings or [line for line in PAGE.splitlines() if line.startswith(f"| `{command}`")]
    assert len(rows) == 1
    named = set(re.findall(r"(?<![\w-])-{0,2}[A-Za-z]\w*", " ".join(re.findall(r"`([^`]+)`", rows[0]))))
    assert set(options) - SAID_OF_ALL - named == set()


def test_what_is_ours_exists() -> None:
    scripts = set(re.findall(r"^(rfmed_\w+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert set(re.findall(r"\brfmed_[a-z_]+\b", PAGE)) <= scripts
    flags = "\n".join(path.read_text() for path in (ROOT / "rfmedsam2" / "cli").glob("*.py"))
    ours = {
        flag
        for line in PAGE.splitlines()
        if line.startswith("| ") and (cells := line.split("|"))
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", cells[2])
    } - {"nproc-per-node"}
    unknown = [flag for flag in ours if not re.search(rf"\b{flag.replace('-', '_').removeprefix('no_')}_?\b", flags)]
    assert len(ours) > 20
    assert unknown == []
