"""Which cases of a raw dataset take part: all but those that planning left out."""

from __future__ import annotations

from dataclasses import replace

from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.raw import RawDataset
from rfmedsam2.system.atomic import read_record


def without_left_out(raw: RawDataset, layout: Layout) -> RawDataset:
    """The dataset without the training cases that planning left out (`skip_faulty`); all of them if it is not planned.

    Raises:
        RecordError: the fingerprint is damaged.
    """
    path = layout.fingerprint_file(raw.name)
    left_out = read_record(path, Fingerprint).left_out if path.is_file() else {}
    return replace(raw, training=tuple(case for case in raw.training if case.id not in left_out))
