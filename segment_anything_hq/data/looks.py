"""Photographs that were saved again: in another format, size or quality they have other bytes, but look the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from segment_anything_hq.data.content import THREADS, digests_of
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.data.image_io import read_thumbnails

SIDE = 8
NEAR = 1 / 8
"""Largest share of differing signs among those set in either of two images that look the same.

Of 596 photographs no two different ones are below 1/4; JPEG quality 50 and half the size stay below 1/8.
"""
AT_ONCE = 256


def look(image: Path) -> str:
    """128 signs as 32 hexadecimal digits: where a thumbnail of 8 x 8 becomes darker to the right, and downwards.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    wide, high = (
        thumbnail.astype(np.int16) for thumbnail in read_thumbnails(image, ((SIDE, SIDE + 1), (SIDE + 1, SIDE)))
    )
    signs = np.concatenate([(np.diff(wide, axis=1) < 0).ravel(), (np.diff(high, axis=0) < 0).ravel()])
    return np.packbits(signs).tobytes().hex()


def looks_of(sets: Sequence[ImageSet]) -> dict[Path, str]:
    """Look of every image of some sets, by its path.

    Raises:
        ImageError: a file cannot be read as an image.
    """
    images = list(dict.fromkeys(sample.image for part in sets for sample in part.samples))
    with ThreadPoolExecutor(max_workers=THREADS) as threads:
        return dict(zip(images, threads.map(look, images), strict=True))


def saved_again(sets: Sequence[ImageSet], looks: Sequence[str], digests: Collection[str]) -> dict[str, tuple[int, int]]:
    """Set name -> number of its images that look like one of some others, and of all its images.

    Args:
        sets: the sets.
        looks: looks of the others.
        digests: digests of the others' bytes (`content.content_digest`): equal files are not counted.

    Raises:
        ImageError: a file cannot be read as an image.
    """
    known, found = set(digests), {}
    for part in sets:
        of_bytes, every = digests_of([part]), looks_of([part])
        own = [every[image] for image, digest in of_bytes.items() if digest not in known]
        alike = int(_is_near(_signs(own), _signs(looks)).sum()) if own and looks else 0
        if alike:
            found[part.name] = (alike, len(every))
    return found


def _signs(looks: Sequence[str]) -> np.ndarray:
    """(N, 128) float32, 0 or 1."""
    return np.unpackbits(np.array([list(bytes.fromhex(each)) for each in looks], np.uint8), axis=1).astype(np.float32)


def _is_near(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) bool: whether a row differs little from any of the others."""
    near = []
    for start in range(0, len(own), AT_ONCE):
        rows = own[start : start + AT_ONCE]
        both = rows @ others.T
        either = rows.sum(1)[:, None] + others.sum(1) - both
        near.append(((either - both) < NEAR * either).any(1))
    return np.concatenate(near)
