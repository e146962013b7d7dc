"""Report page for a training, an evaluation, or both: one self-contained HTML file, printable, light and dark."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfmedsam2.errors import RecordError, RfMedSamError, UsageError, shortlist
from rfmedsam2.pipeline.evaluation.overlays import PREDICTION_COLOR, REFERENCE_COLOR, case_png
from rfmedsam2.pipeline.evaluation.score_plot import spread_png
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import CustomConfig, LibraryConfig, ModelConfig, UNetConfig
from rfmedsam2.records.report import CaseMetrics, Evaluation, Interval
from rfmedsam2.reporting.html import figure_text, png_uri, write_html
from rfmedsam2.reporting.training_curves import Theme, Training, read_training, training_png
from rfmedsam2.store.case_files import channel_file
from rfmedsam2.store.checkpoint_header import CHECKPOINTS, read_record_of
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.json_text import parse_json
from rfmedsam2.system.ordinary_files import read_whole

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.j2")
PICTURED_CASES = 3
"""Number of worst cases shown, and of best ones."""
MAX_CLASS_COLUMNS = 16
NAMED_CLASSES = 4
"""Number of classes named below an overlay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Display properties of a metric."""

    name: str
    title: str
    unit: str
    digits: int
    meaning: str


METRICS = (
    Metric(name="dsc", title="DSC", unit="", digits=3, meaning="Dice similarity coefficient, 0 to 1"),
    Metric(name="iou", title="IoU", unit="", digits=3, meaning="Intersection over union, 0 to 1"),
    Metric(name="nsd", title="NSD", unit="", digits=3, meaning="Normalized surface Dice at the tolerance, 0 to 1"),
    Metric(name="hd95_mm", title="HD95", unit="mm", digits=2, meaning="95th percentile Hausdorff distance"),
    Metric(name="volume_error_ml", title="Volume error", unit="ml", digits=2, meaning="Predicted minus reference"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseOverlay:
    """A case with its overlay image."""

    id: str
    group: str
    score: float
    source: str
    details: str


def write_report(
    path: Path,
    *,
    title: str,
    training: Path | None = None,
    evaluation: Evaluation | Path | None = None,
    images: Path | None = None,
    labels: LabelSet | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the report page.

    Args:
        path: path of the HTML file, written atomically.
        title: heading of the page.
        training: folder of a trained fold with metrics.jsonl; its checkpoint, if any, describes the model.
        evaluation: scores, or their metrics.json; overlays of the best and worst cases are drawn from their files.
        images: folder of the cases' images (ID_0000.nii.gz or ID.nii.gz ...), drawn below the contours.
        labels: labels of the dataset, whose ignore label is not drawn; default: from the checkpoint, if any.
        about: additional facts for the top of the page, name -> text.

    Raises:
        UsageError: neither training nor evaluation is given.
        RecordError: the training folder has no metrics, or metrics.json has faults.
        StoreError: the file cannot be written.
    """
    if training is None and evaluation is None:
        raise UsageError("A report needs a training or an evaluation", where=path)
    if isinstance(evaluation, Path):
        evaluation = read_evaluation(evaluation)
    record = None if training is None else _checkpoint(training)
    curves = None if training is None else read_training(training)
    if labels is None and record is not None:
        labels = record.plan.labels
    facts = {**(_about_model(record) if record is not None else {}), **(about or {})}
    context = {
        "title": title,
        "facts": facts,
        "figures": [*_evaluation_figures(evaluation), *_training_figures(curves)],
        "training": None if curves is None else _themed(lambda theme: training_png(curves, theme=theme)),
        "steps": {} if curves is None else curves.scores_by_step(),
        "evaluation": None if evaluation is None else _evaluation_context(evaluation, images, labels),
        "reference_color": REFERENCE_COLOR,
        "prediction_color": PREDICTION_COLOR,
    }
    write_html(path, TEMPLATE, context)


def read_evaluation(path: Path) -> Evaluation:
    """Read a metrics.json, and find the files of its cases: from the working folder, or where all moved together.

    Raises:
        UsageError: another JSON file, such as predictions.json.
        RecordError: the file does not exist or has faults.
    """
    try:
        evaluation = read_record(path, Evaluation)
    except RecordError:
        if (fields := _fields_of(path)) and not {"mean", "classes"} & fields.keys():
            raise UsageError(
                "This file does not hold scores",
                where=path,
                expected="metrics.json, as rfmed_evaluate writes it",
                found=f"the fields {shortlist(fields, limit=8)}",
                remedy="Score the predictions first: rfmed_evaluate -p PREDICTIONS -g REFERENCES -o FOLDER",
            ) from None
        raise

    folders = path.absolute().parents
    cases = [
        case.model_copy(
            update={"reference": _found(case.reference, folders), "prediction": _found(case.prediction, folders)}
        )
        for case in evaluation.cases
    ]
    return evaluation.model_copy(update={"cases": tuple(cases)})


def _found(name: str, folders: Sequence[Path]) -> str:
    """Where a file is: as written, relative to one of the folders, or as far below one as below its namesake before."""
    parts = Path(name).parts
    places = [Path(name), *(folder / name for folder in folders)]
    for folder in folders:
        if folder.name in parts:
            below = len(parts) - parts[::-1].index(folder.name)
            places.append(folder.joinpath(*parts[below:]))
    return str(next((place for place in places if place.is_file()), name))


def _fields_of(path: Path) -> dict[str, object]:
    """Top-level fields of a JSON file; none if it is damaged or holds no object."""
    try:
        content = parse_json(read_whole(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _themed(draw: Callable[[Theme], bytes]) -> dict[str, str]:
    return {"light": png_uri(draw("light")), "dark": png_uri(draw("dark"))}


def _checkpoint(folder: Path) -> CheckpointRecord | None:
    """Record of the folder's checkpoint, if there is a readable one."""
    for name in CHECKPOINTS:
        if (folder / name).is_file():
            try:
                return read_record_of(folder / name)
            except RfMedSamError as error:
                logger.warning("%s", error)
    return None


def _about_model(record: CheckpointRecord) -> dict[str, str]:
    stage = record.plan.stages[record.stage]
    return {
        "Dataset": record.plan.dataset,
        "Plan": record.plan.name,
        "Stage": record.stage,
        "Fold": record.fold,
        "Model": _about_network(stage.model),
        "Patch": f"{_times(stage.patch_size)} voxels at {_times([f'{s:.3g}' for s in stage.spacing_mm])} mm",
        "Batch": str(stage.batch_size),
        "Trained": f"{record.step} of {stage.train.iterations} steps",
        "Labels": ", ".join(record.plan.labels.foreground),
        "Model hash": record.weights_sha256[:16],
        "Code": f"rfmedsam2 {record.code_version}, torch {record.torch_version}",
    }


def _about_network(model: ModelConfig) -> str:
    if isinstance(model, UNetConfig):
        norm = "" if model.norm == "instance" else f", {model.norm} norm"
        means = f" on means of {_times(model.input_stride)} voxels" if model.input_stride else ""
        return f"{model.kind}{means}, {model.block} blocks{norm}, features {_times(model.features, ', ')}"
    if isinstance(model, LibraryConfig):
        return model.title
    if isinstance(model, CustomConfig):
        return f"{model.name}, a network of {model.package or 'another package'}"
    frames = f"slices at {model.frame_size} × {model.frame_size}"
    prompts = _about_network(model.unet) if model.unet is not None else model.generator
    return f"{model.kind}, {model.backbone} on {frames}, {model.refinements} steps; prompts: {prompts}"


def _times(values: object, between: str = " × ") -> str:
    return between.join(str(v) for v in list(values))  # type: ignore[call-overload]


def _evaluation_figures(evaluation: Evaluation | None) -> list[dict[str, str]]:
    if evaluation is None:
        return []
    shown = [_key_figure(m, evaluation) for m in METRICS if m.name in ("dsc", "nsd", "hd95_mm")]
    number = f"{len(evaluation.classes)} classes" if len(evaluation.classes) != 1 else "1 class"
    return [*shown, {"title": "Cases", "value": str(len(evaluation.cases)), "note": number}]


def _key_figure(metric: Metric, evaluation: Evaluation) -> dict[str, str]:
    interval = evaluation.mean[metric.name]
    value = figure_text(interval.mean, metric.digits) + (f" {metric.unit}" if metric.unit else "")
    note = "mean over cases"
    if interval.low is not None:
        note = f"{figure_text(interval.low, metric.digits)} to {figure_text(interval.high, metric.digits)}"
    if counted := _counted(interval, evaluation):
        note = f"mean over {counted}" if interval.low is None else f"{note}, {counted}"
    return {"title": f"Mean {metric.title}", "value": value, "note": note}


def _counted(mean: Interval, evaluation: Evaluation) -> str:
    """How much a mean counts, if that is less than everything: "1 of 2 cases, 8 of 13 classes"."""
    cases, classes = len(evaluation.cases), len(evaluation.classes)
    parts = [f"{mean.cases} of {cases} cases"] if mean.cases < cases else []
    if mean.classes is not None and mean.classes < classes:
        parts.append(f"{mean.classes} of {classes} classes")
    return ", ".join(parts)


def _training_figures(training: Training | None) -> list[dict[str, str]]:
    if training is None or not training.epochs:
        return []
    rows = training.epochs
    figures = []
    scored = [row for row in rows if "score" in row]
    if scored:
        best = max(scored, key=lambda row: row["score"])
        note = f"best, epoch {int(best['epoch'])}; last {scored[-1]['score']:.3f}"
        figures.append({"title": "Validation score", "value": f"{best['score']:.3f}", "note": note})
    if "loss" in rows[-1]:
        figures.append({"title": "Training loss", "value": f"{rows[-1]['loss']:.3f}", "note": "mean of the last epoch"})
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    steps = int(rows[-1]["step"])
    note = f"{steps} steps, {len(rows)} epoch{'s' if len(rows) != 1 else ''}"
    figures.append({"title": "Training time", "value": _duration(seconds), "note": note})
    return figures


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _evaluation_context(evaluation: Evaluation, images: Path | None, labels: LabelSet | None) -> dict[str, object]:
    names = list(evaluation.classes)
    overlays, unshown = _overlays(evaluation, images, labels)
    notes = evaluation.notes()
    return {
        "metrics": METRICS,
        "tolerance": f"{evaluation.nsd_tolerance_mm:g}",
        "confidence": f"{100 * evaluation.confidence:g}",
        "samples": evaluation.bootstrap_samples,
        "policy": evaluation.empty_policy,
        "warnings": evaluation.warnings,
        "trained_on": notes[0] if evaluation.trained_on else None,
        "notes": notes[1:] if evaluation.trained_on else notes,
        "counted": lambda mean: _counted(mean, evaluation),
        "classes": evaluation.classes,
        "mean": evaluation.mean,
        "spread": _themed(lambda theme: spread_png(evaluation, "dsc", "DSC", theme=theme)),
        "columns": names if 1 < len(names) <= MAX_CLASS_COLUMNS else [],
        "cases": [_case_row(case, names) for case in evaluation.cases],
        "overlays": overlays,
        "unshown": unshown,
    }


def _case_row(case: CaseMetrics, names: list[str]) -> dict[str, object]:
    return {
        "id": case.id,
        "means": {m.name: _case_mean(case, m.name) for m in METRICS},
        "dsc": [case.classes[name].dsc for name in names],
    }


def _case_mean(case: CaseMetrics, metric: str) -> float | None:
    """Mean over the classes with a defined value."""
    values = [v for v in (getattr(scores, metric) for scores in case.classes.values()) if v is not None]
    return float(np.mean(values)) if values else None


def _overlays(
    evaluation: Evaluation, images: Path | None, labels: LabelSet | None
) -> tuple[list[CaseOverlay], list[str]]:
    """Draw the worst and the best cases by mean DSC, each once; also messages for cases that could not be drawn."""
    scored = [(score, case) for case in evaluation.cases if (score := _case_mean(case, "dsc")) is not None]
    ranked = sorted(scored, key=lambda pair: pair[0])
    worst = ranked[: min(PICTURED_CASES, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][::-1][:PICTURED_CASES]
    overlays: list[CaseOverlay] = []
    unshown: list[str] = []
    for group, chosen in (("Worst", worst), ("Best", best)):
        for score, case in chosen:
            try:
                png = case_png(Path(case.reference), Path(case.prediction), _image_of(images, case.id), labels)
            except RfMedSamError as error:
                unshown.append(f"{case.id}: {error}")
                continue
            source, details = png_uri(png), _lowest(case)
            overlays.append(CaseOverlay(id=case.id, group=group, score=score, source=source, details=details))
    if images is not None and scored and all(_image_of(images, case.id) is None for _, case in (*worst, *best)):
        logger.warning("No image of these cases is in %s: the overlays show contours alone", images)
    if unshown:
        logger.warning("%d of %d overlays are not in the report: %s", len(unshown), len(worst) + len(best), unshown[0])
    return overlays, unshown


def _lowest(case: CaseMetrics) -> str:
    """The classes with their DSC; if there are many, those with the lowest."""
    scored = [(s.dsc, name) for name, s in case.classes.items() if s.dsc is not None]
    if len(scored) > NAMED_CLASSES:
        return "lowest: " + ", ".join(f"{name} {dsc:.3f}" for dsc, name in sorted(scored)[:NAMED_CLASSES])
    return ", ".join(f"{name} {dsc:.3f}" for dsc, name in scored)


def _image_of(folder: Path | None, id: str) -> Path | None:
    """The file of a case's first channel, if it exists."""
    return channel_file(folder, id) if folder is not None and folder.is_dir() else None
