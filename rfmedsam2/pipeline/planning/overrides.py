"""Adapting a plan to another dataset."""

from __future__ import annotations

from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.planning.plan import PlannableDataset, check_fingerprint
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.plan import Plan


def adapt_plan_to_dataset(plan: Plan, dataset: PlannableDataset, fingerprint: Fingerprint) -> Plan:
    """Adapt a published (or another dataset's) plan: keep its settings, use this dataset's intensities.

    Raises:
        PlanError: channels or labels differ, or the fingerprint is of another dataset.
    """
    check_fingerprint(dataset, fingerprint)
    labels = dataset.json.label_set
    if len(dataset.json.channels) != len(plan.channels) or labels.num_outputs != plan.labels.num_outputs:
        raise PlanError(
            "The plan does not match the dataset",
            where=plan.name,
            expected=f"{len(plan.channels)} channel(s) and {plan.labels.num_outputs} classes with background",
            found=f"{len(dataset.json.channels)} channel(s) and {labels.num_outputs} classes in {dataset.name}",
            remedy="Make a plan for this dataset with rfmed_plan_and_preprocess",
        )
    return plan.model_copy(
        update={
            "dataset": dataset.name,
            "fingerprint": fingerprint.digest,
            "channels": dataset.json.channels,
            "labels": labels,
            "file_ending": dataset.json.file_ending,
            "intensities": fingerprint.intensities,
        }
    )
