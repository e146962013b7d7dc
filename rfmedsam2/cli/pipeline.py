"""Commands of the pipeline: verify, plan and preprocess, train, predict, evaluate, report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rfmedsam2.cli.command import (
    AsJson,
    DatasetName,
    Device,
    Folds,
    Model,
    PlanName,
    Root,
    Set,
    StageName,
    Workers,
    command,
    end_if_stopped,
    layout_of,
    say,
    say_memory,
    trained_folder,
)
from rfmedsam2.errors import UsageError

Preset = Literal[
    "default", "cpu", "8gb", "24gb", "80gb", "nnunet", "nnunet_resenc_m", "nnunet_resenc_l", "nnunet_resenc_xl"
]

Backbone = Literal["sam2_tiny", "sam2_small", "sam2_base_plus", "sam2_large", "nano", "mobile_sam", "lite_medsam"]


def verify(*, dataset: DatasetName = None, root: Root = None, workers: Workers = 2, as_json: AsJson = False) -> None:
    """Read every file of a raw dataset once and report all faults of all cases."""
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import bars, table
    from rfmedsam2.pipeline.datasets.splits import read_splits
    from rfmedsam2.pipeline.datasets.verify import verify as run

    layout = layout_of(root)
    raw = resolve.raw_dataset(layout, dataset, os.environ)
    splits = layout.splits_file(raw.name)
    folds = read_splits(splits, [case.id for case in raw.training]) if splits.is_file() else ()
    report = run(raw, splits=folds, workers=workers, track=bars)
    if as_json:
        print(report.to_json())
    else:
        if report.faults:
            rows = [(f.severity, f.case, f.kind, f.message, f.remedy) for f in report.faults]
            table(f"Faults in {raw.name}", ("severity", "case", "kind", "what", "what to do"), rows)
        print(
            f"{raw.name}: {report.cases} cases, {report.files} files read in {report.seconds:.1f} s, "
            f"{len(report.errors)} error(s), {len(report.warnings)} warning(s)"
        )
    if report.errors:
        sys.exit(2)


def plan_and_preprocess(
    *,
    dataset: DatasetName = None,
    configurations: Annotated[tuple[str, ...], arg(aliases=("-c",), metavar="NAME")] = (),
    preset: Preset = "default",
    model: Annotated[Literal["unet", "rfmedsam2"], arg(metavar="unet|rfmedsam2")] = "unet",
    backbone: Annotated[Backbone | None, arg(metavar="NAME")] = None,
    plan: Annotated[str | None, arg(aliases=("-p",), metavar="NAME")] = None,
    set_: Set = (),
    nnunet_plans: Annotated[Path | None, arg(metavar="FILE")] = None,
    published: Annotated[Path | None, arg(metavar="FILE")] = None,
    planner: Annotated[str | None, arg(metavar="NAME")] = None,
    spacing: Annotated[tuple[float, float, float] | None, arg(metavar="MM")] = None,
    group_regex: Annotated[str | None, arg(metavar="REGEX")] = None,
    clean: bool = False,
    preprocess: bool = True,
    root: Root = None,
    workers: Workers = 2,
) -> None:
    """Verify and fingerprint a raw dataset, plan its networks, write its splits, preprocess its cases.

    Finished cases are skipped: run the same command again to continue after an interruption.

    Args:
        configurations: Configurations to preprocess; default: all of the plan except 2d.
        preset: Sizes by hardware: cpu (a laptop), 8gb, 24gb, 80gb (GPU memory), nnunet (nnU-Net's own
            decisions), default (RFMedSAM 2's patch of 32x256x256).
        model: A U-Net (unet), or a U-Net refined by SAM 2 (rfmedsam2).
        backbone: Image encoder of rfmedsam2: sam2_tiny, sam2_small, sam2_base_plus, sam2_large, nano (small,
            trained from scratch), mobile_sam or lite_medsam; default: by the preset.
        plan: Name of the plan; default: by its preset.
        nnunet_plans: Import nnU-Net's plans.json instead of planning.
        published: Adapt one of our plans, as in the folder plans/, to this dataset's intensities.
        planner: Use the planner of an installed package; rfmed_doctor lists them.
        spacing: Target spacing z y x in mm of 3d_fullres, instead of nnU-Net's rule.
        group_regex: Cases whose ids have the same first capture group of this regular expression are one patient.
        clean: Compute a new fingerprint even if no file has changed.
        preprocess: Preprocess the cases, or only verify and plan.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import bars, show_plan
    from rfmedsam2.pipeline.preprocessing.plan_and_preprocess import PlanOptions
    from rfmedsam2.pipeline.preprocessing.plan_and_preprocess import plan_and_preprocess as run

    layout = layout_of(root)
    raw = resolve.raw_dataset(layout, dataset, os.environ)
    options = PlanOptions(
        preset=preset,
        model=model,
        backbone=backbone,
        plan_name=plan,
        changes=set_,
        nnunet_plans=nnunet_plans,
        published=published,
        planner=planner,
        spacing_zyx_mm=spacing,
        group_regex=group_regex,
        clean=clean,
        tell=say_memory,
    )
    stages = (configurations or None) if preprocess else ()
    result = run(raw, layout, options, stages=stages, workers=workers, track=bars)
    show_plan(result.plan)
    print(f"Plan: {layout.plan_file(raw.name, result.plan.name)}")
    print(f"Splits: {len(result.splits)} fold(s) in {layout.splits_file(raw.name)}")
    for note in result.notes:
        print(f"Note: {note}")
    if result.preprocessed is not None:
        print(f"Preprocessed: {result.preprocessed}")


def train(
    words: Annotated[Positional[tuple[str, ...]], arg(metavar="[DATASET] CONFIGURATION [fold] FOLD")] = (),
    *,
    dataset: DatasetName = None,
    plan: PlanName = None,
    epochs: Annotated[int | None, arg(metavar="N")] = None,
    iterations: Annotated[int | None, arg(metavar="N")] = None,
    lr: Annotated[float | None, arg(metavar="RATE")] = None,
    sam2: Annotated[Path | None, arg(metavar="FILE")] = None,
    unet: Annotated[Path | None, arg(metavar="PATH")] = None,
    set_: Set = (),
    restart: bool = False,
    validate: bool = True,
    tensorboard: bool = False,
    device: Device = "auto",
    root: Root = None,
) -> None:
    """Train one fold; the same command resumes an interrupted training.

    Args:
        words: `3d_fullres fold 0`, or in nnU-Net's order `BTCV 3d_fullres 0`. A fold is a number, `all`, or the name of
            a split (btcv_24_6 ...).
        epochs: Number of epochs, instead of the plan's.
        iterations: Iterations per epoch, instead of the plan's.
        lr: Initial learning rate, instead of the plan's.
        sam2: Published weights of the plan's backbone (sam2.1_hiera_large.pt, mobile_sam.pt ...), for RFMedSAM 2.
        unet: A trained U-Net (checkpoint or model folder) that Step 0 of RFMedSAM 2 starts from.
        restart: Start over; existing results are moved to a folder beside it.
        validate: Predict and score the validation cases as whole volumes at the end, or skip this.
        tensorboard: Also write TensorBoard events (needs the extra `tensorboard`).
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import TrainingView, bars, show_scores
    from rfmedsam2.pipeline.training.train import TrainOptions
    from rfmedsam2.pipeline.training.train import train as run

    named, stage, fold = training_words(words)
    layout = layout_of(root)
    name = resolve.dataset_name(layout, named or dataset, os.environ, among="preprocessed")
    fields = {"epochs": epochs, "iterations_per_epoch": iterations, "learning_rate": lr}
    changes = [f"{stage}.train.{field}={value}" for field, value in fields.items() if value is not None]
    chosen = resolve.planned(layout, name, plan, stage=stage, changes=[*changes, *set_])
    say(f"Training {name}, plan {chosen.name}, {stage}, fold {fold}")
    with TrainingView() as view:
        options = TrainOptions(
            device=device,
            restart=restart,
            validate=validate,
            tensorboard=tensorboard,
            sam=sam2,
            unet=unet,
            show=view,
            track=bars,
        )
        result = run(layout, chosen, stage, fold=fold, options=options)
    progress = result.progress
    end_if_stopped(progress)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the main rank prints the result
    if view.steps:
        print(f"Trained {progress.step} steps in {progress.seconds / 60:.1f} min: {result.folder}")
    else:
        print(f"Already trained for {progress.step} steps: {result.folder} (start over with --restart)")
    if result.evaluation is not None:
        show_scores(result.evaluation)
        print(f"Report: {result.folder / 'report.html'}")


def predict(
    *,
    input_: Annotated[tuple[Path, ...], arg(name="input", aliases=("-i",), metavar="PATH")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    dataset: DatasetName = None,
    plan: PlanName = None,
    configuration: StageName = None,
    folds: Folds = (),
    model: Model = None,
    checkpoint: Literal["final", "best", "latest"] = "final",
    step_size: Annotated[float | None, arg(metavar="SHARE")] = None,
    mirror: Literal["on", "off"] | None = None,
    tile_batch: Annotated[int | None, arg(metavar="N")] = None,
    skip_empty: bool = False,
    step: Annotated[int | None, arg(metavar="N")] = None,
    boxes: Annotated[Path | None, arg(metavar="PATH")] = None,
    probabilities: bool = False,
    continue_: Annotated[bool, arg(name="continue")] = False,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Predict label maps for images: a folder, files, a list (.csv .json .txt) or a DICOM series.

    Without -d, -p, -c or -m the only trained model is used; if several match, they are listed.

    Args:
        input_: Images to predict.
        output: Output folder of the label maps and predictions.json.
        checkpoint: Checkpoint of each fold; the latest if training has not ended.
        step_size: Distance of tiles as a fraction of the patch, instead of the plan's.
        mirror: Average over flips (on) or not (off), instead of the plan's setting.
        tile_batch: Number of tiles per forward pass, instead of the plan's.
        skip_empty: Skip tiles without body: faster on scans with much surrounding air.
        step: For RFMedSAM 2: return the result of Step 0 (the U-Net), 1 or 2, instead of the last step.
        boxes: Box prompts for RFMedSAM 2 instead of its own: a folder of label maps (CASE + ending), or a JSON file
            {case: [{"label": name, "slice": z, "box": [x0, y0, x1, y1]}]} in voxels of the image.
        probabilities: Also write each case's class probabilities to a chunked file (blosc2).
        continue_: Keep label maps already made by the same model with the same options.
    """
    from rfmedsam2.cli.console import bars
    from rfmedsam2.inference.volume import PredictOptions
    from rfmedsam2.pipeline.prediction.predict import predict_files
    from rfmedsam2.pipeline.prediction.predictor import Predictor
    from rfmedsam2.store.input_discovery import find_cases

    folder = model or trained_folder(layout_of(root), dataset, plan, configuration)
    flips = None if mirror is None else mirror == "on"
    options = PredictOptions(step_size=step_size, mirror=flips, tile_batch=tile_batch, skip_empty=skip_empty, step=step)
    predictor = Predictor.load(folder, folds=folds or None, checkpoint=checkpoint, device=device, options=options)
    say(f"Model: {folder}, fold(s) {', '.join(m.fold for m in predictor.models)}, on {predictor.device}")
    source = input_[0] if len(input_) == 1 else list(input_)
    cases = find_cases(source, channels=len(predictor.plan.channels), file_ending=predictor.plan.file_ending)
    done = predict_files(
        predictor, cases, output, boxes=boxes, continue_=continue_, probabilities=probabilities, track=bars
    )
    if as_json:
        lists = {"written": [str(p) for p in done.written], "kept": [str(p) for p in done.kept]}
        print(json.dumps({"output": str(output), "seconds": round(done.seconds, 3), **lists}, indent=2))
    else:
        print(f"Predicted {len(done.written)} case(s) in {done.seconds:.1f} s, kept {len(done.kept)}: {output}")


def evaluate(
    *,
    predictions: Annotated[Path, arg(aliases=("-p",), metavar="PATH")],
    references: Annotated[Path, arg(aliases=("-g",), metavar="PATH")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    dataset: DatasetName = None,
    labels: Annotated[Path | None, arg(metavar="FILE")] = None,
    tolerance: Annotated[float, arg(metavar="MM")] = 2.0,
    both_empty: Literal["skip", "perfect"] = "skip",
    root: Root = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Score label maps: DSC, IoU, NSD, HD95, volume error per case and class, with confidence intervals.

    Args:
        predictions: Folder of predicted label maps, or one file.
        references: Folder of reference label maps, or one file.
        output: Output folder of metrics.json and metrics.csv.
        labels: A dataset.json with the labels; default: that of -d, or the one beside the label maps.
        tolerance: Tolerance of the normalized surface Dice.
        both_empty: Score of a class that is absent from both label maps.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import bars, show_scores
    from rfmedsam2.pipeline.evaluation.evaluate import evaluate as run

    beside = (references, predictions)
    names = resolve.labels_for(layout_of(root), os.environ, dataset=dataset, file=labels, beside=beside)
    result = run(
        predictions,
        references,
        names,
        out=output,
        nsd_tolerance_mm=tolerance,
        both_empty=both_empty,
        workers=workers,
        track=bars,
    )
    if as_json:
        print(result.to_json())
        return
    show_scores(result)
    print(f"Written: {output / 'metrics.json'}, {output / 'metrics.csv'}")


def report(
    *,
    output: Annotated[Path, arg(aliases=("-o",), metavar="FILE")],
    training: Annotated[Path | None, arg(aliases=("-t",), metavar="DIR")] = None,
    evaluation: Annotated[Path | None, arg(aliases=("-e",), metavar="FILE")] = None,
    images: Annotated[Path | None, arg(aliases=("-i",), metavar="DIR")] = None,
    title: str | None = None,
) -> None:
    """Write one self-contained HTML page: curves, tables, overlays of the best and worst cases.

    Args:
        output: The page to write.
        training: Folder of a trained fold, for its curves.
        evaluation: A metrics.json, for its tables and overlays.
        images: Images of the evaluated cases, drawn below the contours.
        title: Heading of the page.
    """
    from rfmedsam2.pipeline.evaluation.report import write_report
    from rfmedsam2.records.report import Evaluation
    from rfmedsam2.store.atomic import read_record

    if images is not None and not images.is_dir():
        raise UsageError("The folder of images does not exist", where=images, remedy="Check the path given with -i")
    scores = read_record(evaluation, Evaluation) if evaluation else None
    write_report(output, title=title or output.stem, training=training, evaluation=scores, images=images)
    print(f"Written: {output}")


def training_words(words: Sequence[str]) -> tuple[str | None, str, str]:
    """Parse `3d_fullres fold 0`, `BTCV 3d_fullres 0`, `3d_fullres 0` or `3d_fullres`: (dataset, configuration, fold).

    Raises:
        UsageError: no words, or more than three.
    """
    rest = [word for word in words if word != "fold"]
    if len(rest) == 1:
        return None, rest[0], "0"
    if len(rest) == 2:
        return None, rest[0], rest[1]
    if len(rest) == 3:
        return rest[0], rest[1], rest[2]
    raise UsageError(
        "The configuration to train is missing",
        expected="a configuration and a fold: rfmed_train 3d_fullres fold 0, or rfmed_train BTCV 3d_fullres 0",
        found=" ".join(words) or "nothing",
    )


verify_command = command(verify)
plan_and_preprocess_command = command(plan_and_preprocess)
train_command = command(train)
predict_command = command(predict)
evaluate_command = command(evaluate)
report_command = command(report)
