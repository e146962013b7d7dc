"""Sources use the field's standard words: a short list of words to avoid, each with the word to use instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rfmedsam2", "segment_anything_hq")
AVOIDED = {
    r"\banew\b": "again, new",
    r"(?<![Gg]round[ _-])\btruths?\b": "ground truth, reference",
    r"\bpictures?\b": "image",
    r"(?<!there )(?<!There )\bis no\b(?! longer)": "is not a",
    r"\btold\b": "given, reported",
    r"\b[Mm]end(s|ed|ing)?\b": "fix, correct",
    r"\bso many\b": "the number of",
    r"\binterpreter lock\b": "GIL",
    r"\b(prompted|per|of|mask) cells?\b": "object prompt, (slice, class)",
    r"\b(bytes|blocks|values|tokens|pixels|maps|layers) an? (voxel|side|stage|pixel|layer|frame|class)\b": "per",
    r"(?i)normalis|colour|centre\b|localis|unlabelled|behaviour|synchronis|vectoris": "American spelling",
}
EXCEPTIONS = {
    # names in files of format 1, and digests that must stay valid
    "rfmedsam2/records/plan.py": {"normalis"},
    "rfmedsam2/pipeline/preprocessing/case_source.py": {"normalis"},
    "rfmedsam2/pipeline/prediction/identity.py": {"normalis"},
    "segment_anything_hq/records.py": {"pictures"},
    # a spelling that commands accept
    "segment_anything_hq/evaluation/run.py": {"centre"},
    # an HTML element
    "rfmedsam2/pipeline/evaluation/report.html.j2": {"picture"},
    "rfmedsam2/pipeline/selection/selection.html.j2": {"picture"},
}
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for ending in ("py", "j2")
    for path in (ROOT / package).rglob(f"*.{ending}")
)


def avoided_words(text: str, allowed: set[str]) -> list[str]:
    """Each avoided word with its line and what to write instead."""
    found = []
    for pattern, instead in AVOIDED.items():
        for match in re.finditer(pattern, text):
            if match[0] not in allowed:
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"line {line}: {match[0]!r}, write: {instead}")
    return found


@pytest.mark.parametrize(
    ("sentence", "count"),
    [
        ("A file is made anew, the truth is no picture.", 4),
        ("A file is written again; the ground truth is not an image, and the ground_truth array is no longer used.", 0),
        ("4 bytes a voxel", 1),
        ("4 bytes per voxel of a frame", 0),
        ("normalisation of colours", 2),
        ("normalization of colors", 0),
    ],
)
def test_avoided_words_are_found(sentence, count):
    assert len(avoided_words(sentence, set())) == count


@pytest.mark.parametrize("path", FILES)
def test_sources_use_standard_words(path):
    assert avoided_words((ROOT / path).read_text(encoding="utf-8"), EXCEPTIONS.get(path, set())) == []


def test_every_exception_is_needed():
    for path, words in EXCEPTIONS.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(any(word in found for found in avoided_words(text, set())) for word in words), path
