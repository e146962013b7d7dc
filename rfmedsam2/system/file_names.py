"""Names that are read from a file and become part of a path: one rule for all of them, so that none leaves its folder.

Case ids, datasets, plans, configurations, folds and file endings come from dataset.json, lists, plans, checkpoints and
archives that somebody else may have written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from rfmedsam2.errors import DatasetError, shortlist

NAME_BYTES = 200
"""Longest name: endings and the prefix of partial files are added to it, and file systems allow 255 bytes."""
FILE_NAME_BYTES = 255
ENDING_BYTES = 20
NAMES = (
    f"a plain name of at most {NAME_BYTES} bytes, not a path: without slashes, backslashes and control characters, "
    "and not beginning with a dot"
)
_DRIVE = re.compile(r"[A-Za-z]:")
_NOT_IN_NAMES = re.compile("[/\\\\\x00-\x1f\x7f\ud800-\udfff]")


def is_file_name(name: str, *, longest: int = NAME_BYTES) -> bool:
    """Whether a name is that of one visible file or folder on any system, and never a path to another folder.

    Args:
        name: the name.
        longest: limit in UTF-8 bytes.
    """
    if not name or name.startswith(".") or _DRIVE.match(name) or _NOT_IN_NAMES.search(name):
        return False
    return len(name.encode()) <= longest


def as_one_file(name: str) -> str:
    """What is equal for names that some file system takes for one.

    macOS and Windows ignore letter case, and macOS how an accented letter is written: composed, or letter and accent.
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def require_names(names: Iterable[str], *, where: object) -> None:
    """Check names from a file.

    Args:
        names: case ids, names of splits.
        where: the file that holds them.

    Raises:
        DatasetError: names that are paths, empty, hidden or too long; lists them.
    """
    bad = [name for name in names if not is_file_name(name)]
    if bad:
        raise DatasetError(
            f"{len(bad)} name(s) cannot be used as file names",
            where=where,
            expected=NAMES,
            found=shortlist(repr(name[:80]) for name in bad),
            remedy="Rename these cases",
        )


def _name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError(f"expected {NAMES}, found {name[:80]!r}")
    return name


def _file_name(name: str) -> str:
    if not is_file_name(name, longest=FILE_NAME_BYTES):
        raise ValueError(f"expected the name of a file in the same folder, found {name[:80]!r}")
    return name


def _ending(ending: str) -> str:
    if not ending or not is_file_name("x" + ending, longest=1 + ENDING_BYTES):
        raise ValueError(f"expected the end of a file name, such as .nii.gz, found {ending[:80]!r}")
    return ending


Name = Annotated[str, AfterValidator(_name)]
"""A case id, or the name of a dataset, plan, configuration, fold or split."""
FileName = Annotated[str, AfterValidator(_file_name)]
"""The whole name of a file in the folder of the record."""
FileEnding = Annotated[str, AfterValidator(_ending)]
"""What follows a name in the name of a file: .nii.gz, _label.b2nd."""
