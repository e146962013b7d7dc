"""Prompts of any label map: equal to a plain loop over cells, within the frame, on the class."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rfmedsam2.prompts import center_points, prompts_from_labels, prompts_from_members


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Label maps from very sparse to full, of odd sizes, some values no class."""
    shape = tuple(draw(st.integers(1, high)) for high in (3, 13, 13))
    classes = draw(st.integers(1, 40))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(-1, classes + 3, shape, generator=rng)
    keep = torch.rand(shape, generator=rng) < draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))
    return torch.where(keep, labels, 0), classes


@given(label_maps())
def test_boxes_equal_a_loop_over_cells(case: tuple[torch.Tensor, int]) -> None:
    labels, classes = case
    prompts = prompts_from_labels(labels, classes)
    for frame, value in torch.cartesian_prod(torch.arange(len(labels)), torch.arange(1, classes + 1)).tolist():
        ys, xs = torch.where(labels[frame] == value)
        assert bool(prompts.present[frame, value - 1]) == (len(ys) > 0)
        expected = [xs.min(), ys.min(), xs.max(), ys.max()] if len(ys) else [0, 0, 0, 0]
        assert prompts.boxes[frame, value - 1].tolist() == [int(edge) for edge in expected]


@given(label_maps())
def test_labels_and_masks_give_the_same_prompts(case: tuple[torch.Tensor, int]) -> None:
    labels, classes = case
    members = labels[:, None] == torch.arange(1, classes + 1).view(1, -1, 1, 1)
    ours, theirs = prompts_from_labels(labels, classes), prompts_from_members(members)
    assert torch.equal(ours.boxes, theirs.boxes)
    assert torch.equal(ours.present, theirs.present)


@given(label_maps())
def test_center_points_lie_on_their_class(case: tuple[torch.Tensor, int]) -> None:
    labels, classes = case
    points, present = center_points(labels, classes)
    assert torch.equal(present, prompts_from_labels(labels, classes).present)
    frames, indices = present.nonzero().unbind(1)
    x, y = points[frames, indices].long().unbind(1)
    assert torch.equal(labels[frames, y, x], indices + 1)
