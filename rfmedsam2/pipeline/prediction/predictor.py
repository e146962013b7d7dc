"""Predictor: a trained model in memory that predicts files, arrays, volumes, nibabel and SimpleITK images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name
import torch
from nibabel.spatialimages import SpatialImage
from torch import nn
from typing_extensions import Self

from rfmedsam2.arguments import option, path_of
from rfmedsam2.errors import UsageError, require_type, type_name
from rfmedsam2.inference.backends.choice import Running
from rfmedsam2.inference.prediction import Prediction
from rfmedsam2.inference.refinement import require_possible
from rfmedsam2.inference.volume import PredictOptions, PreparedCase, precision_on, predict_prepared, preprocess_case
from rfmedsam2.pipeline.prediction.cascade import (
    FirstStageLabels,
    first_stage_beside,
    no_first_stage,
    require_cascade,
    require_label_map,
)
from rfmedsam2.pipeline.prediction.checkpoints import ENSEMBLE_PLAN, Which, checkpoints_of
from rfmedsam2.pipeline.prediction.ensembles import ensemble_name, members_of, predict_mean, require_averageable
from rfmedsam2.pipeline.prediction.identity import digest_of_ensemble, digest_of_model, settings_of
from rfmedsam2.pipeline.prediction.inputs import BoxInput, ImageInput, as_boxes, as_volume, paths_of, straightened
from rfmedsam2.pipeline.prediction.model_archive import unpacked_model
from rfmedsam2.pipeline.prediction.networks import networks_of, prepared_alike, running
from rfmedsam2.pipeline.prediction.plausibility import doubts_about
from rfmedsam2.pipeline.prediction.postprocessing import postprocessed, rule_of_model
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.records.prediction import PostprocessingRule, PredictingModel
from rfmedsam2.store.images import require_output
from rfmedsam2.system.devices import choose_device
from rfmedsam2.system.progress import Track, silent
from rfmedsam2.system.progress_bars import progress_bars
from rfmedsam2.volume import Volume

logger = logging.getLogger(__name__)
OPTIONS = "Give PredictOptions(mirror=False, ...)"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Predictor:
    """Networks with the plan that they were trained with, to predict any number of volumes.

    `predictor(image)` accepts a file, an array, a `Volume`, a nibabel or a SimpleITK image and returns a `Prediction`;
    `predict_array`, `predict_nibabel`, `predict_sitk` and `predict_file` return only the labels, in the type of the
    input. The networks are never modified, so one predictor can be used by several threads.

    Attributes:
        networks: the folds, in evaluation mode on `device`.
        running: the same as `options.backend` runs them.
        checkpoints: the files that they were loaded from.
        records: records of these files.
        options: options of prediction; `predictor.using(...)` returns a predictor with others and the same weights.
        rule: postprocessing of every label map; None: there is none.
        previous: for the second stage of a cascade, the first, or its label maps, which `predict_files` reads; None:
            there is none.
        others: further models of an ensemble, whose probabilities are averaged with those of this one.
    """

    networks: tuple[nn.Module, ...]
    running: Running
    checkpoints: tuple[Path, ...]
    records: tuple[CheckpointRecord, ...]
    options: PredictOptions
    rule: PostprocessingRule | None = None
    previous: Predictor | FirstStageLabels | Path | None = None
    others: tuple[Predictor, ...] = ()

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        *,
        folds: Sequence[str | int] | str | int | None = None,
        checkpoint: Which = "final",
        device: str | torch.device = "auto",
        options: PredictOptions | None = None,
        postprocessing: bool = True,
        previous: FirstStageLabels | str | Path | None = None,
    ) -> Self:
        """Load a model, and with the second stage of a cascade all folds of the first, whose model lies beside it.

        Args:
            source: a model folder (results/DATASET/PLAN__STAGE, or one that nnU-Net trained), a model archive, a
                checkpoint file, several files of one model to average, or several models, of which an ensemble is made.
            folds: folds of a model folder; None: all found (see `checkpoints.checkpoints_of`).
            checkpoint: for a model folder: final (else latest, else best), best or latest.
            device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps.
            options: options of prediction.
            postprocessing: whether to apply the rule of a model folder (postprocessing.json) to its label maps.
            previous: label maps of a cascade's first stage, or their folder, in place of its model.

        Raises:
            UsageError: the model, a fold or the device does not exist, or the rule is of another dataset; models have
                different labels or channels.
            CheckpointError: an archive or a checkpoint is damaged, or of another plan than the first.
            RecordError: the rule, or the record of an ensemble, is damaged.
        """
        files = [source] if isinstance(source, (str, Path)) else source
        if not isinstance(files, Sequence) or not all(isinstance(path, (str, Path)) for path in files):
            raise UsageError("This is not a model", expected="a model folder or checkpoints", found=type_name(source))
        if options is not None:
            require_type(options, PredictOptions, "options", remedy=OPTIONS)
        with ExitStack() as unpacked:
            paths = [unpacked.enter_context(unpacked_model(Path(path))) for path in files]
            load = partial(cls._load_one, checkpoint=checkpoint, device=device, options=options)
            if (members := members_of(paths)) is None:
                return load(paths, folds=folds, postprocessing=postprocessing, previous=previous)
            if previous is not None:
                raise UsageError("An ensemble takes no label maps of a first stage: it predicts them itself")
            wanted = members.folds if folds is None else folds
            models = [load([folder], folds=wanted, postprocessing=False) for folder in members.folders]
            home = members.home if postprocessing else None
            return cls.averaging(models, None if home is None else rule_of_model(home, models[0].plan.labels))

    @classmethod
    def _load_one(
        cls,
        paths: Sequence[Path],
        *,
        folds: Sequence[str | int] | str | int | None,
        checkpoint: Which,
        device: str | torch.device,
        options: PredictOptions | None,
        postprocessing: bool,
        previous: FirstStageLabels | str | Path | None = None,
    ) -> Self:
        """A model from its folder, or from checkpoints of its folds."""
        folder = paths[0] if len(paths) == 1 and not paths[0].is_file() else None
        if folder is not None:
            paths = checkpoints_of(folder, folds=folds, checkpoint=checkpoint)
        place, options = choose_device(device), options or PredictOptions()
        records, networks = networks_of(paths, place)
        first = path_of(previous, "previous") if isinstance(previous, str | Path) else previous
        if first is None and (beside := first_stage_beside(paths[0], records[0])) is not None:
            first = Predictor.load(beside, device=place, options=options, postprocessing=False)
            require_cascade(records[0], first.records[0], where=beside)
        return cls(
            networks=networks,
            running=running(records, networks, options, place),
            checkpoints=tuple(paths),
            records=records,
            options=options,
            rule=rule_of_model(folder, records[0].plan.labels) if folder is not None and postprocessing else None,
            previous=first,
        )

    @classmethod
    def averaging(cls, models: Sequence[Self], rule: PostprocessingRule | None = None) -> Self:
        """An ensemble of models in memory, on one device, without rules of their own.

        Raises:
            UsageError: they have different labels or channels.
        """
        first = models[0]
        for other in models[1:]:
            require_averageable(first.records[0], other.records[0], where=other.checkpoints[0].parent.parent)
        return replace(first, rule=rule, others=tuple(replace(other, rule=None) for other in models[1:]))

    def __repr__(self) -> str:
        folds = ", ".join(record.fold for record in self.records)
        return f"Predictor({self.plan.dataset}, {', '.join(self.name)}, folds {folds}, {self.device})"

    @property
    def members(self) -> tuple[Predictor, ...]:
        """The models whose probabilities are averaged; of one model only itself."""
        return (replace(self, others=(), rule=None), *self.others) if self.others else (self,)

    @property
    def name(self) -> tuple[str, str]:
        """Names of plan and stage; of an ensemble "ensemble", and the names of its models."""
        if self.others:
            return ENSEMBLE_PLAN, ensemble_name([member.records[0] for member in self.members])
        return self.plan.name, self.stage

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.networks[0].parameters()).device

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found out now about backends, of all models of an ensemble and the first stage of a cascade."""
        before = self.previous.notes if isinstance(self.previous, Predictor) else ()
        return (*before, *(member.running.note for member in self.members if member.running.note is not None))

    @property
    def plan(self) -> Plan:
        """The plan of the first fold; the others are equal in everything that affects prediction."""
        return self.records[0].plan

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.records[0].stage

    @property
    def config(self) -> Stage:
        """The stage."""
        return self.plan.stages[self.stage]

    @property
    def models(self) -> tuple[PredictingModel, ...]:
        """The identity of every fold, of all models of an ensemble."""
        return tuple(
            PredictingModel(
                fold=record.fold, step=record.step, weights_sha256=record.weights_sha256, checkpoint=path.name
            )
            for member in self.members
            for path, record in zip(member.checkpoints, member.records, strict=True)
        )

    def settings(self, *, boxes: bool = False) -> dict[str, float | int | bool | str]:
        """All settings besides model and image that affect a label map; `boxes`: whether boxes are given."""
        previous = self.previous.made_by() if isinstance(self.previous, Predictor) else "given"
        settings = settings_of(self.config, self.options, boxes=boxes, rule=self.rule, previous=previous)
        backends = sorted({member.running.backend for member in self.members})
        precision = precision_on(self.device, self.options.precision)
        return {**settings, "precision": precision, "backend": "+".join(backends)}

    def made_by(self, *, boxes: bool = False) -> str:
        """SHA-256 of the weights of all folds, the relevant part of the plan, and `settings`."""
        if self.others:
            return digest_of_ensemble([member.made_by() for member in self.members], self.rule)
        return digest_of_model(self.records, self.settings(boxes=boxes))

    def using(self, options: PredictOptions) -> Predictor:
        """A predictor with the same weights and other options.

        Raises:
            UsageError: the options are not `PredictOptions`.
        """
        require_type(options, PredictOptions, "options", remedy=OPTIONS)
        previous = self.previous.using(options) if isinstance(self.previous, Predictor) else self.previous
        others = tuple(other.using(options) for other in self.others)
        alike = prepared_alike(self.options, options)
        ready = self.running if alike else running(self.records, self.networks, options, self.device)
        return replace(self, running=ready, options=options, previous=previous, others=others)

    def require_possible(self, *, boxes: bool, previous: bool = False) -> None:
        """Check that the model supports the options, and accepts or has the boxes and a first stage's label maps.

        Raises:
            UsageError: `options.step` is not produced by this model, boxes or labels of a first stage are missing or
                not accepted.
        """
        for other in self.others:
            other.require_possible(boxes=boxes)
        if boxes and self.others:
            raise UsageError("An ensemble takes no boxes", remedy="Predict with one of its models")
        require_possible(self.config.model, step=self.options.step, boxes=boxes)
        first = self.config.previous_stage
        if first is not None and not previous and not isinstance(self.previous, Predictor):
            raise no_first_stage(self.checkpoints[0], self.stage, first)
        if first is None and previous:
            raise UsageError(
                "The model is not the second stage of a cascade, and cannot use the labels of a first",
                where=f"{self.plan.name}, {self.stage}",
                remedy=f"Leave out {option('previous', flag='--previous-stage')}",
            )

    def __call__(
        self,
        image: ImageInput,
        *,
        spacing_zyx_mm: Sequence[float] | np.ndarray | None = None,
        boxes: BoxInput | None = None,
        previous: np.ndarray | None = None,
        probabilities: bool = False,
        progress: bool | Track = False,
    ) -> Prediction:
        """Predict one volume.

        Args:
            image: a file (NIfTI, NRRD, MHA, MGZ), a DICOM folder, a list with one file per channel, a NumPy array
                (Z, Y, X) or (C, Z, Y, X), a `Volume`, a nibabel or a SimpleITK image. Intensities are those of the
                files that the model was trained on; an array's axes must run as in those files (x to the left, y to
                the back, z to the head for a plan with `reorient`: LPS).
            spacing_zyx_mm: spacing of an array, mm; other images have their own.
            boxes: box prompts for RFMedSAM 2, in voxels of the image: a label map (Z, Y, X) whose boxes are taken
                slice by slice, a `Volume` of one, or a list of `BoxPrompt` (or of its JSON form).
            previous: for the second stage of a cascade, the first's labels (Z, Y, X), whole numbers, in the image's
                axes; None: the first stage predicts them.
            probabilities: whether to return them: all classes at full resolution, 2 bytes per value.
            progress: True: a bar of tiles, in the terminal or notebook; a `Track`: shown by it.

        Raises:
            UsageError: an unsupported type of image or boxes, no spacing for an array, boxes that are missing or that
                the model does not accept, a box outside the image, or a label unknown to the model.
            ImageError: a file cannot be read, or voxels are not numbers or not finite.
            PlanError: the number of channels differs from the plan's.
            GeometryError: a spacing, affine or direction is invalid.
        """
        self.require_possible(boxes=boxes is not None, previous=previous is not None)
        volume, header = as_volume(image, spacing_zyx_mm)
        prepared_case = self.prepare(straightened(volume), boxes=boxes, previous=previous)
        for doubt in doubts_about(volume, self.plan, paths=paths_of(image), header=header):
            logger.warning("%s", doubt)
        prediction = self.predict_prepared(prepared_case, probabilities=probabilities, track=progress_bars(progress))
        return replace(prediction, grid=volume.grid if header is None else header.source_grid, header=header)

    def prepare(
        self, volume: Volume, *, boxes: BoxInput | None = None, previous: np.ndarray | None = None
    ) -> PreparedCase:
        """First half of a prediction, everything before the network; see `inference.volume.preprocess_case`."""
        require_type(volume, Volume, "volume", remedy="Make one with Volume.from_numpy, or call the predictor itself")
        if self.others:
            return replace(self.members[0].prepare(volume), waiting=volume)
        if isinstance(self.previous, Predictor) and previous is None:
            return replace(self.previous.prepare(volume), waiting=volume)
        if previous is not None:
            require_label_map(previous, volume.grid.shape_zyx, self.plan.labels, where="previous")
        prompts, threads = None if boxes is None else as_boxes(boxes, volume.grid), self.options.threads
        return preprocess_case(volume, self.plan, self.stage, boxes=prompts, previous=previous, threads=threads)

    def predict_prepared(
        self, prepared_case: PreparedCase, *, probabilities: Path | bool = False, track: Track = silent
    ) -> Prediction:
        """Second half of a prediction, then the rule; see `inference.volume.predict_prepared`."""
        require_type(prepared_case, PreparedCase, "prepared_case", remedy="Make one with predictor.prepare(volume)")
        if self.others:
            prediction = predict_mean(self.members, prepared_case, probabilities=probabilities, track=track)
        else:
            case = self._after_first_stage(prepared_case, track)
            how = partial(predict_prepared, device=self.device, options=self.options)
            networks = self.running.networks
            prediction = how(networks, case, self.plan, self.stage, probabilities=probabilities, track=track)
        return prediction if self.rule is None else postprocessed(prediction, self.rule)

    def _after_first_stage(self, case: PreparedCase, track: Track) -> PreparedCase:
        """A cascade's case, preprocessed with the labels that its first stage predicts; any other as it is."""
        if not isinstance(self.previous, Predictor) or (volume := case.waiting) is None:
            return case
        first = self.previous.predict_prepared(replace(case, waiting=None), track=track)
        case = self.prepare(volume, previous=first.labels)
        return replace(case, seconds=case.seconds + sum(first.seconds.values()))

    def predict_array(
        self,
        array: np.ndarray,
        *,
        spacing_zyx_mm: Sequence[float] | np.ndarray,
        boxes: BoxInput | None = None,
        progress: bool | Track = False,
    ) -> np.ndarray:
        """Labels (Z, Y, X), uint8 or uint16, of an array (Z, Y, X) or (C, Z, Y, X)."""
        return self(array, spacing_zyx_mm=spacing_zyx_mm, boxes=boxes, progress=progress).labels

    def predict_nibabel(
        self, image: SpatialImage, *, boxes: BoxInput | None = None, progress: bool | Track = False
    ) -> nib.Nifti1Image:
        """Labels of a nibabel image, with its affine and, of a NIfTI image, its header."""
        if not isinstance(image, SpatialImage):
            remedy = "Call the predictor itself, or predict_file"
            raise UsageError("This is not a nibabel image", found=type_name(image), remedy=remedy)
        labels = self(image, boxes=boxes, progress=progress).labels
        header = image.header.copy() if isinstance(image, nib.Nifti1Image) else None
        result = nib.Nifti1Image(np.ascontiguousarray(labels.T), image.affine, header, dtype=labels.dtype)
        result.header.set_slope_inter(1, 0)
        return result

    def predict_sitk(
        self, image: sitk.Image, *, boxes: BoxInput | None = None, progress: bool | Track = False
    ) -> sitk.Image:
        """Labels of a SimpleITK image, with its geometry."""
        return self(image, boxes=boxes, progress=progress).to_sitk()

    def predict_file(
        self,
        paths: str | Path | Sequence[str | Path],
        out: str | Path | None = None,
        *,
        boxes: BoxInput | None = None,
        progress: bool | Track = False,
    ) -> np.ndarray:
        """Labels of one case from its files (one per channel, or a DICOM folder); written to `out` if given.

        Raises:
            UsageError: `out` is not a path, has no ending of a format of label maps, or is an input; nothing is done.
        """
        if out is not None:
            require_output(path_of(out, "out"), [paths] if isinstance(paths, str | Path) else paths)
        prediction = self(paths, boxes=boxes, progress=progress)
        if out is not None:
            prediction.save(out)
        return prediction.labels
