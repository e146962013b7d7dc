"""Command that scores published SAM and SAM 2 on a dataset without training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from rfmedsam2.cli.command import AsJson, DatasetName, Device, Root, command, layout_of, say

if TYPE_CHECKING:
    from rfmedsam2.records.study import PromptStudy

Checkpoints = Annotated[tuple[Path, ...], arg(metavar="FILE")]


def prompt_study(
    *,
    dataset: DatasetName = None,
    sam: Checkpoints = (),
    sam2: Checkpoints = (),
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    cases: Annotated[int | None, arg(metavar="N")] = None,
    prompts: tuple[Literal["box", "point"], ...] = ("box", "point"),
    prompted: tuple[Literal["all", "two", "one"], ...] = ("all", "two", "one"),
    channel: Annotated[str | None, arg(metavar="NAME")] = None,
    window: Annotated[tuple[float, float] | None, arg(metavar="LOW HIGH")] = None,
    frame_size: int = 1024,
    max_conditioning: Annotated[int | None, arg(metavar="N")] = None,
    device: Device = "auto",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Score zero-shot SAM and SAM 2 on a labeled dataset, with prompts from its labels.

    Args:
        sam: Checkpoints of MobileSAM, LiteMedSAM, sam_vit_b, sam_vit_l or sam_vit_h; prompted on all slices.
        sam2: Checkpoints sam2.1_hiera_* or sam2_hiera_*.
        output: Output folder of prompt_study.json and prompt_study.csv.
        cases: Number of training cases, the first ones; default: all.
        prompts: A tight box, the pixel nearest to the center of mass, or both, per class and slice.
        prompted: Which of the slices that contain a class SAM 2 is prompted on.
        channel: Name or number of the channel to use; default: three channels as colors, else the first.
        window: Intensities shown as black and white; default: -160 to 240 HU for CT, percentiles for others.
        frame_size: Side length in pixels of SAM 2's input, a multiple of 32.
        max_conditioning: Number of nearest prompted slices that SAM 2 attends to; default: all, as published.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import bars
    from rfmedsam2.pipeline.evaluation.prompt_study import StudyOptions
    from rfmedsam2.pipeline.evaluation.prompt_study import prompt_study as run

    raw = resolve.raw_dataset(layout_of(root), dataset, os.environ)
    options = StudyOptions(
        prompts=prompts,
        prompted=prompted,
        cases=cases,
        channel=channel,
        window=window,
        frame_size=frame_size,
        max_conditioning=max_conditioning,
        device=device,
    )
    study = run(raw, sam=sam, sam2=sam2, options=options, out=output, track=bars)
    if channel is None and len(raw.json.channels) not in (1, 3):
        others = ", ".join(raw.json.channels)
        say(f"Note: using {study.channels[0]} of {len(raw.json.channels)} channels ({others}); change with --channel")
    if as_json:
        print(json.dumps(study.model_dump(mode="json"), indent=2))
        return
    _show(study)
    if output is not None:
        print(f"Written: {output / 'prompt_study.json'} and prompt_study.csv")


def _show(study: PromptStudy) -> None:
    """Print one row per setting, then the classes with one column per setting."""
    from rfmedsam2.cli.console import table

    numbers = range(1, len(study.rows) + 1)
    rows = [
        (n, row.model, row.prompts, row.prompted, row.step2, row.mean.mean)
        for n, row in zip(numbers, study.rows, strict=True)
    ]
    title = f"DSC, {study.dataset}, {len(study.cases)} case(s)"
    table(title, ("", "model", "prompt", "prompted slices", "Step 2 on", "DSC"), rows)
    classes = [(name, *(row.classes[name].mean for row in study.rows)) for name in study.rows[0].classes]
    table("DSC by class", ("class", *map(str, numbers)), classes)
    print(f"Shown: {study.window}. Seconds: {', '.join(f'{s:g} {Path(p).name}' for p, s in study.seconds.items())}")


prompt_study_command = command(prompt_study)
