"""Commands for data and models: phantoms, converters, submissions, model archives; and the doctor."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rfmedsam2.choices import LabelFormat
from rfmedsam2.cli.command import command, layout_of, tell, tell_json
from rfmedsam2.cli.flags import FORMAT, AsJson, ModelChoice, Root
from rfmedsam2.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PhantomSize:
    """What is made; the same seed gives the same dataset."""

    cases: Annotated[int, arg(help="Number of labeled training cases.")] = 8
    test_cases: Annotated[int, arg(help="Number of test cases, with labels in a folder beside.")] = 2
    shape: Annotated[tuple[int, int, int], arg(help="Largest shape z y x, in voxels.")] = (40, 96, 96)
    modality: Annotated[Literal["ct", "mr"], arg(help="CT with contrast phases, or MR with a bias field.")] = "ct"
    seed: Annotated[int, arg(help="Seed of everything random.")] = 0


def make_phantom(
    *,
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    phantom: PhantomSize = PhantomSize(),
    force: bool = False,
    root: Root = None,
) -> None:
    """Make a synthetic abdominal dataset with BTCV's 13 labels, to try the commands without data.

    Args:
        output: Raw folder for the dataset; default: raw/ of the root.
        force: Replace an existing dataset.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.datasets import phantom as verb

    folder = verb.make_phantom(
        output or layout_of(root).raw,
        cases=phantom.cases,
        test_cases=phantom.test_cases,
        shape_zyx=phantom.shape,
        modality=phantom.modality,
        seed=phantom.seed,
        force=force,
        track=bars,
    )
    tell(f"Written: {folder}")


def convert(
    source: Positional[Literal["btcv", "amos22", "msd", "nnunetv1"]],
    *,
    input_: Annotated[Path, arg(name="input", aliases=("-i",), metavar="DIR")],
    task: Literal[1, 2] = 1,
    dataset_id: Annotated[int | None, arg(metavar="N")] = None,
    place: Literal["copy", "hardlink", "symlink"] = "copy",
    force: bool = False,
    root: Root = None,
) -> None:
    """Convert an official download, or a dataset of nnU-Net v1, into a raw dataset, checking every file.

    Args:
        source: The dataset.
        input_: The unpacked download, or nnU-Net v1's folder TaskXXX_Name.
        task: AMOS22 task: 1 CT only, 2 CT and MR.
        dataset_id: Number of the dataset, instead of the task's (msd, nnunetv1).
        place: Copy the files or link them.
        force: Replace a dataset of the same name.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.datasets.amos22 import convert_amos22
    from rfmedsam2.pipeline.datasets.btcv import convert_btcv
    from rfmedsam2.pipeline.datasets.conversion import ConvertOptions
    from rfmedsam2.pipeline.datasets.msd import convert_msd, convert_nnunet_v1

    raw, options = layout_of(root).raw, ConvertOptions(how=place, force=force)
    if source == "btcv":
        done = convert_btcv(input_, raw, options=options, track=bars)
    elif source == "amos22":
        done = convert_amos22(input_, raw, task=task, options=options, track=bars)
    elif source == "nnunetv1":
        done = convert_nnunet_v1(input_, raw, dataset_id=dataset_id, options=options, track=bars)
    else:
        done = convert_msd(input_, raw, dataset_id=dataset_id, options=options, track=bars)
    for warning in done.warnings:
        tell(f"Note: {warning}")
    tell(f"Written: {done.folder} ({done.training} training, {done.test} test cases)")


def submit(
    challenge: Positional[Literal["amos22"]],
    *,
    predictions: Annotated[Path, arg(aliases=("-i",), metavar="DIR")],
    images: Annotated[Path, arg(metavar="DIR")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="ZIP")],
    task: Literal[1, 2] | None = None,
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Check predictions against the images of a challenge, and pack them for upload.

    Args:
        challenge: The challenge.
        predictions: Folder of predicted label maps.
        images: Folder of the challenge's images.
        output: The archive; nothing is written if there are faults.
        task: 1: CT only, 2: CT and MR; default: every image in the folder.
        overwrite: Replace a file of another kind, too.
    """
    from rfmedsam2.cli.console import show_submission
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.datasets.amos22_submission import RefusedSubmissionError, require_submission, submit_amos22

    require_replaceable((output,), require_submission, overwrite=overwrite, inputs=(predictions, images))
    _ = challenge  # there is only one so far, and argument parsing has checked it
    try:
        result = submit_amos22(predictions, images, output, task=task, track=bars)
    except RefusedSubmissionError as refusal:
        if as_json:
            tell_json(json.dumps(refusal.report.as_json(), indent=2))
            sys.exit(2)
        show_submission(refusal.report)
        raise
    if as_json:
        tell_json(json.dumps(result.as_json(), indent=2))
    else:
        tell(f"Written: {output} ({len(result.expected)} cases)")


def convert_labels(
    *,
    maps: Annotated[Path, arg(name="input", aliases=("-i",), metavar="MAPS")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    format: Annotated[tuple[LabelFormat, ...], arg(help=FORMAT)],
    series: Annotated[Path | None, arg(metavar="DIR")] = None,
    labels: Annotated[Path | None, arg(metavar="FILE")] = None,
    codes: Annotated[Path | None, arg(metavar="CSV")] = None,
    keep_empty_frames: bool = False,
    overwrite: bool = False,
) -> None:
    """Write label maps in the formats of other programs, with names, colors and SNOMED-CT codes of the labels.

    Args:
        maps: Folder of label maps, or one file.
        output: Output folder; each format gets a folder in it.
        series: For DICOM: the series of the map, or a folder that holds one for each, in a folder named after the map.
        labels: A dataset.json with the labels; default: the one beside the maps, or predictions.json.
        codes: Codes of your own structures: columns name, code, meaning, and others.
        keep_empty_frames: Keep frames without labels in DICOM segmentations.
        overwrite: Replace files that are there.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.datasets import label_formats as verb
    from rfmedsam2.store.raw import read_dataset_json

    options = verb.FormatOptions(
        formats=format, series=series, codes=codes, keep_empty=keep_empty_frames, overwrite=overwrite
    )
    names = None if labels is None else read_dataset_json(labels).label_set
    written = verb.convert_labels(maps, output, options, labels=names, track=bars)
    tell(f"Written: {len(written)} file(s) in {output}")


def export_model(
    *,
    output: Annotated[Path, arg(aliases=("-o",), metavar="ZIP|DIR")],
    to: Literal["zip", "nnunet"] = "zip",
    model: ModelChoice = ModelChoice(),
    overwrite: bool = False,
) -> None:
    """Pack a trained model into one zip file with a manifest and hashes, or write it for nnUNetv2_predict.

    Args:
        output: The zip; with --to nnunet a folder such as nnUNet_results, where the model gets its own.
        to: What to write; nnunet takes plain and residual U-Nets.
        overwrite: Replace what the command did not make, too.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.prediction import model_archive
    from rfmedsam2.store.archive import read_manifest

    folds = model.folds or None
    if to == "nnunet":
        from rfmedsam2.pipeline.prediction.nnunet_export import export_nnunet_model

        (folder, *more) = model.sources()
        if more:
            raise UsageError("nnU-Net has no models that average others", remedy="Export them one by one")
        written = export_nnunet_model(folder, output, folds=folds, overwrite=overwrite, track=bars)
        tell(f"Written: {written}")
        return
    sources = model.sources()
    require_replaceable((output,), read_manifest, overwrite=overwrite, inputs=sources)
    named = " + ".join(map(str, sources))
    with bars.working(f"Packing {named}"):
        manifest = model_archive.export_model(sources, output, folds=folds)
    tell(f"Written: {output} ({len(manifest.files)} file(s) of {named})")


def import_model(
    source: Annotated[Positional[Path], arg(metavar="ZIP|DIR")], *, force: bool = False, root: Root = None
) -> None:
    """Import a model made by rfmed_export_model, or models that nnU-Net v2 trained; nothing in them is executed.

    Args:
        source: A zip file, or of nnU-Net's also a folder: with plans.json and fold_0 ..., or all of nnUNet_results.
        force: Replace a model of the same name.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.prediction.nnunet_import import import_nnunet_models
    from rfmedsam2.store.archive import is_our_archive

    results = layout_of(root).results
    if not source.is_dir() and is_our_archive(source):
        from rfmedsam2.pipeline.prediction import model_archive

        with bars.working(f"Unpacking {source}"):
            models = [model_archive.import_model(source, results, force=force)]
    else:
        models = import_nnunet_models(source, results, force=force, track=bars)
    for model in models:
        tell(f"Imported: {model.folder} (fold(s) {', '.join(model.folds)})")


def doctor(*, root: Root = None, as_json: AsJson = False) -> None:
    """Show versions, devices, memory and folders, and how to fix problems."""
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import show_doctor
    from rfmedsam2.pipeline import doctor as verb

    chosen = resolve.places(root, os.environ)
    result = verb.doctor(chosen.layout, folders_from=chosen.source)
    if as_json:
        tell_json(json.dumps(result.as_json(), indent=2))
    else:
        show_doctor(result)


make_phantom_command = command(make_phantom)
convert_command = command(convert)
submit_command = command(submit)
convert_labels_command = command(convert_labels)
export_model_command = command(export_model)
import_model_command = command(import_model)
doctor_command = command(doctor)
