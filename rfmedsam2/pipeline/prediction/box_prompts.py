"""Box prompts of cases for RFMedSAM 2, from a folder of label maps or a JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import Self

from rfmedsam2.arguments import option
from rfmedsam2.errors import ImageError, UsageError, shortlist
from rfmedsam2.inference.box_prompts import BoxPrompts, classes_of
from rfmedsam2.pipeline.datasets.label_agreement import require_agreement
from rfmedsam2.records.box_prompts import BoxPrompt, BoxPromptFile
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.case_files import Case, describe_contents, file_stem, list_images
from rfmedsam2.store.formats.image_header import ImageHeader, grids_differ
from rfmedsam2.store.images import digest_of, image_ending, read_label
from rfmedsam2.system.atomic import read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxSource:
    """Boxes of cases: `labels` (case -> label map file) or `boxes` (case -> list of boxes), never both for a case."""

    labels: Mapping[str, Path]
    boxes: Mapping[str, Sequence[BoxPrompt]]

    @classmethod
    def open(cls, path: Path, cases: Sequence[Case], labels: LabelSet) -> Self:
        """Find the boxes of cases.

        Args:
            path: a folder of label maps named CASE + ending, one such file for a single case, or a JSON file of boxes.
            cases: the cases to predict.
            labels: labels of the model.

        Raises:
            UsageError: the path does not exist or has other labels, cases have no boxes, or boxes are of other cases or
                unknown labels.
            RecordError: the JSON file has faults; lists all of them.
        """
        ids = [case.id for case in cases]
        if path.is_dir() or image_ending(path):
            require_agreement(path if path.is_dir() else path.parent, labels)
        if path.is_dir():
            files = label_maps_by_case(path, ids)
            _require_all(ids, files, where=path, found=describe_contents(path), kind="label map")
            return cls(labels=files, boxes={})
        if not path.exists():
            raise UsageError(
                "The folder or file of boxes does not exist", where=path, remedy=f"Check {option('boxes')}"
            )
        if image_ending(path):
            if len(cases) != 1:
                raise UsageError(
                    "One label map can only give the boxes of one case",
                    where=path,
                    expected="a folder",
                    found=f"{len(ids)} cases",
                )
            return cls(labels={ids[0]: path}, boxes={})
        boxes = read_record(path, BoxPromptFile).cases
        unknown = sorted(set(boxes) - set(ids))
        if unknown:
            raise UsageError(
                f"{len(unknown)} case(s) with boxes are not among the cases to predict",
                where=path,
                expected=f"cases of {shortlist(ids)}",
                found=shortlist(unknown),
                remedy="Name cases like their files, without channel number and ending",
            )
        _require_all(ids, boxes, where=path, found=shortlist(sorted(boxes)) or "none", kind="entry")
        classes_of([box for own in boxes.values() for box in own], labels)
        return cls(labels={}, boxes=boxes)

    def of(self, case: Case, header: ImageHeader) -> BoxPrompts:
        """Read the boxes of a case, given the header of its image.

        Raises:
            ImageError: the label map cannot be read, or is not on the image's grid.
        """
        if case.id not in self.labels:
            return self.boxes[case.id]
        return label_map_on(header, self.labels[case.id])

    def digest(self, case: Case) -> bytes:
        """SHA-256 of the boxes of a case."""
        if case.id in self.labels:
            return digest_of([self.labels[case.id]])
        text = "\n".join(box.model_dump_json() for box in self.boxes[case.id])
        return hashlib.sha256(text.encode()).digest()


def label_map_on(header: ImageHeader, path: Path) -> np.ndarray:
    """Read a label map (Z, Y, X) that lies on the grid of an image.

    Raises:
        ImageError: it cannot be read, or is on another grid.
    """
    label, label_header = read_label(path)
    differ = grids_differ(header, label_header)
    if differ is not None and not differ[1]:
        raise ImageError("A label map is not on the grid of its image", where=path, found=differ[0])
    return label.array[0]


def label_maps_by_case(folder: Path, ids: Collection[str]) -> dict[str, Path]:
    """The label maps in a folder that belong to cases, by their ids.

    Raises:
        UsageError: a case has two.
    """
    found: dict[str, Path] = {}
    for path in (entry for entry in list_images(folder, None) if entry.is_file()):
        case = file_stem(path, None)
        if case in found and case in ids:
            names = f"{found[case].name} and {path.name}"
            raise UsageError("Two label maps belong to the same case", where=path.parent, found=names)
        found[case] = path
    return {case: path for case, path in found.items() if case in ids}


def _require_all(ids: Sequence[str], given: Collection[str], *, where: Path, found: str, kind: str) -> None:
    lacking = [case for case in ids if case not in given]
    if lacking:
        raise UsageError(
            f"{len(lacking)} of {len(ids)} cases have no boxes",
            where=where,
            expected=f"a {kind} for {shortlist(lacking)}",
            found=found,
            remedy="Give boxes for every case (an empty list in the JSON file for none), or predict fewer cases",
        )
