"""How the commands show things: progress bars, tables, the live line of a training. Used by cli.py alone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from rfmedsam2.engine.log import StepReport

T = TypeVar("T")
out = Console(highlight=False, soft_wrap=True)
"""Results: standard output."""
err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress and errors: standard error, so that standard output can be read by a program."""


def bars(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A progress bar with rate and remaining time around `items`; plain lines where there is no terminal."""
    if not err.is_terminal:
        began = time.monotonic()
        done = 0
        for item in items:
            yield item
            done += 1
        err.print(f"{description}: {done}/{total} in {time.monotonic() - began:.1f} s")
        return
    with _progress() as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


class TrainingView:
    """Live progress of a training: loss, learning rate, score, remaining time, memory."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._progress = _progress() if err.is_terminal else None
        self._task = None
        self._printed = 0.0
        self._score = ""

    def __call__(self, report: StepReport) -> None:
        """Show one step."""
        text = f"loss {report.loss:8.4f}  lr {report.lr:.2e}  {report.seconds:.2f} s/it  {_memory(report.memory_mb)}"
        if report.scores:
            self._score = f"  score {report.scores.get('score', float('nan')):.4f}"
        text += self._score
        if self._progress is None:
            if report.scores or time.monotonic() - self._printed > 30:
                self._printed = time.monotonic()
                left = (self._total - report.step) * report.seconds
                err.print(f"step {report.step}/{self._total}  {text}  {left / 60:.1f} min left")
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("training", total=self._total)
        self._progress.update(self._task, completed=report.step, description=text)

    def close(self) -> None:
        """End the live display."""
        if self._progress is not None:
            self._progress.stop()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to standard output."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*[_cell(value) for value in row])
    out.print(grid)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        console=err,
    )


def _memory(gpu_mb: float | None) -> str:
    used = psutil.Process().memory_info().rss / 2**30
    return f"RAM {used:.1f} GB" + (f", GPU {gpu_mb / 1024:.1f} GB" if gpu_mb else "")
