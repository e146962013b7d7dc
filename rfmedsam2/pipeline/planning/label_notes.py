"""Notes on what a plan's labels do: regions painted over values, and unlabeled voxels in intensity statistics."""

from __future__ import annotations

from rfmedsam2.arguments import option
from rfmedsam2.errors import sentences
from rfmedsam2.records.dataset import REGION_REMEDY
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.plan import Plan


def notes_on_labels(plan: Plan, fingerprint: Fingerprint) -> list[str]:
    """Sentences for the user; none if there is nothing to decide.

    Args:
        plan: plan of the dataset.
        fingerprint: fingerprint that the plan was made from.
    """
    notes = []
    if (warning := plan.labels.region_warning) is not None:
        notes.append(sentences([warning, REGION_REMEDY]))
    ignore = plan.labels.ignore
    counts = [] if ignore is None else [case.voxels_by_label.get(ignore, 0) for case in fingerprint.cases]
    ct = any(channel.kind == "ct" for stage in plan.stages.values() for channel in stage.normalization)
    if any(counts) and ct and not fingerprint.skip_unlabeled:
        notes.append(
            f"{sum(counts)} voxels of {sum(count > 0 for count in counts)} case(s) have the ignore label {ignore}. As "
            "in nnU-Net, they count as foreground in the statistics that CT is normalized by; "
            f"{option('skip_unlabeled', True)} leaves them out."
        )
    return notes
