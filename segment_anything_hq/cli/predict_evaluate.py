"""samhq_predict and samhq_evaluate: predict masks for prompts, and score a network on data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import command, say, tell, tell_json
from rfmedsam2.cli.flags import AsJson
from rfmedsam2.errors import UsageError, sentences
from segment_anything_hq.cli.flag_groups import EvaluatedData, NetworkChoice, Protocols

if TYPE_CHECKING:
    from segment_anything_hq.data.datasets import ImageSet
    from segment_anything_hq.evaluation.run import Results
    from segment_anything_hq.evaluation.scores import Column
    from segment_anything_hq.inference.network_spec import LoadedNetwork
    from segment_anything_hq.records import EvaluationRecord


def predict(
    network: NetworkChoice = NetworkChoice(),
    *,
    images: Annotated[tuple[Path, ...], arg(aliases=("-i",), metavar="PATH")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    prompts: Annotated[Path, arg(aliases=("-p",), metavar="FILE")],
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Predict a mask for each prompted object: one PNG per object (255 object, 0 background) and predictions.json.

    Args:
        images: Images, or folders of images.
        output: Output folder for the masks.
        prompts: JSON: [{"image": "a.jpg", "box": [x0, y0, x1, y1], "points": [[x, y]], "labels": [1], "name": "cat"}];
            box or points or both. CSV: columns image, x0, y0, x1, y1, or image, object, x, y, label (a row per point).
        overwrite: Replace existing masks.
    """
    from rfmedsam2.cli.console import table
    from rfmedsam2.cli.progress import bars
    from segment_anything_hq.data.prompt_files import images_in, read_prompts
    from segment_anything_hq.inference.files import predict_files, require_free_outputs

    named = network.resolved()
    image_files = images_in(images)
    objects = read_prompts(prompts, image_files)
    require_free_outputs(output, objects, overwrite=overwrite, inputs=(*image_files, prompts))
    record = predict_files(network.load(named), objects, output, track=bars)
    if as_json:
        tell_json(record.to_json())
        return
    rows = [(o.file, o.image, f"{o.score:.3f}", o.pixels, f"{o.seconds:.3f}") for o in record.objects]
    table("Masks", ("file", "image", "score", "pixels", "seconds"), rows)
    without = len(image_files) - len(record.embedding_seconds)
    unprompted = f"; {without} without prompts" if without else ""
    counts = f"{_count(len(rows), 'mask')} of {_count(len(record.embedding_seconds), 'image')}"
    tell(f"Written: {counts} in {output}{unprompted}")


def evaluate(
    network: NetworkChoice = NetworkChoice(),
    *,
    images: EvaluatedData = EvaluatedData(),
    protocols: Protocols = Protocols(),
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a network with boxes, points, clicks or latency; writes one CSV per protocol, a report, evaluation.json.

    Args:
        output: Output folder.
        overwrite: Replace an existing evaluation.
    """
    from rfmedsam2.cli.progress import bars
    from segment_anything_hq.data.looks import saved_again
    from segment_anything_hq.evaluation.interactive import ClickedPredictor
    from segment_anything_hq.evaluation.overlap import UNKNOWN, counted, trained_on
    from segment_anything_hq.evaluation.run import (
        parse_protocols,
        require_no_evaluation,
        run_protocols,
        write_results,
    )
    from segment_anything_hq.inference.interactive import InteractivePredictor

    named = network.resolved()
    rules = parse_protocols(protocols.protocol, clicks=protocols.clicks)
    needs_data = any(rule is not None for rule in rules.values())
    if not images.data and not needs_data and (unused := images.chosen()):
        raise UsageError(
            "There are no images to choose from", found=", ".join(unused), remedy="Add --data, or leave it out"
        )
    sets = _open_sets(images) if images.data or needs_data else ()
    require_no_evaluation(output, tuple(rules), overwrite=overwrite)
    seen = trained_on(sets, named.training_images, model=named.checkpoint, held_out=images.held_out)
    if sets and named.checkpoint is not None and named.training_images is None:
        say(f"Note: {UNKNOWN}.")
    for phrase in counted(seen):
        say(f"Warning: the network was trained on {phrase}: scores of training images say nothing about new ones.")
    alike = saved_again(sets, named.training_looks, named.training_images or ())
    for phrase in counted(alike):
        say(f"Warning: {phrase} look like images that the network was trained on, saved again.")
    chosen = network.load(named)
    predictor = ClickedPredictor(InteractivePredictor(chosen.network, fit=chosen.fit))
    found = run_protocols(predictor, sets, tuple(rules), clicks=protocols.clicks, seed=protocols.seed, track=bars)
    record = _record(chosen, found, sets, seed=protocols.seed, chosen_data=images)
    record = record.model_copy(update={"trained_on": seen, "looks_trained_on": alike})
    about = {**record.network, "data": ", ".join(f"{n} ({k})" for n, k in record.data.items()), "device": record.device}
    if seen:
        about["trained on"] = ", ".join(counted(seen))
    if alike:
        about["look like training images"] = ", ".join(counted(alike))
    files = write_results(output, found, record, about=about)
    if as_json:
        tell_json(record.to_json())
        return
    _print_results(found)
    tell(f"Written: {', '.join(path.name for path in files)} in {output}")


def _open_sets(chosen: EvaluatedData) -> tuple[ImageSet, ...]:
    """Open the data, reduced to the held-out part or the first samples if asked for."""
    from dataclasses import replace

    from segment_anything_hq.data.open_data import open_data, split_held_out

    samples = chosen.samples
    if samples is not None and samples < 1:
        raise UsageError("--samples must be at least 1", found=samples)
    sets = open_data(chosen.data, rule=chosen.mask_rule)
    if chosen.held_out is not None:
        sets = split_held_out(sets, chosen.held_out)[1]
    if samples is None:
        return sets
    return tuple(replace(images, samples=images.samples[:samples], expected=None) for images in sets)


def _record(
    chosen: LoadedNetwork,
    found: Results,
    sets: tuple[ImageSet, ...],
    *,
    seed: int,
    chosen_data: EvaluatedData,
) -> EvaluationRecord:
    from datetime import datetime, timezone

    from rfmedsam2.version import __version__
    from segment_anything_hq.evaluation.run import result_records
    from segment_anything_hq.inference.image_transform import device_of
    from segment_anything_hq.records import EvaluationRecord

    protocols, latency = result_records(found)
    return EvaluationRecord(
        network=chosen.facts(),
        weights_sha256=chosen.weights_sha256,
        device=str(device_of(chosen.network)),
        seed=seed,
        data={images.name: len(images.samples) for images in sets},
        data_words=chosen_data.data,
        held_out=chosen_data.held_out,
        protocols=protocols,
        latency=latency,
        code_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _print_results(found: Results) -> None:
    """Print one table per protocol."""
    from rfmedsam2.cli.console import table

    for name, evaluation in found.evaluations.items():
        rows = [(images, *_format(values, evaluation.columns)) for images, values in evaluation.sets.items()]
        rows.append(("all", *_format(evaluation.overall, evaluation.columns)))
        titles = (f"{c.title} {c.unit}".strip() for c in evaluation.columns)
        tell(evaluation.protocol)
        table(name, ("set", *titles), rows)
        for fault in evaluation.skipped:
            say(sentences([f"Not evaluated: {fault}"]))
    if found.latency is not None:
        sat = found.latency
        tell(
            f"SAT latency: {sat.total_s:.2f} s for {len(sat.points_s)} points, {sat.encode_s:.2f} s of it for the "
            f"image; per point {1000 * sat.point_median_s:.1f} ms (median), {1000 * sat.point_95_s:.1f} ms (95 %)"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _format(values: dict[str, float], columns: tuple[Column, ...]) -> list[str]:
    return [f"{c.scale * values[c.name]:.{c.digits}f}" for c in columns]


predict_command = command(predict, family="samhq")
evaluate_command = command(evaluate, family="samhq")
