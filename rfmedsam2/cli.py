"""The commands. The only place that prints, reads environment variables and imports late.

Each command is a plain function; its flags come from its signature and docstring. `--help` is answered before anything
heavy is imported. An error that a user can meet is printed as a sentence and ends with exit code 2; `--debug` shows its
traceback as well.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from rfmedsam2.errors import RfMedSamError, UsageError
from rfmedsam2.store.layout import Layout

if TYPE_CHECKING:
    from rfmedsam2.pipeline.share import TrainedModel
    from rfmedsam2.records.dataset import LabelSet
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.store.raw import RawDataset

Root = Annotated[Path | None, arg(metavar="DIR", help="Folder of raw/ preprocessed/ results/; else RFMED_ROOT, "
                                  "nnU-Net's three variables, or ./rfmed_data.")]
AsJson = Annotated[bool, arg(name="json", help="Print the answer as JSON.")]
DatasetName = Annotated[str | None, arg(aliases=("-d",), metavar="NAME", help="Id (217), name (BTCV) or folder "
                                        "(Dataset217_BTCV); else RFMED_DATASET, or the only one there is.")]
PlanName = Annotated[str | None, arg(aliases=("-p",), name="plan", metavar="NAME",
                                     help="Plan; needed only where there are several.")]
StageName = Annotated[str | None, arg(aliases=("-c",), name="configuration", metavar="NAME",
                                      help="2d, 3d_fullres or 3d_lowres.")]
Folds = Annotated[tuple[str, ...], arg(aliases=("-f",), metavar="FOLD", help="All trained folds if none is given.")]
Device = Annotated[str, arg(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[int, arg(metavar="N", help="Cases worked on at once.")]
Input = Annotated[tuple[Path, ...], arg(aliases=("-i",), name="input", metavar="PATH")]
Output = Annotated[Path, arg(aliases=("-o",), name="output", metavar="PATH")]
Set = Annotated[tuple[str, ...], arg(name="set", metavar="FIELD=VALUE", help="Change plan fields, for instance "
                                     "3d_fullres.train.learning_rate=0.01.")]
Preset = Literal["default", "nnunet", "nnunet_resenc_m", "nnunet_resenc_l", "nnunet_resenc_xl",
                 "cpu", "8gb", "24gb", "80gb"]


def verify(dataset: DatasetName = None, *, root: Root = None, workers: Workers = 2, as_json: AsJson = False) -> None:
    """Read every file of a raw dataset once and report all faults of all cases."""
    from rfmedsam2.pipeline.splits import read_splits
    from rfmedsam2.pipeline.verify import verify as run

    layout, raw = _raw_dataset(root, dataset)
    splits_file = layout.splits_file(raw.name)
    splits = read_splits(splits_file) if splits_file.is_file() else ()
    report = run(raw, splits=splits, workers=workers, track=_bars())
    if as_json:
        print(report.to_json())
    else:
        from rfmedsam2.console import table

        if report.faults:
            table(f"Faults in {raw.name}", ("severity", "case", "kind", "what", "remedy"),
                  ((f.severity, f.case, f.kind, f.message, f.remedy) for f in report.faults))
        print(f"{raw.name}: {report.cases} cases, {report.files} files, {report.errors} errors, "
              f"{len(report.faults) - report.errors} warnings in {report.seconds:.1f} s")
    if report.errors:
        sys.exit(2)


def plan_and_preprocess(
    dataset: DatasetName = None,
    *,
    configurations: Annotated[tuple[str, ...], arg(aliases=("-c",), metavar="NAME")] = (),
    preset: Preset = "default",
    plan: PlanName = None,
    set_: Set = (),
    nnunet_plans: Annotated[Path | None, arg(metavar="FILE")] = None,
    spacing: Annotated[tuple[float, float, float] | None, arg(metavar="MM")] = None,
    groups: Annotated[str | None, arg(name="group-regex", metavar="REGEX")] = None,
    clean: bool = False,
    preprocess: bool = True,
    root: Root = None,
    workers: Workers = 2,
) -> None:
    """Verify and fingerprint a raw dataset, plan its networks, write its splits, preprocess its cases.

    Finished cases are skipped, so that the same command goes on where it was interrupted.

    Args:
        configurations: Stages to preprocess; those of the plan but 2d if none is given.
        preset: Sizes for what is at hand: cpu (a laptop), 8gb, 24gb, 80gb (GPU memory), nnunet (nnU-Net's own
            decisions), default (RFMedSAM 2's patch of 32x256x256).
        nnunet_plans: Take the decisions from nnU-Net's plans.json instead of planning.
        spacing: Target spacing z y x in mm of 3d_fullres instead of nnU-Net's rule.
        groups: Cases whose ids give the same first group of this expression are one patient and never split.
        clean: Take a new fingerprint even if the files have not changed.
        preprocess: Also preprocess, not only plan.
    """
    from rfmedsam2.pipeline.setup import SetupRequest, set_up

    layout, raw = _raw_dataset(root, dataset)
    request = SetupRequest(
        preset=preset, plan_name=plan, changes=set_, nnunet_plans=nnunet_plans, spacing_zyx_mm=spacing,
        group_regex=groups, clean=clean, stages=configurations, preprocess=preprocess, workers=workers,
    )
    result = set_up(raw, layout, request, track=_bars())
    _print_plan(result.plan)
    print(f"Plan: {layout.plan_file(raw.name, result.plan.name)}")
    for note in result.notes:
        print(note)
    for stage, summary in result.preprocessed.items():
        print(f"{stage}: {summary}")


def train(
    words: Positional[Annotated[tuple[str, ...], arg(metavar="[DATASET] CONFIGURATION [fold] FOLD")]],
    *,
    dataset: DatasetName = None,
    plan: PlanName = None,
    epochs: int | None = None,
    iterations: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    set_: Set = (),
    restart: bool = False,
    validate: bool = True,
    tensorboard: bool = False,
    device: Device = "auto",
    root: Root = None,
) -> None:
    """Train one fold; the same command continues a training that was interrupted.

    Args:
        words: rfmed_train 3d_fullres fold 0, or in nnU-Net's order rfmed_train BTCV 3d_fullres 0. A fold is a number,
            `all`, or a named split such as btcv_24_6.
        epochs: Instead of the plan's.
        iterations: Per epoch, instead of the plan's.
        lr: Initial learning rate, instead of the plan's.
        seed: Instead of the plan's.
        restart: Begin anew; what was trained before is kept beside it under another name.
        validate: Predict and score the validation cases as whole volumes at the end.
        tensorboard: Also write TensorBoard events (needs the extra `tensorboard`).
    """
    from rfmedsam2.console import TrainingView
    from rfmedsam2.pipeline.splits import fold_split
    from rfmedsam2.pipeline.train import TrainOptions
    from rfmedsam2.pipeline.train import train as run

    named, stage, fold = training_words(words)
    layout = _layout(root)
    name = layout.dataset_name(_wanted(layout, named or dataset))
    chosen = _plan(layout, name, plan)
    fields = {"epochs": epochs, "iterations_per_epoch": iterations, "learning_rate": lr, "seed": seed}
    changes = [f"{stage}.train.{field}={value}" for field, value in fields.items() if value is not None]
    chosen = _changed(chosen, (*changes, *set_))
    split = fold_split(layout, name, fold)
    train_config = chosen.stages[stage].train if stage in chosen.stages else None
    view = TrainingView(train_config.iterations if train_config else 0)
    options = TrainOptions(
        device=device, restart=restart, validate=validate, tensorboard=tensorboard, show=view, track=_bars()
    )
    try:
        result = run(layout, chosen, stage, fold=fold, split=split, options=options)
    finally:
        view.close()
    print(result.summary())


def predict(
    input_: Input,
    output: Output,
    *,
    dataset: DatasetName = None,
    plan: PlanName = None,
    configuration: StageName = None,
    folds: Folds = (),
    model: Annotated[Path | None, arg(aliases=("-m",), metavar="DIR")] = None,
    checkpoint: Literal["final", "best", "latest"] = "final",
    step_size: float | None = None,
    mirror: bool | None = None,
    tile_batch: int | None = None,
    skip_empty: bool = False,
    probabilities: bool = False,
    continue_: Annotated[bool, arg(name="continue")] = False,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Predict label maps for images: a folder, files, a list (.csv .json .txt) or a DICOM series.

    Without -d, -p, -c or -m the only trained model is taken; where several fit, they are listed.

    Args:
        input_: What to predict.
        output: Folder for the label maps and predictions.json.
        model: Folder with fold_0 ..., instead of choosing by dataset, plan and configuration.
        checkpoint: Which checkpoint of each fold; the latest where there is no such one.
        step_size: Distance of tiles as a share of the patch, instead of the plan's.
        mirror: Average over flips, instead of what the plan says.
        tile_batch: Tiles per forward pass, instead of the plan's.
        skip_empty: Leave out tiles without body: faster on scans with much air.
        probabilities: Also write each case's probabilities into a chunked file (blosc2).
        continue_: Skip cases that the same model with the same options has already predicted.
    """
    from rfmedsam2.pipeline.predict import PredictOptions, Predictor, predict_files
    from rfmedsam2.store.raw import find_cases

    folder = model or _model(_layout(root), dataset, plan, configuration).folder
    options = PredictOptions(
        step_size=step_size, mirror=mirror, tile_batch=tile_batch, skip_empty=skip_empty, device=device
    )
    predictor = Predictor.load(folder, folds=folds or None, checkpoint=checkpoint, options=options)
    _say(f"Model: {folder}, folds {', '.join(predictor.folds)}, {predictor.device}")
    cases = find_cases(
        list(input_) if len(input_) > 1 else input_[0],
        channels=len(predictor.plan.channels), file_ending=predictor.plan.file_ending,
    )
    summary = predict_files(
        predictor, cases, output, continue_=continue_, probabilities=probabilities, track=_bars()
    )
    print(json.dumps(summary.as_dict(), indent=2) if as_json else summary)


def evaluate(
    predictions: Annotated[Path, arg(aliases=("-p",), metavar="PATH")],
    references: Annotated[Path, arg(aliases=("-g",), metavar="PATH")],
    output: Output,
    *,
    dataset: DatasetName = None,
    labels: Annotated[Path | None, arg(metavar="FILE")] = None,
    tolerance: float = 2.0,
    both_empty: Literal["skip", "one"] = "skip",
    root: Root = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Score label maps: DSC, IoU, NSD, HD95 and volume error per case and class, with confidence intervals.

    Args:
        predictions: Folder of predicted label maps, or one file.
        references: Folder of reference label maps, or one file.
        output: Folder for metrics.json and metrics.csv.
        labels: A dataset.json that names the labels; else -d, the predictions' own sidecar, or the file beside the
            references.
        tolerance: Of the normalised surface Dice, mm.
        both_empty: How a class counts that neither label map holds.
    """
    from rfmedsam2.pipeline.evaluate import evaluate as run

    names = _label_set(root, dataset, labels, predictions, references)
    result = run(
        predictions, references, names, out=output, nsd_tolerance_mm=tolerance, both_empty=both_empty,
        workers=workers, track=_bars(),
    )
    if as_json:
        print(result.to_json())
        return
    _print_scores(result)
    print(f"Written: {output / 'metrics.json'}, {output / 'metrics.csv'}")


def report(
    output: Output,
    *,
    training: Annotated[Path | None, arg(aliases=("-t",), metavar="DIR")] = None,
    evaluation: Annotated[Path | None, arg(aliases=("-e",), metavar="FILE")] = None,
    images: Annotated[Path | None, arg(aliases=("-i",), metavar="DIR")] = None,
    title: str | None = None,
) -> None:
    """Write one self-contained HTML page: curves, tables, overlays of the best and worst cases.

    Args:
        output: The page to write, .html.
        training: Folder of a trained fold: its curves.
        evaluation: A metrics.json: its tables.
        images: Images of the evaluated cases: overlays.
        title: Heading of the page.
    """
    from rfmedsam2.pipeline.report import write_report
    from rfmedsam2.records.report import Evaluation
    from rfmedsam2.store.files import read_record

    if training is None and evaluation is None:
        raise UsageError("Nothing to report on", expected="--training or --evaluation",
                         remedy="Name a trained fold with -t, a metrics.json with -e, or both")
    scores = read_record(evaluation, Evaluation) if evaluation else None
    write_report(output, title=title or output.stem, training=training, evaluation=scores, images=images)
    print(f"Written: {output}")


def submit(
    challenge: Positional[Literal["amos22"]],
    predictions: Annotated[Path, arg(aliases=("-i",), metavar="DIR")],
    images: Annotated[Path, arg(metavar="DIR")],
    output: Output,
    *,
    as_json: AsJson = False,
) -> None:
    """Check predictions against the images that a challenge expects them for, and pack them for upload.

    Args:
        challenge: Which rules.
        predictions: Folder of predicted label maps.
        images: Folder of the challenge's images.
        output: The zip to write; nothing is written if there are faults.
    """
    from rfmedsam2.pipeline.submit import submit_amos22

    assert challenge == "amos22"
    result = submit_amos22(predictions, images, output)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print(result)


def export_model(
    output: Output,
    *,
    dataset: DatasetName = None,
    plan: PlanName = None,
    configuration: StageName = None,
    folds: Folds = (),
    model: Annotated[Path | None, arg(aliases=("-m",), metavar="DIR")] = None,
    root: Root = None,
) -> None:
    """Pack a trained model into one zip with a manifest and hashes.

    Args:
        output: The zip to write.
        model: Folder with fold_0 ..., instead of choosing by dataset, plan and configuration.
    """
    from rfmedsam2.pipeline.share import export_model as run

    folder = model or _model(_layout(root), dataset, plan, configuration).folder
    manifest = run(folder, output, folds=folds or None)
    print(f"Written: {output} ({len(manifest.files)} files of {folder})")


def import_model(
    archive: Positional[Annotated[Path, arg(metavar="ZIP")]], *, force: bool = False, root: Root = None
) -> None:
    """Unpack a model made by rfmed_export_model, after checking every hash.

    Args:
        archive: The zip.
        force: Replace a model of the same name.
    """
    from rfmedsam2.pipeline.share import import_model as run

    print(f"Imported: {run(archive, _layout(root), force=force)}")


def make_phantom(
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    *,
    cases: int = 8,
    test_cases: int = 2,
    shape: tuple[int, int, int] = (40, 96, 96),
    modality: Literal["ct", "mr"] = "ct",
    seed: int = 0,
    force: bool = False,
    root: Root = None,
) -> None:
    """Make a synthetic abdominal dataset with BTCV's 13 labels, to try everything without data.

    Args:
        output: Raw folder to put it in; else raw/ of the root.
        shape: Largest number of voxels z y x.
        force: Replace what is there.
    """
    from rfmedsam2.pipeline.phantom import make_phantom as run

    folder = run(output or _layout(root).raw, cases=cases, test_cases=test_cases, shape_zyx=shape, modality=modality,
                 seed=seed, force=force, track=_bars())
    print(f"Written: {folder}")


def doctor(*, root: Root = None, as_json: AsJson = False) -> None:
    """Show versions, devices, memory and folders, and what to mend."""
    from rfmedsam2.pipeline.doctor import doctor as run

    layout, source = _layout_and_source(root)
    result = run(layout, source=source)
    print(result.to_json() if as_json else result)


def training_words(words: Sequence[str]) -> tuple[str | None, str, str]:
    """(dataset, stage, fold) of `3d_fullres fold 0`, `BTCV 3d_fullres 0`, `3d_fullres 0` or `3d_fullres`.

    Raises:
        UsageError: any other number of words.
    """
    rest = [word for word in words if word != "fold"]
    if len(rest) == 1:
        return None, rest[0], "0"
    if len(rest) == 2:
        return None, rest[0], rest[1]
    if len(rest) == 3:
        return rest[0], rest[1], rest[2]
    raise UsageError("The training is not named", expected="rfmed_train 3d_fullres fold 0, or BTCV 3d_fullres 0",
                     found=" ".join(words) or "nothing")
