"""The house's own test: who may import whom, and what no file may do. Reads the sources, runs none of them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rfmedsam2"
PACKAGES = (PACKAGE, "segment_anything_hq")
MOST_FILES = 15

# A room may import only rooms that stand above it in these lists: lower never imports higher, and no two rooms of one
# line import each other.
VOLUMES = (
    "errors choices version",
    "arguments arrays geometry prompts simpleitk system",
    "records",
    "extensions volume",
    "losses metrics nn store transforms",
    "engine inference models pipeline.datasets pipeline.nnunet",
    "reporting tasks pipeline.planning pipeline.prediction",
    "pipeline.preprocessing",
    "pipeline.doctor pipeline.evaluation",
    "pipeline.selection pipeline.training",
    "cli",
)
IMAGES = (
    "choices",
    "records",
    "modeling prompts",
    "nn utils",
    "data build_sam predictor",
    "models automatic_mask_generator build_sam_baseline video",
    "inference",
    "evaluation",
    "tasks",
    "cli",
)
# on neighboring levels, but strangers by design: (room, what it never imports)
NEVER = {
    ("engine", "nn"): "the loop knows no network",
    ("engine", "models"): "the loop knows no network",
    ("engine", "transforms"): "the loop knows no data",
    ("inference", "engine"): "predicting loads no training code",
    ("inference", "losses"): "predicting loads no training code",
    ("pipeline.prediction", "losses"): "predicting loads no training code",
    ("pipeline.prediction", "engine"): "predicting loads no training code",
}
# what the second package may use of the first
SHARED_WITH_IMAGES = {
    "version",
    "arguments",
    "choices",
    "errors",
    "system",
    "prompts",
    "metrics",
    "losses",
    "engine",
    "records",
    "store",
    "nn",
    "reporting",
}
# how commands parse, print and end is the same in both
SHARED_BY_COMMANDS = SHARED_WITH_IMAGES | {"cli"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
# names that programs written for the published package segment_anything_hq import
PUBLISHED_NAMES = {ROOT / "segment_anything_hq" / "utils", ROOT / "segment_anything_hq" / "modeling" / "common.py"}
UNPICKLERS = {"cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
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


LEVELS = {
    f"{package}.{room}": level
    for package, levels in zip(PACKAGES, (VOLUMES, IMAGES), strict=True)
    for level, rooms in enumerate(levels)
    for room in rooms.split()
}


def room_of(module: str) -> str | None:
    """The room that a module belongs to: "rfmedsam2.store" for rfmedsam2.system.atomic; None for other packages."""
    names = module.split(".")
    return next((room for n in (3, 2) if (room := ".".join(names[:n])) in LEVELS), None)


def own_room(path: Path) -> str | None:
    """The room that a source file belongs to; None for the packages' own __init__."""
    return room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))


def part_of(module: str) -> str | None:
    """The first name below the package of volumes: "store" for rfmedsam2.system.atomic; None for other packages."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 else None


def own_part(path: Path) -> str:
    """The first name below its package that a source file belongs to."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def test_the_walk_sees_the_packages() -> None:
    modules = {module for path in SOURCES for module, _ in imported_modules(path)}
    assert {"rfmedsam2.errors", "rfmedsam2.records.base", "segment_anything_hq.records", "numpy"} <= modules
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"rfmedsam2/nn/sam2", "rfmedsam2/pipeline/training", "segment_anything_hq/evaluation"} <= rooms


def test_every_file_is_in_a_room() -> None:
    facades = [ROOT / package / "__init__.py" for package in PACKAGES]
    folders = {path.parent / "__init__.py" for path in SOURCES if any(path.parent in p.parents for p in SOURCES)}
    homeless = [path for path in SOURCES if own_room(path) is None and path not in facades and path not in folders]
    assert not homeless, f"give {homeless} a place in VOLUMES or IMAGES"


def test_no_room_is_crowded() -> None:
    folders = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in folders.items() if count > MOST_FILES}


def test_lower_rooms_never_import_higher_ones() -> None:
    def faults(path: Path) -> list[str]:
        room = own_room(path)
        return [
            f"line {line}: {room} (layer {LEVELS[room]}) imports {module} (layer {LEVELS[other]})"
            for module, line in imported_modules(path)
            if room is not None and (other := room_of(module)) is not None and other != room
            if other.split(".")[0] == room.split(".")[0] and LEVELS[other] >= LEVELS[room]
        ]

    assert not offences(faults)


@pytest.mark.parametrize("pair", sorted(NEVER))
def test_rooms_that_are_strangers_stay_so(pair: tuple[str, str]) -> None:
    room, never = (f"{PACKAGE}.{name}" for name in pair)

    def faults(path: Path) -> list[str]:
        return [f"line {n}: {NEVER[pair]}" for module, n in imported_modules(path) if room_of(module) == never]

    sources = [path for path in OURS if own_room(path) == room]
    assert sources
    assert not offences(faults, sources)


def test_parallel_work_is_for_the_pipeline() -> None:
    def faults(path: Path) -> list[str]:
        if own_part(path) in {"pipeline", "cli"}:
            return []
        return [
            f"line {line}" for module, line in imported_modules(path) if module.startswith("rfmedsam2.system.parallel")
        ]

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


def test_json_is_parsed_in_one_place() -> None:
    def faults(path: Path) -> list[str]:
        calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
        return [f"line {c.lineno}" for c in calls if ast.unparse(c) in {"json.load", "json.loads"}]

    home = ROOT / PACKAGE / "system" / "json_text.py"
    assert faults(home)
    assert not offences(faults, [path for path in SOURCES if path != home])


def test_no_module_is_a_drawer_for_everything() -> None:
    def faults(path: Path) -> list[str]:
        places = [path, *path.parents][: -len(ROOT.parts)]
        return sorted({place.stem for place in places if place not in PUBLISHED_NAMES} & FORBIDDEN_NAMES)

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
