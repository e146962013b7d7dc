"""samhq_check_data and samhq_summary: check data sets, show the size of a network."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from tyro.conf import Positional, arg

from rfmedsam2.cli.command import command, tell, tell_json
from rfmedsam2.cli.flags import AsJson
from segment_anything_hq import choices
from segment_anything_hq.cli.flags import MaskRule

MOST_FAULTS = 100
"""Rows of the printed table; --json lists all faults."""


def check_data(
    *,
    data: Annotated[tuple[str, ...], arg(metavar="[NAME=]FOLDER")],
    mask_rule: MaskRule = None,
    pixels: bool = True,
    as_json: AsJson = False,
) -> None:
    """Check every image and mask of the data and report all faults; exit code 2 if a set is incomplete or faulty.

    Args:
        data: Images with masks: a folder with images/ and masks/ (or both side by side), or NAME=FOLDER with the root
            of hqseg44k_train, hqseg44k_test, coco_lvis_train or another collection (an unknown name lists them).
        pixels: Only compare the sizes in the files' headers, which takes seconds; damaged files and empty masks stay
            unseen.
    """
    from rfmedsam2.cli.console import table
    from segment_anything_hq.data.checks import check_sets, total
    from segment_anything_hq.data.open_data import list_data

    checks = check_sets(list_data(data, rule=mask_rule), pixels=pixels)
    faults = [(check.name, fault.where, fault.what) for check in checks for fault in check.faults]
    if as_json:
        sets = [
            {
                "name": check.name,
                "images": check.images,
                "samples": check.samples,
                "published": check.expected,
                "with_ignored_pixels": check.with_ignored,
                "complete": check.complete,
                "faults": [{"where": fault.where, "what": fault.what} for fault in check.faults],
            }
            for check in checks
        ]
        samples = sum(check.samples for check in checks)
        tell_json(json.dumps({"sets": sets, "samples": samples, "faults": len(faults)}, indent=2))
    else:
        for check in checks:
            tell(check.summary())
        if faults:
            table("Faults", ("set", "where", "what"), faults[:MOST_FAULTS])
        if len(faults) > MOST_FAULTS:
            tell(f"... and {len(faults) - MOST_FAULTS} more: --json lists all.")
        tell(total(checks))
    if not all(check.complete for check in checks):
        sys.exit(2)


def summary(
    method: Annotated[Positional[choices.AnyMethod], arg(metavar="METHOD")],
    *,
    backbone: Annotated[choices.Backbone, arg(aliases=("-b",), metavar="NAME")],
    frame_size: Annotated[int, arg(metavar="PIXELS")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Show the size of a method's network: parameters by part, trained and frozen.

    Args:
        method: hq_sam, sam_ref, sam_decoder, sam (on SAM's vit_*), hq_sam2, sam2_ref, sam2_refiner, sam2_decoder, sam2
            (on SAM 2's hiera_*).
        backbone: vit_b, vit_l, vit_h, vit_tiny (MobileSAM), hiera_t, hiera_s, hiera_b+ or hiera_l.
        frame_size: Side of the frames in pixels; the size of position embeddings depends on it.
    """
    from rfmedsam2.cli.console import table
    from segment_anything_hq.tasks.network_size import network_size

    size = network_size(method, backbone, frame_size=frame_size)
    if as_json:
        tell_json(json.dumps(size.as_json(), indent=2))
        return
    rows = [(p.name, *_millions(p.parameters, p.trained, p.frozen)) for p in size.parts]
    sums = ("all", *_millions(size.parameters, size.trained, size.parameters - size.trained))
    title = f"{method} on {backbone}: millions of parameters"
    table(title, ("part", "parameters", "trained", "frozen"), [*rows, sums])
    tell(f"Trained: {size.trained / 1e6:.3f} M parameters, {size.trained_mib:.2f} MiB in fp32.")
    if size.published is not None and size.as_published is not None:
        paper, ratio = size.published, size.as_published / size.published.value
        tell(
            f"The {paper.source} says {paper.value:g} {paper.unit}; here it is {size.as_published:.2f} ({ratio:.2f}x)."
        )


def _millions(*counts: int) -> tuple[str, ...]:
    return tuple(f"{count / 1e6:.3f}" for count in counts)


check_data_command = command(check_data, family="samhq")
summary_command = command(summary, family="samhq")
