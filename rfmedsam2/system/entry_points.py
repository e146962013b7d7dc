"""What other installed packages register for this one as Python entry points, by kind and name.

Only what is registered this way is ever imported by a name from a file.
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
    """An extension as an installed package registers it.

    Attributes:
        kind: what it is.
        name: that plans use.
        package: distribution, as pip calls it; `version` is the distribution's.
        entry_point: where it is found in that package.
    """

    kind: Kind
    name: str
    package: str
    version: str
    entry_point: EntryPoint

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of {self.package} {self.version} ({self.entry_point.value})"

    def load(self) -> Any:
        """Import it.

        Raises:
            ExtensionError: it cannot be imported; says why.
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
    """Group of entry points: rfmedsam2.networks, rfmedsam2.losses, rfmedsam2.augmentations ..."""
    return f"rfmedsam2.{'losse' if kind == 'loss' else kind}s"


def installed(kind: Kind) -> list[Registered]:
    """All extensions of a kind that installed packages register, by name and package; imports none of them."""
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
    """The one extension of this name, and of this package if one is given.

    Raises:
        ExtensionError: not installed, or registered by several packages.
    """
    known = installed(kind)
    found = [r for r in known if r.name == name and package in (None, r.package)]
    if len(found) == 1:
        return found[0]
    where = f"{kind} {name}" + (f" of {package}" if package else "")
    if found:
        raise ExtensionError(
            "Several installed packages register an extension of this name",
            where=where,
            found=", ".join(f"{r.package} {r.version}" for r in found),
            remedy='Say which is meant (in the plan, "package" beside "name"), or uninstall the others',
        )
    raise ExtensionError(
        "This extension is not installed",
        where=where,
        expected=f"an installed package with this entry point in the group {group_of(kind)}",
        found=", ".join(f"{r.name} ({r.package} {r.version})" for r in known) or f"no extension of the kind {kind}",
        remedy=f"Install it (pip install {package or 'PACKAGE'}) where rfmedsam2 is installed; rfmed_doctor lists what "
        "there is",
    )
