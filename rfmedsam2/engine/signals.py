"""Signals while training: SIGTERM and SIGINT mean save and stop, SIGUSR1 means save and go on."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Interrupted(BaseException):
    """Raised out of work that may be broken off when a stop is asked for."""


class Signals:
    """What was asked for since training began."""

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the signal that asks to save and stop."""
        self.save = False
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run work that a stop may break off at any point (raises Interrupted there)."""
        self._interruptible = True
        try:
            if self.stop:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Note a signal; a second Ctrl-C stops at once."""
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self.save = True
            return
        if self.stop and name == "SIGINT":
            raise KeyboardInterrupt
        self.stop = name
        logger.info("%s: saving a checkpoint, then stopping", name)
        if self._interruptible:
            raise Interrupted


@contextmanager
def handle_signals() -> Iterator[Signals]:
    """Handle the signals for the time inside; outside the main thread, where Python allows none, nothing is handled."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [signal.Signals[n] for n in ("SIGTERM", "SIGINT", "SIGUSR1") if n in signal.Signals.__members__]
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
