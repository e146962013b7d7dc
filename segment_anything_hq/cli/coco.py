"""samhq_evaluate_coco: COCO average precision of masks from box prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import AsJson, Device, command
from rfmedsam2.errors import UsageError
from segment_anything_hq.cli.predict_evaluate import (
    Backbone,
    Decoder,
    FrameSize,
    Method,
    Model,
    Weights,
    load_on_device,
)

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
    max_images: Annotated[int | None, arg(metavar="N")] = None,
    overwrite: bool = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compute COCO average precision of masks prompted with boxes (needs the extra `coco`).

    Args:
        annotations: instances_val2017.json, lvis_v1_val.json or another file in their format.
        images: Folder of the images.
        detections: A detector's boxes in COCO's results format; without it, the annotated boxes are used.
        output: JSON file to write the results to.
        max_images: Evaluate only the first N images that have boxes.
        overwrite: Replace the output file if it exists.
    """
    from rfmedsam2.cli.console import bars, table
    from rfmedsam2.store.atomic import write_record
    from segment_anything_hq.evaluation.average_precision import average_precision
    from segment_anything_hq.inference.network_spec import NetworkSpec, resolve_spec
    from segment_anything_hq.records import PrecisionRecord

    named = resolve_spec(
        NetworkSpec(
            method=method, backbone=backbone, weights=weights, decoder=decoder, model=model, frame_size=frame_size
        )
    )
    if output is not None and output.exists() and not overwrite:
        raise UsageError("This file already exists", where=output, remedy="Choose another name, or add --overwrite")
    chosen = load_on_device(named, device)
    found = average_precision(
        chosen.network, annotations, images, fit=chosen.fit, detections=detections, max_images=max_images, track=bars
    )
    metrics = {name: None if math.isnan(value) else value for name, value in found.metrics.items()}
    record = PrecisionRecord(
        network=chosen.facts(),
        annotations=annotations.name,
        detections=None if detections is None else detections.name,
        images=found.images,
        boxes=found.boxes,
        figures=metrics,
    )
    if output is not None:
        write_record(output, record)
    if as_json:
        print(record.to_json())
        return
    boxes = "annotated boxes" if detections is None else f"the boxes of {detections.name}"
    row = ["-" if value is None else f"{100 * value:.1f}" for value in metrics.values()]
    table(f"Masks from {boxes}: {found.boxes} in {found.images} images", list(metrics), [row])
    if output is not None:
        print(f"Written: {output}")


evaluate_coco_command = command(evaluate_coco, family="samhq")
