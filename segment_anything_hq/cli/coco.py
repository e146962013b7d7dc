"""COCO's average precision of masks by given boxes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import AsJson, Device, command
from rfmedsam2.errors import UsageError
from segment_anything_hq.cli.predict_evaluate import Backbone, Decoder, FrameSize, Method, Model, Weights, built

File = Annotated[Path | None, arg(metavar="FILE")]


def evaluate_coco(
    method: Method = None,
    *,
    annotations: Annotated[Path, arg(metavar="FILE")],
    images: Annotated[Path, arg(aliases=("-i",), metavar="DIR")],
    detections: File = None,
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="FILE")] = None,
    backbone: Backbone = None,
    weights: Weights = None,
    decoder: Decoder = None,
    model: Model = None,
    frame_size: FrameSize = None,
    pictures: Annotated[int | None, arg(metavar="N")] = None,
    overwrite: bool = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Average precision of masks by a detector's boxes, counted as COCO does (needs the extra `coco`).

    Args:
        annotations: instances_val2017.json, lvis_v1_val.json, or others of their layout.
        images: Folder of the pictures.
        detections: A detector's boxes, in COCO's format of results; else the annotations' own boxes.
        output: A JSON file for the figures.
        pictures: Only the first so many that have boxes.
        overwrite: Replace the output file.
    """
    from rfmedsam2.cli.console import bars, table
    from rfmedsam2.store.atomic import write_record
    from segment_anything_hq.evaluation.average_precision import PrecisionRecord, average_precision
    from segment_anything_hq.inference.network_spec import NetworkSpec, resolve_spec

    named = resolve_spec(
        NetworkSpec(
            method=method, backbone=backbone, weights=weights, decoder=decoder, model=model, frame_size=frame_size
        )
    )
    if output is not None and output.exists() and not overwrite:
        raise UsageError("This file is there already", where=output, remedy="Name another, or add --overwrite")
    chosen = built(named, device)
    found = average_precision(
        chosen.network, annotations, images, fit=chosen.fit, detections=detections, max_images=pictures, track=bars
    )
    figures = {name: None if math.isnan(value) else value for name, value in found.figures.items()}
    record = PrecisionRecord(
        network=chosen.facts(),
        annotations=annotations.name,
        detections=None if detections is None else detections.name,
        images=found.images,
        boxes=found.boxes,
        figures=figures,
    )
    if output is not None:
        write_record(output, record)
    if as_json:
        print(record.to_json())
        return
    boxes = "the annotations' own boxes" if detections is None else f"the boxes of {detections.name}"
    row = ["-" if value is None else f"{100 * value:.1f}" for value in figures.values()]
    table(f"Masks by {boxes}: {found.boxes} in {found.images} pictures", list(figures), [row])
    if output is not None:
        print(f"Written: {output}")


evaluate_coco_command = command(evaluate_coco, family="samhq")
