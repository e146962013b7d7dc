"""Export against nnunetv2 2.8: resample all logits in float64, decide, put back; ours never holds them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from rfmedsam2.geometry import Grid
from rfmedsam2.inference.export import labels_from_slabs
from rfmedsam2.inference.probabilities import ProbabilityMap
from rfmedsam2.inference.sliding_window import Slab
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Resampling
from rfmedsam2.transforms.prepare import Restore

export = pytest.importorskip("nnunetv2.inference.export_prediction")
resampling = pytest.importorskip("nnunetv2.preprocessing.resampling.default_resampling")
handling = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")

CLASSES = LabelSet.model_validate({"names": {"background": 0, "a": 1, "b": 2, "c": 3}})
REGIONS = LabelSet.model_validate(
    {"names": {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "rim": (3,)}, "regions_class_order": (1, 2, 3)}
)

# planned shape and spacing, cropped source shape and spacing (planned axes)
GRIDS = {
    "anisotropic, nearest in z": ((12, 40, 36), (3.0, 0.8, 0.8), (18, 51, 47), (2.0, 0.63, 0.61)),
    "anisotropic, z kept": ((12, 40, 36), (3.0, 0.8, 0.8), (12, 33, 29), (3.0, 0.97, 0.99)),
    "separate axis 1": ((40, 12, 36), (0.8, 3.0, 0.8), (51, 18, 47), (0.63, 2.0, 0.61)),
    "separate axis 2": ((40, 36, 12), (0.8, 0.8, 3.0), (51, 47, 18), (0.63, 0.61, 2.0)),
    "isotropic, finer": ((20, 30, 28), (1.0, 1.0, 1.0), (33, 41, 39), (0.61, 0.73, 0.72)),
    "isotropic, coarser": ((30, 40, 38), (1.0, 1.0, 1.0), (13, 17, 23), (2.3, 2.35, 1.65)),
    "one plane": ((1, 30, 28), (1.0, 1.0, 1.0), (4, 41, 39), (0.25, 0.73, 0.72)),
    "not resampled": ((20, 30, 28), (1.0, 1.0, 1.0), (20, 30, 28), (1.0, 1.0, 1.0)),
}


def logits_like(kind: str, shape: tuple[int, ...], outputs: int) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal((outputs, *shape)).astype(np.float32)
    if kind == "smooth":
        values = np.stack([gaussian_filter(v, 2.0) * 20 for v in values])
    return values


def restore_for(name: str, forward: tuple[int, int, int]) -> Restore:
    planned, spacing_planned, cropped, spacing_source = GRIDS[name]
    backward = [forward.index(axis) for axis in range(3)]
    sizes = [cropped[i] for i in backward]
    box = tuple((low, low + size) for low, size in zip((2, 0, 3), sizes, strict=True))
    shape = tuple(stop + more for (_, stop), more in zip(box, (1, 4, 0), strict=True))
    grid = Grid(shape_zyx=shape, spacing_zyx_mm=tuple(spacing_source[i] for i in backward))
    return Restore(
        source_grid=grid,
        box=box,
        transpose_forward=forward,
        shape_cropped=cropped,
        shape_planned=planned,
        spacing_source=spacing_source,
        spacing_planned=spacing_planned,
    )


def theirs(logits: np.ndarray, restore: Restore, labels: LabelSet) -> tuple[np.ndarray, np.ndarray]:
    names = {n: list(v) if isinstance(v, tuple) and len(v) > 1 else v for n, v in labels.names.items()}
    names = {n: v[0] if isinstance(v, tuple) else v for n, v in names.items()}
    manager = handling.LabelManager(names, labels.regions_class_order)
    forward = restore.transpose_forward
    plans = SimpleNamespace(
        transpose_forward=list(forward), transpose_backward=[forward.index(axis) for axis in range(3)]
    )
    configuration = SimpleNamespace(
        spacing=list(restore.spacing_planned),
        resampling_fn_probabilities=lambda data, *a: resampling.resample_data_or_seg_to_shape(
            data, *a, is_seg=False, order=1, order_z=0, force_separate_z=None
        ),
    )
    properties = {
        "spacing": restore.source_grid.spacing_zyx_mm,
        "shape_after_cropping_and_before_resampling": restore.shape_cropped,
    }
    # nnU-Net transposes first and crops then
    properties["shape_before_cropping"] = tuple(restore.source_grid.shape_zyx[a] for a in forward)
    properties["bbox_used_for_cropping"] = [list(restore.box[a]) for a in forward]
    return export.convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, manager, properties, return_probabilities=True, num_threads_torch=1
    )


def slabs_of(logits: np.ndarray, depth: int):
    for start in range(0, logits.shape[1], depth):
        yield Slab(start=start, logits=torch.from_numpy(logits[:, start : start + depth]))


@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("name", GRIDS)
def test_labels_equal_nnunet(name: str, kind: str, labels: LabelSet) -> None:
    restore = restore_for(name, (0, 1, 2))
    logits = logits_like(kind, restore.shape_planned, labels.num_outputs)
    expected, _ = theirs(logits, restore, labels)
    ours = labels_from_slabs(slabs_of(logits, 5), restore, labels, Resampling())
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    # fewer than 1e-6 of the voxels: none in volumes this small
    assert np.count_nonzero(ours != expected) == 0


@pytest.mark.parametrize("forward", [(1, 0, 2), (2, 0, 1), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_transposed_axes_and_probabilities_equal_nnunet(forward, tmp_path) -> None:
    import blosc2

    for labels in (CLASSES, REGIONS):
        restore = restore_for("isotropic, finer", forward)
        logits = logits_like("smooth", restore.shape_planned, labels.num_outputs)
        expected, probabilities = theirs(logits, restore, labels)
        path = tmp_path / f"{labels.num_outputs}.b2nd"
        ours = labels_from_slabs(
            slabs_of(logits, 6), restore, labels, Resampling(), probabilities=ProbabilityMap(restore, labels, path=path)
        )
        assert np.array_equal(ours, expected)
        stored = blosc2.open(str(path), mode="r")
        assert stored.dtype == np.float16
        assert stored.shape == probabilities.shape
        assert np.abs(stored[:].astype(np.float32) - probabilities).max() < 1e-3
