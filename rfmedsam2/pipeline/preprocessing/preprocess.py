"""Preprocessing: reads every training case once, preprocesses it for every stage and stores the results.

Finished cases are skipped; cases whose files are damaged, or whose source files or plan have changed, are rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rfmedsam2.errors import DatasetError, RfMedSamError, StoreError
from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader, DecodedCase, files_digest
from rfmedsam2.pipeline.preprocessing.memory_estimate import memory_need
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import exclusive_lock
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.parallel import map_cases
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.transforms.foreground import sample_foreground
from rfmedsam2.transforms.prepare import Prepared, prepare


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
    workers: int = 2,
    track: Track = silent,
) -> PreprocessSummary:
    """Preprocess and store all training cases for some stages of a plan.

    Args:
        dataset: a dataset, or the reader used for the fingerprint (whose cached cases are not read again).
        plan: the plan.
        stages: names of the plan's stages.
        layout: the folder layout.
        workers: number of cases processed in parallel; fewer if memory does not suffice.
        track: progress display.

    Raises:
        PlanError: a stage does not exist in the plan.
        DatasetError: cases cannot be preprocessed; lists all of them, the others are finished.
        StoreError: the disk is full or a folder cannot be written; finished cases are kept.
        UsageError: another run writes to the same folder.
        WorkerError: memory ran out also with fewer workers, or a case failed; finished cases are kept.
    """
    begun = time.monotonic()
    source = dataset if isinstance(dataset, CaseReader) else CaseReader(dataset)
    stores = _stores(plan, stages, layout, source.dataset.name)
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

    with ExitStack() as held:
        for folder in dict.fromkeys(store.folder for store in stores.values()):
            held.enter_context(exclusive_lock(folder))
        outcomes = list(
            map_cases(work, cases, workers=workers, name=lambda case: case.id, track=track, description="Preprocessing")
        )
    _raise_faults(outcomes, len(cases))
    return PreprocessSummary(
        done=sum(o.done for o in outcomes),
        skipped=sum(o.skipped for o in outcomes),
        rebuilt=sum(o.rebuilt for o in outcomes),
        seconds=time.monotonic() - begun,
        bytes=sum(o.bytes for o in outcomes),
    )


def case_digest(case: Case, plan: Plan, stage: str) -> str:
    """SHA-256 of the case's files (name, size, time) and preprocessing settings: identity of the stored case."""
    return hashlib.sha256(f"{files_digest(case)}\n{preprocessing_settings(plan, stage)}".encode()).hexdigest()


def preprocessing_settings(plan: Plan, stage: str) -> str:
    """Text of all settings that affect a stage's arrays; stages with equal settings share the work."""
    config = plan.stages[stage]
    parts = {  # the keys are those of format 1: cases that were preprocessed by it stay valid
        "spacing": config.spacing_mm,
        "slices": config.is_2d,
        "normalisation": [n.model_dump(mode="json") for n in config.normalization],
        "resampling": config.resampling.model_dump(mode="json"),
        "transpose": plan.transpose_forward,
        "reorient": plan.reorient,
        "intensities": [i.model_dump(mode="json") for i in plan.intensities],
        "labels": plan.labels.model_dump(mode="json"),
    }
    return json.dumps(parts, sort_keys=True)


def _stores(plan: Plan, stages: Sequence[str], layout: Layout, dataset: str) -> dict[str, CaseStore]:
    return {
        stage: CaseStore(layout.cases_folder(dataset, plan.name, stage), plan.stage(stage).patch_size)
        for stage in stages
    }


def _preprocess_case(
    case: Case, source: CaseReader, plan: Plan, stores: Mapping[str, CaseStore], *, threads: int
) -> _Outcome:
    digests = {stage: case_digest(case, plan, stage) for stage in stores}
    due = [stage for stage, store in stores.items() if not store.is_complete(case.id, digests[stage])]
    rebuilt = sum(stores[stage].has_any_file(case.id) for stage in due)
    outcome = _Outcome(done=len(due) - rebuilt, skipped=len(stores) - len(due), rebuilt=rebuilt)
    if not due:
        return outcome
    decoded: DecodedCase | None = source.read(case)
    written = 0
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
            written += _store(stores[stage], case.id, prepared, plan, digests[stage])
        del prepared  # release before the next stage is preprocessed
    return replace(outcome, bytes=written)


def _store(store: CaseStore, name: str, prepared: Prepared, plan: Plan, digest: str) -> int:
    assert prepared.label is not None
    places = sample_foreground(prepared.label, plan.labels)
    return store.write(
        name,
        prepared.image,
        prepared.label,
        geometry=prepared.restore.to_record(),
        foreground=[(f.key, f.voxels, f.index) for f in places],
        source=digest,
    )


def _raise_faults(outcomes: Iterable[_Outcome], total: int) -> None:
    faults = [o.fault for o in outcomes if o.fault is not None]
    if faults:
        raise DatasetError(
            f"{len(faults)} of {total} cases could not be preprocessed; the others are finished. " + " | ".join(faults),
            remedy="Correct these cases, then run the same command again",
        )
