"""Boxes and points from label maps and masks: where they lie, what absent classes give, how they follow a resize."""

from __future__ import annotations

import pytest
import torch

from rfmedsam2.errors import UsageError
from rfmedsam2.prompts import center_points, prompts_from_labels, prompts_from_members, resized


def one_block(value: int = 2) -> torch.Tensor:
    labels = torch.zeros(2, 8, 10, dtype=torch.int16)
    labels[1, 2:5, 3:9] = value
    return labels


def test_box_names_the_first_and_last_pixel():
    prompts = prompts_from_labels(one_block(), 3)
    assert prompts.boxes.dtype == torch.float32
    assert prompts.boxes[1, 1].tolist() == [3, 2, 8, 4]


def test_absent_classes_have_no_box():
    prompts = prompts_from_labels(one_block(), 3)
    assert prompts.present.tolist() == [[False] * 3, [False, True, False]]
    assert not prompts.boxes[~prompts.present].any()


@pytest.mark.parametrize("value", [-1, 4, 255, 1000])
def test_values_that_are_no_class_give_no_prompt(value):
    assert not prompts_from_labels(one_block(value), 3).present.any()
    assert not center_points(one_block(value), 3)[1].any()


@pytest.mark.parametrize("classes", [29, 30, 58, 117])
def test_many_classes(classes):
    labels = torch.zeros(1, 1, classes + 2, dtype=torch.int64)
    labels[0, 0] = torch.arange(classes + 2)
    prompts = prompts_from_labels(labels, classes)
    assert prompts.present.all()
    assert prompts.boxes[0, :, 0].tolist() == list(range(1, classes + 1))
    assert torch.equal(prompts.boxes[..., 0], prompts.boxes[..., 2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integers_will_do(dtype):
    assert prompts_from_labels(one_block().to(dtype), 2).boxes[1, 1].tolist() == [3, 2, 8, 4]


def test_regions_may_overlap():
    members = torch.zeros(1, 2, 6, 6, dtype=torch.bool)
    members[0, 0, 1:6, 1:6] = True
    members[0, 1, 2, 3] = True
    assert prompts_from_members(members).boxes[0].tolist() == [[1, 1, 5, 5], [3, 2, 3, 2]]


def test_a_box_of_the_whole_frame_stays_one_when_resized():
    whole = prompts_from_labels(torch.ones(1, 8, 10, dtype=torch.int16), 1)
    assert resized(whole, (8, 10), (32, 20)).boxes[0, 0].tolist() == [0, 0, 19, 31]
    there_and_back = resized(resized(whole, (8, 10), (13, 17)), (13, 17), (8, 10))
    torch.testing.assert_close(there_and_back.boxes, whole.boxes)


def test_absent_boxes_stay_empty_when_resized():
    assert not resized(prompts_from_labels(one_block(), 3), (8, 10), (16, 5)).boxes[0].any()


def test_resized_boxes_hold_resized_masks():
    labels = one_block()[1:]
    larger = labels.repeat_interleave(4, 1).repeat_interleave(3, 2)
    expected = prompts_from_labels(larger, 2)
    torch.testing.assert_close(resized(prompts_from_labels(labels, 2), (8, 10), (32, 30)).boxes, expected.boxes)


def test_center_of_a_block_is_its_middle():
    points, present = center_points(one_block(), 2)
    assert present.tolist() == [[False, False], [False, True]]
    assert points[1, 1].tolist() == [5, 3]
    assert not points[~present].any()


def test_center_of_a_ring_lies_on_the_ring():
    labels = torch.ones(1, 9, 9, dtype=torch.uint8)
    labels[0, 2:7, 2:7] = 0
    x, y = center_points(labels, 1)[0][0, 0].long().tolist()
    assert labels[0, y, x] == 1


def test_no_classes_and_other_shapes_get_a_sentence():
    with pytest.raises(UsageError, match="at least one foreground class"):
        prompts_from_labels(one_block(), 0)
    with pytest.raises(UsageError, match=r"integers of shape \(N, H, W\)"):
        prompts_from_labels(one_block()[0], 1)
    with pytest.raises(UsageError, match="float"):
        center_points(one_block().float(), 1)
