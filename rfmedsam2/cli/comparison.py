"""Commands that look at label maps: two sets of predictions compared case by case, and drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rfmedsam2.choices import ComparedMetric
from rfmedsam2.cli.command import command, layout_of, tell, tell_json
from rfmedsam2.cli.flag_groups import LabelNames, Scoring
from rfmedsam2.cli.flags import AsJson, Workers
from rfmedsam2.errors import UsageError, shortlist


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


def overlay(
    *,
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    images: Annotated[Path | None, arg(aliases=("-i",), metavar="DIR")] = None,
    predictions: Annotated[Path | None, arg(aliases=("-p",), metavar="DIR")] = None,
    labels: LabelNames = LabelNames(),
    cases: Annotated[tuple[str, ...], arg(metavar="ID")] = (),
    channel: Annotated[int, arg(metavar="N")] = 0,
    opacity: Annotated[float, arg(metavar="SHARE")] = 0.45,
    overwrite: bool = False,
    workers: Workers = 2,
) -> None:
    """Draw label maps over their images, one PNG a case: of a dataset (-d), or of predictions (-i and -p).

    Args:
        output: Folder of the drawings.
        images: Images of the cases; without them the background is black.
        predictions: Label maps; without them, those of the training cases of the dataset.
        cases: Draw these only.
        channel: Channel of the images.
        opacity: Of the colors: 0 is the image alone, 1 hides it.
        overwrite: Replace drawings that are there.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.evaluation import case_drawings as verb

    layout = layout_of(labels.root)
    if predictions is None:
        if images is not None:
            raise UsageError("There are images and no label maps", expected="-p with them, or -d with a dataset")
        raw = resolve.raw_dataset(layout, labels.dataset, os.environ)
        chosen, names = verb.cases_of_dataset(raw, channel), raw.json.label_set
    else:
        chosen = verb.cases_of_folder(predictions, images, channel)
        names = resolve.labels_for(layout, os.environ, dataset=labels.dataset, file=labels.labels)
    unknown = set(cases) - {case.id for case in chosen}
    if unknown:
        known = shortlist(case.id for case in chosen)
        raise UsageError("There is no such case", expected=f"one of {known}", found=", ".join(sorted(unknown)))
    chosen = [case for case in chosen if not cases or case.id in cases]
    done = verb.write_drawings(chosen, output, names, opacity=opacity, overwrite=overwrite, workers=workers, track=bars)
    tell(f"Drew {len(done)} case(s): {output}")


compare_command = command(compare)
overlay_command = command(overlay)
