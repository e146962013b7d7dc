"""What records say of extensions: networks, losses, augmentations, planners and tasks of other installed packages.

A record holds a registered name and plain options, never the path of a class: reading it loads nothing.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

from rfmedsam2.records.base import Record

ExtensionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)]
"""As it stands before the "=" of an entry point."""


class Extension(Record):
    """One extension, by the name under which an installed package registers it."""

    name: ExtensionName
    package: ExtensionName | None = None
    """Distribution that it comes from: what to install where it is missing, and which is meant where two packages
    register the name."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Checked by the extension's own record, where it has one."""


class StageExtensions(Record):
    """What a stage takes from other packages, beside its network (model kind `custom`)."""

    task: Extension | None = None
    """Trains in the place of ours."""
    loss: Extension | None = None
    """In the place of cross-entropy + Dice, at every supervised resolution."""
    augmentation: tuple[Extension, ...] = ()
    """Applied to training patches in this order, after `augmentation` of the stage."""
