"""Write the file maps of both packages' READMEs: a table per folder, a row per file, from the modules' docstrings."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rfmedsam2", "segment_anything_hq")
BEGIN, END = "<!-- map: scripts/write_maps.py -->\n", "<!-- end of map -->\n"


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def file_map(package: Path) -> str:
    """Tables of all modules of a package, grouped by folder; a folder's heading carries its `__init__` docstring."""
    files = sorted(package.rglob("*.py"), key=lambda path: (path.relative_to(package).parent.parts, path.name))
    tables = []
    for folder, group in groupby(files, key=lambda path: path.parent):
        modules = [path for path in group if path.name != "__init__.py"]
        if not modules:
            continue
        name = folder.relative_to(package).as_posix()
        title = "On top" if folder == package else f"{name}/ - {summary(folder / '__init__.py').rstrip('.')}"
        rows = [f"| `{path.relative_to(package).as_posix()}` | {summary(path)} |\n" for path in modules]
        tables.append(f"### {title}\n\n| file | what it is for |\n|---|---|\n{''.join(rows)}\n")
    return "".join(tables)


def with_map(text: str, package: Path) -> str:
    """A README's text with its map replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{file_map(package)}{END}{tail}"


if __name__ == "__main__":
    for name in PACKAGES:
        readme = ROOT / name / "README.md"
        readme.write_text(with_map(readme.read_text(encoding="utf-8"), ROOT / name), encoding="utf-8")
