"""Commands for what follows cross-validation: the choice of a model, and postprocessing rules."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from rfmedsam2.cli.command import command, layout_of, tell, tell_json
from rfmedsam2.cli.flags import AsJson, DatasetName, Device, Root, Workers

if TYPE_CHECKING:
    from rfmedsam2.records.report import Interval, Selection


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is compared."""

    plans: Annotated[
        tuple[str, ...], arg(aliases=("-p",), metavar="NAME", help="Names of plans; default: all trained ones.")
    ] = ()
    folds: Annotated[
        tuple[str, ...],
        arg(aliases=("-f",), metavar="FOLD", help="Folds to compare on; default: all that any model has validated."),
    ] = ()
    ensembles: Annotated[bool, arg(help="Do not predict pairs of models.")] = True
    postprocessing: Annotated[bool, arg(help="Do not learn postprocessing rules.")] = True
    device: Device = "auto"


def postprocess(
    *,
    input_: Annotated[Path, arg(name="input", aliases=("-i",), metavar="DIR")],
    output: Annotated[Path, arg(aliases=("-o",), metavar="DIR")],
    rule: Annotated[Path, arg(metavar="FILE")],
    overwrite: bool = False,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Apply a postprocessing rule to a folder of label maps: largest components, smallest volumes, holes.

    Args:
        input_: Folder of label maps; never changed.
        output: Another folder.
        rule: The rule, such as the postprocessing.json of a model.
        overwrite: Replace also files that predictions.json does not list, or that were changed since.
    """
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.pipeline.prediction.postprocessing import postprocess_folder
    from rfmedsam2.records.prediction import PostprocessingRule
    from rfmedsam2.system.atomic import read_record

    found = read_record(rule, PostprocessingRule)
    done = postprocess_folder(input_, output, found, overwrite=overwrite, workers=workers, track=bars)
    if as_json:
        cases = {case.path.name: case.changed for case in done}
        tell_json(json.dumps({"output": str(output), "rule": found.digest, "changed_voxels": cases}, indent=2))
        return
    for step in found.steps:
        tell(f"Rule: {step}")
    changed = sum(case.changed > 0 for case in done)
    tell(f"Processed {len(done)} label map(s), of which {changed} changed: {output}")


def select(
    *,
    dataset: DatasetName = None,
    compared: Compared = Compared(),
    archive: Annotated[Path | None, arg(aliases=("-o",), metavar="ZIP")] = None,
    overwrite: bool = False,
    root: Root = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Compare all trained models of a dataset, and all pairs of them, by cross-validation; learn postprocessing.

    Pairs are predicted on the validation cases of every fold, each model once. An ensemble is selected only if it is
    better than the best single model by more than chance.

    Args:
        archive: Also pack what is selected into this model archive, for rfmed_predict -m.
        overwrite: Replace a postprocessing rule that was written by hand, and an archive of somebody else, too.
    """
    from rfmedsam2.cli import resolve
    from rfmedsam2.cli.progress import bars
    from rfmedsam2.cli.replacing import require_replaceable
    from rfmedsam2.pipeline.selection import select as verb
    from rfmedsam2.store.archive import read_manifest

    layout = layout_of(root)
    name = resolve.dataset_name(layout, dataset, os.environ, among="raw")
    if archive is not None:
        require_replaceable((archive,), read_manifest, overwrite=overwrite, inputs=(layout.results / name,))
    found = verb.select(
        layout,
        name,
        plans=compared.plans,
        folds=compared.folds,
        options=verb.SelectOptions(
            ensembles=compared.ensembles,
            postprocessing=compared.postprocessing,
            overwrite=overwrite,
            archive=archive,
            device=compared.device,
            workers=workers,
        ),
        track=bars,
    )
    if as_json:
        tell_json(found.to_json())
        return
    _show(found)
    written = [*(layout.results / name / file for file in verb.FILES), *([archive] if archive else [])]
    tell(f"Written: {', '.join(map(str, written))}")


def _show(found: Selection) -> None:
    """Print a table of the models, the best one first, and what was learned."""
    from rfmedsam2.cli.console import table

    by_fold = {(row.candidate, row.fold): row.dsc for row in found.scores if row.name == "mean"}
    rows = [
        [
            one.name,
            one.dsc.mean,
            _span(one.dsc, "{:.3f}-{:.3f}"),
            *(by_fold[one.name, fold] for fold in found.folds),
            "best" if one.name == found.winner else _span(one.difference, "{:+.4f} to {:+.4f}"),
            one.dsc.cases,
        ]
        for one in found.candidates
    ]
    columns = ("model", "DSC", "95% CI", *(f"fold {fold}" for fold in found.folds), "CI of - best", "cases")
    table(f"{found.dataset}: mean DSC in cross-validation", columns, rows)
    for name, what in found.left_out.items():
        tell(f"Left out: {name}, which was not validated on {what}")
    for note in found.notes:
        tell(f"Note: {note}")
    tell(f"Best: {found.winner}")
    if found.candidates[0].members:
        tell(f"Predict with it: rfmed_predict -d {found.dataset} -p ensemble -c {found.winner} -i IMAGES -o OUT")
    if found.unprocessed_dsc is not None and found.postprocessed_dsc is not None:
        for step in found.rule.steps if found.rule else ():
            tell(f"Postprocessing: {step} ({step.gain or 0:+.4f})")
        change = f"{found.unprocessed_dsc:.4f} without, {found.postprocessed_dsc:.4f} with it"
        tell(f"Mean DSC over classes: {change}" if found.rule else "Postprocessing: no step raises the scores")


def _span(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return "-"
    return form.format(interval.low, interval.high)


postprocess_command = command(postprocess)
select_command = command(select)
