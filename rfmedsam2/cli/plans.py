"""Command that summarizes a plan's network before training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rfmedsam2.cli.command import command, layout_of, tell_json
from rfmedsam2.cli.flags import AsJson, DatasetName, Root


def summary(
    plan: Annotated[Positional[str], arg(metavar="PLAN")],
    *,
    configuration: Annotated[str, arg(aliases=("-c",), metavar="NAME")] = "3d_fullres",
    dataset: DatasetName = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Summarize a plan's network: parameters by part, sizes of layers, memory of training.

    Args:
        plan: File of a plan (plans/btcv.json), or name of a plan of the dataset given with -d.
        configuration: 2d, 3d_fullres or 3d_lowres.
    """
    from rfmedsam2.cli.console import show_summary
    from rfmedsam2.pipeline.training import model_summary
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.system.atomic import read_record
    from rfmedsam2.system.file_names import is_file_name

    if plan.endswith(".json") or not is_file_name(plan):
        found = read_record(Path(plan), Plan)
    else:
        from rfmedsam2.cli import resolve

        layout = layout_of(root)
        name = resolve.dataset_name(layout, dataset, os.environ, among="preprocessed")
        found = resolve.planned(layout, name, plan, stage=configuration)
    result = model_summary.summary(found, configuration)
    if as_json:
        tell_json(json.dumps(result.as_json(), indent=2))
    else:
        show_summary(result)


summary_command = command(summary)
