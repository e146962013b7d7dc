"""Command that scores published SAM and SAM 2 on a dataset without training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import command, layout_of, say, tell, tell_json
from rfmedsam2.cli.flag_groups import StudiedData, StudiedModels, StudiedPrompts
from rfmedsam2.cli.flags import AsJson

if TYPE_CHECKING:
    from rfmedsam2.records.report import Interval
    from rfmedsam2.records.study import PromptStudy


def prompt_study(
    *,
    data: StudiedData = StudiedData(),
    models: StudiedModels = StudiedModels(),
    prompts: StudiedPrompts = StudiedPrompts(),
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Score zero-shot SAM and SAM 2 on a labeled dataset, with prompts from its labels.

    Args:
        output: Output folder of prompt_study.json and prompt_study.csv.
        overwrite: Replace files of these names that another program wrote, too.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.evaluation import prompt_study as verb
    from rfmedsam2.records.study import PromptStudy

    if output is not None:
        files = (output / "prompt_study.json", output / "prompt_study.csv")
        require_replaceable(files, PromptStudy.load, overwrite=overwrite)
    raw, channel = resolve.raw_dataset(layout_of(data.root), data.dataset, os.environ), data.channel
    options = verb.StudyOptions(
        prompts=prompts.prompts,
        prompted=prompts.prompted,
        cases=data.cases,
        channel=channel,
        window=data.window,
        frame_size=models.frame_size,
        max_conditioning=models.max_conditioning,
        device=models.device,
    )
    study = verb.prompt_study(raw, sam=models.sam, sam2=models.sam2, options=options, out=output, track=bars)
    if channel is None and len(raw.json.channels) not in (1, 3):
        others = ", ".join(raw.json.channels)
        say(f"Note: using {study.channels[0]} of {len(raw.json.channels)} channels ({others}); change with --channel")
    if as_json:
        tell_json(json.dumps(study.model_dump(mode="json"), indent=2))
        return
    _show(study)
    if output is not None:
        tell(f"Written: {output / 'prompt_study.json'} and prompt_study.csv")


def _show(study: PromptStudy) -> None:
    """Print one row per setting, then the classes with one column per setting."""
    from rfmedsam2.cli.console import table

    numbers = range(1, len(study.rows) + 1)
    rows = [
        (n, row.model, row.prompts, row.prompted, row.step2, _counted(row.mean, study))
        for n, row in zip(numbers, study.rows, strict=True)
    ]
    title = f"DSC, {study.dataset}, {len(study.cases)} case(s)"
    table(title, ("", "model", "prompt", "prompted slices", "Step 2 on", "DSC"), rows)
    classes = [(name, *(_counted(row.classes[name], study) for row in study.rows)) for name in study.rows[0].classes]
    table("DSC by class", ("class", *map(str, numbers)), classes)
    tell(f"Shown: {study.window}. Seconds: {', '.join(f'{s:g} {Path(p).name}' for p, s in study.seconds.items())}")


def _counted(mean: Interval, study: PromptStudy) -> str | None:
    """A mean over cases, with the number of cases that it counts if that is not all of them."""
    if mean.mean is None:
        return None
    every = len(study.cases)
    return f"{mean.mean:.4f}" + (f" ({mean.cases} of {every})" if mean.cases < every else "")


prompt_study_command = command(prompt_study)
