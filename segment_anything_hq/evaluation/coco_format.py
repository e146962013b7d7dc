"""COCO's annotations and detections, checked before pycocotools computes with them.

pycocotools checks nothing: an entry without an image ends in a KeyError, NaN scores or unknown categories count as
something, and run lengths that do not fit their image are decoded anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from rfmedsam2.errors import DatasetError, shortlist
from segment_anything_hq.data.coco_masks import run_lengths

Id = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Side = Annotated[int, Field(gt=0, le=1 << 20)]
Length = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bbox = tuple[Real, Real, Length, Length]
NAMED = 3
"""Largest number of faults in a message."""


class RunLengths(TypedDict):
    """A mask as lengths of runs of 0 and 1 by columns: a list, or COCO's compressed text."""

    size: tuple[Side, Side]
    counts: str | list[Annotated[int, Field(ge=0)]]


class CocoImage(TypedDict):
    """One of `images`."""

    id: Id
    height: Side
    width: Side


class CocoAnnotation(TypedDict):
    """One of `annotations`; bbox: x, y, width, height in pixels."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Bbox
    segmentation: list[list[Real]] | RunLengths
    area: NotRequired[Length]


class CocoDetection(TypedDict):
    """One of a detector's results."""

    image_id: Id
    category_id: Id
    bbox: Bbox
    score: Real


class CocoCategory(TypedDict):
    """One of `categories`."""

    id: Id


def require_annotations(content: dict[str, Any], where: Path) -> None:
    """Check the lists `images`, `annotations` and `categories`.

    Raises:
        DatasetError: names the first faults.
    """
    images = _checked(list[CocoImage], content["images"], "images", where)
    categories = _checked(list[CocoCategory], content["categories"], "categories", where)
    entries = _checked(list[CocoAnnotation], content["annotations"], "annotations", where)
    for name, parts in (("image", images), ("category", categories), ("annotation", entries)):
        twice = [id for id, count in Counter(part["id"] for part in parts).items() if count > 1]
        if twice:
            raise DatasetError(f"Entries have the same {name} id", where=where, found=shortlist(twice))
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    require_known(entries, sizes.keys(), {category["id"] for category in categories}, where)
    for entry in entries:
        mask, size = entry["segmentation"], sizes[entry["image_id"]]
        if isinstance(mask, dict) and (tuple(mask["size"]) != size or _pixels(mask["counts"]) != size[0] * size[1]):
            raise DatasetError(
                "The run lengths of an annotation do not fit its image",
                where=where,
                expected=f"{size[0]} x {size[1]} pixels",
                found=f"annotation {entry['id']} of size {' x '.join(map(str, mask['size']))}",
            )


def require_detections(content: object, where: Path) -> list[CocoDetection]:
    """Check a detector's results.

    Raises:
        DatasetError: names the first faults.
    """
    if not isinstance(content, list):
        raise DatasetError("The file is not a list of detections", where=where)
    return _checked(list[CocoDetection], content, "the list of detections", where)


def require_known(entries: Sequence[CocoAnnotation | CocoDetection], images: Any, categories: Any, where: Path) -> None:
    """Check that images and categories of entries are in the annotations.

    Raises:
        DatasetError: names those that are not.
    """
    for field, known in (("image_id", images), ("category_id", categories)):
        unknown = sorted({entry[field] for entry in entries} - set(known))
        if unknown:
            what = "images" if field == "image_id" else "categories"
            found = f"{field} {shortlist(unknown)}"
            raise DatasetError(f"Entries refer to {what} that are not in the annotations", where=where, found=found)


def _checked(kind: Any, content: object, name: str, where: Path) -> Any:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise DatasetError(
            f"Entries of {name} are not in COCO's format", where=where, found="; ".join(faults[:NAMED]) + more
        ) from None


def _pixels(counts: str | list[int]) -> int:
    """Number of pixels of run lengths; -1 if they cannot be any."""
    try:
        runs = counts if isinstance(counts, list) else run_lengths(counts)
    except DatasetError:
        return -1
    return sum(runs) if all(run >= 0 for run in runs) else -1
