"""Read COCO and LVIS annotation files as image sets with one sample per object (polygons or run lengths)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2.errors import DatasetError
from rfmedsam2.system.file_names import FILE_NAME_BYTES, is_file_name
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole
from segment_anything_hq.data.coco_masks import counts_mask, polygons_mask
from segment_anything_hq.data.datasets import Fault, ImageSet, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """The mask of one annotated object.

    Attributes:
        path: the annotation file.
        size: height and width of the mask, pixels.
        polygons: arrays (2 n,) float64 of x0, y0, x1, y1, ...; empty if there are run lengths.
        counts: run lengths, compressed (text) or plain; None if there are polygons.
    """

    path: Path
    size: tuple[int, int]
    polygons: tuple[np.ndarray, ...] = ()
    counts: str | tuple[int, ...] | None = None

    @property
    def source(self) -> Path:
        """The annotation file."""
        return self.path

    def read(self) -> np.ndarray:
        """(H, W) int8: 1 object, 0 background."""
        if self.counts is not None:
            return np.ascontiguousarray(counts_mask(self.counts, *self.size), np.int8)
        return polygons_mask(self.polygons, *self.size).astype(np.int8)


def open_annotations(path: Path, images: Path, *, name: str | None = None, min_area: float = 0.0) -> ImageSet:
    """List the objects of an annotation file, without crowds.

    Args:
        path: COCO's instances_*.json or LVIS's lvis_v1_*.json.
        images: image folder of one split, or the folder that holds train2017 and val2017 (LVIS's validation images come
            from both).
        name: name of the set; None: the file's name.
        min_area: smallest annotated area to keep, square pixels.

    Raises:
        DatasetError: the file is missing, is not valid JSON, or lacks images or annotations.
    """
    content = _read(path)
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        objects[entry.get("image_id", -1)].append(entry)
    samples: list[Sample] = []
    faults: list[Fault] = []
    known = set()
    for record in sorted(content["images"], key=lambda r: r["id"]):
        known.add(record["id"])
        wanted = [o for o in objects.get(record["id"], ()) if not o.get("iscrowd") and o.get("area", 1) >= min_area]
        image = image_file(record, images)
        if image is None:
            if wanted:
                faults.append(Fault(where=f"image {record['id']}", what=f"the image is missing in {images}"))
            continue
        for entry in wanted:
            found = _annotation(path, record, entry)
            if isinstance(found, Fault):
                faults.append(found)
            else:
                samples.append(Sample(id=f"{image.stem}_{entry['id']}", image=image, mask=found))
    faults += [
        Fault(where=f"image {image_id}", what=f"has {len(objects[image_id])} annotations but no entry")
        for image_id in sorted(objects.keys() - known)
    ]
    return ImageSet(name=name or path.stem, samples=tuple(samples), faults=tuple(faults))


def coco_lvis(root: Path, split: str = "train", *, min_area: float = 0.0) -> tuple[ImageSet, ...]:
    """Open COCO 2017 and LVIS v1 in their download layout: annotations/, train2017/, val2017/.

    Args:
        root: COCO's folder; the LVIS files are in root/annotations or in root.
        split: "train" or "val".
        min_area: see `open_annotations`.

    Raises:
        DatasetError: an annotation file is missing or cannot be read.
    """
    coco = root / "annotations" / f"instances_{split}2017.json"
    places = (root / "annotations" / f"lvis_v1_{split}.json", root / f"lvis_v1_{split}.json")
    lvis = next((p for p in places if p.is_file()), places[0])
    return (
        open_annotations(coco, root / f"{split}2017", name=f"COCO-{split}", min_area=min_area),
        open_annotations(lvis, root, name=f"LVIS-{split}", min_area=min_area),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_whole(path), unique=False)
    except FileNotFoundError:
        raise DatasetError("The annotation file is missing", where=path) from None
    except (OSError, ValueError) as error:
        raise DatasetError("The annotation file is not valid JSON", where=path, found=error) from error
    parts = ("images", "annotations")
    if not isinstance(content, dict) or any(not isinstance(content.get(p), list) for p in parts):
        raise DatasetError("The file holds no annotations", where=path, expected="lists named images and annotations")
    bad = [r for r in content["images"] if not all(isinstance(r.get(k), int) for k in ("id", "height", "width"))]
    if bad:
        raise DatasetError(
            "Images in the annotation file lack required fields",
            where=path,
            expected="id, height and width",
            found=bad[0],
        )
    return content


def image_file(record: dict[str, Any], images: Path) -> Path | None:
    """The image's file, by `file_name` or, as in LVIS, by `coco_url`; None if it is missing, or not in the folder."""
    address = str(record.get("file_name") or record.get("coco_url") or "")
    parts = Path(address).parts
    tails = [parts[-n:] for n in (1, 2) if len(parts) >= n]
    plain = [tail for tail in tails if all(is_file_name(part, longest=FILE_NAME_BYTES) for part in tail)]
    candidates = [images.joinpath(*tail) for tail in plain]
    return next((c for c in candidates if c.is_file()), None)


def _annotation(path: Path, record: dict[str, Any], entry: dict[str, Any]) -> Annotation | Fault:
    size = (record["height"], record["width"])
    shape = entry.get("segmentation")
    where = f"annotation {entry.get('id')}"
    if isinstance(shape, dict):
        counts, stated = shape.get("counts"), shape.get("size")
        if stated is not None and tuple(stated) != size:
            return Fault(where=where, what=f"run lengths are for a size of {stated}, the image has {list(size)}")
        if isinstance(counts, str):
            return Annotation(path=path, size=size, counts=counts)
        if isinstance(counts, list):
            return Annotation(path=path, size=size, counts=tuple(counts))
        return Fault(where=where, what="run lengths without counts")
    usable = [p for p in shape if isinstance(p, list) and len(p) >= 6] if isinstance(shape, list) else []
    if not usable:
        return Fault(where=where, what="no polygon with at least three points")
    return Annotation(path=path, size=size, polygons=tuple(np.asarray(p, np.float64) for p in usable))
