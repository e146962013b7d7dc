"""Prompt files, JSON or CSV: which objects of which images to segment; all faults are reported at once."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from rfmedsam2.arguments import option
from rfmedsam2.errors import ImageError, UsageError, shortlist
from rfmedsam2.system.csv_text import decode_text, read_rows
from rfmedsam2.system.file_names import as_one_file, is_file_name
from rfmedsam2.system.json_text import JsonError, parse_json
from rfmedsam2.system.ordinary_files import read_whole
from segment_anything_hq.data.image_io import ENDINGS, image_size
from segment_anything_hq.prompts.prompt import Box, Click, Prompt

BOX = ("x0", "y0", "x1", "y1")
POINT = ("x", "y", "label")
FIELDS = ("image", "box", "points", "labels", "name")
COLUMNS = ("image", "object", *BOX, *POINT)
MOST_FAULTS = 50
"""Maximum number of faults listed in an error message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedObject:
    """One object to segment.

    Attributes:
        image: path of the image.
        file: file name of the mask.
        prompt: clicks and box.
    """

    image: Path
    file: str
    prompt: Prompt


@dataclass(slots=True, kw_only=True)
class _Asked:
    """An object as read from a file, not yet validated; `where` is its place in the file, for error messages."""

    where: str
    image: str
    box: Any = None
    points: list[Any] = field(default_factory=list)
    labels: list[Any] | None = None
    name: str | None = None
    """File name of the mask, without ending."""
    part: str | None = None
    """Identifies an object among those of one image."""


class _Faults(list[str]):
    """Fault descriptions, collected to be reported together."""

    def add(self, where: str, what: str) -> None:
        self.append(f"{where}: {what}")


def images_in(paths: Sequence[Path]) -> tuple[Path, ...]:
    """List image files, given directly or contained in given folders (not in their subfolders).

    Raises:
        UsageError: no path is given, a path does not exist, or there are no images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError("Image or folder not found", where=path)
    if not found:
        where = ", ".join(map(str, paths)) or None
        raise UsageError("No images found", where=where, expected=f"files that end in {', '.join(ENDINGS)}")
    return tuple({(path.parent.resolve(), path.name): path for path in reversed(found)}.values())[::-1]


def read_prompts(path: Path, images: Sequence[Path]) -> tuple[PromptedObject, ...]:
    """Read a prompt file and validate it against the images.

    JSON: a list (or {"prompts": list}) of {"image", "box": [x0, y0, x1, y1], "points": [[x, y] ...], "labels": [1, 0
    ...], "name"} with a box, points or both. CSV: columns image, x0, y0, x1, y1 (one box per row), or image, object, x,
    y, label (one point per row), or all of them; rows with the same image and object belong together, and a box without
    an object is a separate object.

    Args:
        path: the file, .json or .csv.
        images: image files that prompts may refer to, by name with or without ending.

    Returns:
        at least one object, grouped by image. A mask is named after `name`, else after its image, followed by `object`
        or a number if the image has several objects.

    Raises:
        UsageError: the file cannot be read, or has faults, all of which are reported.
    """
    faults = _Faults()
    reader = {".json": _from_json, ".csv": _from_csv}.get(path.suffix.lower())
    if reader is None:
        raise UsageError("Prompts must be JSON or CSV", where=path, expected="a name that ends in .json or .csv")
    asked = reader(_text(path), path, faults)
    objects = _checked(asked, images, faults)
    if not faults and not objects:
        raise UsageError("The file contains no prompts", where=path)
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise UsageError(
            f"The prompts have {count}", where=path, found=shortlist(faults, limit=MOST_FAULTS, separator="; ")
        )
    return objects


def _text(path: Path) -> str:
    try:
        return decode_text(read_whole(path))
    except FileNotFoundError:
        raise UsageError("Prompt file not found", where=path) from None
    except UnicodeDecodeError as error:
        raise UsageError("The prompt file is not text", where=path, expected="UTF-8", found=error.reason) from None
    except OSError as error:
        raise UsageError(f"The prompt file cannot be read ({error.strerror})", where=path) from error


def _from_json(text: str, path: Path, faults: _Faults) -> list[_Asked]:
    try:
        content = parse_json(text)
    except JsonError as error:
        raise UsageError("The prompts are not valid JSON", where=path, found=str(error)) from None
    if isinstance(content, dict) and set(content) == {"prompts"}:
        content = content["prompts"]
    if not isinstance(content, list):
        expected = 'a list, or {"prompts": [...]}, of {"image": "name.jpg", "box": [x0, y0, x1, y1]}'
        raise UsageError(
            "This is not a list of prompts", where=path, expected=expected, found=f"a {type(content).__name__}"
        )
    asked = []
    for number, entry in enumerate(content, 1):
        where = f"prompt {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            faults.add(where, '"image" is missing, or not text')
            continue
        where += f" ({entry['image']})"
        unknown = sorted(set(entry) - set(FIELDS))
        if unknown:
            faults.add(where, f"unknown fields {', '.join(unknown)}; known are {', '.join(FIELDS)}")
        given = {key: entry[key] for key in FIELDS if entry.get(key) is not None}
        lists = [key for key in ("points", "labels") if not isinstance(given.get(key, []), list)]
        if lists or not isinstance(given.get("name", ""), str):
            faults.add(where, f"{lists[0]} is not a list" if lists else "name is not text")
            continue
        asked.append(_Asked(where=where, **given))
    return asked


def _from_csv(text: str, path: Path, faults: _Faults) -> list[_Asked]:
    try:
        return _from_rows(list(read_rows(text)), path, faults)
    except csv.Error as error:
        raise UsageError("The prompts are not valid CSV", where=path, found=str(error)) from None


def _from_rows(rows: Sequence[tuple[int, list[str]]], path: Path, faults: _Faults) -> list[_Asked]:
    names = rows[0][1] if rows else []
    while names and not names[-1]:
        names.pop()
    unknown = [name or "(no name)" for name in names if name not in COLUMNS]
    if "image" not in names or unknown or len(set(names)) < len(names):
        raise UsageError(
            "Wrong columns in the prompt file",
            where=path,
            expected=f"image, {', '.join(BOX)} or image, object, {', '.join(POINT)}",
            found=", ".join(names) or "an empty file",
        )
    asked: dict[object, _Asked] = {}
    for line, cells in rows[1:]:
        where = f"line {line}"
        if any(cells[len(names) :]):
            faults.add(where, "more values than columns")
            continue
        _read_row(dict(zip_longest(names, cells[: len(names)], fillvalue="")), where, asked, faults)
    return list(asked.values())


def _read_row(row: dict[str, str], where: str, asked: dict[object, _Asked], faults: _Faults) -> None:
    """Read one row of a CSV file: a box, a point or both, for a new or an existing object."""
    where += f" ({row['image']})"
    part = row.get("object") or None
    given = [[row.get(name, "") for name in kind] for kind in (BOX, POINT)]
    for values, kind, what in zip(given, (BOX, POINT), ("box", "point"), strict=True):
        if any(values) and not all(values):
            lacking = [name for name, value in zip(kind, values, strict=True) if not value]
            faults.add(where, f"the {what} lacks {', '.join(lacking)}")
            return
    box, point = ([_read_number(value) for value in values] if all(values) else None for values in given)
    # a box without an object is a separate object; points without one belong to a single object
    key = (row["image"], part) if part or not box else where
    known = asked.setdefault(key, _Asked(where=where, image=row["image"], part=part))
    if box:
        if known.box is not None:
            faults.add(where, f"object {part} already has a box")
        known.box = box
    if point:
        known.points.append(point[:2])
        known.labels = [*(known.labels or []), point[2]]


def _read_number(text: str) -> float | str:
    """Parse a number; return other text unchanged."""
    try:
        return float(text)
    except ValueError:
        return text


def _checked(asked: Iterable[_Asked], images: Sequence[Path], faults: _Faults) -> tuple[PromptedObject, ...]:
    """Validate objects against the images and name their masks."""
    named: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        for name in dict.fromkeys((path.name, path.stem)):
            named[name].append(path)
    sizes: dict[Path, tuple[int, int] | None] = {}
    of: dict[Path, list[tuple[_Asked, PromptedObject]]] = defaultdict(list)
    for one in asked:
        image = _image_of(one, named, faults)
        if image is None:
            continue
        if image not in sizes:
            try:
                sizes[image] = image_size(image)
            except ImageError as error:
                faults.add(one.where, str(error))
                sizes[image] = None
        size = sizes[image]
        if size is not None:
            of[image].append((one, _object(one, image, size, faults)))
    return _with_names(of, faults)


def _image_of(one: _Asked, named: Mapping[str, Sequence[Path]], faults: _Faults) -> Path | None:
    """The image that an object names: by file name, with or without ending, and by as many folders as it names."""
    parts = PurePath(one.image).parts
    found = [path for path in named.get(parts[-1] if parts else "", ()) if path.parts[-len(parts) : -1] == parts[:-1]]
    whole = [path for path in found if path.name == parts[-1]]
    found = whole or found
    if len(found) == 1:
        return found[0]
    if found:
        faults.add(one.where, f"several images have this name: {shortlist(found)}; name one with its folder")
    else:
        faults.add(one.where, f"image not found among those of {option('images')}")
    return None


def _object(one: _Asked, image: Path, size: tuple[int, int], faults: _Faults) -> PromptedObject:
    """Convert an object of an image of (H, W) pixels; problems are added to the faults."""
    if one.box is None and not one.points:
        faults.add(one.where, "it has neither a box nor points")
    box = None if one.box is None else _box(one, faults)
    points = [place for point in one.points if (place := _point(one, point, faults)) is not None]
    labels = one.labels or []
    if len(labels) != len(one.points):
        counts = (
            f"{len(n)} {what}{'' if len(n) == 1 else 's'}" for n, what in ((one.points, "point"), (labels, "label"))
        )
        faults.add(one.where, f"it has {' and '.join(counts)}; each point needs one, 1 (on the object) or 0 (off it)")
    for label in labels:
        if isinstance(label, bool) or label not in (0, 1):
            faults.add(one.where, f"a label is not 1 (on the object) or 0 (off it), but {_shown(label)}")
    signs = [label == 1 for label in labels] if len(labels) == len(points) else [True] * len(points)
    clicks = tuple(Click(x=x, y=y, positive=sign) for (x, y), sign in zip(points, signs, strict=True))
    prompt = Prompt(clicks=clicks, box=box)
    for fault in prompt.faults(size):
        faults.add(one.where, fault)
    return PromptedObject(image=image, file="", prompt=prompt)


def _box(one: _Asked, faults: _Faults) -> Box | None:
    numbers = _numbers(one.box, 4)
    if numbers is None:
        faults.add(one.where, f"the box is not four numbers x0, y0, x1, y1, but {_shown(one.box)}")
        return None
    x0, y0, x1, y1 = numbers
    return x0, y0, x1, y1


def _point(one: _Asked, point: object, faults: _Faults) -> tuple[float, float] | None:
    numbers = _numbers(point, 2)
    if numbers is None:
        faults.add(one.where, f"a point is not two numbers x, y, but {_shown(point)}")
        return None
    return numbers[0], numbers[1]


def _with_names(of: dict[Path, list[tuple[_Asked, PromptedObject]]], faults: _Faults) -> tuple[PromptedObject, ...]:
    taken: dict[str, str] = {}
    objects = []
    for image, found in of.items():
        for number, (one, prompted) in enumerate(found, 1):
            name = one.name or (f"{image.stem}_{one.part or number}" if len(found) > 1 else image.stem)
            if not is_file_name(name):
                faults.add(one.where, f"{name!r} is not a valid file name")
            elif (key := as_one_file(name)) in taken:
                faults.add(one.where, f"its mask {name}.png has the same name as that of {taken[key]}")
            taken[as_one_file(name)] = one.where
            objects.append(replace(prompted, file=f"{name}.png"))
    return tuple(objects)


def _numbers(values: object, count: int) -> list[float] | None:
    """The values as `count` finite numbers; None if they are anything else."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return None
    try:
        numbers = [float(v) for v in values]
    except OverflowError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _shown(value: object) -> str:
    text = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) if isinstance(value, list) else None
    return (repr(value) if text is None else text)[:80]
