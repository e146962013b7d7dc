"""How commands show progress: one line that is rewritten on a terminal, a line every ten seconds elsewhere.

Work only counts; a thread of its own writes. A terminal that is blocked, closed or too narrow never delays or ends it.
rich paints the line; what it holds is chosen here, because rich's columns shrink until figures are cut off.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import psutil
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rfmedsam2.cli.console import err
from rfmedsam2.system.progress import Speed, StepReport
from rfmedsam2.system.terminal import plain

T = TypeVar("T")
QUIET_SECONDS = 9.0
"""Where there is no terminal, a line is written this often."""
REFRESH_SECONDS = 0.2
PATIENCE_SECONDS = 1.0
"""How long the end of the work waits for its last line to be written."""
SPINNER = "|/-\\"
BAR = 20
"""Most characters of the bar, which takes the place that figures leave."""


@dataclass(slots=True)
class _Stage:
    """Something that is going on: cases, or within them tiles; `total` None: it has no parts to count."""

    description: str
    total: int | None
    done: int = 0
    details: tuple[str, ...] = ()
    """Figures of a training, the most important first."""


@dataclass(slots=True)
class _Pace:
    """How fast the outermost countable stage goes, by what was done lately."""

    speed: Speed = field(default_factory=Speed)
    position: float = 0.0
    at: float = 0.0
    last: float = 0.0
    left_at: float | None = None
    """Seconds that were left at `at`."""

    def move(self, position: float, total: int, now: float) -> None:
        if position > self.position:
            self.last = now - self.at
            self.speed.add(position - self.position, self.last)
            self.position, self.at = position, now
            self.left_at = (total - position) * (self.speed.seconds_per_unit or 0.0)

    def left(self, now: float) -> float | None:
        # between two counts the clock runs down, by no more than the last one took
        return None if self.left_at is None else max(0.0, self.left_at - min(now - self.at, self.last))


class Display:
    """Progress of one command (`rfmedsam2.system.progress.Track`).

    Args:
        console: where to show it.
        clock: seconds.
        shown: False: show nothing, as all processes of a training but the first do.
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic, shown: bool = True
    ) -> None:
        self._console, self._clock, self._shown = console or err, clock, shown
        self._lock = threading.Lock()
        self._stages: list[_Stage] = []
        self._pace = _Pace()
        self._began = 0.0
        self._lines: list[str] = []
        self._wake = threading.Event()
        self._writer: threading.Thread | None = None
        self._training: _Stage | None = None
        self.steps = 0
        """Steps of the last training shown."""

    def __call__(self, items: Iterable[T], description: str, total: int, /) -> Iterator[T]:
        """Count items as they go by."""
        stage = _Stage(description, total)
        self._open(stage)
        try:
            for item in items:
                yield item
                self._count(stage, stage.done + 1)
        finally:
            self._close(stage)

    def step(self, report: StepReport, /) -> None:
        """Show the figures of a training step or a validation."""
        self.steps += report.scores is None
        with self._lock:
            stage = self._training
            if stage is None:
                return
            first = stage.total is None
            if first:
                self._began = self._clock()
            score = stage.details[2:3] if report.scores is None else (f"score {report.scores.get('score', 0):.4f}",)
            stage.description, stage.total, stage.done = "step", report.total, report.step
            stage.details = _figures(report, score)
            self._pace = _Pace(at=self._clock(), last=report.seconds, left_at=report.eta_seconds)
            if not self._live and (first or report.scores is not None):
                self._lines.append(self.line(None))
            if report.step == report.total and report.scores is not None:
                stage.description, stage.total, stage.details = "Finishing", None, ()
                self._pace = _Pace()

    @contextmanager
    def working(self, description: str) -> Iterator[_Stage]:
        """Show that something without countable parts goes on."""
        stage = _Stage(description, None)
        self._open(stage)
        try:
            yield stage
        finally:
            self._close(stage)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show a training, whose steps come by `step`."""
        self.steps = 0
        with self.working("Preparing to train") as self._training:
            yield
        self._training = None

    def line(self, width: int | None) -> str:
        """What is going on, in at most `width` columns (None: any number)."""
        now, stages = self._clock(), self._countable() or self._stages[-1:]
        left = self._pace.left(now)
        parts: list[tuple[int, str]] = []  # (the higher, the sooner it is left out, text)
        for depth, stage in enumerate(stages):
            inner = depth == len(stages) - 1
            count = "" if stage.total is None else f" {stage.done}/{stage.total}"
            parts.append((0 if depth == 0 else 2 if inner else 4, plain(stage.description) + count))
            ranks = (0, 5, 4, 6, 7, 8, 8)
            parts += [(rank, text) for rank, text in zip(ranks, stage.details, strict=False) if text]
        parts.append((3, f"{_clock_words(now - self._began)} elapsed"))
        if left is not None:
            parts.append((1, f"{_clock_words(left)} left"))
        return fitted(parts, width)

    def __rich__(self) -> Text:
        """The line, with a bar where there is room for one."""
        with self._lock:
            width = self._console.width - 1  # a full line would move the cursor into the next one
            if not self._stages:
                return Text("")
            text = f"{SPINNER[int(self._clock() / REFRESH_SECONDS) % len(SPINNER)]} {self.line(width - 2)}"
            room = min(BAR, width - cell_len(text) - 3)
            total = next((stage.total for stage in self._countable()), 0)
            if room >= BAR // 2 and total:
                filled = round(room * self._position() / total)
                text += f" [{'#' * filled}{'.' * (room - filled)}]"
            return Text(text, no_wrap=True, overflow="crop")

    def _open(self, stage: _Stage) -> None:
        if not self._shown:
            return
        with self._lock:
            self._stages.append(stage)
            if len(self._stages) == 1 or self._countable() == [stage]:
                self._began, self._pace = self._clock(), _Pace(at=self._clock())
            if self._writer is None:
                self._wake = threading.Event()
                self._writer = threading.Thread(target=self._write, args=(self._wake,), name="progress", daemon=True)
                self._writer.start()

    def _count(self, stage: _Stage, done: int) -> None:
        if not self._shown:
            return
        with self._lock:
            stage.done = done
            outermost = self._countable()[0]
            if outermost is not self._training:
                self._pace.move(self._position(), outermost.total or 0, self._clock())

    def _close(self, stage: _Stage) -> None:
        if not self._shown:
            return
        with self._lock:
            self._stages = [other for other in self._stages if other is not stage]
            if stage.total is not None and stage is not self._training and not self._countable():
                taken = self._clock() - self._began
                self._lines.append(f"{plain(stage.description)}: {stage.done}/{stage.total} in {taken:.1f} s")
                self._pace = _Pace()
            writer = None
            if not self._stages:
                writer, self._writer = self._writer, None
                self._wake.set()
        if writer is not None:
            writer.join(PATIENCE_SECONDS)

    @property
    def _live(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _countable(self) -> list[_Stage]:
        return [stage for stage in self._stages if stage.total is not None]

    def _position(self) -> float:
        """Of the outermost countable stage, with the part of its present item that is done."""
        within = 0.0
        outermost, *others = self._countable()
        for stage in reversed(others):
            within = min(1.0, (stage.done + within) / (stage.total or 1))
        return min(outermost.done + within, outermost.total or 0)

    def _write(self, wake: threading.Event) -> None:
        """The writing thread: the only place where progress meets the stream."""
        if self._live:
            with Live(self, console=self._console, auto_refresh=False, transient=True, redirect_stdout=False) as live:
                while not wake.wait(REFRESH_SECONDS):
                    live.refresh()
        else:
            due = self._clock() + QUIET_SECONDS
            while not wake.wait(REFRESH_SECONDS):
                if self._lines:
                    due = self._clock() + QUIET_SECONDS
                elif self._clock() >= due:
                    due += QUIET_SECONDS
                    with self._lock:
                        self._lines.append(self.line(None))
                self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            self._console.print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)


def fitted(parts: Sequence[tuple[int, str]], width: int | None) -> str:
    """Join texts by two spaces, leaving out those of the highest numbers until they fit; at last it is cut."""
    kept = list(parts)
    while width is not None and len(kept) > 1 and cell_len("  ".join(text for _, text in kept)) > width:
        highest = max(rank for rank, _ in kept)
        if highest <= 1:
            break
        kept.pop(next(i for i in reversed(range(len(kept))) if kept[i][0] == highest))
    line = "  ".join(text for _, text in kept)
    if width is None or cell_len(line) <= width:
        return line
    # the name is cut, the figures after it stay
    name, rest = kept[0][1], "  ".join(text for _, text in kept[1:])
    words, _, count = name.rpartition(" ")
    figures = "  ".join(filter(None, (count, rest)))
    room = width - cell_len(figures) - 1
    return f"{set_cell_size(words, room)} {figures}" if room > 0 else set_cell_size(figures, width)


def _figures(report: StepReport, score: tuple[str, ...]) -> tuple[str, ...]:
    used = psutil.Process().memory_info().rss / 2**30
    return (
        f"loss {report.loss:.4f}",
        f"epoch {report.epoch}",
        *(score or ("",)),
        f"{report.seconds:.2f} s/it",
        f"lr {report.lr:.1e}",
        f"RAM {used:.1f} GB",
        f"GPU {report.memory_mb / 1024:.1f} GB" if report.memory_mb else "",
    )


def _clock_words(seconds: float) -> str:
    """m:ss, from an hour on h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


bars = Display(shown=os.environ.get("RANK", "0") == "0")
"""Progress of this command."""
