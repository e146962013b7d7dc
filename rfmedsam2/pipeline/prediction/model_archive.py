"""Exporting a trained model to a zip file, and importing it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.pipeline.prediction.cascade import first_stage_beside
from rfmedsam2.pipeline.prediction.checkpoints import (
    ENSEMBLE_PLAN,
    FOLD,
    IMPORTING,
    TrainedModel,
    Which,
    checkpoints_of,
    place,
    require_dataset_name,
)
from rfmedsam2.pipeline.prediction.ensembles import Members, ensemble_name, members_of, require_averageable
from rfmedsam2.pipeline.prediction.postprocessing import rule_of_model
from rfmedsam2.records.archive import ArchivedModel, Manifest
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.prediction import ENSEMBLE, POSTPROCESSING, EnsembleRecord, PredictingModel
from rfmedsam2.store.archive import describe, is_our_archive, unpack_archive, write_archive
from rfmedsam2.store.checkpoint_header import FINAL, read_record_of
from rfmedsam2.store.checkpoints import read_all, read_weights, write_checkpoint
from rfmedsam2.store.lock import workplace
from rfmedsam2.system.atomic import write_record
from rfmedsam2.version import __version__

EXTRAS = ("metrics.json", "summary.json")
"""Files of a fold that are exported with its checkpoint if they exist."""
ARCHIVE = ".zip"
EXPORTING, UNPACKING = ".export-", "rfmed_model-"
"""How names of folders begin that hold an unfinished model."""


def export_model(
    source: Path | Sequence[Path], out: Path, *, folds: Sequence[str] | None = None, checkpoint: Which = "final"
) -> Manifest:
    """Pack the weights and the postprocessing rule of a model into a zip file, without optimizer, RNG and ids of cases.

    Of an ensemble all of its models go in, and the first stages of cascades among them.

    Args:
        source: results/DATASET/PLAN__STAGE, the folder of an ensemble, or several models to average.
        out: the zip file; replaced if it exists. Equal models give equal bytes.
        folds: names of folds; None: all, or those of the ensemble.
        checkpoint: final (latest if training has not ended, best if that alone was kept), best or latest.

    Raises:
        UsageError: the model or a fold does not exist, or models have different labels or channels.
        CheckpointError: a checkpoint is damaged, or folds are of different trainings.
        StoreError: `out` cannot be written.
    """
    sources = [source] if isinstance(source, Path) else [*source]
    members = members_of(sources)
    home = sources[0] if members is None else members.home
    parts = {"": (sources[0], folds)} if members is None else _parts(members, folds, checkpoint)
    with workplace(out.parent, EXPORTING) as work:
        files: dict[str, Path] = {}
        packed: dict[str, list[CheckpointRecord]] = {}
        for name, (folder, chosen) in parts.items():
            packed[name] = _pack(folder, work, name, files, folds=chosen, checkpoint=checkpoint)
        first = next(iter(packed.values()))[0]
        if members is not None:
            record = EnsembleRecord(dataset=first.plan.dataset, members=tuple(_member_names(members)))
            files[ENSEMBLE] = work / ENSEMBLE
            write_record(files[ENSEMBLE], record)
        if home is not None and rule_of_model(home, first.plan.labels) is not None:
            files[POSTPROCESSING] = home / POSTPROCESSING
        manifest = _manifest(packed, files, None if members is None else _member_names(members))
        write_archive(out, manifest, files)
    return manifest


def _member_names(members: Members) -> list[str]:
    """Folders of the models in an archive; their own names may hold characters that archives do not."""
    return [f"model_{number}" for number in range(len(members.folders))]


def _parts(
    members: Members, folds: Sequence[str] | None, checkpoint: Which
) -> dict[str, tuple[Path, Sequence[str] | None]]:
    """Folders in the archive -> the model and the folds that go into it; first stages lie beside the second ones."""
    chosen = folds or members.folds
    parts: dict[str, tuple[Path, Sequence[str] | None]] = {}
    first = None
    for name, folder in zip(_member_names(members), members.folders, strict=True):
        path = checkpoints_of(folder, folds=chosen, checkpoint=checkpoint)[0]
        record = read_record_of(path)
        first = first or record
        require_averageable(first, record, where=folder)
        parts[name] = (folder, chosen)
        if (beside := first_stage_beside(path, record)) is not None:
            parts[f"{name}__{record.plan.stages[record.stage].previous_stage}"] = (beside, None)
    return parts


def _pack(
    model_folder: Path,
    work: Path,
    name: str,
    files: dict[str, Path],
    *,
    folds: Sequence[str] | None,
    checkpoint: Which,
) -> list[CheckpointRecord]:
    """Write checkpoints without what only training needs below work/name, and add them to the files of an archive."""
    paths = checkpoints_of(model_folder, folds=folds, checkpoint=checkpoint)
    records = [read_record_of(path) for path in paths]
    names = {(record.plan.dataset, record.plan.name, record.stage) for record in records}
    if len(names) > 1:
        raise CheckpointError(
            "The folds are of different models", where=model_folder, found="; ".join(" ".join(n) for n in sorted(names))
        )
    stored: list[CheckpointRecord] = []
    for path in paths:
        record, weights = read_weights(path)  # a training may have gone on since the records were compared
        stored.append(record)
        fold = f"{name}/{FOLD}{record.fold}".removeprefix("/")
        file = f"{fold}/{FINAL}"
        files[file] = work / file
        tensors = {f"model/{key}": tensor for key, tensor in weights.items()}
        # ids of cases may tell whose they are
        write_checkpoint(files[file], record.model_copy(update={"cases": None, "learned_before": {}}), tensors, {})
        extras = [path.parent / extra for extra in EXTRAS]
        files |= {f"{fold}/{extra.name}": extra for extra in extras if extra.is_file()}
    return stored


def import_model(archive: Path, results: Path, *, force: bool = False) -> TrainedModel:
    """Unpack a model below a results folder, atomically.

    Every checkpoint, and the postprocessing rule, is read and checked before anything is moved into place.

    Args:
        archive: a zip file made by `export_model`.
        results: root/results.
        force: replace an existing model (which is kept if anything fails).

    Raises:
        CheckpointError: the archive is damaged, not one of ours or unsafe, or a checkpoint does not match the manifest.
        UsageError: the model already exists.
        StoreError: the folder cannot be written, the disk is full.
    """
    with workplace(results, IMPORTING) as work:
        unpacked = work / "model"
        unpacked.mkdir()
        manifest = _unpack(archive, unpacked)
        target = results / manifest.dataset / f"{manifest.plan}__{manifest.stage}"
        place(unpacked, target, force=force)
        models = manifest.models or manifest.members[0].models
    folds = tuple(sorted(model.fold for model in models))
    return TrainedModel(dataset=manifest.dataset, plan=manifest.plan, stage=manifest.stage, folds=folds, folder=target)


def _unpack(archive: Path, folder: Path) -> Manifest:
    """Unpack into an empty folder and check every checkpoint, the rule and, of an ensemble, that its models fit."""
    manifest = unpack_archive(archive, folder)
    labels = _checked_folds(archive, manifest, folder)[0].plan.labels
    rule_of_model(folder, labels)
    members = members_of([folder])
    inside = {folder / member.folder for member in manifest.members}
    if (members is not None and not set(members.folders) <= inside) or (members is None) != (not inside):
        raise CheckpointError("The archive's ensemble does not match its manifest", where=archive)
    return manifest


@contextmanager
def unpacked_model(source: Path) -> Iterator[Path]:
    """The folder of a model while a block runs: of an archive a temporary one (TMPDIR), of anything else itself.

    Raises:
        CheckpointError: as in `import_model`.
    """
    if source.suffix.lower() != ARCHIVE or not source.is_file():
        yield source
        return
    if not is_our_archive(source):
        raise UsageError(
            "This archive was not made by rfmed_export_model",
            where=source,
            remedy="Import models of nnU-Net with rfmed_import_model, and predict with the imported one",
        )
    with workplace(Path(tempfile.gettempdir()), UNPACKING) as work:
        unpacked = work / "model"
        unpacked.mkdir()
        _unpack(source, unpacked)
        yield unpacked


def _manifest(
    packed: Mapping[str, Sequence[CheckpointRecord]], files: Mapping[str, Path], members: Sequence[str] | None
) -> Manifest:
    """The manifest of a model or, with names of members, of an ensemble."""
    first = next(iter(packed.values()))[0]
    name = (first.plan.name, first.stage)
    if members is not None:
        name = ENSEMBLE_PLAN, ensemble_name([packed[member][0] for member in members])
    return Manifest(
        dataset=first.plan.dataset,
        plan=name[0],
        stage=name[1],
        models=tuple(_identity(record) for record in packed.get("", ())),
        members=tuple(
            ArchivedModel(
                folder=folder,
                dataset=records[0].plan.dataset,
                plan=records[0].plan.name,
                stage=records[0].stage,
                models=tuple(_identity(record) for record in records),
            )
            for folder, records in packed.items()
            if folder
        ),
        code_version=__version__,
        created=max(record.created for records in packed.values() for record in records),
        files=describe(files),
    )


def _identity(record: CheckpointRecord) -> PredictingModel:
    return PredictingModel(
        fold=record.fold,
        step=record.step,
        weights_sha256=record.weights_sha256,
        checkpoint=FINAL,
    )


def _checked_folds(archive: Path, manifest: Manifest, folder: Path) -> list[CheckpointRecord]:
    """Read all checkpoints and check that each is valid, in its fold's folder, and the one in the manifest."""
    parts: dict[str, Manifest | ArchivedModel] = {f"{member.folder}/": member for member in manifest.members}
    parts = parts or {"": manifest}
    wanted = {
        f"{start}{FOLD}{model.fold}/{model.checkpoint}": (part, model)
        for start, part in parts.items()
        for model in part.models
    }
    found = {file.name for file in manifest.files if file.name.endswith(".safetensors")}
    if not found or set(wanted) != found:
        raise CheckpointError(
            "The archive's checkpoints do not match its manifest",
            where=archive,
            expected=", ".join(sorted(wanted)) or "at least one checkpoint",
            found=", ".join(sorted(found)) or "none",
        )
    records = []
    for name, (part, model) in wanted.items():
        record, _, _ = read_all(folder / name)
        plan = record.plan
        said = (part.dataset, part.plan, part.stage, model.fold, model.weights_sha256)
        if said != (plan.dataset, plan.name, record.stage, record.fold, record.weights_sha256):
            raise CheckpointError("A checkpoint does not match the manifest", where=f"{archive}: {name}")
        records.append(record)
    require_dataset_name(archive, manifest.dataset)
    return records
