"""A trained model kept in memory: arrays, nibabel and SimpleITK images, or files in, label maps out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its usual name
import torch
from nibabel.spatialimages import SpatialImage
from torch import nn
from typing_extensions import Self

from rfmedsam2.errors import CheckpointError, ImageError, UsageError
from rfmedsam2.geometry import Grid, Triple
from rfmedsam2.inference.box_prompts import BoxPrompts
from rfmedsam2.inference.volume import PredictOptions, VolumePrediction, predict_volume
from rfmedsam2.models import load_network
from rfmedsam2.pipeline.prediction.checkpoints import Which, checkpoints_of
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.model import RFMedSam2Config
from rfmedsam2.records.plan import Plan, Stage
from rfmedsam2.records.prediction import PredictingModel
from rfmedsam2.store.images import read_channels, write_label
from rfmedsam2.system.devices import choose_device
from rfmedsam2.volume import Volume

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Networks with the plan that they were trained by, ready to predict any number of volumes.

    Attributes:
        networks: the folds, in evaluation mode on `options.device`.
        checkpoints: the files that they came from.
        records: what those say about themselves.
        options: how to predict; `predictor.using(...)` gives one with others and the same weights.
    """

    networks: tuple[nn.Module, ...]
    checkpoints: tuple[Path, ...]
    records: tuple[CheckpointRecord, ...]
    options: PredictOptions

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        *,
        folds: Sequence[str] | None = None,
        checkpoint: Which = "final",
        device: str = "auto",
        options: PredictOptions | None = None,
    ) -> Self:
        """Load a model.

        Args:
            source: a model folder (results/DATASET/PLAN__STAGE), a checkpoint file, or several that are averaged.
            folds: of a model folder; None: all that are found (see `trained.checkpoints_of`).
            checkpoint: of a model folder: final (latest where training has not ended), best or latest.
            device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps.
            options: how to predict; its device is replaced.

        Raises:
            UsageError: no such model, fold or device.
            CheckpointError: a checkpoint that is broken, or of another plan than the first.
        """
        files = [source] if isinstance(source, (str, Path)) else list(source)
        paths = [Path(path) for path in files]
        if isinstance(source, (str, Path)) and not paths[0].is_file():
            paths = checkpoints_of(paths[0], folds=folds, checkpoint=checkpoint)
        if not paths:
            raise UsageError("There is no checkpoint to predict with", expected="at least one file")
        place = choose_device(device)
        loaded = [load_network(path, device=place) for path in paths]
        records = tuple(record for record, _ in loaded)
        for path, record in zip(paths[1:], records[1:], strict=True):
            _require_same_model(records[0], record, where=path)
        networks = tuple(network for _, network in loaded)
        options = replace(options or PredictOptions(), device=place)
        return cls(networks=networks, checkpoints=tuple(paths), records=records, options=options)

    @property
    def plan(self) -> Plan:
        """The plan of the first fold; the others' agree in all that matters for predicting."""
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
        """The identity of every fold."""
        return tuple(
            PredictingModel(
                fold=record.fold, step=record.step, weights_sha256=record.weights_sha256, checkpoint=path.name
            )
            for path, record in zip(self.checkpoints, self.records, strict=True)
        )

    def settings(self) -> dict[str, float | int | bool | str]:
        """Everything beside model and image that a label map depends on."""
        inference = self.options.inference(self.config)
        cuda = torch.device(self.options.device).type == "cuda"
        settings: dict[str, float | int | bool | str] = {
            "step_size": inference.step_size,
            "mirror": inference.mirror,
            "skip_empty": self.options.skip_empty,
            "precision": self.options.precision if cuda else "fp32",
        }
        if isinstance(self.config.model, RFMedSam2Config):
            settings["step"] = self.config.model.refinements if self.options.step is None else self.options.step
            # which ones is a matter of the case: they are part of its input
            settings["boxes"] = "own" if self.options.boxes is None else "given"
        return settings

    def made_by(self) -> str:
        """SHA-256 over the weights of all folds, the plan's part that matters, and `settings`."""
        parts = [sorted(r.weights_sha256 for r in self.records), _what_predicting_needs(self.records[0])]
        return hashlib.sha256(json.dumps([*parts, self.settings()], sort_keys=True).encode()).hexdigest()

    def using(self, options: PredictOptions) -> Predictor:
        """Keep the weights and take other options (the device stays)."""
        return replace(self, options=replace(options, device=self.options.device))

    def predict_volume(self, volume: Volume, *, boxes: BoxPrompts | None = None) -> VolumePrediction:
        """Labels and seconds; see `inference.volume.predict_volume`."""
        return predict_volume(self.networks, volume, self.plan, self.stage, options=self.options, boxes=boxes)

    def predict_array(
        self, array: np.ndarray, spacing_zyx_mm: Triple, *, boxes: BoxPrompts | None = None
    ) -> np.ndarray:
        """Predict a volume that exists only in memory.

        Args:
            array: (Z, Y, X) or (C, Z, Y, X), intensities as in the files that the model was trained on. Axes must run
                as in those files (x to the left, y to the back, z to the head for a plan with `reorient`: LPS).
            spacing_zyx_mm: distance of voxel centers, mm.
            boxes: to prompt RFMedSAM 2 with: a label map (Z, Y, X) to take them from, or one by one.

        Returns:
            (Z, Y, X) labels, uint8 or uint16.

        Raises:
            ImageError: not three or four axes, or not numbers.
            PlanError: another number of channels than planned.
            GeometryError: a spacing that is not positive.
        """
        if array.ndim not in (3, 4) or array.dtype.kind not in "iufb":
            raise ImageError(
                "This array is no volume",
                expected="numbers with axes (Z, Y, X) or (C, Z, Y, X)",
                found=f"{array.dtype} {array.shape}",
            )
        channels = array[None] if array.ndim == 3 else array
        z, y, x = channels.shape[1:]
        grid = Grid(shape_zyx=(z, y, x), spacing_zyx_mm=spacing_zyx_mm)
        return self.predict_volume(Volume(array=channels, grid=grid), boxes=boxes).labels

    def predict_nibabel(self, image: SpatialImage) -> nib.Nifti1Image:
        """Predict a nibabel image (x, y, z) or (x, y, z, C); the result has its affine."""
        array = np.asarray(image.dataobj)
        channels = array.T if array.ndim == 4 else array.T[None]
        z, y, x = channels.shape[-3:]
        grid = Grid.from_affine_lps(_RAS_TO_LPS @ np.asarray(image.affine), (z, y, x)).orthonormalized()
        labels = self.predict_volume(Volume(array=channels, grid=grid)).labels
        header = image.header.copy() if isinstance(image, nib.Nifti1Image) else None
        result = nib.Nifti1Image(np.ascontiguousarray(labels.T), image.affine, header, dtype=labels.dtype)
        result.header.set_slope_inter(1, 0)
        return result

    def predict_sitk(self, image: sitk.Image) -> sitk.Image:
        """Predict a SimpleITK image (vector pixels: channels); the result has its geometry."""
        array = sitk.GetArrayFromImage(image)
        channels = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
        z, y, x = channels.shape[-3:]
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())[None]
        affine[:3, 3] = image.GetOrigin()
        grid = Grid.from_affine_lps(affine, (z, y, x))
        result = sitk.GetImageFromArray(self.predict_volume(Volume(array=channels, grid=grid)).labels)
        result.CopyInformation(image)
        return result

    def predict_file(self, paths: Path | Sequence[Path], out: Path | None = None) -> np.ndarray:
        """Predict one case from its file or files (one a channel, or a DICOM folder); written to `out` if given."""
        volume, header = read_channels([paths] if isinstance(paths, Path) else list(paths))
        labels = self.predict_volume(volume).labels
        if out is not None:
            write_label(out, labels, header)
        return labels


def _what_predicting_needs(record: CheckpointRecord) -> dict[str, object]:
    plan = record.plan.model_dump(mode="json", include={"channels", "labels", "reorient", "transpose_forward"})
    stage = record.plan.stages[record.stage].model_dump(
        mode="json", include={"spacing_mm", "patch_size", "normalization", "resampling", "model"}
    )
    intensities = [i.model_dump(mode="json") for i in record.plan.intensities]
    mirror = list(record.plan.stages[record.stage].augmentation.mirror_axes)
    return {**plan, **stage, "intensities": intensities, "mirror_axes": mirror, "stage": record.stage}


def _require_same_model(first: CheckpointRecord, other: CheckpointRecord, *, where: Path) -> None:
    one, two = _what_predicting_needs(first), _what_predicting_needs(other)
    differing = [name for name in one if one[name] != two[name]]
    if differing:
        raise CheckpointError(
            "The checkpoints belong to different plans and cannot be averaged",
            where=where,
            expected=f"the plan {first.plan.name} and stage {first.stage} of the first checkpoint",
            found=f"{other.plan.name}, {other.stage}; other {', '.join(differing)}",
            remedy="Predict with folds of one training",
        )
