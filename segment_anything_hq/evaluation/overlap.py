"""Whether a network is evaluated on images that it was trained on, by the content of the images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rfmedsam2.arguments import option
from rfmedsam2.errors import UsageError, shortlist
from segment_anything_hq.data.content import seen_images
from segment_anything_hq.data.datasets import ImageSet

UNKNOWN = "The checkpoint does not say which images it was trained on; these may be among them"


def trained_on(
    sets: Sequence[ImageSet], training_images: Collection[str] | None, *, model: Path | None, held_out: float | None
) -> dict[str, tuple[int, int]]:
    """Set name -> number of its images that the network was trained on, and of all its images; others are left out.

    Args:
        sets: the sets to evaluate on.
        training_images: digests in the checkpoint; None: it does not say, or there is none.
        model: the checkpoint, of the network or of its decoder; None: published weights, whose training images are
            unknown.
        held_out: the share that `sets` are the held-out part of; None: all data.

    Raises:
        UsageError: a held-out part was asked for, but holds training images, or the checkpoint does not say which.
        ImageError: an image cannot be read.
    """
    if training_images is None:
        if model is not None and held_out is not None:
            raise UsageError(
                "The checkpoint does not say which images it was trained on, so nothing is known to be held out",
                where=model,
                remedy=f"Train it again with this version, or evaluate without {option('held_out')} on data that it "
                "has not seen",
            )
        return {}
    seen = seen_images(sets, training_images)
    if seen and held_out is not None:
        raise UsageError(
            f"The held-out part of {option('held_out', held_out)} holds training images",
            where=model,
            found=shortlist(counted(seen)),
            remedy=f"Give the share and all the data of the training, or evaluate without {option('held_out')}",
        )
    return seen


def counted(seen: dict[str, tuple[int, int]]) -> list[str]:
    """One phrase per set: "12 of 13 images of photos"."""
    return [f"{some} of {every} images of {name}" for name, (some, every) in seen.items()]
