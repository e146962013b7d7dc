"""Export: labels in the source grid, any number of values, faults named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rfmedsam2.errors import PlanError
from rfmedsam2.geometry import Grid
from rfmedsam2.inference.export import _Painter, _taps, _targets, label_table, labels_from_slabs
from rfmedsam2.inference.probabilities import ProbabilityMap
from rfmedsam2.inference.sliding_window import Slab
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Resampling
from rfmedsam2.transforms.prepare import Restore

THREE = LabelSet.model_validate({"names": {"background": 0, "a": 1, "b": 2}})


def restore(source: tuple[int, int, int], planned: tuple[int, int, int], spacing=(1.0, 1.0, 1.0)) -> Restore:
    return Restore(
        source_grid=Grid(shape_zyx=source, spacing_zyx_mm=spacing),
        box=((0, source[0]), (0, source[1]), (0, source[2])),
        transpose_forward=(0, 1, 2),
        shape_cropped=source,
        shape_planned=planned,
        spacing_source=spacing,
        spacing_planned=tuple(s * n / p for s, n, p in zip(spacing, source, planned, strict=True)),
    )


def slabs(logits: np.ndarray, *starts: int):
    for start, stop in zip(starts, (*starts[1:], logits.shape[1]), strict=True):
        yield Slab(start=start, logits=torch.from_numpy(logits[:, start:stop]))


def random_logits(outputs: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((outputs, *shape)).astype(np.float32)


@pytest.mark.parametrize("cuts", [(0,), (0, 1, 2, 3, 4, 5, 6, 7), (0, 3), (0, 1, 7)])
@pytest.mark.parametrize("source", [(8, 6, 7), (13, 9, 5), (5, 6, 7)])
def test_where_slabs_are_cut_does_not_matter(source, cuts) -> None:
    logits = random_logits(3, 8, 6, 7)
    how = restore(source, (8, 6, 7))
    whole = labels_from_slabs(slabs(logits, 0), how, THREE, Resampling())
    np.testing.assert_array_equal(labels_from_slabs(slabs(logits, *cuts), how, THREE, Resampling()), whole)


def test_without_resampling_it_is_the_arg_max() -> None:
    logits = random_logits(3, 4, 5, 6)
    labels = labels_from_slabs(slabs(logits, 0, 2), restore((4, 5, 6), (4, 5, 6)), THREE, Resampling())
    np.testing.assert_array_equal(labels, logits.argmax(0))


def test_linear_between_planes_and_nearest_between_planes_differ() -> None:
    logits = np.zeros((3, 2, 1, 1), np.float32)
    logits[1, 0], logits[2, 1] = 2.0, 1.0
    how = restore((8, 1, 1), (2, 1, 1))
    linear = labels_from_slabs(slabs(logits, 0, 1), how, THREE, Resampling(anisotropy_threshold=100))
    nearest = labels_from_slabs(slabs(logits, 0, 1), how, THREE, Resampling(order_logits=0, anisotropy_threshold=100))
    # planes lie at 1/4 and 3/4: class 1 leads while 2 (1 - t) > t
    assert linear[:, 0, 0].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert nearest[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_declared_values_need_not_be_consecutive() -> None:
    labels = LabelSet.model_validate({"names": {"background": 0, "far": 700, "near": 5}})
    logits = random_logits(3, 2, 3, 4)
    result = labels_from_slabs(slabs(logits, 0), restore((2, 3, 4), (2, 3, 4)), labels, Resampling())
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, np.array([0, 5, 700])[logits.argmax(0)])


def test_more_than_256_classes() -> None:
    names = {"background": 0} | {f"class {i}": i for i in range(1, 300)}
    logits = random_logits(300, 1, 4, 4)
    result = labels_from_slabs(
        slabs(logits, 0), restore((1, 4, 4), (1, 4, 4)), LabelSet.model_validate({"names": names}), Resampling()
    )
    np.testing.assert_array_equal(result, logits.argmax(0))


def test_regions_are_painted_in_their_order() -> None:
    regions = LabelSet.model_validate(
        {"names": {"background": 0, "whole": (1, 2), "core": (2,)}, "regions_class_order": (1, 2)}
    )
    logits = np.array([[1, 1, -1, -1], [1, -1, 1, -1]], np.float32).reshape(2, 1, 1, 4)
    result = labels_from_slabs(slabs(logits, 0), restore((1, 1, 4), (1, 1, 4)), regions, Resampling())
    assert result.ravel().tolist() == [2, 1, 2, 0]


def test_outside_the_crop_is_background() -> None:
    how = Restore(
        source_grid=Grid(shape_zyx=(4, 4, 4), spacing_zyx_mm=(1.0, 1.0, 1.0)),
        box=((1, 3), (2, 4), (0, 1)),
        transpose_forward=(0, 1, 2),
        shape_cropped=(2, 2, 1),
        shape_planned=(2, 2, 1),
        spacing_source=(1.0, 1.0, 1.0),
        spacing_planned=(1.0, 1.0, 1.0),
    )
    logits = np.zeros((3, 2, 2, 1), np.float32)
    logits[2] = 1
    result = labels_from_slabs(slabs(logits, 0), how, THREE, Resampling())
    assert result.sum() == 2 * 4
    assert (result[1:3, 2:4, 0] == 2).all()


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(threads) -> None:
    logits = random_logits(3, 8, 6, 7)
    how = restore((20, 13, 9), (8, 6, 7))
    expected = labels_from_slabs(slabs(logits, 0), how, THREE, Resampling(), threads=2)
    result = labels_from_slabs(slabs(logits, 0), how, THREE, Resampling(), threads=threads)
    np.testing.assert_array_equal(result, expected)


def test_missing_slabs_are_an_error() -> None:
    how = restore((4, 3, 3), (4, 3, 3))
    with pytest.raises(PlanError, match="does not match"):
        labels_from_slabs(slabs(random_logits(3, 4, 3, 3), 1), how, THREE, Resampling())
    with pytest.raises(PlanError, match="missing"):
        labels_from_slabs([], how, THREE, Resampling())


def test_another_number_of_classes_is_an_error() -> None:
    with pytest.raises(PlanError, match="does not match"):
        labels_from_slabs(slabs(random_logits(2, 4, 3, 3), 0), restore((4, 3, 3), (4, 3, 3)), THREE, Resampling())


def test_a_failure_leaves_no_probability_file(tmp_path) -> None:
    path = tmp_path / "p.b2nd"
    how = restore((4, 3, 3), (4, 3, 3))
    half = [Slab(start=0, logits=torch.zeros(3, 2, 3, 3))]
    with pytest.raises(PlanError):
        labels_from_slabs(half, how, THREE, Resampling(), probabilities=ProbabilityMap(how, THREE, path=path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("regions", [False, True])
def test_the_device_path_gives_what_the_kernels_give(regions) -> None:
    names = (
        {"background": 0, "whole": (1, 2), "core": (2, 3), "rim": 3} if regions else {"background": 0, "a": 1, "b": 2}
    )
    order = (1, 3, 2) if regions else None
    labels = LabelSet.model_validate({"names": names, "regions_class_order": order})
    logits = torch.from_numpy(random_logits(3, 8, 30, 35))
    how = restore((13, 41, 22), (8, 30, 35))
    taps = _taps(how, Resampling())
    painter = _Painter(label_table(labels), taps[1:], regions=regions)
    groups = _targets([Slab(start=0, logits=logits)], taps[0], how.shape_planned, 3)
    for target in next(groups):
        np.testing.assert_array_equal(painter(target), painter._on_device(target))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", [(8, 60, 70), (13, 90, 50)])
def test_cuda_gives_what_the_cpu_gives(source) -> None:
    logits = torch.from_numpy(random_logits(3, 8, 60, 70))
    how = restore(source, (8, 60, 70))
    cpu = labels_from_slabs([Slab(start=0, logits=logits)], how, THREE, Resampling())
    cuda = labels_from_slabs([Slab(start=0, logits=logits.cuda())], how, THREE, Resampling())
    assert np.count_nonzero(cpu != cuda) <= 1
