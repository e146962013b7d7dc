"""Boxes that a person, or another program, gives to be segmented: one rectangle on one slice each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, FiniteFloat, model_validator
from typing_extensions import Self

from rfmedsam2.records.base import Record

Place = Annotated[FiniteFloat, Field(ge=0)]


class BoxPrompt(Record):
    """A rectangle about one object on one slice, in voxels of the image file, counted from 0."""

    label: str | int
    """Name or value, as in the dataset's labels."""
    slice: Annotated[int, Field(ge=0)]
    """Index along the file's array axis z (the third of NIfTI's axes)."""
    box: tuple[Place, Place, Place, Place]
    """x and y of the first voxel, x and y of the last: x0, y0, x1, y1."""

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Self:
        x0, y0, x1, y1 = self.box
        if x1 < x0 or y1 < y0:
            raise ValueError(f"the box {list(self.box)} ends before it begins: x0, y0, x1, y1 are expected")
        return self


class BoxPromptFile(Record):
    """The file {case: [{"label": ..., "slice": ..., "box": [x0, y0, x1, y1]}, ...], ...}."""

    cases: dict[str, tuple[BoxPrompt, ...]]

    @model_validator(mode="before")
    @classmethod
    def _is_a_table(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError('the file must hold {"case": [{"label": ..., "slice": ..., "box": [x0, y0, x1, y1]}]}')
        return {"cases": data}
