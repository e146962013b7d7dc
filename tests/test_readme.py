"""The READMEs tell the truth: every file is in the map, every command and every named file exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


@pytest.mark.parametrize("wing", ["rfmedsam2", "segment_anything_hq"])
def test_every_file_is_in_the_map_once(wing):
    text = (ROOT / wing / "README.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+\.py)` \|", text, re.M)
    files = [f.removeprefix(f"{wing}/") for f in tracked(f"{wing}/**/*.py", f"{wing}/*.py")]
    assert sorted(rows) == sorted(f for f in set(files) if not f.endswith("__init__.py"))


def test_every_command_is_in_the_readme_and_exists():
    # tomllib came with Python 3.11
    scripts = re.findall(r'^((?:rfmed|samhq)_\w+) = "', (ROOT / "pyproject.toml").read_text(), re.M)
    named = set(re.findall(r"\b(?:rfmed|samhq)_[a-z_]+\b", (ROOT / "README.md").read_text()))
    # data folders and variables look like commands
    assert {name for name in named if name not in ("rfmed_data", "rfmed_quickstart", "rfmed_cpu")} == set(scripts)


def test_every_benchmark_and_script_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    missing = [f for f in tracked("scripts/*.sh", "scripts/benchmarks/*.py") if Path(f).name not in text]
    assert not missing


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`((?:tests|scripts|plans|rfmedsam2)/[\w./]+)`", text)
    missing = [name for name in named if "://" not in name and not (ROOT / name).exists()]
    assert not missing
