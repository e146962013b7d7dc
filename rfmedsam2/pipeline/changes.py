"""Changing figures of a plan: `--set stage.field=value` and moving a plan to another dataset."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from rfmedsam2.errors import PlanError, UsageError
from rfmedsam2.pipeline.plan import PlannableDataset, check_fingerprint
from rfmedsam2.records.fingerprint import Fingerprint
from rfmedsam2.records.plan import Plan


def changed(plan: Plan, assignments: Sequence[str], name: str) -> Plan:
    """Change some figures of a plan and give it a new name.

    Args:
        plan: the plan to begin with.
        assignments: each PATH=VALUE. PATH is a stage and its fields ("3d_fullres.train.epochs") or a field of the plan
            itself; items of lists are numbers ("3d_fullres.normalisation.0.use_mask"). VALUE is JSON, or else a word.
            Changing a `kind` ("3d_fullres.train.optimizer.kind=adamw") takes the defaults of that kind.
        name: of the new plan.

    Raises:
        UsageError: an assignment without "=", or a field that does not exist; lists what does.
        RecordError: a value that the field cannot have; lists all such.
    """
    data = plan.model_dump(mode="json")
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise UsageError("A change has no value", where=assignment, expected="stage.field=value")
        keys = path.strip().split(".")
        _assign(data, keys, _value(text.strip()), assignment)
        if keys[-1] == "kind":
            # the next assignment may name a field of the new kind: fill in its defaults
            data = Plan.parse(data, where=assignment).model_dump(mode="json")
    data["name"] = name
    return Plan.parse(data, where=f"plan {name}")


def moved(plan: Plan, dataset: PlannableDataset, fingerprint: Fingerprint) -> Plan:
    """Adopt a published (or another dataset's) plan: its sizes and figures, this dataset's intensities.

    Raises:
        PlanError: channels or labels differ, or the fingerprint is of another dataset.
    """
    check_fingerprint(dataset, fingerprint)
    labels = dataset.json.label_set
    if len(dataset.json.channels) != len(plan.channels) or labels.num_outputs != plan.labels.num_outputs:
        raise PlanError(
            "The plan is for other data",
            where=plan.name,
            expected=f"{len(plan.channels)} channel(s) and {plan.labels.num_outputs} classes with background",
            found=f"{len(dataset.json.channels)} channel(s) and {labels.num_outputs} classes in {dataset.name}",
            remedy="Make a plan of its own with rfmed_plan_and_preprocess",
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


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _assign(data: dict[str, Any], path: list[str], value: Any, assignment: str) -> None:
    """Set one field of the plan's plain data in place."""
    if path[0] in data["stages"]:
        path = ["stages", *path]
    holder: Any = data
    for depth, key in enumerate(path[:-1]):
        holder = _child(holder, key, path[:depth], assignment)
    last = path[-1]
    old = _child(holder, last, path[:-1], assignment)
    if last == "kind" and value != old:
        # the fields of the old kind mean nothing to the new one: leave them to its defaults
        holder.clear()
    if isinstance(holder, list):
        holder[int(last)] = value
    else:
        holder[last] = value


def _child(holder: Any, key: str, above: list[str], assignment: str) -> Any:
    if isinstance(holder, list) and key.isdigit() and int(key) < len(holder):
        return holder[int(key)]
    if isinstance(holder, dict) and key in holder:
        return holder[key]
    valid = [str(k) for k in holder] if isinstance(holder, dict) else []
    if isinstance(holder, list):
        valid = [str(i) for i in range(len(holder))]
    if not above and isinstance(holder, dict):
        valid = [*holder["stages"], *valid]
    near = difflib.get_close_matches(key, valid, n=1)
    raise UsageError(
        f"There is no field {key!r} in {'.'.join(above) or 'the plan'}",
        where=assignment,
        expected=f"one of {', '.join(valid)}" if valid else "a value here, not a field below it",
        remedy=f"Perhaps {near[0]!r} was meant" if near else None,
    )
