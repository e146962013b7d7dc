"""What can be imported from the `segment_anything_hq` that is on the path: modules, names, signatures, as JSON.

A program of its own, because the published package and ours have the same name.
usage: public_names.py OUT.json [KNOWN.json]
Without KNOWN.json all names that the package defines, else what became of the names in it.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import segment_anything_hq

PACKAGE = "segment_anything_hq"
ABSENT = "absent"


def main() -> None:
    """Write all."""
    out, *known = (Path(argument) for argument in sys.argv[1:])
    found = found_again(json.loads(known[0].read_text(encoding="utf-8"))) if known else surface()
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def surface() -> dict[str, dict[str, Any]]:
    """Module -> public name -> what it is, of everything that this package defines."""
    modules = [found.name for found in pkgutil.walk_packages(segment_anything_hq.__path__, f"{PACKAGE}.")]
    found: dict[str, dict[str, Any]] = {}
    for module in (PACKAGE, *sorted(modules)):
        # by import, as a function of the package has the name of a module
        members = {name: value for name, value in vars(import_module(module)).items() if not name.startswith("_")}
        own = {name: value for name, value in members.items() if isinstance(value, dict) or defined_here(value)}
        found[module] = {name: described(value, public_methods(value)) for name, value in own.items()}
    return found


def found_again(known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What this package has by the same names."""
    found: dict[str, dict[str, Any]] = {}
    for module, names in known.items():
        try:
            members = import_module(module)
        except ModuleNotFoundError:
            found[module] = dict.fromkeys(names, ABSENT)
            continue
        found[module] = {
            name: described(getattr(members, name), list(what.get("methods", ()))) if hasattr(members, name) else ABSENT
            for name, what in names.items()
        }
    return found


def defined_here(value: Any) -> bool:
    """A class or function of this package, not one that it imports."""
    return callable(value) and getattr(value, "__module__", "").split(".")[0] == PACKAGE


def public_methods(value: Any) -> list[str]:
    """Names of a class's public methods and properties that this package defines."""
    if not inspect.isclass(value):
        return []
    owners = [owner for owner in value.__mro__ if owner.__module__.split(".")[0] == PACKAGE]
    return sorted({name for owner in owners for name in vars(owner) if is_method(owner, name)})


def is_method(owner: type, name: str) -> bool:
    """Of a class's own members a public function or property."""
    member = inspect.getattr_static(owner, name)
    kinds = (staticmethod, classmethod, property)
    return not name.startswith("_") and (isinstance(member, kinds) or inspect.isfunction(member))


def described(value: Any, methods: list[str]) -> dict[str, Any]:
    """The keys of a dict; the signature of what can be called, with those of its methods."""
    if isinstance(value, dict):
        return {"keys": list(value)}
    if not methods:
        return {"call": signature(value)}
    return {"call": signature(value), "methods": {name: method(value, name) for name in methods}}


def method(owner: type, name: str) -> str:
    """A method's signature; of a property that it is one."""
    member = inspect.getattr_static(owner, name, ABSENT)
    if isinstance(member, property) or member is ABSENT:
        return ABSENT if member is ABSENT else "property"
    static = "static " if isinstance(member, staticmethod) else ""
    return static + signature(getattr(member, "__func__", member))


def signature(value: Any) -> str:
    """Names, order, kinds and defaults of the parameters."""
    parameters = inspect.signature(value).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty, default=default(p.default)) for p in parameters]))


class Default:
    """A default, shown by a text that is the same in both packages."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def default(value: Any) -> Any:
    """Lists as tuples, numbers to nine digits, types by their names."""
    if value is inspect.Parameter.empty:
        return value
    if isinstance(value, list | tuple):
        return Default(f"({', '.join(repr(default(one)) for one in value)})")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Default(f"{value:.9g}")
    return Default(value.__name__ if inspect.isclass(value) else repr(value))


if __name__ == "__main__":
    main()
