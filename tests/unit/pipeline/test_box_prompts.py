"""Boxes given for an image, in the planned grid that the network sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rfmedsam2.errors import GeometryError, ImageError, RecordError, UsageError
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.box_prompts import planned_boxes
from rfmedsam2.prompts import Prompts, prompts_from_labels
from rfmedsam2.records.box_prompts import BoxPrompt, BoxPromptFile
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Resampling
from rfmedsam2.store.orientation import Orientation
from rfmedsam2.transforms.prepare import Restore

LABELS = LabelSet.model_validate({"names": {"background": 0, "liver": 3, "spleen": 1}, "ignore": 9})
REGIONS = LabelSet.model_validate(
    {"names": {"background": 0, "whole": (1, 2), "core": (2,)}, "regions_class_order": (1, 2)}
)


def restore(shape=(6, 20, 24), *, box=None, forward=(0, 1, 2), planned=None) -> Restore:
    box = box or ((0, shape[0]), (0, shape[1]), (0, shape[2]))
    a, b, c = (box[axis][1] - box[axis][0] for axis in forward)
    cropped = (a, b, c)
    planned = planned or cropped
    return Restore(
        source_grid=Grid(shape_zyx=shape, spacing_zyx_mm=(1.0, 1.0, 1.0)),
        box=box,
        transpose_forward=forward,
        shape_cropped=cropped,
        shape_planned=planned,
        spacing_source=(1.0, 1.0, 1.0),
        spacing_planned=(cropped[0] / planned[0], cropped[1] / planned[1], cropped[2] / planned[2]),
    )


def given(label: str | int, z: int, *box: float) -> BoxPrompt:
    return BoxPrompt.parse({"label": label, "slice": z, "box": box})


def boxes_of(given_, how: Restore, *, turned: Orientation | None = None, labels: LabelSet = LABELS) -> Prompts:
    return planned_boxes(given_, how, turned, labels, Resampling())


def objects(prompts: Prompts) -> dict[tuple[int, int], list[float]]:
    return {(f, k): prompts.boxes[f, k].tolist() for f, k in prompts.present.nonzero().tolist()}


def test_boxes_stay_as_they_are_where_nothing_is_changed() -> None:
    found = boxes_of([given("spleen", 2, 3, 4, 8, 9), given(3, 5, 0, 0, 23, 19)], restore())
    assert objects(found) == {(2, 0): [3, 4, 8, 9], (5, 1): [0, 0, 23, 19]}
    assert found.boxes.shape == (6, 2, 4)


def test_several_boxes_of_a_class_on_a_slice_become_one_about_them() -> None:
    found = boxes_of([given("liver", 1, 3, 4, 8, 9), given("liver", 1, 1, 6, 4, 12)], restore())
    assert objects(found) == {(1, 1): [1, 4, 8, 12]}


def test_boxes_outside_the_crop_are_gone_and_those_on_its_rim_clipped() -> None:
    how = restore(box=((1, 6), (5, 15), (4, 24)))
    found = boxes_of([given("liver", 0, 9, 9, 9, 9), given("liver", 3, 0, 0, 9, 9), given(1, 4, 0, 0, 3, 19)], how)
    assert objects(found) == {(2, 1): [0, 0, 5, 4]}


@pytest.mark.parametrize("forward", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("flipped", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_boxes_of_all_slices_equal_those_of_the_label_map_that_they_are_about(forward, flipped, axes) -> None:
    file = np.zeros((6, 20, 24), np.uint8)
    file[1:4, 5:11, 7:18] = 3
    file[2:6, 0:4, 3:20] = 1
    one_by_one = [given("liver", z, 7, 5, 17, 10) for z in range(1, 4)]
    one_by_one += [given("spleen", z, 3, 0, 19, 3) for z in range(2, 6)]
    turn = Orientation(source_axes=axes, flipped=flipped)
    shape = turn.apply(file).shape
    how = restore(shape, box=((1, shape[0]), (0, shape[1] - 1), (0, shape[2])), forward=forward)
    found, expected = boxes_of(one_by_one, how, turned=turn), boxes_of(file, how, turned=turn)
    torch.testing.assert_close(found.present, expected.present)
    torch.testing.assert_close(found.boxes, expected.boxes)
    assert found.present.any()


def test_planes_are_scaled_by_the_area_of_pixels() -> None:
    found = boxes_of([given("liver", 2, 4, 6, 7, 9)], restore(planned=(6, 40, 12)))
    assert objects(found) == {(2, 1): [2, 12, 3, 19]}
    one_pixel = boxes_of([given("liver", 2, 4, 6, 4, 6)], restore(planned=(6, 5, 6)))
    assert objects(one_pixel) == {(2, 1): [1, 1.5, 1, 1.5]}


def test_no_slice_is_lost_between_coarser_frames_and_finer_ones_repeat_it() -> None:
    coarse = restore((12, 20, 24), planned=(4, 20, 24))
    for z in range(12):
        assert objects(boxes_of([given("liver", z, 3, 4, 8, 9)], coarse)) == {(z // 3, 1): [3, 4, 8, 9]}
    fine = boxes_of([given("liver", 2, 3, 4, 8, 9)], restore(planned=(12, 20, 24)))
    assert sorted(objects(fine)) == [(4, 1), (5, 1)]


def test_label_maps_are_resampled_like_training_labels() -> None:
    file = np.zeros((6, 20, 24), np.uint8)
    file[1:4, 6:12, 8:16] = 3
    file[4, 2, 2] = 9
    found = boxes_of(file, restore(planned=(6, 10, 12)))
    assert objects(found) == {(z, 1): [4, 3, 7, 5] for z in (1, 2, 3)}


def test_regions_are_named_by_name_or_painted_value() -> None:
    file = np.zeros((6, 20, 24), np.uint8)
    file[0, 2:9, 2:9] = 1
    file[0, 4:6, 4:6] = 2
    assert objects(boxes_of(file, restore(), labels=REGIONS)) == {(0, 0): [2, 2, 8, 8], (0, 1): [4, 4, 5, 5]}
    one_by_one = [given("whole", 0, 2, 2, 8, 8), given(2, 0, 4, 4, 5, 5)]
    assert objects(boxes_of(one_by_one, restore(), labels=REGIONS)) == {(0, 0): [2, 2, 8, 8], (0, 1): [4, 4, 5, 5]}


def test_nothing_given_is_nothing_prompted() -> None:
    found = boxes_of([], restore())
    assert not found.present.any()
    assert found.boxes.shape == (6, 2, 4)


def test_prompts_equal_those_of_the_labels_themselves() -> None:
    file = np.random.default_rng(0).integers(0, 4, (20, 20, 24)).astype(np.uint8)
    file[file == 2] = 0
    expected = prompts_from_labels(torch.from_numpy(np.select([file == 1, file == 3], [1, 2]).astype(np.int32)), 2)
    torch.testing.assert_close(boxes_of(file, restore((20, 20, 24))).boxes, expected.boxes)


def test_all_boxes_outside_the_image_are_named() -> None:
    with pytest.raises(UsageError, match=r"2 box\(es\) are outside.*liver on slice 6.*spleen on slice 0"):
        boxes_of([given("liver", 6, 1, 1, 2, 2), given("spleen", 0, 1, 1, 24, 2), given(1, 0, 1, 1, 2, 2)], restore())


def test_unknown_labels_are_named() -> None:
    with pytest.raises(UsageError, match=r"liver, spleen.*kidney"):
        boxes_of([given("kidney", 0, 1, 1, 2, 2)], restore())
    with pytest.raises(UsageError, match="unknown to the model"):
        boxes_of([given(2, 0, 1, 1, 2, 2)], restore())
    with pytest.raises(ImageError, match=r"unknown to the model.*\[2\]"):
        boxes_of(np.full((6, 20, 24), 2, np.uint8), restore())


def test_a_label_map_of_another_shape_is_refused() -> None:
    with pytest.raises(GeometryError, match="shape of a label map"):
        boxes_of(np.zeros((6, 20, 23), np.uint8), restore())


def test_all_faults_of_a_file_of_boxes_are_listed() -> None:
    faulty = {
        "a": [{"label": "liver", "slice": -1, "box": [1, 2, 3, 4]}],
        "b": [{"label": 1, "slice": 0, "box": [5, 2, 3, 4]}, {"label": 1, "slice": 0, "box": [1, 2]}],
    }
    with pytest.raises(RecordError) as caught:
        BoxPromptFile.parse(faulty)
    for words in ("a.0.slice", "ends before it begins", "b.1.box"):
        assert words in str(caught.value)
    with pytest.raises(RecordError, match="must hold"):
        BoxPromptFile.parse([1])
