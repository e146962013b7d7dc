"""Box prompts given by a user or another program: each a rectangle on one slice."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, FiniteFloat, model_validator
from typing_extensions import Self

from rfmedsam2.records.base import Record
from rfmedsam2.system.file_names import Name

Place = Annotated[FiniteFloat, Field(ge=0)]


class BoxPrompt(Record):
    """A rectangle around one object on one slice, as a user gives it, in voxels of the image file.

    The convention of all boxes of volumes: x0, y0, x1, y1 are indices from 0, and both corners are voxels that belong
    to the box. A box of one voxel has x0 = x1; a whole slice is 0, 0, width - 1, height - 1; in millimeters or after
    resampling a box extends from the near edge of its first voxel to the far edge of its last.
    """

    label: str | int
    """Name or value of the class, as in the dataset's labels."""
    slice: Annotated[int, Field(ge=0)]
    """Index along the file's array axis z (the third of NIfTI's axes)."""
    box: tuple[Place, Place, Place, Place]
    """x0, y0, x1, y1: x and y of the first voxel, then of the last (inclusive)."""

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Self:
        x0, y0, x1, y1 = self.box
        if x1 < x0 or y1 < y0:
            raise ValueError(f"the box {list(self.box)} ends before it begins: x0, y0, x1, y1 are expected")
        return self


class BoxPromptFile(Record):
    """The file {case: [{"label": ..., "slice": ..., "box": [x0, y0, x1, y1]}, ...], ...}."""

    cases: dict[Name, tuple[BoxPrompt, ...]]

    @model_validator(mode="before")
    @classmethod
    def _is_a_table(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError('the file must hold {"case": [{"label": ..., "slice": ..., "box": [x0, y0, x1, y1]}]}')
        return {"cases": data}
