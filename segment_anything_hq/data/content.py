"""Images by their content: digests that stay the same when files are moved, renamed or copied."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from rfmedsam2.errors import ImageError
from rfmedsam2.system.ordinary_files import file_sha256
from segment_anything_hq.data.datasets import ImageSet

DIGITS = 16
"""Hexadecimal digits of a digest: the chance that any two of a million images share one is below 1e-7."""
THREADS = 4


def content_digest(image: Path) -> str:
    """The first `DIGITS` digits of the SHA-256 of a file's bytes; an unchanged file is read once per process.

    Raises:
        ImageError: the file cannot be read.
    """
    try:
        status = image.stat()
        return _digest(image, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror})", where=image) from error


def digests_of(sets: Sequence[ImageSet]) -> dict[Path, str]:
    """Digest of every image of some sets, by its path.

    Raises:
        ImageError: a file cannot be read.
    """
    images = list(dict.fromkeys(sample.image for part in sets for sample in part.samples))
    with ThreadPoolExecutor(max_workers=THREADS) as threads:
        return dict(zip(images, threads.map(content_digest, images), strict=True))


def seen_images(sets: Sequence[ImageSet], digests: Collection[str]) -> dict[str, tuple[int, int]]:
    """Set name -> number of its images among some digests, and of all its images; sets without any are left out.

    Raises:
        ImageError: a file cannot be read.
    """
    known, found = set(digests), {}
    for part in sets:
        own = digests_of([part]).values()
        seen = sum(digest in known for digest in own)
        if seen:
            found[part.name] = (seen, len(own))
    return found


@cache
def _digest(image: Path, size: int, modified_ns: int) -> str:  # noqa: ARG001 - they tell a changed file
    return file_sha256(image)[:DIGITS]
