"""Signals during training: SIGTERM, SIGINT and SIGHUP save and stop, SIGUSR1 saves and continues."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)
HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class Interrupted(BaseException):
    """Raised inside `interruptible` work when a stop is requested."""


class Signals:
    """Requests received since training started."""

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the signal that requested to save and stop."""
        self.save = False
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run work that a stop request may interrupt at any point (raises Interrupted there)."""
        self._interruptible = True
        try:
            if self.stop:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Record a signal; a second Ctrl-C stops at once."""
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
    """Handle signals inside the `with` block; does nothing outside the main thread, where Python allows no handlers.

    SIGHUP, which says that the terminal is gone, stays ignored under nohup.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [signal.Signals[name] for name in HANDLED if name in signal.Signals.__members__]
    before = {
        number: signal.signal(number, signals.handle)
        for number in numbers
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
