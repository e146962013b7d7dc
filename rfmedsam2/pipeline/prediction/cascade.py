"""The first stage of a cascade: where its model lies, and its label maps where they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import Self

from rfmedsam2.arguments import option
from rfmedsam2.errors import CheckpointError, ImageError, RecordError, UsageError, shortlist
from rfmedsam2.pipeline.datasets.label_agreement import require_agreement
from rfmedsam2.pipeline.datasets.splits import read_splits
from rfmedsam2.pipeline.prediction.box_prompts import label_map_on, label_maps_by_case
from rfmedsam2.pipeline.prediction.checkpoints import FOLD, VALIDATED, folds_of
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Plan
from rfmedsam2.records.prediction import PREDICTIONS, PredictionsRecord
from rfmedsam2.store.case_files import Case, describe_contents
from rfmedsam2.store.checkpoint_header import FINAL, read_record_of
from rfmedsam2.store.formats.image_header import ImageHeader
from rfmedsam2.store.images import digest_of
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.ordinary_files import require_folder


def first_stage_folder(checkpoint: Path, stage: str, previous: str) -> Path:
    """The model of a cascade's first stage, beside the second's: PLAN__3d_lowres by PLAN__3d_cascade_fullres.

    Args:
        checkpoint: a fold's checkpoint of the second stage.
        stage: name of the second stage.
        previous: name of the first.
    """
    model = checkpoint.absolute().parent.parent
    return model.with_name(model.name.removesuffix(stage).removesuffix("__") + f"__{previous}")


def first_stage_beside(checkpoint: Path, record: CheckpointRecord) -> Path | None:
    """The first stage's model that lies beside the second's; None: it is not a second stage, or there is nothing."""
    previous = record.plan.stages[record.stage].previous_stage
    folder = None if previous is None else first_stage_folder(checkpoint, record.stage, previous)
    return folder if folder is not None and folder.is_dir() else None


def require_cascade(second: CheckpointRecord, first: CheckpointRecord, *, where: Path) -> None:
    """Check that a model is the first stage of another.

    Raises:
        CheckpointError: it has other channels or labels, or needs a first stage itself.
    """
    differing = [f for f in ("channels", "labels") if getattr(first.plan, f) != getattr(second.plan, f)]
    if differing or first.plan.stages[first.stage].previous_stage is not None:
        raise CheckpointError(
            "The model is not the first stage of this cascade",
            where=where,
            expected=f"the {second.plan.stages[second.stage].previous_stage} of {second.plan.name}",
            found=f"other {' and '.join(differing)}" if differing else f"{first.stage}, a second stage itself",
            remedy=f"Put the model there that {second.stage} was trained with",
        )


def no_first_stage(checkpoint: Path, stage: str, previous: str) -> UsageError:
    """What to do for a second stage without its first."""
    return UsageError(
        f"The model is the second stage of a cascade and needs the labels of the first, {previous}",
        where=checkpoint.parent.parent,
        expected=f"the model of {previous} in {first_stage_folder(checkpoint, stage, previous)}",
        remedy=f"Put it there, or give its label maps with {option('previous', 'FOLDER', flag='--previous-stage')}",
    )


def require_label_map(labels: np.ndarray, shape: Sequence[int], known: LabelSet, *, where: str) -> None:
    """Check the label map of a first stage.

    Raises:
        ImageError: it has another shape than the image, or values that the model does not know.
    """
    if labels.shape != tuple(shape):
        found = " x ".join(map(str, labels.shape))
        raise ImageError(
            "The first stage's label map has another shape than the image",
            where=where,
            expected=" x ".join(map(str, shape)),
            found=found,
        )
    unknown = np.setdiff1d(np.unique(labels), known.values)
    if unknown.size:
        raise ImageError(
            "The first stage's label map has values that the model does not know",
            where=where,
            expected=f"some of {', '.join(map(str, known.values))}",
            found=shortlist(map(str, unknown.tolist())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStageLabels:
    """Label maps of a first stage, one file per case."""

    files: Mapping[str, Path]
    labels: LabelSet

    @classmethod
    def open(cls, folder: Path, cases: Sequence[Case], labels: LabelSet) -> Self:
        """Find the label maps of cases.

        Args:
            folder: holds CASE + ending, as `rfmed_predict` or `nnUNetv2_predict` writes them.
            cases: the cases to predict.
            labels: labels of the model.

        Raises:
            UsageError: the folder does not exist or has other labels, or cases have no label map.
        """
        require_folder(folder, "folder of the first stage's label maps")
        require_agreement(folder, labels)
        files = label_maps_by_case(folder, [case.id for case in cases])
        if lacking := [case.id for case in cases if case.id not in files]:
            raise UsageError(
                f"{len(lacking)} of {len(cases)} cases have no label map of the first stage",
                where=folder,
                expected=f"one for {shortlist(lacking)}",
                found=describe_contents(folder),
                remedy="Predict these cases with the first stage, or fewer with the second",
            )
        return cls(files=files, labels=labels)

    def of(self, case: Case, header: ImageHeader) -> np.ndarray:
        """The label map of a case, (Z, Y, X), given the header of its image.

        Raises:
            ImageError: it cannot be read, is not on the image's grid, or has values that the model does not know.
        """
        path = self.files[case.id]
        found = label_map_on(header, path)
        require_label_map(found, found.shape, self.labels, where=str(path))
        return found

    def digest(self, case: Case) -> bytes:
        """SHA-256 of the label map of a case."""
        return digest_of([self.files[case.id]])


def predictions_of_others(layout: Layout, plan: Plan, stage: str, cases: Sequence[str]) -> dict[str, Path]:
    """The label map of each case that a fold of a stage has predicted which was not trained on the case.

    Raises:
        UsageError: there is none for some cases; names the folds to train.
        CheckpointError: a fold was trained with other labels than the plan now has.
    """
    model = layout.model_folder(plan.dataset, plan.name, stage)
    found: dict[str, Path] = {}
    for fold in sorted(folds_of(model, (FINAL,)), key=lambda name: (not name.isdigit(), name)):
        folder = model / f"{FOLD}{fold}"
        trained = read_record_of(folder / FINAL)
        if trained.plan.labels != plan.labels:
            raise CheckpointError(
                f"A fold of {stage} was trained with other labels than the plan has now",
                where=folder / FINAL,
                expected=_table(plan.labels),
                found=_table(trained.plan.labels),
                remedy=f"Train it again: rfmed_train {plan.dataset} {stage} {fold} -p {plan.name} --restart",
            )
        known = trained.cases
        try:
            predicted = read_record(folder / VALIDATED / PREDICTIONS, PredictionsRecord).cases
        except RecordError:
            continue  # it was not validated
        learned = set() if known is None else set(known.train)
        for case, entry in predicted.items():
            if case not in learned and (path := folder / VALIDATED / entry.file).is_file():
                found.setdefault(case, path)
    missing = [case for case in cases if case not in found]
    if not missing:
        return {case: found[case] for case in cases}
    splits = read_splits(layout.splits_file(plan.dataset))
    folds = [str(number) for number, split in enumerate(splits) if set(split.val) & set(missing)]
    raise UsageError(
        f"The second stage of a cascade learns from predictions of the first, {stage}, by folds that were not trained "
        f"on the case, and {len(missing)} case(s) have none",
        where=model,
        expected=f"fold(s) {', '.join(folds)}, trained and validated" if folds else "a validated fold for each case",
        found=f"nothing of {shortlist(missing)}",
        remedy=f"Run rfmed_train {plan.dataset} {stage} {folds[0] if folds else 'FOLD'} -p {plan.name}, so for each",
    )


def _table(labels: LabelSet) -> str:
    return shortlist(f"{name} {value}" for name, value in labels.names.items())


def first_stage_labels(layout: Layout, checkpoint: Path, cases: Sequence[str]) -> FirstStageLabels | None:
    """What the second stage of a cascade is validated with: labels of the first by folds that did not see the case.

    Args:
        layout: the folder layout.
        checkpoint: a fold's checkpoint.
        cases: ids of the cases.

    Returns:
        None: the model is not a second stage.

    Raises:
        UsageError: there is none for some cases; names the folds to train.
    """
    record = read_record_of(checkpoint)
    previous = record.plan.stages[record.stage].previous_stage
    if previous is None:
        return None
    files = predictions_of_others(layout, record.plan, previous, cases)
    return FirstStageLabels(files=files, labels=record.plan.labels)
