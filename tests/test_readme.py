"""The READMEs tell the truth: every file is in the map, every command and every named file exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import write_maps  # noqa: E402


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


@pytest.mark.parametrize("package", write_maps.PACKAGES)
def test_the_map_lists_every_file_with_its_docstring(package):
    text = (ROOT / package / "README.md").read_text()
    assert text == write_maps.with_map(text, ROOT / package), "run: python scripts/write_maps.py"


def test_every_command_is_in_the_readme_and_exists():
    # tomllib came with Python 3.11
    scripts = re.findall(r'^((?:rfmed|samhq)_\w+) = "', (ROOT / "pyproject.toml").read_text(), re.M)
    named = set(re.findall(r"\b(?:rfmed|samhq)_[a-z_]+\b", (ROOT / "README.md").read_text()))
    # data folders and variables look like commands
    assert {name for name in named if name not in ("rfmed_data", "rfmed_quickstart", "rfmed_cpu")} == set(scripts)


def test_every_benchmark_and_script_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    missing = [
        f
        for f in tracked("scripts/*.sh", "scripts/benchmarks/*.py")
        if Path(f).name not in text and "_harness" not in f
    ]
    assert not missing


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`((?:tests|scripts|plans|rfmedsam2)/[\w./]+)`", text)
    missing = [name for name in named if "://" not in name and not (ROOT / name).exists()]
    assert not missing
