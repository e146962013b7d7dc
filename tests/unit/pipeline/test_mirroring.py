"""Labels of the left and of the right are noticed, with the axis that must not be mirrored then."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfmedsam2.geometry import Grid
from rfmedsam2.pipeline.planning.mirroring import note_on_mirroring, paired_names
from rfmedsam2.records.plan import Augmentation, Plan
from rfmedsam2.system.atomic import read_record

PAIRS = {"background": 0, "left_caudate": 1, "right_caudate": 2}
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SAGITTAL = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
"""z, as stored, runs from right to left."""


def planned(names: dict[str, int], *, mirror: tuple[int, ...] = (0, 1, 2), forward=(0, 1, 2)) -> Plan:
    root = Path(__file__).resolve().parents[3] / "plans"
    plan = read_record(next(root.glob("amos22*.json")), Plan)
    labels = plan.labels.model_copy(update={"names": names})
    stage = plan.stages["3d_fullres"]
    stage = stage.model_copy(update={"augmentation": Augmentation(mirror_axes=mirror)})
    return plan.model_copy(
        update={"labels": labels, "stages": {"3d_fullres": stage}, "transpose_forward": forward, "reorient": None}
    )


def grid(direction) -> Grid:
    return Grid(shape_zyx=(4, 5, 6), spacing_zyx_mm=(1.0, 1.0, 1.0), direction=direction)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["left_caudate", "right_caudate", "stem"], ["left_caudate", "right_caudate"]),
        (["Kidney Left", "kidney right"], ["Kidney Left", "kidney right"]),
        (["lh-cortex", "rh-cortex"], ["lh-cortex", "rh-cortex"]),
        (["left_atrium", "leftover"], []),
        (["bright", "cleft"], []),
    ],
)
def test_sides_are_pairs(names, found) -> None:
    assert paired_names(names) == found


@pytest.mark.parametrize(
    ("direction", "forward", "kept"),
    [(AXIAL, (0, 1, 2), "[0,1]"), (SAGITTAL, (0, 1, 2), "[1,2]"), (SAGITTAL, (2, 0, 1), "[0,2]")],
)
def test_the_axis_from_side_to_side_is_named(direction, forward, kept) -> None:
    (note,) = note_on_mirroring(planned(PAIRS, forward=forward), grid(direction))
    assert f"3d_fullres.augmentation.mirror_axes={kept}" in note


def test_what_is_turned_when_read_has_its_sides_along_x() -> None:
    plan = planned(PAIRS).model_copy(update={"reorient": "RAS"})
    assert "mirror_axes=[0,1]" in note_on_mirroring(plan, grid(SAGITTAL))[0]


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert not note_on_mirroring(planned({"background": 0, "liver": 1}), grid(AXIAL))
    assert not note_on_mirroring(planned(PAIRS, mirror=(0, 1)), grid(AXIAL))
