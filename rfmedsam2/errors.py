"""Every error that a user can meet.

An error names the thing, the place, what was expected, what was found and what to do. The command line prints the
sentence and exits with 2; a traceback is therefore always a bug of ours. Each kind is also the builtin that fits, so
that a caller can catch either.
"""

from __future__ import annotations


class RfMedSamError(Exception):
    """Base of all errors of this package.

    Args:
        what: what is wrong, one sentence without the full stop.
        where: the file, folder, case or field it was found in.
        expected: what would have been right.
        found: what was there instead.
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
        parts = [what.rstrip(".") + (f": {where}" if where is not None else "") + "."]
        if expected is not None:
            parts.append(f"Expected {expected}.")
        if found is not None:
            parts.append(f"Found {found}.")
        if remedy is not None:
            parts.append(remedy.rstrip(".") + ".")
        super().__init__(" ".join(parts))
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy


class UsageError(RfMedSamError, ValueError):
    """An argument that cannot be used: a dataset, plan, configuration or fold that does not exist, flags that clash."""


class DatasetError(RfMedSamError, ValueError):
    """A raw dataset that cannot be used as it is."""


class ImageError(RfMedSamError, ValueError):
    """A single image or label file that is unreadable, truncated or holds what it must not."""


class GeometryError(RfMedSamError, ValueError):
    """Spacing, direction, origin or shape that is impossible or does not match."""


class RecordError(RfMedSamError, ValueError):
    """A JSON record (plan, fingerprint, dataset.json ...) with faults; the message lists all of them."""


class PlanError(RfMedSamError, ValueError):
    """A plan that does not fit the data, the model or the request."""


class StoreError(RfMedSamError, OSError):
    """A folder that cannot be written, a full disk, a preprocessed case that is broken."""


class CheckpointError(RfMedSamError, ValueError):
    """A checkpoint or model archive that is truncated, foreign, unsafe or of another plan."""


class WorkerError(RfMedSamError, RuntimeError):
    """A data loading or case worker that died, was killed or stalled; names the cause and the case."""


class MemoryShortError(WorkerError, MemoryError):
    """A worker that ran out of memory, as far as can be told; work is tried once more with fewer of them."""


class DivergedError(RfMedSamError, ArithmeticError):
    """Training whose loss is no longer finite; names the cases of the batch."""


class SubmissionError(RfMedSamError, ValueError):
    """A set of predictions that a challenge would refuse."""


class MissingPackageError(RfMedSamError, ImportError):
    """An optional package that this command needs; names the extra that installs it."""
