"""Training metrics: events in metrics.jsonl, a table with one row per epoch in metrics.csv, and trackers.

metrics.jsonl is the source; metrics.csv is made from it. On resume, events after the resumed step are removed, so that
the file equals that of an uninterrupted run.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rfmedsam2.engine.monitoring.trackers import Ending, Trackers, Tracking
from rfmedsam2.system.atomic import write_text, writing_to
from rfmedsam2.system.csv_text import write_rows
from rfmedsam2.system.json_text import JsonError, parse_json

EVENTS = "metrics.jsonl"
TABLE = "metrics.csv"
FLUSH_BYTES = 1 << 16


class MetricsLog:
    """Writer of one run's metrics; buffered, `flush` makes all events durable.

    Args:
        folder: folder of the run.
        keep_step: events after this step are removed (0: all events).
        keep_validation: keep the validation of step `keep_step` itself.
        tracking: trackers that get the same numbers.
    """

    def __init__(
        self, folder: Path, *, keep_step: int = 0, keep_validation: bool = True, tracking: Tracking | None = None
    ) -> None:
        self._path, self._table = folder / EVENTS, folder / TABLE
        self._buffer = bytearray()
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = _cut(self._path, keep_step, keep_validation)
        self._epochs = Epochs()
        for event in kept:
            self._epochs.add(event)
        self._trackers = Trackers(tracking or Tracking(), folder, keep_step)

    def write(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self._buffer += (json.dumps(event) + "\n").encode()
        self._epochs.add(event)
        self._trackers.add(event["step"], dict(_numbers(event)))
        if len(self._buffer) > FLUSH_BYTES:
            self._append()

    def flush(self) -> None:
        """Write all events to disk (fsync), and update the table.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        self._append()
        write_text(self._table, self._epochs.to_csv())
        self._trackers.flush()

    def close(self, ending: Ending = "finished") -> None:
        """Flush and close."""
        try:
            self.flush()
        finally:
            self._trackers.close(ending)

    def _append(self) -> None:
        with writing_to(self._path), self._path.open("ab") as stream:
            stream.write(self._buffer)
            stream.flush()
            os.fsync(stream.fileno())
        self._buffer.clear()


class Epochs:
    """Running summary of events per epoch: the rows of metrics.csv."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float]] = {}
        self._counts: dict[int, int] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Add one event to its epoch's row: losses are averaged, seconds summed, the last rate and scores kept."""
        epoch = event["epoch"]
        row = self._rows.setdefault(epoch, {"epoch": epoch})
        row["step"] = event["step"]
        if event["event"] == "validation":
            row.update(event["scores"])
            return
        count = self._counts[epoch] = self._counts.get(epoch, 0) + 1
        losses = {"loss": event["loss"]} | {f"loss/{name}": value for name, value in event["losses"].items()}
        for name, value in losses.items():
            row[name] = row.get(name, 0.0) + (value - row.get(name, 0.0)) / count
        row["lr"] = event["lr"]
        row["seconds"] = row.get("seconds", 0.0) + event["seconds"]

    def rows(self) -> list[dict[str, float]]:
        """One row per epoch, ascending."""
        return [self._rows[epoch] for epoch in sorted(self._rows)]

    def to_csv(self) -> str:
        """The rows as CSV text, with a column for every name that occurred."""
        columns = list(dict.fromkeys(name for row in self.rows() for name in row))
        stream = io.StringIO()
        rows = ([row.get(name) for name in columns] for row in self.rows())
        write_rows(stream, itertools.chain([columns], rows), line_end="\n")
        return stream.getvalue()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Read the events of a metrics.jsonl; a last line left incomplete by a crash is ignored."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for event, _ in _lines(stream):
            yield event


def epoch_rows(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, computed from metrics.jsonl."""
    epochs = Epochs()
    for event in read_events(path):
        epochs.add(event)
    return epochs.rows()


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[dict[str, Any], int]]:
    """Events with the offset after each, up to the first incomplete line."""
    end = 0
    for line in stream:
        end += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            event = parse_json(line)
        except JsonError:
            return
        if not isinstance(event, dict):
            return
        yield event, end


def _cut(path: Path, keep_step: int, keep_validation: bool) -> list[dict[str, Any]]:
    """Truncate the file after the last event to keep; returns the kept events."""
    kept: list[dict[str, Any]] = []
    end = 0
    if path.is_file():
        with path.open("rb") as stream:
            for event, after in _lines(stream):
                of_step = event["step"] == keep_step and (event["event"] != "validation" or keep_validation)
                if not (event["step"] < keep_step or of_step):
                    break
                kept.append(event)
                end = after
        os.truncate(path, end)
    else:
        path.touch()
    return kept


def _numbers(event: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if event["event"] == "validation":
        yield from ((f"validation/{name}", value) for name, value in event["scores"].items())
        return
    yield "train/loss", event["loss"]
    yield from ((f"train/loss/{name}", value) for name, value in event["losses"].items())
    yield "train/lr", event["lr"]
