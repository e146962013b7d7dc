"""samhq_evaluate_coco: COCO average precision of masks from box prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import command, say, tell, tell_json
from rfmedsam2.cli.flags import AsJson
from rfmedsam2.errors import UsageError
from segment_anything_hq.cli.flag_groups import DetectedBoxes, NetworkChoice

if TYPE_CHECKING:
    from segment_anything_hq.data.datasets import ImageSet


def evaluate_coco(
    network: NetworkChoice = NetworkChoice(),
    *,
    boxes: DetectedBoxes,
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="FILE")] = None,
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Compute COCO average precision of masks prompted with boxes (needs the extra `coco`).

    Args:
        output: JSON file to write the results to.
        overwrite: Replace the output file if it exists.
    """
    from rfmedsam2.cli.console import table
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.system.atomic import write_record
    from segment_anything_hq.data.content import seen_images
    from segment_anything_hq.data.looks import saved_again
    from segment_anything_hq.evaluation.average_precision import average_precision
    from segment_anything_hq.evaluation.overlap import UNKNOWN, counted
    from segment_anything_hq.records import PrecisionRecord

    named = network.resolved()
    if output is not None and output.exists() and not overwrite:
        raise UsageError("This file already exists", where=output, remedy="Choose another name, or add --overwrite")
    chosen = network.load(named)
    found = average_precision(
        chosen.network,
        boxes.annotations,
        boxes.images,
        fit=chosen.fit,
        detections=boxes.detections,
        max_images=boxes.max_images,
        track=bars,
    )
    known = named.training_images or ()
    if named.checkpoint is not None and named.training_images is None:
        say(f"Note: {UNKNOWN}.")
    evaluated = _image_set(boxes.annotations.name, found.files)
    seen, alike = seen_images([evaluated], known), saved_again([evaluated], named.training_looks, known)
    for phrase in counted(seen):
        say(f"Warning: the network was trained on {phrase}: scores of training images say nothing about new ones.")
    for phrase in counted(alike):
        say(f"Warning: {phrase} look like images that the network was trained on, saved again.")
    metrics = {name: None if math.isnan(value) else value for name, value in found.metrics.items()}
    record = PrecisionRecord(
        network=chosen.facts(),
        annotations=boxes.annotations.name,
        detections=None if boxes.detections is None else boxes.detections.name,
        images=found.images,
        boxes=found.boxes,
        trained_on=seen.get(evaluated.name, (0, 0))[0],
        looks_trained_on=alike.get(evaluated.name, (0, 0))[0],
        figures=metrics,
    )
    if output is not None:
        write_record(output, record)
    if as_json:
        tell_json(record.to_json())
        return
    source = "annotated boxes" if boxes.detections is None else f"the boxes of {boxes.detections.name}"
    row = ["-" if value is None else f"{100 * value:.1f}" for value in metrics.values()]
    table(f"Masks from {source}: {found.boxes} in {found.images} images", list(metrics), [row])
    if output is not None:
        tell(f"Written: {output}")


def _image_set(name: str, images: Sequence[Path]) -> ImageSet:
    """The images as a set, whose masks are not read."""
    from segment_anything_hq.data.datasets import ImageSet, MaskFile, Sample

    samples = (Sample(id=image.name, image=image, mask=MaskFile(path=image)) for image in images)
    return ImageSet(name=name, samples=tuple(samples))


evaluate_coco_command = command(evaluate_coco, family="samhq")
