"""Extensions named in plans: networks, losses, augmentations, planners and tasks of other packages.

A registered object is called with keyword arguments, always including `options`: an instance of its attribute `Options`
(a `Record`) if it has one, else a plain dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rfmedsam2.errors import ExtensionError, RfMedSamError
from rfmedsam2.records.base import Record
from rfmedsam2.records.model import CustomConfig, Extension
from rfmedsam2.records.plan import Stage
from rfmedsam2.system.entry_points import Kind, Registered, find


def make(kind: Kind, extension: Extension, **given: Any) -> Any:
    """Call a registered object with validated options and the arguments of its kind (see this package's README).

    Raises:
        ExtensionError: the extension is not installed, registered twice, cannot be imported, or failed.
        RecordError: options that the extension does not have.
    """
    registered, factory, options = _resolve(kind, extension)
    try:
        return factory(**given, options=options)
    except RfMedSamError:
        raise
    except Exception as error:
        raise ExtensionError(
            "An extension failed while being created",
            where=registered,
            found=f"{type(error).__name__}: {error}",
            remedy=f"Report this to the maintainers of {registered.package}",
        ) from error


def check(stage: Stage) -> None:
    """Import all extensions of a stage and check their options, before other work; raises the errors of `make`."""
    for kind, extension in named_by(stage):
        _resolve(kind, extension)


def named_by(stage: Stage) -> Iterator[tuple[Kind, Extension]]:
    """The extensions that a stage names."""
    if isinstance(stage.model, CustomConfig):
        yield "network", stage.model
    if stage.extensions.task is not None:
        yield "task", stage.extensions.task
    if stage.extensions.loss is not None:
        yield "loss", stage.extensions.loss
    for augmentation in stage.extensions.augmentation:
        yield "augmentation", augmentation


def _resolve(kind: Kind, extension: Extension) -> tuple[Registered, Any, Any]:
    """The registration, the imported object, and its options."""
    registered = find(kind, extension.name, package=extension.package)
    factory = registered.load()
    record = getattr(factory, "Options", None)
    if record is None:
        return registered, factory, dict(extension.options)
    if not (isinstance(record, type) and issubclass(record, Record)):
        raise ExtensionError(
            "The options of an extension are not a record",
            where=registered,
            expected="Options, a subclass of rfmedsam2.records.base.Record",
            found=repr(record),
        )
    return registered, factory, record.parse(extension.options, where=f"options of {registered}")
