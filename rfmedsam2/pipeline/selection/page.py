"""Page of a selection: candidates with intervals and rules, differences, and scores by class in one HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rfmedsam2.records.report import Candidate, Selection
from rfmedsam2.reporting.html import figure_text, png_uri, write_html
from rfmedsam2.reporting.training_curves import INK, SERIES, Theme, as_png, new_figure, styled

TEMPLATE = Path(__file__).with_name("selection.html.j2")


def write_page(path: Path, selection: Selection) -> None:
    """Write the page of a selection, atomically.

    Raises:
        StoreError: the file cannot be written.
    """
    by_name = {(row.candidate, row.fold, row.name): row for row in selection.scores}
    classes = dict.fromkeys(row.name for row in selection.scores if row.name != "mean")
    candidates = [
        {
            "number": number,
            "parts": one.members or (one.name,),
            "dsc": one.dsc,
            "difference": one.difference,
            "ruled": one.postprocessed_dsc,
            "unruled": one.unprocessed_dsc,
            "folds": [by_name[one.name, fold, "mean"].dsc for fold in selection.folds],
            **{metric: getattr(by_name[one.name, "all", "mean"], metric) for metric in ("iou", "nsd", "hd95_mm")},
        }
        for number, one in enumerate(selection.candidates)
    ]
    rows: dict[str, dict[str, object]] = {}
    for name in classes:
        found = [by_name[one.name, "all", name].dsc for one in selection.candidates]
        rows[name] = {"dsc": found, "highest": max((dsc for dsc in found if dsc is not None), default=None)}
    several = len(candidates) > 1
    left_out = [f"Left out: {name}, not validated on {what}" for name, what in selection.left_out.items()]
    context = {
        "title": f"{selection.dataset}: selection of a model",
        "figures": list(_figures(selection)),
        "facts": dict(_facts(selection)),
        "notes": [*selection.notes, *left_out],
        "folds": selection.folds,
        "candidates": candidates,
        "classes": rows,
        "chart": {theme: png_uri(_chart(selection, theme)) for theme in ("light", "dark")} if several else None,
    }
    write_html(path, TEMPLATE, context)


def _figures(selection: Selection) -> Iterator[dict[str, str]]:
    best = selection.candidates[0]
    note = "mean over cases"
    if best.dsc.low is not None and best.dsc.high is not None:
        note = f"{best.dsc.low:.4f} to {best.dsc.high:.4f}"
    yield {"title": "DSC of the selected", "value": figure_text(best.dsc.mean, 4), "note": note}
    if best.postprocessed_dsc is not None and best.unprocessed_dsc is not None and best.rule is not None:
        value, before = figure_text(best.postprocessed_dsc, 4), figure_text(best.unprocessed_dsc, 4)
        yield {"title": "With its rule", "value": value, "note": f"{before} without; over classes"}
    ensembles = sum(bool(one.members) for one in selection.candidates)
    singles = len(selection.candidates) - ensembles
    yield {
        "title": "Candidates",
        "value": str(len(selection.candidates)),
        "note": f"{singles} models, {ensembles} pairs",
    }
    folds = len(selection.folds)
    yield {"title": "Cases", "value": str(best.dsc.cases), "note": f"of {folds} fold{'s' if folds != 1 else ''}"}


def _facts(selection: Selection) -> Iterator[tuple[str, str]]:
    best = selection.candidates[0]
    yield ("Ensemble" if best.members else "Model"), " + ".join(best.members or (best.name,))
    yield "Predict with it", _command(selection, best)
    yield "Folds", ", ".join(selection.folds)
    if best.rule is not None:
        yield "Postprocessing", "; ".join(f"{step} ({step.gain or 0:+.4f})" for step in best.rule.steps)
    elif best.unprocessed_dsc is not None:
        yield "Postprocessing", "none: no step raises the scores"


def _command(selection: Selection, best: Candidate) -> str:
    plan, _, stage = ("ensemble", "", best.name) if best.members else best.name.partition("__")
    return f"rfmed_predict -d {selection.dataset} -p {plan} -c {stage} -i IMAGES -o OUT"


def _chart(selection: Selection, theme: Theme) -> bytes:
    """One row per candidate: its mean difference to the selected one, with its interval."""
    others = selection.candidates[1:]
    figure = new_figure((9.0, 1.0 + 0.42 * len(others)), theme)
    ax = figure.subplots()
    styled(ax, theme)
    ax.axvline(0.0, color=INK[theme][0], lw=1.0)
    for row, one in enumerate(others):
        found, color = one.difference, SERIES[0] if one.members else SERIES[1]
        if found.mean is None:
            continue
        if found.low is not None and found.high is not None:
            ax.plot([found.low, found.high], [row, row], color=color, lw=3.5, solid_capstyle="round")
        ax.plot([found.mean], [row], "D", color=color, ms=6, mec=INK[theme][2], mew=1.0)
    ax.set_yticks(range(len(others)), [" +\n".join(one.members) or one.name for one in others])
    ax.set_ylim(len(others) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("DSC minus that of the selected candidate (better on the right)")
    return as_png(figure)
