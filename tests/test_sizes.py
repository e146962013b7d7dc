"""The house's own test: sizes, docstrings, and prints only where the user is spoken to."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 400
LONGEST_FUNCTION = 70

SOURCES = sorted(p for name in ("rfmedsam2", "segment_anything_hq") for p in (ROOT / name).rglob("*.py"))

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def offences(faults_of: Callable[[Path], list[str]], *, but: Callable[[Path], bool] | None = None) -> list[str]:
    """All faults of all sources as "file: fault", leaving out the sources that `but` excuses."""
    sources = [path for path in SOURCES if but is None or not but(path)]
    return [f"{path.relative_to(ROOT)}: {fault}" for path in sources for fault in faults_of(path)]


def speaks_to_the_user(path: Path) -> bool:
    return "cli" in path.relative_to(ROOT).with_suffix("").parts


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


def is_stub(node: Documented) -> bool:
    """A protocol's method: its body is only an ellipsis; the protocol's docstring speaks for it."""
    body = node.body[-1]
    return len(node.body) == 1 and isinstance(body, ast.Expr) and ast.unparse(body) == "..."


def is_setter(node: Documented) -> bool:
    """The second half of a property: its getter has the docstring."""
    return any(isinstance(d, ast.Attribute) and d.attr in {"setter", "deleter"} for d in node.decorator_list)


def test_the_walk_reaches_every_depth_of_both_packages() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"rfmedsam2/__init__.py", "rfmedsam2/errors.py", "rfmedsam2/nn/sam2/build.py"} <= found
    assert {"segment_anything_hq/__init__.py", "segment_anything_hq/cli/inspect.py"} <= found


def test_files_are_short() -> None:
    def faults(path: Path) -> list[str]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        return [f"{lines} lines: split it where it does two things"] if lines > LONGEST_FILE else []

    assert not offences(faults)


def test_functions_are_short() -> None:
    def faults(path: Path) -> list[str]:
        functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        lengths = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions]
        return [f"{name} has {length} lines" for name, length in lengths if length > LONGEST_FUNCTION]

    assert not offences(faults)


def test_every_module_says_what_it_is_for() -> None:
    assert not offences(lambda path: [] if ast.get_docstring(tree_of(path)) else ["no docstring at the top"])


def test_what_is_public_is_documented() -> None:
    def faults(path: Path) -> list[str]:
        nodes = [(name, node) for name, node in public(tree_of(path)) if not is_stub(node) and not is_setter(node)]
        return [f"{name} has no docstring" for name, node in nodes if not ast.get_docstring(node)]

    assert not offences(faults)


def test_only_the_command_line_prints() -> None:
    def faults(path: Path) -> list[str]:
        calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        return [f"line {c.lineno}" for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]

    assert not offences(faults, but=speaks_to_the_user)


def test_only_the_command_line_reads_the_users_variables() -> None:
    def faults(path: Path) -> list[str]:
        names = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
        return [f"line {n.lineno}" for n in names if ast.unparse(n) in {"os.environ", "os.getenv"}]

    # torchrun's RANK, WORLD_SIZE ... are how a launcher speaks to the engine
    assert not offences(faults, but=lambda path: speaks_to_the_user(path) or path.parent.name == "engine")
