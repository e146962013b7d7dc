"""Arguments of the Python API, checked where they come in; and how messages name options, there and in commands."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TypeVar

from typing_extensions import Self

from rfmedsam2.errors import UsageError, type_name

T = TypeVar("T")
_as_flags = False


@contextmanager
def options_as_flags() -> Iterator[None]:
    """Let messages name options as a command line has them, inside the `with` block."""
    global _as_flags
    before, _as_flags = _as_flags, True
    try:
        yield
    finally:
        _as_flags = before


def option(name: str, value: object = None, *, flag: str | None = None) -> str:
    """An option as its user writes it: `overwrite=True` in Python, `--overwrite` in a command.

    Args:
        name: of the argument or field.
        value: what it is to be, a tuple for several words; None: the name alone.
        flag: in a command, if not the name.
    """
    if not _as_flags:
        return name if value is None else f"{name}={value!r}"
    flag = flag or "--" + name.replace("_", "-")
    words = map(str, value) if isinstance(value, tuple) else () if value in (None, True) else (str(value),)
    return " ".join((flag, *words))


def path_of(value: object, name: str) -> Path:
    """A path from text or any object that is one.

    Raises:
        UsageError: something else, such as None, bytes or a list of paths.
    """
    if isinstance(value, str | os.PathLike):
        if "\0" in str(value):
            raise UsageError(f"{name} is not a path", expected="text without null characters", found=repr(str(value)))
        return Path(value)
    raise UsageError(f"{name} is not a path", expected="text or a pathlib.Path", found=type_name(value))


def names_of(value: object, name: str) -> tuple[str, ...]:
    """Names from any collection of them; a single one may stand alone.

    Raises:
        UsageError: not a collection.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable):
        return tuple(str(one) for one in value)
    raise UsageError(f"{name} is not a list of names", found=f"{value!r}")


def choice_of(value: object, known: Sequence[object], name: str) -> None:
    """Check that a value is one of those known.

    Raises:
        UsageError: it is not.
    """
    if not any(type(value) is type(one) and value == one for one in known):
        listed = ", ".join(map(str, known))
        raise UsageError(f"Unknown {name}", expected=f"one of {listed}", found=f"{value!r}")


def whole_number(value: object, name: str, *, least: int) -> int:
    """A whole number of any integer type, also NumPy's and a tensor's.

    Raises:
        UsageError: something else, or a number below `least`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise UsageError(f"{name} must be a whole number from {least}", found=f"{value!r}")
    return number


def number_from_zero(value: object, name: str) -> float:
    """A number that is 0 or more.

    Raises:
        UsageError: something else, a negative number or NaN.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) >= 0:
        raise UsageError(f"{name} must be 0 or more", found=f"{value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class Part:
    """The `number`-th of `count` parts of a list of cases, for several processes or machines; both count from 1.

    Every item is in one part, and sizes differ by one at most.
    """

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

    @property
    def lock(self) -> str:
        """Name of the folder that its run locks in a folder which several parts write to."""
        return f".part-{self.number}-of-{self.count}"

    def of(self, items: Sequence[T]) -> list[T]:
        """The part's items, in their order."""
        return list(items[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
