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
    channels, values = len(prepared.image), labels.values[1:]
    image = np.empty((channels + len(values), *prepared.image.shape[1:]), np.float32)
    image[:channels] = prepared.image
    for channel, value in zip(image[channels:], values, strict=True):
        np.equal(prepared.label, value, out=channel, casting="unsafe")
    return replace(prepared, image=image, label=None)
