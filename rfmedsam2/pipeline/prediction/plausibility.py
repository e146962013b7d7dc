"""Whether an image is of the kind that a model was trained on, by modality, intensities and size, or one of those."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.plan import Plan
from rfmedsam2.store.formats.dicom_files import modality_of
from rfmedsam2.store.formats.image_header import ImageHeader, assumptions
from rfmedsam2.volume import Volume

NAMES = {
    "CT": r"(cb|ce|nc)?ct|cta",
    "MR": r"mr[ia]?|magnetic|t[12]\w{0,3}|flair|adc|dwi|dti|swi|qsm|asl|bold|dce|tof|stir|mprage|pdw?",
    "PT": r"pet|pt|suv",
    "NM": r"spect|nm",
    "US": r"us|ultrasound",
}
"""Words in channel names by DICOM's Modality."""
UNKNOWN = ("OT", "SC")
"""Modalities that do not say what made the image: other, secondary capture."""
AIR_HU = -200
SAMPLED_VOXELS = 200_000
FEW, MANY = 0.001, 0.05
"""Shares of voxels: fewer inside the training foreground's range, or more of air in an image that has none, are odd."""
NARROW = 0.05
"""All values of a CT in a smaller part of the training foreground's range are no HU: 0 to 1, -1 to 1, z-scores."""
NARROWEST_HU = 20
"""The same where the training foreground is one tissue: the noise of a CT alone takes more than this. Not of a training
on scaled values, a quarter of whose range is less."""
ODD_SIZE = 10
"""Factor between the longest sides of an image and of the training images that another unit of length explains."""


def doubts_about(
    volume: Volume, plan: Plan, *, paths: Sequence[Path] = (), header: ImageHeader | None = None
) -> tuple[str, ...]:
    """Reasons to doubt that a model can segment an image, as sentences without a full stop; empty if there are none.

    Args:
        volume: (C, Z, Y, X) as read, with the plan's number of channels.
        plan: the plan that the model was trained with.
        paths: the files of the volume, one or one per channel; none for an image in memory.
        header: of the first file, for what had to be assumed in reading it.
    """
    found = [] if header is None else [*assumptions(header).values()]
    found += [doubt] if (doubt := _doubt_about_size(volume, plan)) else []
    for number, (name, statistics) in enumerate(zip(plan.channels, plan.intensities, strict=True)):
        kind = modality_named(name)
        scanner = modality_of(paths[number]) if number < len(paths) else None
        if kind is not None and scanner is not None and scanner not in (kind, *UNKNOWN):
            found.append(f"The model was trained on {kind} (channel {name}), but this series is {scanner}")
        elif number < len(volume.array) and (doubt := _doubt_about(volume.array[number], statistics, kind)):
            found.append(f"The intensities are not those of the model's training (channel {name}): {doubt}")
    return tuple(found)


def trained_ids(records: Iterable[CheckpointRecord], ids: Iterable[str]) -> list[str]:
    """Ids among some that any of the models was trained on, as far as their checkpoints say it; ascending."""
    known = {name for record in records for cases in record.learned().values() for name in cases}
    return sorted(known.intersection(ids))


def modality_named(channel: str) -> str | None:
    """DICOM's Modality that a channel name stands for; None if it does not say, or names several."""
    words = re.split(r"[^a-z0-9]+", channel.lower())
    kinds = [kind for kind, name in NAMES.items() if any(re.fullmatch(name, word) for word in words)]
    return kinds[0] if len(kinds) == 1 else None


def _doubt_about_size(volume: Volume, plan: Plan) -> str | None:
    """The longest side alone: one slice, or a slab, of a body that the model knows raises no doubt."""
    usual = [
        n * mm for stage in plan.stages.values() for n, mm in zip(stage.median_shape, stage.spacing_mm, strict=True)
    ]
    own = max(n * mm for n, mm in zip(volume.grid.shape_zyx, volume.grid.spacing_zyx_mm, strict=True))
    if not usual or max(usual) / ODD_SIZE <= own <= max(usual) * ODD_SIZE:
        return None
    return (
        f"The image's longest side is {own:.3g} mm and the training images' {max(usual):.3g} mm: its spacing may be in "
        "another unit"
    )


def _doubt_about(channel: np.ndarray, training: IntensityStatistics, kind: str | None) -> str | None:
    step = max(1, round((channel.size / SAMPLED_VOXELS) ** (1 / 3)))
    voxels = channel[::step, ::step, ::step]
    if voxels.min() == voxels.max():
        return None
    if kind == "CT":
        if training.min < 0 <= voxels.min() and channel.min() >= 0:
            return f"no voxel is below 0, but the training foreground reaches {training.min:g} HU"
        inside = np.mean((voxels >= training.min) & (voxels <= training.max))
        if inside < FEW:
            return f"{inside:.1%} of the voxels lie in its foreground's range, {training.min:g} to {training.max:g}"
        span, usual = float(voxels.max()) - float(voxels.min()), training.percentile_99_5 - training.percentile_00_5
        if span < max(NARROW * usual, min(NARROWEST_HU, usual / 4)):
            return (
                f"all voxels lie within {span:.3g} HU, and the training foreground within {usual:.4g}: they look scaled"
            )
        return None
    air = np.mean(voxels < AIR_HU)
    if training.min >= 0 and air > MANY:
        return f"{air:.0%} of the voxels are below {AIR_HU}, as air in CT, but no training foreground is below 0"
    return None
