"""Labels of a real abdominal CT, for benchmarks whose cost depends on which organs are where."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np

CASE = "ct-organs-totalsegmentator/Dataset110_TSAbdomenCT/labelsTr/ts_example.nii.gz"
ORGANS = 13


def labels_with_most_organs(frames: int) -> np.ndarray | None:
    """Labels (frames, 122, 101) of 0..13 at 3 mm: the first slices that show the most different organs.

    Reads the data sets in RFMED_TEST_DATA; None if they are not available.
    """
    named = os.environ.get("RFMED_TEST_DATA")
    if not named or not (Path(named) / CASE).is_file():
        return None
    # nibabel's first axis is x: slices are the last
    labels = np.moveaxis(np.asarray(nibabel.load(Path(named) / CASE).dataobj), 2, 0)  # type: ignore[attr-defined]
    windows = range(len(labels) - frames + 1)
    start = max(windows, key=lambda at: (len(np.unique(labels[at : at + frames])), -at))
    return labels[start : start + frames]
