"""Checks before a training: cases are preprocessed, whole and up to date, and the same as when it was begun."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.engine.checkpoint import differences
from rfmedsam2.engine.monitoring.log import EVENTS
from rfmedsam2.errors import CheckpointError, DatasetError, StoreError, UsageError, shortlist
from rfmedsam2.pipeline.preprocessing.case_source import Changes, changes_since
from rfmedsam2.records.case import CaseRecord
from rfmedsam2.records.checkpoint import CheckpointRecord, TrainedCases
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.checkpoint_header import FINAL, newest_checkpoint, read_header
from rfmedsam2.store.images import image_files
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.ordinary_files import file_sha256
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track

logger = logging.getLogger(__name__)
CHECKS_AT_ONCE = 4
"""Number of cases whose files are checked in parallel before a training."""


def require_preprocessed(
    split: Split, store: CaseStore, raw: RawDataset | None, plan: Plan, stage: str, *, track: Track
) -> TrainedCases:
    """Check that all cases of a split are preprocessed, whole, and made from the raw files and the plan as they are.

    Only files with a new modification time are read.

    Returns:
        The cases, by which a later run can tell that it is the same training.

    Raises:
        UsageError: cases are not preprocessed, or their preprocessing is outdated; names them and the remedy.
        DatasetError: dataset.json does not match the plan.
        StoreError: preprocessed cases are damaged.
        ImageError: a raw file is missing or cannot be read.
    """
    wanted, there = sorted({*split.train, *split.val}), set(store.ids())
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(wanted)} cases are not preprocessed",
            where=store.folder,
            found=f"none of {shortlist(missing)}",
            remedy=_again(plan, stage),
        )
    # a copied dataset has new modification times: then all files are read once
    sound = map_cases(
        store.looks_complete, wanted, workers=CHECKS_AT_ONCE, name=str, track=track, description="Checking cases"
    )
    damaged = [name for name, whole in zip(wanted, sound, strict=True) if not whole]
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {len(wanted)} preprocessed cases are damaged or were modified",
            where=store.folder,
            found=shortlist(damaged),
            remedy="Run rfmed_plan_and_preprocess again with the same options: it rebuilds damaged cases",
        )
    records = {name: store.open(name).record for name in wanted}
    if raw is not None:
        require_current(records, raw, plan, stage, where=store.folder, track=track)
        _warn_of_new_cases(raw, there)
    contents = {name: record.contents for name, record in records.items()}
    return TrainedCases(
        train={name: contents[name] for name in split.train}, val={name: contents[name] for name in split.val}
    )


def require_current(
    records: Mapping[str, CaseRecord], raw: RawDataset, plan: Plan, stage: str, *, where: Path, track: Track
) -> None:
    """Check that cases were made from the raw files, `dataset.json` and the plan as they are.

    Raises:
        DatasetError: dataset.json does not match the plan.
        UsageError: files or settings have changed; names the cases.
        ImageError: a raw file is missing or cannot be read.
    """
    _require_same_labels(raw, plan, _again(plan, stage))
    _require_same_sources(_changes(raw, records, plan, stage, track), len(records), where, _again(plan, stage))


def _again(plan: Plan, stage: str) -> str:
    return f"Run rfmed_plan_and_preprocess -d {plan.dataset} -c {stage} with the options that made {plan.name}"


def require_same_cases(folder: Path, cases: TrainedCases) -> None:
    """Check that the training in a folder, if there is one, was begun with these cases.

    Raises:
        CheckpointError: it was not; names the cases.
        UsageError: the folder holds an imported model.
    """
    _require_trained_here(folder)
    path = newest_checkpoint(folder)
    if path is None:
        return
    try:
        before = read_header(path, CheckpointRecord).record.cases
    except CheckpointError:
        return  # whoever reads all of it says what is wrong
    if before is None:
        return  # by version 0.1
    differ = [
        f"{name} was {before.part_of(name)}, is {cases.part_of(name)}"
        for name in sorted({*before.train, *before.val, *cases.train, *cases.val})
        if before.part_of(name) != cases.part_of(name)
    ]
    known = before.train | before.val
    changed = [
        f"{name} was preprocessed again from other files or by another plan"
        for name, now in sorted((cases.train | cases.val).items())
        if known.get(name, now) != now
    ]
    if differ or changed:
        raise CheckpointError(
            "This training was begun with other cases",
            where=path,
            found=shortlist([*differ, *changed], separator="; "),
            remedy="Restore the splits and the cases as they were, or start over with rfmed_train --restart",
        )


def learned_under_other_ids(trained: TrainedCases, cases: Sequence[Case], store: CaseStore) -> list[str]:
    """Validation cases that the model was trained on under another id: files that were renamed or copied since.

    A copy that was a validation case when the training began is left to planning's note of copies.

    Args:
        trained: the cases of the training.
        cases: the validation cases, as their files are now.
        store: preprocessed cases; of cases that it does not have, nothing is known.

    Returns:
        A phrase for each.

    Raises:
        ImageError: an image cannot be read.
    """
    records: dict[str, CaseRecord] = {}
    for name in {*trained.train, *(case.id for case in cases)} & set(store.ids()):
        with suppress(StoreError):
            records[name] = store.open(name).record
    sources = {name: {file.sha256 for file in (record.sources or {}).values()} for name, record in records.items()}
    by_contents = {contents: name for name, contents in trained.train.items()}
    found = []
    for case in cases:
        images = {file_sha256(file) for path in case.images if not path.is_dir() for file in image_files(path)}
        contents = records[case.id].contents if case.id in records and images <= sources[case.id] else None
        if contents is not None and contents == trained.val.get(case.id):
            continue
        # contents are others after planning again, as statistics of intensities have changed: then files are compared
        copies = (name for name in trained.train if images and images <= sources.get(name, set()))
        twin = by_contents.get(contents or "") or next(copies, None)
        if twin is not None and twin != case.id:
            found.append(f"{case.id}, which was {twin}")
    return found


def _require_trained_here(folder: Path) -> None:
    """Check that the training in a folder, if it has ended, was not imported from elsewhere.

    Raises:
        UsageError: there are final weights without the metrics of their training.
    """
    if (folder / FINAL).is_file() and not (folder / EVENTS).is_file():
        raise UsageError(
            "This fold holds a model that was imported, which no training here goes on from",
            where=folder,
            remedy="Train beside it with "
            + option("plan.variant(NAME)", flag="--name NAME")
            + ", starting from it with "
            f"{option('weights', str(folder))} if wanted; or put it aside with {option('restart', True)}",
        )


def _require_same_labels(raw: RawDataset, plan: Plan, again: str) -> None:
    """Raise if dataset.json declares other labels, channels or orientation than the plan was made with."""
    then, now = plan.labels, raw.json.label_set
    declared = {
        "labels": (then.model_dump(mode="json"), now.model_dump(mode="json")),
        # regions are painted in the order in which they are declared
        "regions": (list(then.foreground), list(now.foreground)) if now.has_regions else (None, None),
        "channels": (list(plan.channels), list(raw.json.channels)),
        "reorient": (plan.reorient, raw.reorient),
    }
    faults = [fault for name, (before, after) in declared.items() for fault in differences(before, after, name)]
    if faults:
        raise DatasetError(
            f"dataset.json was changed after plan {plan.name} was made",
            where=raw.folder / "dataset.json",
            found=shortlist(faults, separator="; "),
            remedy=f"{again}, or restore dataset.json",
        )


def _changes(
    raw: RawDataset, records: Mapping[str, CaseRecord], plan: Plan, stage: str, track: Track
) -> dict[str, Changes]:
    cases = [case for case in raw.training if case.id in records]
    found = map_cases(
        lambda case: changes_since(records[case.id], case, plan, stage),
        cases,
        workers=CHECKS_AT_ONCE,
        name=lambda case: case.id,
        track=track,
        description="Checking raw files",
    )
    return {case.id: changes for case, changes in zip(cases, found, strict=True)}


def _require_same_sources(changes: dict[str, Changes], total: int, where: Path, again: str) -> None:
    changed = {name: change.files for name, change in changes.items() if change.files}
    if changed:
        raise UsageError(
            f"The files of {len(changed)} of {total} cases have changed since they were preprocessed",
            where=where,
            found=shortlist([f"{name} ({', '.join(files)})" for name, files in changed.items()]),
            remedy=f"{again}: it rebuilds these cases",
        )
    otherwise = [name for name, change in changes.items() if change.settings]
    if otherwise:
        raise UsageError(
            f"{len(otherwise)} of {total} cases were preprocessed with other settings than the plan's",
            where=where,
            found=shortlist(otherwise),
            remedy=f"{again}: it rebuilds these cases",
        )
    unknown = [name for name, change in changes.items() if change.unknown]
    if unknown:
        logger.warning(
            "The files of %d case(s) have new modification times, and version 0.1, which preprocessed them, kept "
            "nothing else to compare them by (%s). If they were changed, run rfmed_plan_and_preprocess again.",
            len(unknown),
            shortlist(unknown),
        )


def _warn_of_new_cases(raw: RawDataset, preprocessed: Collection[str]) -> None:
    new = [case.id for case in raw.training if case.id not in preprocessed]
    if new:
        logger.warning(
            "%d case(s) were added to the raw dataset after it was planned and are in no fold (%s). To use them, "
            "delete splits_final.json and run rfmed_plan_and_preprocess again.",
            len(new),
            shortlist(new),
        )
