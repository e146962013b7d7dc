"""Input of the second stage of a cascade: the image, then the first stage's label map, one-hot (nnU-Net's order)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.transforms.prepare import Prepared


def with_previous_labels(prepared: Prepared, labels: LabelSet) -> Prepared:
    """Move the label map, which is the first stage's, behind the channels of the image.

    Args:
        prepared: image (C, a, b, c) and label map (a, b, c).
        labels: the labels; every value but background gets a channel of 0 and 1, in ascending order.

    Returns:
        The same with an image (C + K, a, b, c) and no label map.
    """
    assert prepared.label is not None
    return replace(prepared, image=stacked(prepared.image, prepared.label, labels), label=None)


def stacked(image: np.ndarray, label: np.ndarray, labels: LabelSet) -> np.ndarray:
    """The input (C + K, a, b, c) of an image (C, a, b, c) and a label map (a, b, c); see `with_previous_labels`."""
    channels, values = len(image), labels.values[1:]
    both = np.empty((channels + len(values), *image.shape[1:]), np.float32)
    both[:channels] = image
    for channel, value in zip(both[channels:], values, strict=True):
        np.equal(label, value, out=channel, casting="unsafe")
    return both
