"""Terminal output of the commands: tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rfmedsam2.cli.command import tell
from rfmedsam2.errors import sentences
from rfmedsam2.records.model import CustomConfig, LibraryConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.system.terminal import plain

if TYPE_CHECKING:
    from rfmedsam2.choices import ComparedMetric
    from rfmedsam2.pipeline.datasets.amos22_submission import SubmissionReport
    from rfmedsam2.pipeline.doctor import DoctorReport
    from rfmedsam2.pipeline.training.model_summary import Summary
    from rfmedsam2.records.model import ModelConfig
    from rfmedsam2.records.plan import Plan
    from rfmedsam2.records.report import Comparison, Evaluation, Interval, PairedMean

# names are shown as they are: nothing in them is markup, an emoji's name or a number to be colored
out = Console(markup=False, emoji=False, highlight=False)
"""Results: standard output."""
err = Console(stderr=True, markup=False, emoji=False, highlight=False)
"""Progress: standard error, so that a program can read standard output."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to standard output."""
    grid = Table(title=plain(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    grid.padding, grid.pad_edge = (0, 1, 0, 0), False
    for column in columns:
        grid.add_column(plain(column), overflow="fold")
    for row in rows:
        grid.add_row(*[_cell(value) for value in row])
    if out.is_terminal:
        out.print(grid)
        return
    # lines are not wrapped in files
    endless = Console(file=out.file, markup=False, emoji=False, highlight=False, width=10_000)
    endless.width = endless.measure(grid).maximum
    endless.print(grid)


def show_plan(plan: Plan) -> None:
    """Print the stages of a plan, side by side."""
    stages = list(plan.stages.values())
    rows: list[list[object]] = [
        ["spacing mm", *(" x ".join(f"{s:.3g}" for s in stage.spacing_mm) for stage in stages)],
        ["median shape", *(_by(stage.median_shape) for stage in stages)],
        ["patch", *(_by(stage.patch_size) for stage in stages)],
        ["batch", *(stage.batch_size for stage in stages)],
        *_network_rows([stage.model for stage in stages]),
        ["normalization", *(_counted([n.kind for n in stage.normalization]) for stage in stages)],
        ["optimizer", *(f"{s.train.optimizer.kind}, lr {s.train.learning_rate:g}" for s in stages)],
        ["training", *(f"{s.train.epochs} epochs x {s.train.iterations_per_epoch}" for s in stages)],
    ]
    table(f"Plan {plan.name} of {plan.dataset}", ["", *plan.stages], rows)


def _network_rows(models: Sequence[ModelConfig]) -> list[list[object]]:
    """Rows on the networks of the stages; rows on SAM 2 only if a stage has it."""
    unets = [model.unet if isinstance(model, RFMedSam2Config) else model for model in models]
    rows: list[list[object]] = []
    if any(isinstance(unet, UNetConfig) for unet in unets):
        rows.append(["U-Net", *(_features(unet) for unet in unets)])
    if any(isinstance(model, CustomConfig | LibraryConfig) for model in models):
        rows.append(["network", *(_name(model) for model in models)])
    refined = [model if isinstance(model, RFMedSam2Config) else None for model in models]
    if any(refined):
        rows += [
            ["prompts", *(model and model.generator for model in refined)],
            ["SAM 2", *(model and f"{model.backbone}, {model.refinements} steps" for model in refined)],
            ["frames", *(model and _by((model.frame_size, model.frame_size)) for model in refined)],
            ["memory", *(model and f"{model.strategy}, {model.memory_frames} frames" for model in refined)],
        ]
    return rows


def _name(network: ModelConfig) -> str | None:
    if isinstance(network, LibraryConfig):
        return network.title
    return network.name if isinstance(network, CustomConfig) else None


def _features(network: object) -> str | None:
    return ", ".join(map(str, network.features)) if isinstance(network, UNetConfig) else None


def show_summary(summary: Summary) -> None:
    """Print parts, layers and memory of a plan's network."""
    rows: list[Sequence[object]] = [
        (part.group, part.name, *map(_millions, (part.parameters, part.trained, part.frozen))) for part in summary.parts
    ]
    totals = (summary.parameters, summary.trained, summary.parameters - summary.trained)
    columns = ("", "part", "parameters", "trained", "frozen")
    title = f"Plan {summary.plan}, {summary.stage}: millions of parameters"
    table(title, columns, [*rows, ("all", "", *map(_millions, totals))])
    sizes = [(layer.part, layer.name, layer.channels, _by(layer.size)) for layer in summary.layers]
    table("Sizes per sample, slice or object", ("", "layer", "channels", "voxels"), sizes)
    pairs = list(zip(summary.memory, summary.memory_half, strict=True))
    needs: list[Sequence[object]] = [
        (full.name, f"{full.gib:.2f}", f"{half.gib:.2f}", full.rule) for full, half in pairs
    ]
    both = (sum(full.gib for full, _ in pairs), sum(half.gib for _, half in pairs))
    needs.append(("all", *(f"{gib:.2f}" for gib in both), "an estimate"))
    table("Memory of a training step, GiB", ("", "float32", "mixed", "float32's rule"), needs)


def show_scores(evaluation: Evaluation) -> None:
    """Print means over cases per class with the number of cases they count, confidence intervals for DSC, and notes."""
    every, classes = len(evaluation.cases), len(evaluation.classes)

    def row(name: str, found: dict[str, Interval]) -> list[object]:
        dsc, distance = found["dsc"], found["hd95_mm"]
        span = "-" if dsc.low is None or dsc.high is None else f"{dsc.low:.3f}-{dsc.high:.3f}"
        fewer = distance.cases < dsc.cases or (distance.classes or classes) < (dsc.classes or classes)
        counted = f" ({_cases(distance, every, classes)})" if fewer else ""
        hd95 = None if distance.mean is None else f"{distance.mean:.1f}{counted}"
        return [name, dsc.mean, span, found["iou"].mean, found["nsd"].mean, hd95, _cases(dsc, every, classes)]

    rows = [row(name, found) for name, found in evaluation.classes.items()]
    # short enough for BTCV's class names and no broken line in a terminal of 80 columns
    columns = ("class", "DSC", f"{evaluation.confidence:.0%} CI", "IoU", "NSD", "HD95", "cases")
    title = f"{len(evaluation.cases)} case(s), NSD at {evaluation.nsd_tolerance_mm:g} mm, HD95 in mm"
    table(title, columns, [*rows, row("mean", evaluation.mean)])
    for note in evaluation.notes():
        tell(note)


def show_comparison(comparison: Comparison, metric: ComparedMetric) -> None:
    """Print the paired means of one metric per class, and what they leave out."""
    every = len(comparison.cases)

    def row(name: str, found: PairedMean) -> list[object]:
        gain = found.difference
        span = "-" if gain.low is None or gain.high is None else f"{gain.low:+.4f} to {gain.high:+.4f}"
        change = None if gain.mean is None else f"{gain.mean:+.4f}"
        counts = f"{found.wins}/{found.ties}/{found.losses}"
        return [name, found.mean_a, found.mean_b, change, span, counts, _cases(gain, every, len(comparison.classes))]

    tell(f"A: {comparison.a}")
    tell(f"B: {comparison.b}")
    means = {**comparison.classes, "mean": comparison.mean}
    columns = ("class", "A", "B", "B - A", f"{comparison.confidence:.0%} CI of B - A", "win/tie/loss", "cases")
    rows = [row(name, found[metric]) for name, found in means.items()]
    table(f"{metric} of {every} case(s) in both; win: B is better", columns, rows)
    for note in comparison.notes:
        tell(note)


def show_submission(report: SubmissionReport) -> None:
    """Print the faults of a submission."""
    table("Faults", ("case", "file", "kind", "what"), [(f.case, f.file, f.kind, f.message) for f in report.faults])


def show_doctor(report: DoctorReport) -> None:
    """Print the doctor's report, warnings last."""
    rows: list[tuple[object, object]] = [
        ("rfmedsam2", report.package),
        ("Python", f"{report.python} ({report.executable})"),
        ("system", report.system),
        *((d.name, f"{d.kind}, {d.memory_gib:.1f} GiB" if d.memory_gib else d.kind) for d in report.devices),
        ("memory", f"{report.ram_gib:.1f} GiB, {report.ram_free_gib:.1f} GiB free"),
        ("shared memory", None if report.shm_gib is None else f"{report.shm_gib:.1f} GiB free"),
        ("C++ compiler", report.compiler),
        *((f.name, f"{f.path} ({report.folders_from})") for f in report.folders),
    ]
    table("This machine", ("", "found"), rows)
    packages = {**report.packages, **report.optional_packages}
    table("Packages", ("package", "version"), packages.items())
    if report.extensions:
        found = [(e.kind, e.name, f"{e.package} {e.version}", e.fault or "ready") for e in report.extensions]
        table("Extensions", ("kind", "name", "package", "state"), found)
    if report.models:
        models = [(m.dataset, m.plan, m.configuration, ", ".join(m.folds), m.trained_by) for m in report.models]
        table("Trained models", ("dataset", "plan", "configuration", "folds", "trained by"), models)
    for advice in report.warnings:
        tell(sentences([f"Warning: {advice.message}", advice.remedy]))


def _cases(mean: Interval, every: int, classes: int) -> str:
    """How many cases a mean counts, and how many classes if some have no defined value."""
    cases = f"{mean.cases}" if mean.cases == every else f"{mean.cases} of {every}"
    return cases if mean.classes in (None, classes) else f"{cases}, {mean.classes}/{classes} classes"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else plain(value)


def _counted(words: Sequence[str]) -> str:
    """Group equal words: `zscore x 4`."""
    counts = Counter(words)
    return ", ".join(word if n == 1 else f"{word} x {n}" for word, n in counts.items())


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3f}"


def _by(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))
