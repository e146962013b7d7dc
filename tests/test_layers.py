"""The house's own test: who may import whom, and what no file may do. Reads the sources, runs none of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rfmedsam2"

# lower may never import higher; modules of one level may import one another only inside the same part
LEVELS = {
    "errors": 0,
    "geometry": 1,
    "records": 2,
    "parallel": 2,
    "compiling": 0,
    "free_memory": 0,
    "store": 3,
    "transforms": 3,
    "prompts": 3,
    "metric_kernels": 2,
    "metrics": 3,
    "devices": 2,
    "losses": 4,
    "nn": 4,
    "models": 5,
    "engine": 5,
    "inference": 6,
    "tasks": 7,
    "pipeline": 8,
    "cli": 9,
}
# what the second package may use of the first
SHARED_WITH_IMAGES = {"compiling", "errors", "prompts", "metrics", "losses", "engine", "records", "store", "nn"}
# how commands parse, print and end is the same in both
SHARED_BY_COMMANDS = SHARED_WITH_IMAGES | {"cli"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
UNPICKLERS = {"cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

SOURCES = sorted(p for name in (PACKAGE, "segment_anything_hq") for p in (ROOT / name).rglob("*.py"))
OURS = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == PACKAGE]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def offences(faults_of: Callable[[Path], list[str]], sources: list[Path] = SOURCES) -> list[str]:
    """All faults of all sources as "file: fault"."""
    return [f"{path.relative_to(ROOT)}: {fault}" for path in sources for fault in faults_of(path)]


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of all modules that a file imports anywhere, type checking and functions included, with lines."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base, node.lineno
            # "from package import part" may name a module
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of the package that a module belongs to: "store" for rfmedsam2.store.files; None for other packages."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 and names[1] in LEVELS else None


def own_part(path: Path) -> str:
    """The part that a source file of the package belongs to; "" for the package's __init__."""
    name = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def test_the_walk_sees_the_package() -> None:
    modules = {module for path in SOURCES for module, _ in imported_modules(path)}
    assert len(SOURCES) > 20
    assert {"rfmedsam2.errors", "rfmedsam2.records.base", "numpy"} <= modules


def test_every_part_has_a_layer() -> None:
    parts = {own_part(path) for path in OURS} - {""}
    assert parts <= set(LEVELS), f"give {parts - set(LEVELS)} a place among {', '.join(LEVELS)}"


def test_lower_layers_never_import_higher_ones() -> None:
    def faults(path: Path) -> list[str]:
        part = own_part(path)
        return [
            f"line {line}: {part} (layer {LEVELS[part]}) imports {module} (layer {LEVELS[other]})"
            for module, line in imported_modules(path)
            if (other := part_of(module)) is not None and other != part and LEVELS[other] >= LEVELS[part]
        ]

    assert not offences(faults, [path for path in OURS if own_part(path) in LEVELS])


def test_parallel_work_is_for_the_pipeline() -> None:
    def faults(path: Path) -> list[str]:
        if own_part(path) in {"pipeline", "cli"}:
            return []
        return [f"line {line}" for module, line in imported_modules(path) if part_of(module) == "parallel"]

    assert not offences(faults, OURS)


def test_records_load_no_arrays_or_networks() -> None:
    heavy = {"torch", "scipy", "nibabel", "SimpleITK", "pandas", "matplotlib"}

    def faults(path: Path) -> list[str]:
        return [module for module, _ in imported_modules(path) if module.split(".")[0] in heavy]

    assert not offences(faults, [path for path in OURS if own_part(path) == "records"])


def test_the_two_packages_share_only_the_foundation() -> None:
    def faults(path: Path) -> list[str]:
        if path in OURS:
            return [m for m, _ in imported_modules(path) if m.split(".")[0] == "segment_anything_hq"]
        shared = SHARED_BY_COMMANDS if path.parent.name == "cli" else SHARED_WITH_IMAGES
        return [m for m, _ in imported_modules(path) if (p := part_of(m)) is not None and p not in shared]

    assert not offences(faults)


def test_imports_stand_at_the_top_of_modules() -> None:
    def faults(path: Path) -> list[str]:
        scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, scopes)]
        late = {n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)}
        return [f"line {line}" for line in sorted(late)]

    free = {
        ROOT / PACKAGE / "__init__.py",
        *(path for path in SOURCES if "cli" in path.relative_to(ROOT).with_suffix("").parts),
    }
    assert not offences(faults, [path for path in SOURCES if path not in free])


def test_no_module_is_a_drawer_for_everything() -> None:
    def faults(path: Path) -> list[str]:
        return sorted({part.removesuffix(".py") for part in path.relative_to(ROOT).parts} & FORBIDDEN_NAMES)

    assert not offences(faults)


def test_nothing_read_from_a_file_can_execute() -> None:
    def faults(path: Path) -> list[str]:
        unpicklers = [module for module, _ in imported_modules(path) if module.split(".")[0] in UNPICKLERS]
        calls = [(getattr(node, "lineno", 0), unsafe_call(node)) for node in ast.walk(tree_of(path))]
        # of pickle itself only the name of its error: multiprocessing raises it
        names = {m for m, _ in imported_modules(path) if m.startswith("pickle.")} | {
            ast.unparse(n) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)
        }
        unpicklers += sorted(n for n in names if n.startswith("pickle.") and n != "pickle.PicklingError")
        return [*unpicklers, *(f"line {line}: {fault}" for line, fault in calls if fault)]

    assert not offences(faults)


def unsafe_call(node: ast.AST) -> str | None:
    """What is wrong with a call: eval, exec, or a loader that unpickles."""
    if not isinstance(node, ast.Call):
        return None
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in {"eval", "exec", "compile", "__import__"}:
        return name
    if not isinstance(node.func, ast.Attribute):
        return None
    values = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    called = f"{ast.unparse(node.func.value)}.{node.func.attr}"
    if called == "torch.load" and values.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if called in {"np.load", "numpy.load"} and values.get("allow_pickle", False) is not False:
        return "numpy load with allow_pickle"
    if called in {"yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}:
        return called
    if values.get("shell") is True and called.startswith("subprocess."):
        return "a shell"
    return None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("np.load(p, allow_pickle=False)", False),
        ("eval(text)", True),
        ("model.eval()", False),
        ("re.compile(text)", False),
        ("subprocess.run(c, shell=True)", True),
    ],
)
def test_the_search_for_unsafe_calls_finds_them(source: str, found: bool) -> None:
    assert (unsafe_call(ast.parse(source, mode="eval").body) is not None) == found
