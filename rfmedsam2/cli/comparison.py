"""Command that compares two sets of predictions, case by case."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rfmedsam2.choices import ComparedMetric
from rfmedsam2.cli.command import command, layout_of, tell, tell_json
from rfmedsam2.cli.flag_groups import LabelNames, Scoring
from rfmedsam2.cli.flags import AsJson
from rfmedsam2.errors import UsageError


def compare(
    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="A B")] = (),
    *,
    references: Annotated[Path | None, arg(aliases=("-g",), metavar="DIR")] = None,
    output: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    metric: ComparedMetric = "dsc",
    labels: LabelNames = LabelNames(),
    scoring: Scoring = Scoring(),
    overwrite: bool = False,
    as_json: AsJson = False,
) -> None:
    """Compare predictions A and B of the same cases: paired differences with confidence intervals, wins and losses.

    Args:
        paths: Two folders of label maps, or of rfmed_evaluate (or their metrics.json).
        references: Folder of reference label maps; not needed for two evaluations.
        output: Output folder of comparison.json, comparison.csv (all cases) and comparison.png.
        metric: Metric of table and chart.
        overwrite: Replace files of these names that another program wrote, too.
    """
    if len(paths) != 2:
        raise UsageError(
            "Two sets of predictions are compared",
            expected="rfmed_compare A B",
            found=" ".join(map(str, paths)) or "none",
        )
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.console import show_comparison
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.evaluation import compare as verb
    from rfmedsam2.records.report import Comparison

    if output is not None:
        require_replaceable([output / name for name in verb.FILES], Comparison.load, overwrite=overwrite)
    names = resolve.labels_for(layout_of(labels.root), os.environ, dataset=labels.dataset, file=labels.labels)
    result = verb.compare(
        paths[0],
        paths[1],
        references,
        names,
        cases=scoring.cases or None,
        nsd_tolerance_mm=scoring.tolerance,
        both_empty=scoring.both_empty,
        workers=scoring.workers,
        progress=bars,
    )
    if output is not None:
        verb.write_comparison(output, result, metric)
    if as_json:
        tell_json(result.to_json())
        return
    show_comparison(result, metric)
    if output is not None:
        tell(f"Written: {', '.join(str(output / name) for name in verb.FILES)}")


compare_command = command(compare)
