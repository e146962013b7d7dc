"""Declared dependencies are those that are imported, where they are imported, and installed as declared."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rfmedsam2", "segment_anything_hq")
IMPORTED_AS = {
    "mlflow-skinny": "mlflow",
    "pillow": "PIL",
    "pynrrd": "nrrd",
    "simpleitk": "SimpleITK",
    "connected-components-3d": "cc3d",
    "pytest-timeout": "pytest_timeout",
}
"""Names of modules where they are not the package's name with underscores."""
TOOLS = {"hatchling", "ruff", "pyright", "pytest-timeout", "pytest-xdist"}
"""Run, or loaded by pip or pytest, never imported."""
BROUGHT_ALONG = {
    "pydantic_core": "pydantic",
    "hydra": "sam2",
    "tifffile": "nnunetv2",
    "omegaconf": "sam2",
    "packaging": "pytest",
    "support": "",
    "test_plan": "",
    "test_predict": "",
    "test_unet_task": "",
    "write_maps": "",
    "before_after": "",
    "_harness": "",
    "tomli": "pytest",  # on Python 3.10, which has no tomllib
}
"""What is imported of a dependency's own dependencies, by the one that brings it; and what scripts share."""
BY_NAME = {"tensorboard": "torch.utils.tensorboard", "onnxruntime": "onnxruntime", "cv2": ""}
"""Imported by another package, or by name where installed."""


@cache
def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Requirements of the packages, or of an extra, by lower-case name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    start = "\ndependencies = [" if extra is None else f"\n{extra} = ["
    block = ("\n" + section if extra else text).partition(start)[2].partition("]\n")[0]
    found = [Requirement(line) for line in re.findall(r'"([^"]+)"', block)]
    assert found, extra
    return {requirement.name.lower(): requirement for requirement in found}


def extras() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return re.findall(r"^([\w-]+) = \[", section, re.M)


def module_of(distribution: str) -> str:
    return IMPORTED_AS.get(distribution, distribution.replace("-", "_"))


@cache
def imported_by(*folders: str) -> frozenset[str]:
    """Top-level modules that the sources of these folders import, at any place, but of Python itself."""
    names: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module or "")
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("importorskip", "import_module"):
                    names.add(str(node.args[0].value))
    return frozenset({name.partition(".")[0] for name in names} - set(sys.stdlib_module_names))


def test_every_dependency_is_imported_by_a_package() -> None:
    unused = {name for name in declared() if module_of(name) not in imported_by(*PACKAGES)}
    assert not unused


def test_every_import_of_the_packages_is_declared() -> None:
    optional = {module_of(name) for extra in extras() if extra != "test" for name in declared(extra)}
    brought = {module for module, parent in BROUGHT_ALONG.items() if parent in declared()}
    known = {module_of(name) for name in declared()} | optional | brought | set(PACKAGES)
    assert not imported_by(*PACKAGES) - known


def test_every_import_of_tests_and_scripts_is_declared() -> None:
    known = {module_of(name) for extra in (None, *extras()) for name in declared(extra)} | set(PACKAGES)
    assert not imported_by("tests", "scripts") - known - set(BROUGHT_ALONG) - set(BY_NAME)


def test_every_dependency_of_tests_is_used() -> None:
    used = imported_by("tests", "scripts", *PACKAGES) | TOOLS | set(BY_NAME)
    assert not {name for name in declared("test") if module_of(name) not in used and name not in used}


@pytest.mark.parametrize("name", sorted(declared()))
def test_every_dependency_has_a_lower_bound(name: str) -> None:
    assert any(specifier.operator == ">=" for specifier in declared()[name].specifier)


def test_extras_ask_for_what_the_test_extra_asks_for() -> None:
    shared = [(extra, name) for extra in extras() for name in declared(extra) if name in declared("test")]
    assert not [pair for pair in shared if str(declared(pair[0])[pair[1]]) != str(declared("test")[pair[1]])]


def test_lower_bounds_lie_below_upper_ones() -> None:
    for requirement in declared().values():
        bounds = {s.operator: Version(s.version) for s in requirement.specifier}
        assert "<" not in bounds or bounds[">="] < bounds["<"], requirement
