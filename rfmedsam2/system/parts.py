"""Shares of a list of cases, so that several processes or machines work on one dataset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from typing_extensions import Self

from rfmedsam2.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """The `number`-th of `count` parts, both from 1. Every item is in one part; sizes differ by one at most."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: object) -> Self:
        """A part as its user writes it: "2/8".

        Raises:
            UsageError: something else, or a part that there is not.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII) if isinstance(text, str) else None
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(
                "This is not a part",
                expected="its number and how many there are, such as 2/8: the second of eight",
                found=repr(text),
            )
        return cls(number, count)

    def of(self, items: Sequence[T]) -> list[T]:
        """The part's items, in their order."""
        return list(items[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
