"""Python entry points that other installed packages register for this one, by kind and name.

Names in files can only refer to objects registered this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from rfmedsam2.errors import ExtensionError

Kind = Literal["network", "loss", "augmentation", "planner", "task"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """An extension registered by an installed package.

    Attributes:
        kind: kind of the extension.
        name: name used in plans.
        package: name of the distribution, as in pip; `version` is its version.
        entry_point: its location in that package.
    """

    kind: Kind
    name: str
    package: str
    version: str
    entry_point: EntryPoint

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of {self.package} {self.version} ({self.entry_point.value})"

    def load(self) -> Any:
        """Import the object.

        Raises:
            ExtensionError: the object cannot be imported; gives the reason.
        """
        try:
            return self.entry_point.load()
        except Exception as error:
            raise ExtensionError(
                "An extension cannot be imported",
                where=self,
                found=f"{type(error).__name__}: {error}",
                remedy=f"Update or reinstall {self.package}",
            ) from error


def group_of(kind: Kind) -> str:
    """Entry point group: rfmedsam2.networks, rfmedsam2.losses, rfmedsam2.augmentations ..."""
    return f"rfmedsam2.{'losse' if kind == 'loss' else kind}s"


def installed(kind: Kind) -> list[Registered]:
    """All registered extensions of a kind, sorted by name and package; does not import them."""
    found = [
        Registered(
            kind=kind,
            name=entry.name,
            package=entry.dist.name if entry.dist is not None else "an unnamed package",
            version=entry.dist.version if entry.dist is not None else "",
            entry_point=entry,
        )
        for entry in entry_points(group=group_of(kind))
    ]
    return sorted(found, key=lambda each: (each.name, each.package))


def find(kind: Kind, name: str, *, package: str | None = None) -> Registered:
    """The extension of this name, and of this package if given.

    Raises:
        ExtensionError: the extension is not installed, or registered by several packages.
    """
    known = installed(kind)
    found = [r for r in known if r.name == name and package in (None, r.package)]
    if len(found) == 1:
        return found[0]
    where = f"{kind} {name}" + (f" of {package}" if package else "")
    if found:
        raise ExtensionError(
            "Several installed packages register an extension with this name",
            where=where,
            found=", ".join(f"{r.package} {r.version}" for r in found),
            remedy='Set "package" beside "name" in the plan, or uninstall the others',
        )
    raise ExtensionError(
        "The extension is not installed",
        where=where,
        expected=f"an installed package with this entry point in the group {group_of(kind)}",
        found=", ".join(f"{r.name} ({r.package} {r.version})" for r in known) or f"no extension of the kind {kind}",
        remedy=f"Install it (pip install {package or 'PACKAGE'}) where rfmedsam2 is installed; rfmed_doctor lists what "
        "there is",
    )
