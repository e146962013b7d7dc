"""nnU-Net v2's `dataset.json` and its labels."""

from __future__ import annotations

from typing import Any, ClassVar
from unicodedata import category, normalize

from pydantic import ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from rfmedsam2.records.base import Record
from rfmedsam2.system.file_names import FileEnding, Name

_HIGHEST = 65535  # label maps are of 16 bits
REGION_REMEDY = "Declare larger regions before those that they contain, each with the value of what only it contains"


class LabelSet(Record):
    """Names of the values of a label map.

    Classes are mutually exclusive (softmax, arg-max) or, with regions (a name that
    stands for several values), overlapping (one sigmoid each), painted in `regions_class_order`.
    """

    names: dict[str, int | tuple[int, ...]]
    """Name -> value, or -> the values of a region. Contains "background": 0; never the ignore label."""
    regions_class_order: tuple[int, ...] | None = None
    """For regions: the value painted for each foreground region, in painting order."""
    ignore: int | None = None
    """Value of voxels without annotation; excluded from losses and metrics."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.names.get("background") not in (0, (0,)):
            raise ValueError('labels must contain "background": 0')
        if self.has_regions:
            if self.regions_class_order is None:
                raise ValueError("region labels need regions_class_order")
            if len(self.regions_class_order) != len(self.foreground):
                raise ValueError("regions_class_order must name one value for each foreground region")
        if self.ignore is not None and self.ignore in self.values:
            raise ValueError("the ignore label must differ from every other label value")
        return self

    @property
    def has_regions(self) -> bool:
        """Whether a foreground name stands for several values (trained with sigmoids)."""
        return any(isinstance(v, tuple) and len(v) > 1 for n, v in self.names.items() if n != "background")

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Foreground name -> the label values it covers (one value unless it is a region), in declared order."""
        return {n: v if isinstance(v, tuple) else (v,) for n, v in self.names.items() if n != "background"}

    @property
    def values(self) -> tuple[int, ...]:
        """All declared values with background 0, without the ignore label, ascending."""
        return tuple(sorted({0, *(x for v in self.foreground.values() for x in v)}))

    @property
    def allowed_values(self) -> tuple[int, ...]:
        """All values allowed in a label file: `values` and the ignore label."""
        return self.values if self.ignore is None else (*self.values, self.ignore)

    @property
    def num_outputs(self) -> int:
        """Number of a network's output channels: regions, or classes with background."""
        return len(self.foreground) if self.has_regions else len(self.values)

    @property
    def region_warning(self) -> str | None:
        """A sentence without its full stop if painting the regions changes values of a perfect prediction."""
        if not self.has_regions or self.regions_class_order is None:
            return None
        painted: dict[int, int] = {}  # later regions are painted over earlier ones
        for values, color in zip(self.foreground.values(), self.regions_class_order, strict=True):
            painted.update(dict.fromkeys(values, color))
        changed = [f"{color} in place of {value}" for value, color in sorted(painted.items()) if color != value]
        if not changed:
            return None
        lost = [str(value) for value in sorted(painted) if value not in painted.values()]
        never = f"; {', '.join(lost)} can never come out" if lost else ""
        return f"With this regions_class_order even a perfect prediction holds {', '.join(changed)}{never}"

    @classmethod
    def from_dataset_json(cls, labels: dict[str, Any], regions_class_order: Any = None) -> LabelSet:
        """Split nnU-Net's `labels` into names and the ignore label."""
        names = {n: tuple(v) if isinstance(v, list | tuple) else v for n, v in labels.items() if n != "ignore"}
        ignore = labels.get("ignore")
        if isinstance(ignore, list | tuple):
            ignore = ignore[0] if len(ignore) == 1 else ignore
        return cls.model_validate({"names": names, "regions_class_order": regions_class_order, "ignore": ignore})


def _ambiguous(labels: dict[str, int | tuple[int, ...]]) -> list[str]:
    """Why a table does not give every value (or set of values) one name of its own; empty if it does."""
    names: dict[frozenset[int], list[str]] = {}
    alike: dict[str, list[str]] = {}
    for name in labels:
        alike.setdefault(_shown(name), []).append(name)
    for name, value in ((name, value) for name, value in labels.items() if name != "ignore"):
        names.setdefault(frozenset(value if isinstance(value, tuple) else (value,)), []).append(name)
    faults = [f"names that look the same: {', '.join(map(repr, same))}" for same in alike.values() if len(same) > 1]
    for values, same in names.items():
        if not values:
            faults.append(f"{same[0]!r} has no value")
            continue
        shown = " and ".join(map(str, sorted(values)))
        if len(same) > 1:
            faults.append(f"{len(same)} names for the value {shown}: {', '.join(map(repr, same))}")
        if not all(map(_shown, same)):
            faults.append(f"the value {shown} has an empty name")
    for name, value in labels.items():
        values = value if isinstance(value, tuple) else (value,)
        if values and not 0 <= min(values) <= max(values) <= _HIGHEST:
            shown = " and ".join(map(str, sorted(values)))
            faults.append(f"{name!r} has the value {shown}, and label maps hold values from 0 to {_HIGHEST}")
    return faults


def _shown(name: str) -> str:
    """What can be seen of a name: accents as one character, one space for several, nothing of invisible characters."""
    return " ".join("".join(c for c in normalize("NFC", name) if category(c) != "Cf").split())


class DatasetJson(Record):
    """The fields of nnU-Net v2's `dataset.json` that we use; other fields are kept unchanged."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    known_as: ClassVar[str] = "dataset.json"

    channel_names: dict[str, str]
    labels: dict[str, int | tuple[int, ...]]
    file_ending: FileEnding
    numTraining: int | None = None  # noqa: N815 - nnU-Net's spelling
    name: str | None = None
    regions_class_order: tuple[int, ...] | None = None
    overwrite_image_reader_writer: str | None = None
    dataset: dict[Name, dict[str, Any]] | None = None
    groups: dict[str, str] | None = Field(default=None)
    """Our extension: case id -> patient (or other group); a group stays on one side of every split."""

    @field_validator("file_ending")
    @classmethod
    def _dotted(cls, value: str) -> str:
        if not value.startswith("."):
            raise ValueError('file_ending must begin with a dot, for instance ".nii.gz"')
        return value

    @field_validator("labels")
    @classmethod
    def _one_name_for_each_value(cls, labels: dict[str, int | tuple[int, ...]]) -> dict[str, int | tuple[int, ...]]:
        if faults := _ambiguous(labels):
            raise ValueError("; ".join(faults))
        return labels

    @model_validator(mode="after")
    def _labels_are_valid(self) -> Self:
        labels = self.label_set
        strange = sorted(set(labels.regions_class_order or ()) - set(labels.values)) if labels.has_regions else []
        if strange:
            shown = ", ".join(map(str, strange))
            raise ValueError(f"regions_class_order paints values that no label has: {shown}")
        if not self.channel_names or set(self.channel_names) != set(map(str, range(len(self.channel_names)))):
            raise ValueError(f"channel_names must be numbered 0, 1, ..., found {list(self.channel_names)}")
        return self

    @property
    def label_set(self) -> LabelSet:
        """The labels as a `LabelSet`."""
        return LabelSet.from_dataset_json(dict(self.labels), self.regions_class_order)

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names in channel order."""
        return tuple(self.channel_names[str(i)] for i in range(len(self.channel_names)))
