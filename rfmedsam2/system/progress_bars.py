"""Progress of the Python API: bars in the terminal, widgets in notebooks (tqdm)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

from rfmedsam2.system.progress import StepReport, Track, silent
from rfmedsam2.system.terminal import SafeStream, plain

T = TypeVar("T")


class ProgressBars:
    """Shows cases, tiles and training steps as bars; a bar that cannot be written ends nothing."""

    def __init__(self) -> None:
        self._training: Any = None

    def __call__(self, items: Iterable[T], description: str, total: int, /) -> Iterator[T]:
        """Count items as they go by."""
        with _bar(description, total) as bar:
            for item in items:
                yield item
                bar.update()

    def step(self, report: StepReport, /) -> None:
        """Show a training step's loss, or a validation's score."""
        if self._training is None:
            self._training = _bar("training", report.total, initial=report.step - 1)
        bar = self._training
        figures = {"loss": f"{report.loss:.4f}"}
        if report.scores is not None:
            figures["score"] = f"{report.scores.get('score', float('nan')):.4f}"
        bar.set_postfix(figures, refresh=False)
        bar.update(report.step - bar.n)
        if report.step == report.total and report.scores is not None:
            bar.close()
            self._training = None


def progress_bars(progress: bool | Track) -> Track:
    """What `progress` means in the Python API: True shows bars, False nothing, a `Track` shows what it likes."""
    if callable(progress):
        return progress
    return ProgressBars() if progress else silent


def _bar(description: str, total: int, *, initial: int = 0) -> Any:
    # tqdm's estimate follows the recent speed (an exponential moving average); widgets take no stream
    return tqdm(
        total=total, initial=initial, desc=plain(description), file=SafeStream(sys.stderr), smoothing=0.3, leave=False
    )
