"""Overriding fields of a plan (`--set stage.field=value`), and adapting a plan to another dataset."""

from __future__ import annotations

from collections.abc import Sequence

from rfmedsam2.errors import PlanError
from rfmedsam2.pipeline.planning.plan import PlannableDataset, check_fingerprint
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.overrides import with_overrides
from rfmedsam2.records.plan import Plan


def apply_overrides(plan: Plan, assignments: Sequence[str], name: str) -> Plan:
    """Override some fields of a plan and give it a new name.

    Args:
        plan: the original plan.
        assignments: each PATH=VALUE. PATH is a stage and its fields ("3d_fullres.train.epochs") or a field of the plan
            itself; items of lists are numbers ("3d_fullres.normalization.0.use_mask"). VALUE is JSON, or else a string.
            Changing a `kind` ("3d_fullres.train.optimizer.kind=adamw") resets its fields to the defaults of that kind.
        name: name of the new plan.

    Raises:
        UsageError: an assignment without "=", or a field that does not exist; lists the existing fields.
        RecordError: a value that its field does not allow; lists all of them.
    """
    changed_plan = with_overrides(plan, assignments, within="stages", where=f"plan {name}")
    return Plan.parse(changed_plan.model_dump(mode="json") | {"name": name}, where=f"plan {name}")


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
