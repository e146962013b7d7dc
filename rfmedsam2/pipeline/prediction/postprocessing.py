"""Postprocessing of a folder of label maps by a rule, and the rule that a model has."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from rfmedsam2.errors import RfMedSamError, UsageError, shortlist
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.prediction import Prediction
from rfmedsam2.pipeline.prediction.outputs import Outputs
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import POSTPROCESSING, PREDICTIONS, PostprocessingRule, PredictionsRecord
from rfmedsam2.store.case_files import Case, file_stem
from rfmedsam2.store.images import digest_of, image_ending, read_label, write_label
from rfmedsam2.store.raw import read_dataset_json
from rfmedsam2.system.atomic import is_taken, read_record, write_record
from rfmedsam2.system.ordinary_files import require_folder
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.transforms.postprocess import postprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Postprocessed:
    """A label map that was written.

    Attributes:
        path: the file.
        changed: number of voxels with another value than before.
    """

    path: Path
    changed: int


def voxel_ml_of(grid: Grid) -> float:
    """Volume of a voxel in ml, of oblique and skewed grids, too."""
    return abs(float(np.linalg.det(grid.affine_lps[:3, :3]))) / 1000


def require_same_labels(rule: PostprocessingRule, labels: LabelSet, *, where: object) -> None:
    """Check that a rule is for label maps of this table; the order of names is free.

    Raises:
        UsageError: names or values differ.
    """
    pairs = [(table.foreground, table.regions_class_order) for table in (rule.label_set, labels)]
    if pairs[0] != pairs[1]:
        raise UsageError(
            "This is a postprocessing rule of another dataset: its labels differ",
            where=where,
            expected=_shown(labels),
            found=f"{_shown(rule.label_set)} ({rule.dataset})",
            remedy="Learn a rule for this dataset with rfmed_select, or leave it out",
        )


def rule_of_model(folder: Path, labels: LabelSet) -> PostprocessingRule | None:
    """The rule in a model's folder; None if it has none, or one without steps.

    Raises:
        RecordError: the file is damaged.
        UsageError: the rule is of another dataset.
    """
    path = folder / POSTPROCESSING
    if not is_taken(path):
        return None
    rule = read_record(path, PostprocessingRule)
    require_same_labels(rule, labels, where=path)
    return rule if rule.steps else None


def postprocessed(prediction: Prediction, rule: PostprocessingRule) -> Prediction:
    """A prediction with the labels that a rule makes of it."""
    started = time.perf_counter()
    voxel_ml = voxel_ml_of(prediction.grid)
    labels = postprocess(prediction.labels, rule.steps, prediction.classes, voxel_ml=voxel_ml)
    seconds = {**prediction.seconds, "postprocess": time.perf_counter() - started}
    return replace(prediction, labels=labels, seconds=seconds)


def postprocess_folder(
    folder: Path,
    out: Path,
    rule: PostprocessingRule,
    *,
    overwrite: bool = False,
    workers: int = 1,
    track: Track = silent,
) -> list[Postprocessed]:
    """Apply a rule to all label maps of a folder; predictions.json, if there is one, goes along with the rule's digest.

    Args:
        folder: folder of label maps.
        out: another folder, created if it does not exist.
        rule: the rule.
        overwrite: replace files that predictions.json in `out` does not list, or that were changed since.
        workers: number of label maps processed in parallel.
        track: progress display over cases.

    Raises:
        UsageError: there are no label maps, the rule is of another dataset, or files of somebody else, or the input,
            would be replaced.
        RfMedSamError: label maps were not processed; names each and the reason. All others are written.
    """
    cases = _cases(folder)
    record = read_record(folder / PREDICTIONS, PredictionsRecord) if (folder / PREDICTIONS).is_file() else None
    if record is not None:
        require_same_labels(rule, record.label_set, where=folder / PREDICTIONS)
    elif (folder / "dataset.json").is_file():
        require_same_labels(rule, read_dataset_json(folder / "dataset.json").label_set, where=folder / "dataset.json")
    outputs = Outputs(out, ending="", overwrite=overwrite, continue_=None)
    if outputs.file is not None:
        raise UsageError("Label maps of a folder go to a folder", where=out, remedy="Name a folder")
    with outputs.locked():
        outputs.require_free(cases, probabilities=False)
        outputs.require_same_labels(cases, rule.label_set)
        apply = partial(_apply, rule=rule, outputs=outputs)
        done: list[Postprocessed] = []
        faults: list[str] = []
        results = map_cases(apply, cases, workers=workers, name=lambda case: case.id, track=track, description="Rule")
        for case, result in zip(cases, results, strict=True):
            if isinstance(result, str):
                faults.append(result)
                continue
            done.append(result)
            if record is not None:
                _record(record, case, rule, outputs)
    if faults:
        raise RfMedSamError(
            f"{len(faults)} of {len(cases)} label maps were not processed", where=folder, found="; ".join(faults)
        )
    return done


def _cases(folder: Path) -> list[Case]:
    require_folder(folder, "folder of label maps")
    files = [path for path in sorted(folder.iterdir()) if not path.is_dir() and not path.name.startswith(".")]
    cases = [Case(id=file_stem(path, ending), images=(path,)) for path in files if (ending := image_ending(path))]
    if not cases:
        raise UsageError("There are no label maps in this folder", where=folder, remedy="Check the path")
    names = [case.id for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError("Two label maps have the same name", where=folder, found=", ".join(twice))
    return cases


def _apply(case: Case, *, rule: PostprocessingRule, outputs: Outputs) -> Postprocessed | str:
    """Process one file; a message if it has a fault."""
    try:
        volume, header = read_label(case.images[0])
        before, labels = volume.array[0], rule.label_set
        strange = sorted(set(np.unique(before).tolist()) - set(labels.allowed_values))
        if strange:
            return f"{case.id}: it holds values that the rule's labels do not name ({shortlist(strange)})"
        after = postprocess(before, rule.steps, labels, voxel_ml=voxel_ml_of(volume.grid))
        outputs.require_still_free(case)
        write_label(outputs.target(case), after, header)
    except RfMedSamError as error:
        return f"{case.id}: {str(error).rstrip('.')}"
    return Postprocessed(path=outputs.target(case), changed=int(np.count_nonzero(after != before)))


def _record(record: PredictionsRecord, case: Case, rule: PostprocessingRule, outputs: Outputs) -> None:
    """Write the entry of a finished file; of one that the input's record does not list there is none."""
    entry = record.cases.get(case.id)
    if entry is None:
        return
    target = outputs.target(case)
    made_by = hashlib.sha256(f"{entry.made_by} {rule.digest}".encode()).hexdigest()
    changes = {"file": target.name, "probabilities": None, "made_by": made_by, "sha256": digest_of([target]).hex()}
    outputs.known[case.id] = entry.model_copy(update=changes)
    update = {
        "options": {**record.options, "postprocessing": rule.digest},
        "made_by": made_by,
        "cases": dict(sorted(outputs.known.items())),
    }
    write_record(outputs.folder / PREDICTIONS, record.model_copy(update=update))


def _shown(labels: LabelSet) -> str:
    pairs: Sequence[tuple[str, tuple[int, ...]]] = list(labels.foreground.items())
    return shortlist(f"{name} {'+'.join(map(str, values))}" for name, values in pairs)
