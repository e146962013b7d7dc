"""All errors that users can encounter.

An error says what is wrong, where, what was expected, what was found, and what to do. Commands print the message and
exit with code 2; a traceback is therefore always a bug in this package. Each class also derives from the matching
builtin exception, so that callers can catch either.
"""

from __future__ import annotations

from collections.abc import Iterable


class RfMedSamError(Exception):
    """Base of all errors of this package.

    Args:
        what: what is wrong, one sentence without the period.
        where: the file, folder, case or field that is concerned.
        expected: what would have been right.
        found: what was found instead.
        remedy: what the user can do, one sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        parts = [what.rstrip(".") + (f": {where}" if where is not None else "")]
        if expected is not None:
            parts.append(f"Expected {expected}")
        if found is not None:
            parts.append(f"Found {found}")
        if remedy is not None:
            parts.append(remedy)
        super().__init__(sentences(parts))
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy


class UsageError(RfMedSamError, ValueError):
    """An invalid argument: a dataset, plan, configuration or fold that does not exist, or conflicting flags."""


class DatasetError(RfMedSamError, ValueError):
    """A raw dataset that cannot be used as it is."""


class ImageError(RfMedSamError, ValueError):
    """An image or label file that is unreadable, truncated or holds invalid values."""


class GeometryError(RfMedSamError, ValueError):
    """A spacing, direction, origin or shape that is invalid or does not match."""


class RecordError(RfMedSamError, ValueError):
    """A JSON record (plan, fingerprint, dataset.json ...) with faulty fields; the message lists all of them."""


class PlanError(RfMedSamError, ValueError):
    """A plan that does not match the data, the model or the request."""


class StoreError(RfMedSamError, OSError):
    """A folder that cannot be written, a full disk, or a damaged preprocessed case."""


class CheckpointError(RfMedSamError, ValueError):
    """A checkpoint or model archive that is truncated, not one of ours, unsafe, or of another plan."""


class WorkerError(RfMedSamError, RuntimeError):
    """A worker process or thread that died, was killed or stalled; names the cause and the case."""


class MemoryShortError(WorkerError, MemoryError):
    """A worker that most likely ran out of memory; the work is retried once with fewer workers."""


class DivergedError(RfMedSamError, ArithmeticError):
    """A training whose loss is no longer finite; names the cases of the batch."""


class SubmissionError(RfMedSamError, ValueError):
    """Predictions that a challenge would reject."""


class ExtensionError(RfMedSamError, ImportError):
    """An extension that a plan names: not installed, registered by two packages, or not working."""


class PackageVersionError(RfMedSamError, ImportError):
    """An installed release of another package that lacks what this one uses."""


class MissingPackageError(RfMedSamError, ImportError):
    """An optional package that this command needs; names the extra that installs it."""


class ConversionError(RfMedSamError, RuntimeError):
    """A network that a backend other than torch cannot run; names the operation."""


def sentences(parts: Iterable[str]) -> str:
    """Parts of a message as sentences in one text: each ends with exactly one mark, or with its own line break."""
    ended = (part if part.endswith((".", "?", "!", "\n")) else f"{part}." for part in parts if part)
    return "".join(part if part.endswith("\n") else f"{part} " for part in ended).rstrip(" ")


def type_name(thing: object) -> str:
    """Name of a thing's type with its module, for messages."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def require_type(value: object, kind: type, name: str, *, remedy: str) -> None:
    """Check that an argument is an object of a type of ours, not a name or path of one.

    Raises:
        UsageError: it is of another type; says which was expected.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name} is not a {kind.__name__}", found=type_name(value), remedy=remedy)


def shortlist(items: Iterable[object], *, limit: int = 5, separator: str = ", ") -> str:
    """The first items of a list for a message, with the number of those left out: "a, b and 3 more"."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return separator.join(shown[:limit]) + more
