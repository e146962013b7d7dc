"""COCO's and LVIS's annotation files as sets of samples: one object each, polygons or run lengths."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rfmedsam2.errors import DatasetError
from segment_anything_hq.data.coco_masks import counts_mask, polygons_mask
from segment_anything_hq.data.datasets import Fault, ImageSet, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """The mask of one annotated object.

    Attributes:
        path: the annotation file.
        size: height and width.
        polygons: each (2 n,) float64 of x, y ...; empty where there are counts.
        counts: run lengths, compressed or not; None where there are polygons.
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


def open_annotations(path: Path, images: Path, *, name: str | None = None, least_area: float = 0.0) -> ImageSet:
    """List the objects of an annotation file; crowds are left out.

    Args:
        path: COCO's instances_*.json or LVIS's lvis_v1_*.json.
        images: folder of the pictures: of one part, or the one that holds train2017 and val2017 (LVIS's validation
            pictures are of both).
        name: of the set; else the file's.
        least_area: objects smaller than this (square pixels, as annotated) are left out.

    Raises:
        DatasetError: the file is missing, no JSON, or has neither images nor annotations.
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
        mine = [o for o in objects.get(record["id"], ()) if not o.get("iscrowd") and o.get("area", 1) >= least_area]
        image = _image_file(record, images)
        if image is None:
            if mine:
                faults.append(Fault(where=f"image {record['id']}", what=f"the picture is missing in {images}"))
            continue
        for entry in mine:
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


def coco_lvis(root: Path, split: str = "train", *, least_area: float = 0.0) -> tuple[ImageSet, ...]:
    """COCO 2017 and LVIS v1 below one root, as they are downloaded: annotations/, train2017/, val2017/.

    Args:
        root: folder of COCO; the LVIS files lie in root/annotations or in root.
        split: "train" or "val".
        least_area: see `open_annotations`.

    Raises:
        DatasetError: an annotation file is missing or is none.
    """
    coco = root / "annotations" / f"instances_{split}2017.json"
    places = (root / "annotations" / f"lvis_v1_{split}.json", root / f"lvis_v1_{split}.json")
    lvis = next((p for p in places if p.is_file()), places[0])
    return (
        open_annotations(coco, root / f"{split}2017", name=f"COCO-{split}", least_area=least_area),
        open_annotations(lvis, root, name=f"LVIS-{split}", least_area=least_area),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError("The annotation file is missing", where=path) from None
    except (OSError, ValueError) as error:
        raise DatasetError("The annotation file is no JSON", where=path, found=error) from error
    parts = ("images", "annotations")
    if not isinstance(content, dict) or any(not isinstance(content.get(p), list) for p in parts):
        raise DatasetError("The file holds no annotations", where=path, expected="lists named images and annotations")
    bad = [r for r in content["images"] if not all(isinstance(r.get(k), int) for k in ("id", "height", "width"))]
    if bad:
        raise DatasetError("Pictures are not described", where=path, expected="id, height and width", found=bad[0])
    return content


def _image_file(record: dict[str, Any], images: Path) -> Path | None:
    """The picture's file; LVIS names it only by its address."""
    address = str(record.get("file_name") or record.get("coco_url") or "")
    parts = Path(address).parts
    # a name from the file never leads out of the folder
    candidates = [images.joinpath(*parts[-n:]) for n in (1, 2) if len(parts) >= n and ".." not in parts[-n:]]
    return next((c for c in candidates if c.is_file()), None)


def _annotation(path: Path, record: dict[str, Any], entry: dict[str, Any]) -> Annotation | Fault:
    size = (record["height"], record["width"])
    shape = entry.get("segmentation")
    where = f"annotation {entry.get('id')}"
    if isinstance(shape, dict):
        counts, stated = shape.get("counts"), shape.get("size")
        if stated is not None and tuple(stated) != size:
            return Fault(where=where, what=f"run lengths of {stated}, the picture has {list(size)}")
        if isinstance(counts, str):
            return Annotation(path=path, size=size, counts=counts)
        if isinstance(counts, list):
            return Annotation(path=path, size=size, counts=tuple(counts))
        return Fault(where=where, what="run lengths without counts")
    usable = [p for p in shape if isinstance(p, list) and len(p) >= 6] if isinstance(shape, list) else []
    if not usable:
        return Fault(where=where, what="no polygon of three points or more")
    return Annotation(path=path, size=size, polygons=tuple(np.asarray(p, np.float64) for p in usable))
