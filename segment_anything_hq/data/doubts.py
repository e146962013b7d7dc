"""Files that can be read, but may mean something else: masks of labels, void borders or colors, stacks, dark images."""

from __future__ import annotations

import logging
import multiprocessing
from functools import cache
from pathlib import Path

import numpy as np

from rfmedsam2.arguments import option
from segment_anything_hq.choices import MaskRule

logger = logging.getLogger(__name__)
NOISE = 32
"""Values up to this one are black in a mask that was compressed with loss."""
COLORED = 64
"""Channels that differ by more are a color."""
VOID, VOID_COLOR = 255, (224, 224, 192)
"""Unlabeled borders in PASCAL VOC's masks, and in those of its successors."""
HALF = 128
"""Labels beside void are lower; what an editor smooths has values up to 254."""


def warn_of_mask(path: Path, values: np.ndarray, ground_truth: np.ndarray, rule: MaskRule, *, exact: bool) -> None:
    """Warn if a mask may be read by the wrong rule.

    Args:
        path: the mask's file.
        values: (H, W, C), the values as stored.
        ground_truth: (H, W) int8, what `rule` made of them: 1 object, 0 background, -1 ignored.
        rule: how they were read.
        exact: the file was compressed without loss.
    """
    found = _of_every_value(values) if rule == "any" else _of_bright_values(values, ground_truth, exact=exact)
    if found is not None:
        warn_once(path, *found)


def warn_once(path: Path, doubt: str, details: str) -> None:
    """Warn of the first file that raises a doubt; workers that load batches do not."""
    if doubt not in _warned() and multiprocessing.parent_process() is None:
        _warned().add(doubt)
        logger.warning("%s: %s (%s). Said once; other files may be like it.", doubt, path, details)


@cache
def _warned() -> set[str]:
    return set()


def _of_bright_values(values: np.ndarray, ground_truth: np.ndarray, *, exact: bool) -> tuple[str, str] | None:
    """A doubt and its details: most of what is not black is background, or some of what is colored."""
    taken = int(np.count_nonzero(ground_truth == 1))
    lit = int(np.count_nonzero((values > (0 if exact else NOISE)).any(-1) & (ground_truth >= 0)))
    if not taken or lit == taken or (lit < 2 * taken and not _is_colored(values)):
        return None  # an empty mask is an error of its own
    doubt = "Object is where a mask's first channel is above 128, but labels or colors of objects may be meant"
    remedy = f"{option('rule', 'any', flag='--mask-rule')} takes every value but 0"
    return doubt, f"{taken} of {lit} pixels that are not black are object; {remedy}"


def _of_every_value(values: np.ndarray) -> tuple[str, str] | None:
    """A doubt and its details: void is taken for object, or there is no background."""
    if (values > 0).any(-1).all() and (values != values[0, 0]).any():
        return "Every value of a mask but 0 is object, but it has no 0", "its background may be a color"
    if values.shape[2] == 1:
        labels = set(np.unique(values).tolist()) - {0, VOID}
        void = np.count_nonzero(values == VOID) if labels and max(labels) < HALF else 0
    else:
        void = np.count_nonzero((values == VOID_COLOR).all(-1))
    if void:
        return "Every value of a mask but 0 is object, also what PASCAL VOC calls void", f"{void} pixels of it"
    return None


def _is_colored(values: np.ndarray) -> bool:
    if values.shape[2] == 1 or all(np.array_equal(values[..., 0], values[..., other]) for other in (1, 2)):
        return False
    return bool((values.max(-1) - values.min(-1) > COLORED).any())
