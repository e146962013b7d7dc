"""Zero-shot SAM and SAM 2 on a labeled dataset, by kind and number of prompts (RFMedSAM 2 paper, Table 1).

Prompts come from the reference: a tight box, or the pixel nearest to the center of mass, one per class and slice along
z as stored. The setting `one` prompts the middle one of the slices that contain a class, `two` those at a quarter and
three quarters. Classes are merged into one label map (the highest logit wins) and scored as whole volumes on the
original grid.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from rfmedsam2.arguments import option
from rfmedsam2.choices import Backbone
from rfmedsam2.errors import CheckpointError, DatasetError, UsageError, shortlist
from rfmedsam2.inference.video_tracking import VideoSegmenter, as_published
from rfmedsam2.inference.zero_shot import reference_prompts, segment_slices
from rfmedsam2.metrics.volumes import case_metrics, empty_policy
from rfmedsam2.nn.sam import NAMES, SamSegmenter
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.sizes import sizes_of
from rfmedsam2.nn.sam2.weights import BLOCKS, STEM, load_sam2
from rfmedsam2.nn.sam_weights import build_sam, sam_backbone
from rfmedsam2.pipeline.evaluation.bootstrap import summarize
from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader
from rfmedsam2.prompts import Prompts
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.report import CaseMetrics
from rfmedsam2.records.study import Prompted, PromptKind, PromptStudy, Step2, StudyRow
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.published_weights import read_published
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.atomic import atomic, write_record
from rfmedsam2.system.csv_text import write_rows
from rfmedsam2.system.devices import choose_device
from rfmedsam2.system.progress import Track, silent

SOFT_TISSUE_HU = (-160.0, 240.0)
"""Intensity window of CT, the usual one for the abdomen."""
PERCENTILES = (0.5, 99.5)
"""Intensity window of other images, of the voxels above the volume's minimum."""
SAM2_NAMES: dict[Backbone, str] = {
    "sam2_tiny": "SAM 2 tiny",
    "sam2_small": "SAM 2 small",
    "sam2_base_plus": "SAM 2 base+",
    "sam2_large": "SAM 2 large",
    "nano": "nano",
}

SamModel = SamSegmenter | SAM2Base
Setting = tuple[PromptKind, Prompted, Step2]
"""(kind of prompt, prompted slices, slices of Step 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """Options of the study.

    Attributes:
        prompts: kinds of prompts.
        prompted: which slices are prompted for SAM 2; SAM is prompted on all.
        cases: number of training cases, the first ones; None: all.
        channel: name or number of the channel to show; None: all if there are three, else the first.
        window: intensities shown as black and white; None: chosen by the channel's name.
        frame_size: side length of SAM 2's input in pixels.
        max_conditioning: number of nearest prompted slices that SAM 2 attends to; None: all, as published.
        device: device, see `devices.choose_device`.
    """

    prompts: tuple[PromptKind, ...] = ("box", "point")
    prompted: tuple[Prompted, ...] = ("all", "two", "one")
    cases: int | None = None
    channel: str | None = None
    window: tuple[float, float] | None = None
    frame_size: int = 1024
    max_conditioning: int | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How volumes are converted to images: numbers and names of the channels, and the window if one is given."""

    channels: tuple[int, ...]
    names: tuple[str, ...]
    window: tuple[float, float] | None


def prompt_study(
    dataset: RawDataset,
    *,
    sam: Sequence[Path] = (),
    sam2: Sequence[Path] = (),
    options: StudyOptions | None = None,
    out: Path | None = None,
    track: Track = silent,
) -> PromptStudy:
    """Segment labeled cases with prompts from their labels, and score the result.

    Args:
        dataset: a labeled dataset; its training cases are used.
        sam: checkpoints of MobileSAM, LiteMedSAM, or official SAM.
        sam2: checkpoints of SAM 2 or 2.1.
        options: options of the study.
        out: output folder of prompt_study.json and prompt_study.csv; None: write nothing.
        track: progress display.

    Raises:
        UsageError: nothing to study, or options that do not match the dataset.
        CheckpointError: a file is not a known checkpoint.
        DatasetError: a case cannot be used, or no case has labeled voxels.
    """
    options = options or StudyOptions()
    checkpoints = [*((path, False) for path in sam), *((path, True) for path in sam2)]
    _require_something(dataset, options, checkpoints=len(checkpoints))
    cases, look = dataset.training[: options.cases], chosen_look(dataset, options)
    rows: list[StudyRow] = []
    seconds: dict[str, float] = {}
    for path, is_sam2 in checkpoints:
        name, model = _load(path, sam2=is_sam2, options=options)
        began = time.perf_counter()
        scores = _scores(model, dataset, track(cases, name, len(cases)), look, options, track)
        rows += _rows(name, path, scores, dataset.json.label_set)
        seconds[str(path)] = round(time.perf_counter() - began, 1)
    study = PromptStudy(
        dataset=dataset.name,
        cases=tuple(case.id for case in cases),
        channels=look.names,
        window="; ".join(f"{name}: {_window_text(name, look.window)}" for name in look.names),
        empty_policy=empty_policy("skip"),
        seconds=seconds,
        rows=tuple(rows),
    )
    if out is not None:
        write_study(out, study)
    return study


def chosen_look(dataset: RawDataset, options: StudyOptions) -> Look:
    """Choose the channels to show: the requested one, else three as colors, else the first.

    Raises:
        UsageError: the channel does not exist.
    """
    names, wanted = dataset.json.channels, options.channel
    if wanted is None:
        channels = (0, 1, 2) if len(names) == 3 else (0,)
    else:
        channels = tuple(i for i, name in enumerate(names) if wanted.lower() in (name.lower(), str(i)))[:1]
    if not channels:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise UsageError("The channel does not exist", where=wanted, expected=f"one of {listed} ({option('channel')})")
    return Look(channels=channels, names=tuple(names[i] for i in channels), window=options.window)


def as_images(image: np.ndarray, look: Look) -> Tensor:
    """Convert an image (C, Z, Y, X) to RGB slices (Z, 3, Y, X) with values from 0 to 255.

    CT uses the soft-tissue window, other images percentiles of the voxels above the minimum.
    """
    shown = np.empty((len(look.channels), *image.shape[1:]), np.float32)
    for i, (number, name) in enumerate(zip(look.channels, look.names, strict=True)):
        channel = image[number]
        low, high = look.window or (SOFT_TISSUE_HU if _is_ct(name) else _percentiles(channel))
        gray = (channel.astype(np.float32) - low) * np.float32(255 / max(high - low, 1e-8))
        shown[i] = np.clip(gray, 0, 255)
    frames = torch.from_numpy(shown).transpose(0, 1)
    return frames if frames.shape[1] == 3 else frames.expand(-1, 3, -1, -1)


def sam2_backbone(weights: Mapping[str, Tensor]) -> Backbone | None:
    """SAM 2 size of weights, by the channels of the stem and the number of blocks; None: not SAM 2."""
    if STEM not in weights:
        return None
    blocks = len({key[len(BLOCKS) :].split(".")[0] for key in weights if key.startswith(BLOCKS)})
    found = len(weights[STEM]), blocks
    for name in SAM2_NAMES:
        sizes = sizes_of(name).hiera
        if sizes is not None and (sizes.channels, sum(sizes.stages)) == found:
            return name
    return None


def write_study(folder: Path, study: PromptStudy) -> None:
    """Write prompt_study.json and prompt_study.csv (one row per setting, DSC), both or neither."""
    classes = list(study.rows[0].classes)
    with atomic(folder / "prompt_study.csv") as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            write_rows(stream, [("model", "checkpoint", "prompts", "prompted", "step2", "mean", *classes)])
            for row in study.rows:
                scores = (row.mean.mean, *(row.classes[name].mean for name in classes))
                write_rows(stream, [(row.model, row.checkpoint, row.prompts, row.prompted, row.step2, *scores)])
        write_record(folder / "prompt_study.json", study)


def _require_something(dataset: RawDataset, options: StudyOptions, *, checkpoints: int) -> None:
    if not checkpoints:
        raise UsageError(
            "No checkpoints were given",
            expected="checkpoints of SAM or SAM 2",
            remedy=f"Give {option('sam')} or {option('sam2')}",
        )
    if not options.prompts or not options.prompted:
        raise UsageError("No prompts were chosen", expected="at least one kind of prompt and of prompted slices")
    if options.cases is not None and options.cases < 1:
        raise UsageError(
            "The number of cases is too small", expected=f"1 or more ({option('cases')})", found=options.cases
        )
    if options.window is not None and options.window[0] >= options.window[1]:
        raise UsageError(
            "The window must have LOW < HIGH", where=option("window", flag="--window LOW HIGH"), found=options.window
        )
    CaseReader(dataset).check_file_layout()
    if not dataset.json.label_set.foreground:
        raise DatasetError("The dataset declares no foreground class", where=dataset.folder / "dataset.json")


def _load(path: Path, *, sam2: bool, options: StudyOptions) -> tuple[str, SamModel]:
    weights = read_published(path)
    if not sam2:
        model = build_sam(weights, where=path, best_of_three=True)
        return NAMES[model.backbone], model
    backbone = sam2_backbone(weights)
    if backbone is None:
        raise CheckpointError(
            "The file does not hold weights of a known SAM 2",
            where=path,
            expected="sam2.1_hiera_*.pt or sam2_hiera_*.pt of tiny, small, base_plus or large",
            found=f"{len(weights)} tensors ({shortlist(weights, limit=3)})",
            remedy=f"Give files of SAM with {option('sam')}" if sam_backbone(weights) is not None else None,
        )
    base = build_base(backbone, frame_size=options.frame_size)
    report = load_sam2(base, weights, where=path)
    name = SAM2_NAMES[backbone]
    if not report.missing:
        name = name.replace("SAM 2", "SAM 2.1")
    return name, as_published(base, max_conditioning=options.max_conditioning)


def _scores(
    model: SamModel, dataset: RawDataset, cases: Iterable[Case], look: Look, options: StudyOptions, track: Track
) -> dict[Setting, list[CaseMetrics]]:
    """Scores of every case by setting."""
    device = choose_device(options.device)
    model.to(device)
    labels, source = dataset.json.label_set, CaseReader(dataset)
    scores: dict[Setting, list[CaseMetrics]] = {}
    seen = 0
    for case in cases:
        decoded = source.read(case)
        seen += sum(decoded.voxels_by_label.get(v, 0) for values in labels.foreground.values() for v in values)
        # the official predictor's precision; bfloat16 is not faster on the CPU
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            maps = _segmented(model, as_images(decoded.volume.array, look), decoded.label, labels, options, track)
        spacing = decoded.volume.grid.spacing_zyx_mm
        for setting, found in maps.items():
            classes = case_metrics(decoded.label, found, labels, spacing)
            scored = CaseMetrics(id=case.id, reference=str(case.label), prediction="", classes=classes)
            scores.setdefault(setting, []).append(scored)
    if not seen:
        raise DatasetError(
            "The cases have no voxel of any class to prompt for",
            where=dataset.folder,
            remedy="Use more cases, or check their labels",
        )
    return scores


def _segmented(
    model: SamModel, frames: Tensor, reference: np.ndarray, labels: LabelSet, options: StudyOptions, track: Track
) -> dict[Setting, np.ndarray]:
    """Label maps of one case by setting."""
    prompts: dict[PromptKind, Prompts] = {kind: reference_prompts(reference, labels, kind) for kind in options.prompts}
    if isinstance(model, SamSegmenter):
        by_kind = segment_slices(model, frames, prompts, labels, track=track)
        return {(kind, "all", "none"): found for kind, found in by_kind.items()}
    return {
        (kind, *setting): found
        for kind, each in prompts.items()
        for setting, found in VideoSegmenter(model, frames, each, labels, kind=kind, track=track)
        .run(options.prompted)
        .items()
    }


def _rows(name: str, path: Path, scores: dict[Setting, list[CaseMetrics]], labels: LabelSet) -> list[StudyRow]:
    rows = []
    for (kind, prompted, step2), cases in scores.items():
        classes, mean = summarize(cases, tuple(labels.foreground))
        rows.append(
            StudyRow(
                model=name,
                checkpoint=str(path),
                prompts=kind,
                prompted=prompted,
                step2=step2,
                mean=mean["dsc"],
                classes={each: found["dsc"] for each, found in classes.items()},
                cases=tuple(cases),
            )
        )
    return rows


def _is_ct(name: str) -> bool:
    return name.lower() == "ct" or name.lower().startswith("ct_") or name.lower().startswith("ct ")


def _percentiles(channel: np.ndarray) -> tuple[float, float]:
    above = channel[channel > channel.min()]
    if above.size == 0:
        return float(channel.min()), float(channel.min()) + 1
    low, high = np.percentile(above, PERCENTILES)
    return float(low), float(high)


def _window_text(name: str, window: tuple[float, float] | None) -> str:
    if window is not None:
        return f"{window[0]:g} to {window[1]:g}"
    if _is_ct(name):
        return f"{SOFT_TISSUE_HU[0]:g} to {SOFT_TISSUE_HU[1]:g} HU"
    return f"percentiles {PERCENTILES[0]:g} to {PERCENTILES[1]:g} of the voxels above the minimum"
