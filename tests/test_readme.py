"""The READMEs tell the truth: maps, commands, scripts, links, anchors and quoted messages are those of the sources."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import write_maps  # noqa: E402

LONGEST_README = 12_000
"""Bytes: what a newcomer reads in ten minutes. Figures, ablations and faults have READMEs of their own."""
LARGEST_PICTURE = 200_000
NOT_COMMANDS = {"rfmed_data", "rfmed_quickstart", "rfmed_cpu"}


@cache
def everything() -> list[str]:
    """Found by walking: a source distribution has no git."""
    folders = (".github", "plans", "rfmedsam2", "scripts", "segment_anything_hq", "tests")
    found = [*ROOT.iterdir(), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.is_file())


def files(*patterns: str) -> list[str]:
    """Whose path matches a pattern; a star stands for folders, too."""
    return [name for name in everything() if any(fnmatch(name, pattern) for pattern in patterns)]


PAGES = sorted(files("*.md"))


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def anchors_of(page: str) -> frozenset[str]:
    """GitHub's anchors: lower case, spaces to hyphens, punctuation left out."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.M)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def links_of(page: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]


@pytest.mark.parametrize("package", write_maps.PACKAGES)
def test_the_map_lists_every_file_with_its_docstring(package):
    text = (ROOT / package / "README.md").read_text()
    assert text == write_maps.with_map(text, ROOT / package), "run: python scripts/write_maps.py"


def test_every_command_is_in_the_readme_and_exists():
    # tomllib came with Python 3.11
    scripts = re.findall(r'^((?:rfmed|samhq)_\w+) = "', (ROOT / "pyproject.toml").read_text(), re.M)
    assert len(scripts) > 15
    named = set(re.findall(r"\b(?:rfmed|samhq)_[a-z_]+\b", text_of("README.md")))
    assert named - NOT_COMMANDS == set(scripts)


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_pages_name_exist(page):
    scripts = re.findall(r'^((?:rfmed|samhq)_\w+) = "', (ROOT / "pyproject.toml").read_text(), re.M)
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.M | re.S)
    lines = [line for block in blocks for line in block.split("\n")]
    called = {word for line in lines for word in re.findall(r"^(?:\S+ )*?((?:rfmed|samhq)_[a-z_]+) ", line)}
    assert called <= set(scripts)


def test_every_benchmark_is_in_its_readme():
    text = text_of("scripts/benchmarks/README.md")
    scripts = [Path(f) for f in files("scripts/benchmarks/*.py") if "_harness" not in f]
    assert len(scripts) > 15
    assert not [f.name for f in scripts if f"`{f.name}" not in text and f"benchmarks/{f.name}" not in text]


def test_every_fault_test_is_in_its_readme():
    text = text_of("tests/faults/README.md")
    assert not [f for f in files("tests/faults/test_*.py") if Path(f).name not in text]


def test_every_script_is_named_by_a_page():
    text = text_of("README.md") + text_of(".github/CONTRIBUTING.md") + text_of("plans/README.md")
    scripts = files("scripts/*.sh", "scripts/*.py")
    assert not [f for f in scripts if "benchmarks" not in f and Path(f).name not in text]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page):
    missing = []
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(name).resolve() if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target.relative_to(ROOT).as_posix())):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    named = re.findall(r"`((?:tests|scripts|plans|rfmedsam2|segment_anything_hq|\.github)/[\w./*]+)`", text_of(page))
    assert not [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= LONGEST_README


def test_pictures_are_small():
    pictures = [link for link in links_of("README.md") if link.endswith(".png")]
    assert len(pictures) == 2
    assert not [link for link in pictures if (ROOT / link).stat().st_size > LARGEST_PICTURE]


def test_messages_under_troubleshooting_are_those_of_the_sources():
    section = text_of("README.md").partition("## Troubleshooting")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `(.+?)`", section, re.M)
    assert len(quoted) == 8
    sources = "\n".join((ROOT / f).read_text() for f in files("rfmedsam2/*.py", "segment_anything_hq/*.py"))
    assert not [message for message in quoted if message not in sources]
