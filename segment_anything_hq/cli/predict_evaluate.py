"""samhq_predict and samhq_evaluate: predict masks for prompts, and score a network on data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from rfmedsam2.cli.command import AsJson, Device, command, say
from rfmedsam2.errors import UsageError
from segment_anything_hq.cli.names import AnyBackbone, AnyMethod, MaskRule

if TYPE_CHECKING:
    from segment_anything_hq.data.datasets import ImageSet
    from segment_anything_hq.evaluation.run import Results
    from segment_anything_hq.evaluation.scores import Column
    from segment_anything_hq.inference.network_spec import LoadedNetwork, ResolvedSpec
    from segment_anything_hq.records import EvaluationRecord

# both commands select the network with the same options
Method = Annotated[
    Positional[AnyMethod | None],
    arg(
        metavar="[METHOD]",
        help="hq_sam, hq_sam2, sam_ref, sam2_ref, sam2_refiner, sam_decoder, sam2_decoder, or sam, sam2 as published.",
    ),
]
Backbone = Annotated[
    AnyBackbone | None,
    arg(
        aliases=("-b",),
        metavar="NAME",
        help="vit_b, vit_l, vit_h, vit_tiny (MobileSAM), hiera_t, hiera_s, hiera_b+ or hiera_l.",
    ),
]
Weights = Annotated[Path | None, arg(aliases=("-w",), metavar="FILE", help="Published weights of the backbone.")]
Decoder = Annotated[
    Path | None, arg(metavar="FILE", help="Checkpoint of the fine-tuned mask decoder that the method was trained with.")
]
Model = Annotated[
    Path | None,
    arg(
        aliases=("-m",),
        metavar="FILE",
        help="Checkpoint of samhq_train; it contains method, backbone and frame size.",
    ),
]
FrameSize = Annotated[int | None, arg(metavar="PIXELS", help="Side of the frames; default: the checkpoint's, or 1024.")]


def predict(
    method: Method = None,
    *,
    images: Annotated[tuple[Path, ...], arg(aliases=("-i",), metavar="PATH")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    prompts: Annotated[Path, arg(aliases=("-p",), metavar="FILE")],
    backbone: Backbone = None,
    weights: Weights = None,
    decoder: Decoder = None,
    model: Model = None,
    frame_size: FrameSize = None,
    overwrite: bool = False,
    device: Device = "auto",
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
    from rfmedsam2.cli.console import bars, table
    from segment_anything_hq.data.prompt_files import images_in, read_prompts
    from segment_anything_hq.inference.files import predict_files, require_free_outputs
    from segment_anything_hq.inference.network_spec import NetworkSpec, resolve_spec

    named = resolve_spec(
        NetworkSpec(
            method=method, backbone=backbone, weights=weights, decoder=decoder, model=model, frame_size=frame_size
        )
    )
    image_files = images_in(images)
    objects = read_prompts(prompts, image_files)
    require_free_outputs(output, objects, overwrite=overwrite)
    chosen = load_on_device(named, device)
    record = predict_files(chosen, objects, output, track=bars)
    if as_json:
        print(record.to_json())
        return
    rows = [(o.file, o.image, f"{o.score:.3f}", o.pixels, f"{o.seconds:.3f}") for o in record.objects]
    table("Masks", ("file", "image", "score", "pixels", "seconds"), rows)
    without = len(image_files) - len(record.embedding_seconds)
    unprompted = f"; {without} without prompts" if without else ""
    counts = f"{_count(len(rows), 'mask')} of {_count(len(record.embedding_seconds), 'image')}"
    print(f"Written: {counts} in {output}{unprompted}")


def evaluate(
    method: Method = None,
    *,
    data: Annotated[tuple[str, ...], arg(metavar="[NAME=]FOLDER")] = (),
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    protocol: Annotated[tuple[str, ...], arg(metavar="NAME")] = ("box",),
    backbone: Backbone = None,
    weights: Weights = None,
    decoder: Decoder = None,
    model: Model = None,
    frame_size: FrameSize = None,
    held_out: Annotated[float | None, arg(metavar="SHARE")] = None,
    samples: Annotated[int | None, arg(metavar="N")] = None,
    mask_rule: Annotated[MaskRule, arg(metavar="RULE")] = "above_128",
    clicks: Annotated[int, arg(metavar="N")] = 20,
    seed: int = 0,
    overwrite: bool = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a network with boxes, points, clicks or latency; writes one CSV per protocol, a report, evaluation.json.

    Args:
        data: Images with masks: a folder with images/ and masks/ (or both side by side), or NAME=FOLDER with
            hqseg44k_test, grabcut, berkeley, davis, sbd or another collection (an unknown name lists them).
        output: Output folder.
        protocol: One or more of: box, box_0.2 and box_0.4 (noisy boxes), center, points_N (N random points), clicks
            (NoC, NoF strict and as published, 5-mIoU, seconds per click), sat (latency of 16 x 16 points; no data).
        held_out: Evaluate only the images that samhq_train --held-out SHARE holds out.
        samples: Evaluate only the first N samples of each set.
        mask_rule: How mask values are interpreted: above_128, ignore_128 (128 is ignored) or any (all but 0).
        clicks: Maximum number of clicks per object.
        seed: Seed of box noise and random points.
        overwrite: Replace an existing evaluation.
    """
    from rfmedsam2.cli.console import bars
    from segment_anything_hq.evaluation.interactive import ClickedPredictor
    from segment_anything_hq.evaluation.run import (
        parse_protocols,
        require_no_evaluation,
        run_protocols,
        write_results,
    )
    from segment_anything_hq.inference.interactive import InteractivePredictor
    from segment_anything_hq.inference.network_spec import NetworkSpec, resolve_spec

    named = resolve_spec(
        NetworkSpec(
            method=method, backbone=backbone, weights=weights, decoder=decoder, model=model, frame_size=frame_size
        )
    )
    rules = parse_protocols(protocol, clicks=clicks)
    needs_data = any(rule is not None for rule in rules.values())
    sets = _open_sets(data, mask_rule, held_out=held_out, samples=samples) if data or needs_data else ()
    require_no_evaluation(output, tuple(rules), overwrite=overwrite)
    chosen = load_on_device(named, device)
    predictor = ClickedPredictor(InteractivePredictor(chosen.network, fit=chosen.fit))
    found = run_protocols(predictor, sets, tuple(rules), clicks=clicks, seed=seed, track=bars)
    record = _record(chosen, found, sets, seed=seed, data=data, held_out=held_out)
    about = {**record.network, "data": ", ".join(f"{n} ({k})" for n, k in record.data.items()), "device": record.device}
    files = write_results(output, found, record, about=about)
    if as_json:
        print(record.to_json())
        return
    _print_results(found)
    print(f"Written: {', '.join(path.name for path in files)} in {output}")


def load_on_device(spec: ResolvedSpec, device: str) -> LoadedNetwork:
    """Load a network onto its device, and print its warnings."""
    from rfmedsam2.system.devices import choose_device
    from segment_anything_hq.inference.network_spec import load_network

    chosen = load_network(spec)
    for note in chosen.notes:
        say(f"Note: {note}.")
    chosen.network.to(choose_device(device))
    return chosen


def _open_sets(
    words: tuple[str, ...], rule: MaskRule, *, held_out: float | None, samples: int | None
) -> tuple[ImageSet, ...]:
    """Open the data, reduced to the held-out part or the first samples if asked for."""
    from dataclasses import replace

    from segment_anything_hq.data.open_data import open_data, split_held_out

    if samples is not None and samples < 1:
        raise UsageError("--samples must be at least 1", found=samples)
    sets = open_data(words, rule=rule)
    if held_out is not None:
        sets = split_held_out(sets, held_out)[1]
    if samples is None:
        return sets
    return tuple(replace(images, samples=images.samples[:samples], expected=None) for images in sets)


def _record(
    chosen: LoadedNetwork,
    found: Results,
    sets: tuple[ImageSet, ...],
    *,
    seed: int,
    data: tuple[str, ...],
    held_out: float | None,
) -> EvaluationRecord:
    from datetime import datetime, timezone

    import rfmedsam2
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
        data_words=data,
        held_out=held_out,
        protocols=protocols,
        latency=latency,
        code_version=rfmedsam2.__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _print_results(found: Results) -> None:
    """Print one table per protocol."""
    from rfmedsam2.cli.console import table

    for name, evaluation in found.evaluations.items():
        rows = [(images, *_format(values, evaluation.columns)) for images, values in evaluation.sets.items()]
        rows.append(("all", *_format(evaluation.overall, evaluation.columns)))
        titles = (f"{c.title} {c.unit}".strip() for c in evaluation.columns)
        print(evaluation.protocol)
        table(name, ("set", *titles), rows)
        for fault in evaluation.skipped:
            say(f"Not evaluated: {fault}.")
    if found.latency is not None:
        sat = found.latency
        print(
            f"SAT latency: {sat.total_s:.2f} s for {len(sat.points_s)} points, {sat.encode_s:.2f} s of it for the "
            f"image; per point {1000 * sat.point_median_s:.1f} ms (median), {1000 * sat.point_95_s:.1f} ms (95 %)"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _format(values: dict[str, float], columns: tuple[Column, ...]) -> list[str]:
    return [f"{c.scale * values[c.name]:.{c.digits}f}" for c in columns]


predict_command = command(predict, family="samhq")
evaluate_command = command(evaluate, family="samhq")
