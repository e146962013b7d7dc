"""Overriding fields of a record by assignments such as `train.learning_rate=0.01` (the `--set` of commands)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from rfmedsam2.errors import UsageError
from rfmedsam2.records.base import Record
from rfmedsam2.system.json_text import JsonError, parse_json

RecordT = TypeVar("RecordT", bound=Record)


def with_overrides(record: RecordT, assignments: Sequence[str], *, within: str | None = None, where: object) -> RecordT:
    """Return a record with some fields changed.

    Args:
        record: the record; it is not modified.
        assignments: each PATH=VALUE. PATH is a field and those below it ("train.epochs"); items of lists are numbers
            ("normalization.0.use_mask"). VALUE is JSON, or else a string. Changing a `kind`
            ("train.optimizer.kind=adamw") resets the other fields to the defaults of that kind.
        within: a field whose own fields may be given without its name.
        where: the place that error messages name.

    Raises:
        UsageError: an assignment without "=", or a field that does not exist; lists the existing fields.
        RecordError: a value that its field does not allow; lists all of them.
    """
    data = record.model_dump(mode="json")
    for assignment in assignments:
        path, equals, text = assignment.partition("=") if isinstance(assignment, str) else ("", "", "")
        if not equals or not path.strip():
            expected = "field=value" if within is None else "stage.field=value"
            raise UsageError("An override has no value", where=assignment, expected=expected)
        keys = path.strip().split(".")
        _assign(data, keys, _value(text.strip()), within, assignment)
        if keys[-1] == "kind":
            # fill in the new kind's defaults, because the next assignment may name one of its fields
            data = type(record).parse(data, where=assignment).model_dump(mode="json")
    return type(record).parse(data, where=where, remedy="Correct the values that were set")


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except JsonError:
        return text


def _assign(data: dict[str, Any], path: list[str], value: Any, within: str | None, assignment: str) -> None:
    """Set one field of a record's plain data in place."""
    if within is not None and path[0] in data[within]:
        path = [within, *path]
    holder: Any = data
    for depth, key in enumerate(path[:-1]):
        holder = _child(holder, key, path[:depth], within, assignment)
    last = path[-1]
    old = _child(holder, last, path[:-1], within, assignment)
    if last == "kind" and value != old:
        # drop the fields of the old kind; the new kind takes its defaults
        holder.clear()
    if isinstance(holder, list):
        holder[int(last)] = value
    else:
        holder[last] = value


def _child(holder: Any, key: str, above: list[str], within: str | None, assignment: str) -> Any:
    if isinstance(holder, list) and key.isdigit() and int(key) < len(holder):
        return holder[int(key)]
    if isinstance(holder, dict) and key in holder:
        return holder[key]
    valid = [str(k) for k in holder] if isinstance(holder, dict) else []
    if isinstance(holder, list):
        valid = [str(i) for i in range(len(holder))]
    if within is not None and not above and isinstance(holder, dict):
        valid = [*holder[within], *valid]
    near = difflib.get_close_matches(key, valid, n=1)
    raise UsageError(
        f"The field {key!r} does not exist in {'.'.join(above) or 'the plan'}",
        where=assignment,
        expected=f"one of {', '.join(valid)}" if valid else "a value here, not a field below it",
        remedy=f"Did you mean {near[0]!r}?" if near else None,
    )
