"""Commands of the pipeline: verify, plan and preprocess, train, predict, evaluate, report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from rfmedsam2.arguments import Part
from rfmedsam2.cli.command import command, end_if_stopped, layout_of, say, say_memory, tell, tell_json
from rfmedsam2.cli.flag_groups import (
    Cascade,
    GivenDecisions,
    InitialWeights,
    LabelNames,
    PlanChoice,
    Planning,
    PredictOutput,
    Preprocessing,
    Refinement,
    Schedule,
    Scoring,
    Tiles,
    TrainRun,
)
from rfmedsam2.cli.flags import AsJson, DatasetName, ModelChoice, Root, Workers
from rfmedsam2.cli.training_flags import (
    named,
    require_consistent,
    training_words,
    what_is_trained,
    with_encoder_rate,
    with_refinement,
)
from rfmedsam2.errors import UsageError, shortlist
from rfmedsam2.system.ranks import ranks_of

if TYPE_CHECKING:
    from rfmedsam2.pipeline.prediction.predictor import Predictor
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.store.layout import Layout
    from rfmedsam2.store.raw import RawDataset


def verify(*, dataset: DatasetName = None, root: Root = None, workers: Workers = 2, as_json: AsJson = False) -> None:
    """Read every file of a raw dataset once and report all faults of all cases."""
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import table
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.datasets import verify as verb
    from rfmedsam2.pipeline.datasets.splits import read_splits

    layout = layout_of(root)
    raw = resolve.raw_dataset(layout, dataset, os.environ)
    splits = layout.splits_file(raw.name)
    folds = read_splits(splits, [case.id for case in raw.training]) if splits.is_file() else ()
    report = verb.verify(raw, splits=folds, workers=workers, track=bars)
    if as_json:
        tell_json(report.to_json())
    else:
        if report.faults:
            rows = [(f.severity, f.case, f.kind, f.message, f.remedy) for f in report.faults]
            table(f"Faults in {raw.name}", ("severity", "case", "kind", "what", "what to do"), rows)
        tell(
            f"{raw.name}: {report.cases} cases, {report.files} files read in {report.seconds:.1f} s, "
            f"{len(report.errors)} error(s), {len(report.warnings)} warning(s)"
        )
    if report.errors:
        sys.exit(2)


def plan_and_preprocess(
    *, data: Preprocessing = Preprocessing(), planning: Planning = Planning(), given: GivenDecisions = GivenDecisions()
) -> None:
    """Verify and fingerprint a raw dataset, plan its networks, write its splits, preprocess its cases.

    Finished cases are skipped: run the same command again to continue after an interruption.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import show_plan
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.preprocessing import plan_and_preprocess as verb

    layout = layout_of(data.root)
    raw = resolve.raw_dataset(layout, data.dataset, os.environ)
    options = verb.PlanOptions(
        preset=planning.preset,
        gpu_memory_gb=planning.gpu_memory,
        model=planning.model,
        backbone=planning.backbone,
        plan_name=planning.plan,
        changes=planning.set_,
        nnunet_plans=given.nnunet_plans,
        published=given.published,
        plan_of=given.plan_of,
        planner=given.planner,
        spacing_zyx_mm=given.spacing,
        group_regex=data.group_regex,
        clean=data.clean,
        skip_faulty=data.skip_faulty,
        skip_unlabeled=data.skip_unlabeled,
        tell=say_memory,
    )
    if data.part is not None:
        _preprocess_part(raw, layout, data, planning, given)
        return
    stages = (data.configurations or None) if data.preprocess else ()
    result = verb.plan_and_preprocess(raw, layout, options, stages=stages, workers=data.workers, track=bars)
    show_plan(result.plan)
    tell(f"Plan: {layout.plan_file(raw.name, result.plan.name)}")
    tell(f"Splits: {len(result.splits)} fold(s) in {layout.splits_file(raw.name)}")
    for note in result.notes:
        tell(f"Note: {note}")
    if result.preprocessed is not None:
        tell(f"Preprocessed: {result.preprocessed}")


def _preprocess_part(
    raw: RawDataset, layout: Layout, data: Preprocessing, planning: Planning, given: GivenDecisions
) -> None:
    """Make a part of the cases of a plan that exists."""
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.preprocessing import plan_and_preprocess as verb

    part = Part.parse(data.part)
    asked = Preprocessing(
        dataset=data.dataset, configurations=data.configurations, part=data.part, root=data.root, workers=data.workers
    )
    if (data, planning, given) != (asked, Planning(plan=planning.plan), GivenDecisions()):
        raise UsageError(
            "A part of the cases is made by a plan that exists, and nothing is planned",
            where=f"--part {part}",
            expected="no other options than -d, -p, -c, --workers and --root",
            remedy="Plan first, with the same command without --part and with --no-preprocess",
        )
    plan = resolve.planned(layout, raw.name, planning.plan, stage=None)
    stages = data.configurations or None
    done = verb.preprocess_part(raw, layout, plan, part, stages=stages, workers=data.workers, track=bars)
    tell(f"Preprocessed part {part} of {plan.name}: {done}")


def train(
    words: Annotated[Positional[tuple[str, ...]], arg(metavar="[DATASET] CONFIGURATION [[fold] FOLD]")] = (),
    *,
    plan: PlanChoice = PlanChoice(),
    schedule: Schedule = Schedule(),
    start: InitialWeights = InitialWeights(),
    run: TrainRun = TrainRun(),
) -> None:
    """Train one fold; the same command resumes an interrupted training.

    Args:
        words: `3d_fullres fold 0`, or in nnU-Net's order `BTCV 3d_fullres 0`. A fold is a number (without one: 0),
            `all`, or the name of a split (btcv_24_6 ...).
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.progress import bars

    given, stage, fold = training_words(words)
    require_consistent(run)
    layout = layout_of(plan.root)
    name = resolve.dataset_name(layout, given or plan.dataset, os.environ, among="preprocessed")
    fields = {"epochs": schedule.epochs, "iterations_per_epoch": schedule.iterations, "learning_rate": schedule.lr}
    changes = [f"{stage}.train.{field}={value}" for field, value in fields.items() if value is not None]
    chosen = resolve.planned(layout, name, plan.plan, stage=stage, changes=[*changes, *plan.set_])
    chosen = with_refinement(chosen, stage, step0=start.step0, cache=start.cache)
    chosen = named(with_encoder_rate(chosen, stage, start.encoder_rate), run.name, layout)
    if run.validate_only:
        _validate(layout, chosen, stage, fold, run)
        return
    folder = layout.fold_folder(name, chosen.name, stage, fold)
    say(what_is_trained(chosen, stage, fold, folder, restart=run.restart))
    with bars.training():
        # only now, so that the line above comes at once: what trains takes seconds to load
        from rfmedsam2.pipeline.training import train as verb

        options = verb.TrainOptions(
            device=run.device,
            restart=run.restart,
            validate=run.validate,
            probabilities=run.probabilities,
            trackers=run.trackers,
            weights=start.weights,
            sam=start.sam2,
            unet=start.unet,
            progress=bars,
        )
        result = verb.train(layout, chosen, stage, fold=fold, options=options)
    progress = result.progress
    end_if_stopped(progress)
    if not ranks_of(os.environ).is_main:
        return  # the main rank prints the result
    if bars.steps:
        tell(f"Trained {progress.step} steps in {progress.seconds / 60:.1f} min: {result.folder}")
    else:
        tell(f"Already trained for {progress.step} steps: {result.folder} (start over with --restart)")
    if result.evaluation is not None:
        from rfmedsam2.cli.console import show_scores

        show_scores(result.evaluation)
        tell(f"Report: {result.folder / 'report.html'}")


def _validate(layout: Layout, plan: Plan, stage: str, fold: str, run: TrainRun) -> None:
    """Score the trained weights of a fold on its validation cases."""
    from rfmedsam2.cli.console import show_scores
    from rfmedsam2.cli.progress import bars

    with bars.working(f"Validating {plan.dataset}, plan {plan.name}, {stage}, fold {fold}"):
        from rfmedsam2.pipeline.training.validation import VALIDATION, validate

    scores = validate(
        layout,
        plan,
        stage,
        fold=fold,
        checkpoint=run.checkpoint,
        probabilities=run.probabilities,
        device=run.device,
        progress=bars,
    )
    folder = layout.fold_folder(plan.dataset, plan.name, stage, fold) / VALIDATION[run.checkpoint]
    if scores is None:
        tell(f"Predicted, but not scored: {folder}")
    else:
        show_scores(scores)
        tell(f"Scores: {folder / 'metrics.csv'}")


def predict(
    *,
    input_: Annotated[tuple[Path, ...], arg(name="input", aliases=("-i",), metavar="PATH")],
    output: PredictOutput,
    model: ModelChoice = ModelChoice(),
    tiles: Tiles = Tiles(),
    refinement: Refinement = Refinement(),
    cascade: Cascade = Cascade(),
) -> None:
    """Predict label maps for images: a folder, files, a list (.csv .json .txt) or a DICOM series.

    Args:
        input_: Images to predict.
    """
    from rfmedsam2.cli.progress import bars

    part = None if output.part is None else Part.parse(output.part)
    sources = model.sources()
    named = " + ".join(map(str, sources))
    with bars.working(f"Loading {named}"):
        from rfmedsam2.cli.resolve import cache_folder
        from rfmedsam2.inference.volume import PredictOptions
        from rfmedsam2.pipeline.datasets.label_formats import PredictedFormats
        from rfmedsam2.pipeline.prediction.predict import predict_files
        from rfmedsam2.pipeline.prediction.predictor import Predictor
        from rfmedsam2.store.input_discovery import find_cases

        options = PredictOptions(
            step_size=tiles.step_size,
            mirror=None if tiles.mirror is None else tiles.mirror == "on",
            tile_batch=tiles.tile_batch,
            skip_empty=tiles.skip_empty,
            precision=tiles.precision,
            backend=tiles.backend,
            cache_folder=cache_folder(os.environ),
            step=refinement.step,
        )
        predictor = Predictor.load(
            sources,
            folds=model.folds or None,
            checkpoint=tiles.checkpoint,
            device=tiles.device,
            options=options,
            postprocessing=output.postprocessing,
            previous=cascade.previous_stage,
        )
    _say_model(named, predictor)
    source = input_[0] if len(input_) == 1 else list(input_)
    cases = find_cases(source, channels=len(predictor.plan.channels), file_ending=predictor.plan.file_ending)
    formats = PredictedFormats(cases, output.output, output.formats, part=part, **output.replacing)
    done = predict_files(
        predictor,
        cases,
        output.output,
        boxes=refinement.boxes,
        probabilities=output.probabilities,
        part=part,
        track=bars,
        **output.replacing,
    )
    formats.write(done.written, (*done.kept, *done.corrected), predictor.plan.labels)
    if done.corrected:
        names = shortlist(path.name for path in done.corrected)
        say(f"Kept {len(done.corrected)} label map(s) that this model did not make or that were changed since: {names}")
    if output.as_json:
        lists = {name: [str(p) for p in getattr(done, name)] for name in ("written", "kept", "corrected")}
        tell_json(json.dumps({"output": str(output.output), "seconds": round(done.seconds, 3), **lists}, indent=2))
    else:
        kept = f"kept {len(done.kept) + len(done.corrected)}"
        tell(f"Predicted {len(done.written)} case(s) in {done.seconds:.1f} s, {kept}: {output.output}")


def _say_model(named: str, predictor: Predictor) -> None:
    """Print which networks predict, where, and by which backend; and why, where that was found out now."""
    for note in predictor.notes:
        say(note)
    folds, backend = ", ".join(m.fold for m in predictor.models), predictor.settings()["backend"]
    say(f"Model: {named}, fold(s) {folds}, on {predictor.device}, by {backend}")


def evaluate(
    *,
    predictions: Annotated[Path, arg(aliases=("-p",), metavar="PATH")],
    references: Annotated[Path, arg(aliases=("-g",), metavar="PATH")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    labels: LabelNames = LabelNames(),
    scoring: Scoring = Scoring(),
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Score label maps: DSC, IoU, NSD, HD95, volume error per case and class, with confidence intervals.

    Args:
        predictions: Folder of predicted label maps, or one file.
        references: Folder of reference label maps, or one file.
        output: Output folder of metrics.json and metrics.csv.
        overwrite: Replace files of these names that another program wrote, too.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import show_scores
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.evaluation import evaluate as verb
    from rfmedsam2.records.report import Evaluation

    files = (output / "metrics.json", output / "metrics.csv")
    require_replaceable(files, Evaluation.load, overwrite=overwrite, inputs=(predictions, references))
    names = resolve.labels_for(layout_of(labels.root), os.environ, dataset=labels.dataset, file=labels.labels)
    result = verb.evaluate(
        predictions,
        references,
        names,
        out=output,
        cases=scoring.cases or None,
        nsd_tolerance_mm=scoring.tolerance,
        both_empty=scoring.both_empty,
        workers=scoring.workers,
        progress=bars,
    )
    if as_json:
        tell_json(result.to_json())
        return
    show_scores(result)
    tell(f"Written: {output / 'metrics.json'}, {output / 'metrics.csv'}")


def report(
    *,
    output: Annotated[Path, arg(aliases=("-o",), metavar="FILE")],
    training: Annotated[Path | None, arg(aliases=("-t",), metavar="DIR")] = None,
    evaluation: Annotated[Path | None, arg(aliases=("-e",), metavar="FILE")] = None,
    images: Annotated[Path | None, arg(aliases=("-i",), metavar="DIR")] = None,
    title: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one self-contained HTML page: curves, tables, overlays of the best and worst cases.

    Args:
        output: The page to write.
        training: Folder of a trained fold, for its curves.
        evaluation: A metrics.json or its folder, for its tables and overlays.
        images: Images of the evaluated cases, drawn below the contours.
        title: Heading of the page.
        overwrite: Replace a file of another kind, too.
    """
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.evaluation.report import write_report
    from rfmedsam2.reporting.html import require_page
    from rfmedsam2.system.ordinary_files import require_folder

    require_replaceable((output,), require_page, overwrite=overwrite, inputs=(training, evaluation, images))
    if images is not None:
        require_folder(images, "folder of images")
    if evaluation is not None and evaluation.is_dir():
        evaluation /= "metrics.json"
    write_report(output, title=title or output.stem, training=training, evaluation=evaluation, images=images)
    tell(f"Written: {output}")


verify_command = command(verify)
plan_and_preprocess_command = command(plan_and_preprocess)
train_command = command(train)
predict_command = command(predict)
evaluate_command = command(evaluate)
report_command = command(report)
