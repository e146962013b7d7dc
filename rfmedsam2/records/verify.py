"""Faults of a data set, and the report of its verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rfmedsam2.errors import DatasetError, sentences, shortlist
from rfmedsam2.records.base import Record

FaultKind = Literal[
    "unreadable",
    "truncated",
    "changed-while-reading",
    "bad-geometry",
    "skewed-axes",
    "forms-differ",
    "no-spacing",
    "unit-ignored",
    "scaling-ignored",
    "shape-mismatch",
    "affine-mismatch",
    "not-finite",
    "constant-image",
    "missing-channel",
    "extra-channel",
    "undeclared-label",
    "not-a-label",
    "label-names",
    "empty-label",
    "region-order",
    "missing-label",
    "missing-image",
    "duplicate-id",
    "wrong-suffix",
    "case-count",
    "split-overlap",
    "split-unknown",
]


class Fault(Record):
    """One problem of a data set."""

    case: str
    """Case id, "" for the dataset as a whole."""
    file: str
    kind: FaultKind
    severity: Literal["error", "warning"]
    message: str
    remedy: str = ""


class VerifyReport(Record):
    """The result of verifying a data set."""

    dataset: str
    cases: int
    """Number of training and test cases checked."""
    files: int
    """Number of image and label files read."""
    seconds: float
    faults: tuple[Fault, ...]
    """All faults, errors first, then by case."""

    @property
    def errors(self) -> tuple[Fault, ...]:
        """Faults that prevent training."""
        return tuple(f for f in self.faults if f.severity == "error")

    @property
    def warnings(self) -> tuple[Fault, ...]:
        """Faults that should be checked."""
        return tuple(f for f in self.faults if f.severity == "warning")

    @property
    def clean(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    def require_clean(self) -> None:
        """Raise if there are errors.

        Raises:
            DatasetError: lists all of them.
        """
        require_no_errors(self.faults, where=self.dataset)


REMEDY = "Correct or remove these cases, then run the same command again"


def summaries(faults: Sequence[Fault]) -> list[str]:
    """What warnings say that ask for something, a text for each kind: the first one's message, and all of its cases."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        if fault.severity == "warning" and not fault.remedy.startswith("No action needed"):
            kinds.setdefault(fault.kind, []).append(fault)
    found = []
    for same in kinds.values():
        cases = list(dict.fromkeys(fault.case for fault in same if fault.case))
        of = f"{len(cases)} case(s) ({shortlist(cases)}): " if cases else ""
        found.append(of + sentences([same[0].message, same[0].remedy]))
    return found


def require_no_errors(faults: Sequence[Fault], *, where: object, remedy: str = REMEDY) -> None:
    """Raise when any fault is an error.

    Raises:
        DatasetError: lists every error, one per line.
    """
    errors = [fault for fault in faults if fault.severity == "error"]
    if errors:
        lines = "\n".join(
            f"  {fault.case or '(dataset)'}: {sentences([fault.message, fault.remedy])}" for fault in errors
        )
        raise DatasetError(
            f"The dataset has {len(errors)} fault(s)",
            where=where,
            found=f"\n{lines}\n",
            remedy=remedy,
        )
