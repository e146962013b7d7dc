"""Preprocessing: reads every training case once, preprocesses it for every stage and stores the results.

Finished cases are skipped; cases whose files are damaged, or whose source files' contents or plan have changed, are
rebuilt, unless a training is reading them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from rfmedsam2.arguments import Part, option
from rfmedsam2.errors import DatasetError, RfMedSamError, StoreError, UsageError, shortlist
from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader, DecodedCase
from rfmedsam2.pipeline.preprocessing.case_source import Files, case_digest, is_from, preprocessing_settings
from rfmedsam2.pipeline.preprocessing.memory_estimate import memory_need
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import InUseError, exclusive_lock, shared_lock
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.transforms.foreground import sample_foreground
from rfmedsam2.transforms.prepare import Prepared, prepare

CHECKS_AT_ONCE = 4
"""Number of stored cases checked in parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSummary:
    """Summary of preprocessing; a case counts once per stage.

    Attributes:
        done: number of cases stored for the first time.
        skipped: number of cases that were already finished.
        rebuilt: number of cases stored again, because they were damaged, or their source or the plan had changed.
        seconds: wall time.
        bytes: bytes written.
    """

    done: int
    skipped: int
    rebuilt: int
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.done} new, {self.rebuilt} rebuilt, {self.skipped} finished before, "
            f"{self.bytes / 1e6:.1f} MB written in {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    done: int = 0
    skipped: int = 0
    rebuilt: int = 0
    bytes: int = 0
    fault: str | None = None


def preprocess(
    dataset: RawDataset | CaseReader,
    plan: Plan,
    stages: Sequence[str],
    layout: Layout,
    *,
    part: Part | str | None = None,
    workers: int = 2,
    track: Track = silent,
) -> PreprocessSummary:
    """Preprocess and store all training cases for some stages of a plan.

    Args:
        dataset: a dataset, or the reader used for the fingerprint (whose cached cases are not read again).
        plan: the plan.
        stages: names of the plan's stages.
        layout: the folder layout.
        part: make this part of the cases ("2/8"), while other runs make the others; None: all.
        workers: number of cases processed in parallel; fewer if memory does not suffice.
        track: progress display.

    Raises:
        UsageError: `part` is none, or cases of it would have to be made again, which no part can while others work.
        PlanError: a stage does not exist in the plan.
        DatasetError: cases cannot be preprocessed; lists all of them, the others are finished.
        StoreError: the disk is full or a folder cannot be written; finished cases are kept.
        InUseError: another run writes to the same folder, or reads cases that must be made again.
        WorkerError: memory ran out also with fewer workers, or a case failed; finished cases are kept.
    """
    source = dataset if isinstance(dataset, CaseReader) else CaseReader(dataset)
    if part is not None:
        return _preprocess_part(source, plan, stages, layout, Part.parse(str(part)), workers=workers, track=track)
    with writable_cases(source, plan, stages, layout, track=track) as writable:
        return preprocess_locked(source, plan, stages, layout, writable=writable, workers=workers, track=track)


def _preprocess_part(
    source: CaseReader, plan: Plan, stages: Sequence[str], layout: Layout, part: Part, *, workers: int, track: Track
) -> PreprocessSummary:
    """Make the cases of a part that are missing, beside runs of other parts and trainings, which read finished ones."""
    chosen = part.of(sorted(source.dataset.training, key=lambda case: case.id))
    source = CaseReader(replace(source.dataset, training=tuple(chosen)))
    with ExitStack() as held:
        for store in _stores(plan, stages, layout, source.dataset.name).values():
            held.enter_context(exclusive_lock(store.folder / part.lock))
            held.enter_context(shared_lock(store.folder))
        _require_none_stale(source, plan, stages, layout, part, track=track)
        return preprocess_locked(source, plan, stages, layout, writable=stages, workers=workers, track=track)


def _require_none_stale(
    source: CaseReader, plan: Plan, stages: Sequence[str], layout: Layout, part: Part, *, track: Track
) -> None:
    stores = _stores(plan, stages, layout, source.dataset.name)
    # files of a case without its record are left from a killed run: nobody reads them
    stored = [case for case in source.dataset.training if _known(case, stores) is not None]
    stale = [
        case.id
        for case, due in zip(stored, _all_due(source, stored, plan, stores, track=track), strict=True)
        if any(stores[stage].record(case.id) is not None for stage in due)
    ]
    if stale:
        raise UsageError(
            f"{len(stale)} case(s) of part {part} are damaged, or were made from other files or by another plan. They "
            "can be replaced only while no other run uses the folder",
            where=next(iter(stores.values())).folder,
            found=shortlist(stale),
            remedy=f"Make all cases without {option('part')}, or remove this folder first",
        )


def preprocess_locked(
    source: CaseReader,
    plan: Plan,
    stages: Sequence[str],
    layout: Layout,
    *,
    writable: Sequence[str],
    workers: int,
    track: Track,
) -> PreprocessSummary:
    """`preprocess` inside the caller's `writable_cases`, which names the stages that may be written."""
    begun = time.monotonic()
    stores = _stores(plan, writable, layout, source.dataset.name)
    cases = source.dataset.training
    workers = memory_need(source, plan, stages, workers).workers
    threads = max(1, workers // max(1, len(cases)))

    def work(case: Case) -> _Outcome:
        try:
            return _preprocess_case(case, source, plan, stores, threads=threads)
        except StoreError:
            raise
        except RfMedSamError as error:
            return _Outcome(fault=f"{case.id}: {error}")

    outcomes = list(
        map_cases(work, cases, workers=workers, name=lambda case: case.id, track=track, description="Preprocessing")
    )
    _raise_faults(outcomes, len(cases))
    return PreprocessSummary(
        done=sum(o.done for o in outcomes),
        skipped=sum(o.skipped for o in outcomes) + (len(stages) - len(writable)) * len(cases),
        rebuilt=sum(o.rebuilt for o in outcomes),
        seconds=time.monotonic() - begun,
        bytes=sum(o.bytes for o in outcomes),
    )


def _stores(plan: Plan, stages: Sequence[str], layout: Layout, dataset: str) -> dict[str, CaseStore]:
    return {
        stage: CaseStore(layout.cases_folder(dataset, plan.cases_plan(stage), stage), plan.stage(stage).patch_size)
        for stage in stages
    }


@contextmanager
def writable_cases(
    source: CaseReader, plan: Plan, stages: Sequence[str], layout: Layout, *, track: Track = silent
) -> Iterator[tuple[str, ...]]:
    """Lock the folders of the cases against all who read or write them, inside the `with` block.

    Yields:
        The stages that are locked. The others are used by another run, such as a training, and all finished.

    Raises:
        InUseError: another run uses cases that are missing, damaged, or to be made again; names them.
    """
    locked = []
    with ExitStack() as held:
        for stage, store in _stores(plan, stages, layout, source.dataset.name).items():
            try:
                held.enter_context(exclusive_lock(store.folder))
                locked.append(stage)
            except InUseError as error:
                _require_finished(source, plan, {stage: store}, error, track=track)
        yield tuple(locked)


def _require_finished(
    source: CaseReader, plan: Plan, stores: Mapping[str, CaseStore], error: InUseError, *, track: Track
) -> None:
    """Raise the error of the lock if any case must be made."""
    cases = source.dataset.training
    due = _all_due(source, cases, plan, stores, track=track)
    names = [case.id for case, stages in zip(cases, due, strict=True) if stages]
    if names:
        raise InUseError(
            error.what,
            where=error.where,
            found=f"{error.found or 'its lock'}, and {len(names)} case(s) here that must be made: {shortlist(names)}",
            remedy="Wait until it has ended, then run the same command again; or choose another plan name",
        ) from None


def _all_due(
    source: CaseReader, cases: Sequence[Case], plan: Plan, stores: Mapping[str, CaseStore], *, track: Track
) -> Iterator[list[str]]:
    """Stages that each case must be made for."""
    return map_cases(
        lambda case: _due(case, source.files(case, _known(case, stores)), plan, stores),
        cases,
        workers=CHECKS_AT_ONCE,
        name=lambda case: case.id,
        track=track,
        description="Checking cases",
    )


def _due(case: Case, files: Files, plan: Plan, stores: Mapping[str, CaseStore]) -> list[str]:
    """Stages for which the case is missing, damaged, or was made from other files or by another plan."""
    due = []
    for stage, store in stores.items():
        record = store.record(case.id)
        current = record is not None and is_from(record, case, files, plan, stage)
        if record is None or not (current and store.is_complete(case.id, record.source)):
            due.append(stage)
    return due


def _preprocess_case(
    case: Case, source: CaseReader, plan: Plan, stores: Mapping[str, CaseStore], *, threads: int
) -> _Outcome:
    files = source.files(case, _known(case, stores))
    due = _due(case, files, plan, stores)
    rebuilt = sum(stores[stage].has_any_file(case.id) for stage in due)
    outcome = _Outcome(done=len(due) - rebuilt, skipped=len(stores) - len(due), rebuilt=rebuilt)
    for stage in stores.keys() - set(due):  # the same contents, perhaps with new modification times
        stores[stage].note_sources(case.id, case_digest(files, plan, stage), files)
    if not due:
        return outcome
    decoded: DecodedCase | None = source.read(case)
    files, written = decoded.files, 0
    by_recipe: dict[str, list[str]] = {}
    for stage in due:
        by_recipe.setdefault(preprocessing_settings(plan, stage), []).append(stage)
    alike = list(by_recipe.values())
    while alike and decoded is not None:
        same = alike.pop()
        prepared = prepare(decoded.volume, plan, same[0], label=decoded.label, threads=threads)
        if not alike:
            decoded = None  # release before storing, which needs memory for the compressed arrays
        for stage in same:
            written += _store(stores[stage], case.id, prepared, plan, stage, files)
        del prepared  # release before the next stage is preprocessed
    return replace(outcome, bytes=written)


def _known(case: Case, stores: Mapping[str, CaseStore]) -> Files | None:
    """The source files that a stored case was made from, if any stage has it."""
    records = (store.record(case.id) for store in stores.values())
    return next((record.sources for record in records if record is not None and record.sources is not None), None)


def _store(store: CaseStore, name: str, prepared: Prepared, plan: Plan, stage: str, files: Files) -> int:
    assert prepared.label is not None
    places = sample_foreground(prepared.label, plan.labels)
    return store.write(
        name,
        prepared.image,
        prepared.label,
        geometry=prepared.restore.to_record(),
        foreground=[(f.key, f.voxels, f.index) for f in places],
        source=case_digest(files, plan, stage),
        sources=files,
    )


def _raise_faults(outcomes: Iterable[_Outcome], total: int) -> None:
    faults = [o.fault for o in outcomes if o.fault is not None]
    if faults:
        raise DatasetError(
            f"{len(faults)} of {total} cases could not be preprocessed; the others are finished. " + " | ".join(faults),
            remedy="Correct these cases, then run the same command again",
        )
