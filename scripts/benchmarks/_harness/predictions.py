"""The two predicting commands with their networks timed, and how their label maps differ."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _harness import stub_network
from _harness.peers import Sides
from _harness.usage import Usage, run_measured
from rfmedsam2.store.images import read_label

NNUNET = (
    "nnunetv2.inference.predict_from_raw_data:nnUNetPredictor._internal_maybe_mirror_and_predict",
    "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
)
OURS = ("rfmedsam2.inference.sliding_window:_Ensemble.__call__", "rfmedsam2.cli.pipeline:predict_command")
"""The method that runs the network, and the command."""


class Network(NamedTuple):
    """Seconds of a network, and its processor seconds: the fairer ones where others use the same cores."""

    wall_s: float
    cpu_s: float


def timed_prediction(
    sides: Sides, side: tuple[str, str], words: list[object], *, limit_mib: int | None = None
) -> tuple[Usage, Network]:
    """Resources that a side used, and those of its network, 0 if it was killed at the limit of memory."""
    shutil.rmtree(str(words[words.index("-o") + 1]), ignore_errors=True)
    command = [sys.executable, Path(stub_network.__file__), *side, *words]
    usage = run_measured(command, env=sides.nnunet_variables, limit_mib=limit_mib)
    if usage.stopped:
        return usage, Network(0, 0)
    told = re.search(rf"{stub_network.SECONDS_PREFIX} ([\d.]+) ([\d.]+)", usage.output)
    assert told is not None, usage.output
    return usage, Network(float(told[1]), float(told[2]))


def differences(theirs: Path, ours: Path) -> tuple[int, int]:
    """Number of differing voxels, and of all voxels."""
    different, voxels = 0, 0
    for expected, found in _pairs(theirs, ours):
        different += int(np.count_nonzero(expected != found))
        voxels += expected.size
    return different, voxels


def mean_dice(theirs: Path, ours: Path) -> float:
    """DSC of ours against theirs, mean over all foreground classes of all volumes that either holds."""
    scores = []
    for expected, found in _pairs(theirs, ours):
        both = expected[expected == found]
        counts = [np.bincount(each.ravel()) for each in (expected, found, both)]
        padded = np.zeros((3, max(map(len, counts))))
        for row, count in zip(padded, counts, strict=True):
            row[: len(count)] = count
        one, two, same = padded[:, 1:]
        there = one + two > 0
        scores += list(2 * same[there] / (one + two)[there])
    return float(np.mean(scores)) if scores else 1.0


def _pairs(theirs: Path, ours: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    names = [path.name for path in sorted(theirs.glob("*.nii.gz"))]
    return [(read_label(theirs / name)[0].array, read_label(ours / name)[0].array) for name in names]
