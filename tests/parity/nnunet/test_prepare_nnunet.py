"""Preparing a case against nnU-Net's DefaultPreprocessor, and its foreground sampling."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import gaussian_filter

from rfmedsam2.errors import ImageError
from rfmedsam2.geometry import Grid
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Normalization, Plan, Stage
from rfmedsam2.store.images import read_channels, read_label
from rfmedsam2.transforms.foreground import sample_foreground
from rfmedsam2.transforms.prepare import Prepared, Restore, prepare
from rfmedsam2.volume import Volume

PEERS = {
    "ct": "CTNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "none": "NoNormalization",
}
STATISTICS = IntensityStatistics(
    mean=60.5, median=70, std=140.25, min=-1000, max=1900, percentile_00_5=-300, percentile_99_5=500
)


def plan(
    kinds: list[str],
    spacing: tuple[float, float, float],
    *,
    order: tuple[int, int, int] = (0, 1, 2),
    masked: bool = False,
    flat: bool = False,
) -> Plan:
    """A plan with one stage, as small as it can be."""
    dimensions = 2 if flat else 3
    model = UNetConfig(
        features=(4, 4),
        kernel_sizes=((3,) * dimensions,) * 2,
        strides=((1,) * dimensions, (2,) * dimensions),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    stage = Stage(
        spacing_mm=spacing,
        median_shape=(10, 10, 10),
        patch_size=(8,) * dimensions,
        batch_size=2,
        normalization=tuple(Normalization(kind=kind, use_mask=masked) for kind in kinds),
        model=model,
    )
    return Plan(
        name="test",
        dataset="Dataset001_Test",
        fingerprint="none",
        channels=tuple(kinds),
        labels=LabelSet(names={"background": 0, "a": 1, "b": 2}),
        file_ending=".nii.gz",
        transpose_forward=order,
        intensities=(STATISTICS,) * len(kinds),
        stages={"stage": stage},
    )


def nnunet(volume: Volume, label: np.ndarray | None, ours: Plan) -> tuple[np.ndarray, np.ndarray, dict]:
    """What nnU-Net's preprocessor makes of the same arrays and figures."""
    stage = ours.stages["stage"]
    resample = partial(resample_data_or_seg_to_shape, order_z=0, force_separate_z=None)
    properties = STATISTICS.model_dump()
    manager = SimpleNamespace(
        transpose_forward=ours.transpose_forward,
        foreground_intensity_properties_per_channel={str(c): properties for c in range(len(ours.channels))},
        get_label_manager=lambda json: LabelManager({"background": 0, "a": 1, "b": 2}, None),
    )
    configuration = SimpleNamespace(
        spacing=list(stage.spacing_mm)[1 if stage.is_2d else 0 :],
        normalization_schemes=[PEERS[n.kind] for n in stage.normalization],
        use_mask_for_norm=[n.use_mask for n in stage.normalization],
        resampling_fn_data=partial(resample, is_seg=False, order=3),
        resampling_fn_seg=partial(resample, is_seg=True, order=1),
    )
    where = {"spacing": list(volume.grid.spacing_zyx_mm)}
    marks = None if label is None else label[None].astype(np.float32)
    preprocessor = DefaultPreprocessor(verbose=False)
    image, marks, where = preprocessor.run_case_npy(volume.array, marks, where, manager, configuration, {})
    return image, marks[0], where


def synthetic(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], channels: int
) -> tuple[Volume, np.ndarray]:
    """A body in a frame of zeros with a ragged outline, a hole, and labels that touch the outside."""
    rng = np.random.default_rng(5)
    smooth = gaussian_filter(rng.normal(size=(channels, *shape)), (0, 1.5, 1.5, 1.5))
    image = (smooth * 2000 + rng.normal(size=smooth.shape) * 30).round().astype(np.int16)
    image[image == 0] = 1
    a, b, c = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = a**2 + b**2 + c**2 + 0.15 * smooth[0] / smooth[0].std() < 0.9
    image[:, ~body] = 0
    image[:, shape[0] // 2, shape[1] // 2, shape[2] // 2 : shape[2] // 2 + 3] = 0
    label = np.zeros(shape, np.uint8)
    label[(np.abs(a) < 0.6) & (b < -0.3)] = 1
    label[(np.abs(a) < 0.6) & (b > 0.4) & (c > 0)] = 2
    label[~gaussian_filter(body.astype(float), 1).astype(bool)] = 0
    return Volume(array=image, grid=Grid(shape_zyx=shape, spacing_zyx_mm=spacing)), label


def agree(volume: Volume, label: np.ndarray, ours: Plan) -> Prepared:
    image, marks, where = nnunet(volume, label, ours)
    prepared = prepare(volume, ours, "stage", label=label)
    assert prepared.label is not None
    assert prepared.image.shape == image.shape
    assert prepared.image.flags["C_CONTIGUOUS"]
    assert np.abs(prepared.image - image).max() <= 1e-5
    masked = any(n.use_mask for n in ours.stages["stage"].normalization)
    expected = marks if masked else np.maximum(marks, 0)
    assert np.count_nonzero(prepared.label != expected) == 0
    back = ours.transpose_backward
    assert [list(prepared.restore.box[axis]) for axis in ours.transpose_forward] == [
        list(limits) for limits in where["bbox_used_for_cropping"]
    ]
    assert prepared.restore.shape_cropped == tuple(where["shape_after_cropping_and_before_resampling"])
    assert tuple(prepared.restore.spacing_source[axis] for axis in back) == volume.grid.spacing_zyx_mm
    return prepared


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        ((1.5, 0.9, 0.9), (1.0, 1.0, 1.0)),
        ((5.0, 0.9, 0.9), (5.0, 1.2, 1.2)),
        ((5.0, 0.9, 0.9), (3.5, 0.7, 0.7)),
        ((0.9, 0.9, 5.0), (1.0, 1.0, 4.0)),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_synthetic_cases_agree(source, target, masked, order):
    volume, label = synthetic((16, 34, 29), source, 2)
    planned = (target[order[0]], target[order[1]], target[order[2]])
    agree(volume, label, plan(["zscore", "ct"], planned, order=order, masked=masked))


def test_slices_keep_their_distance_in_a_2d_stage():
    volume, label = synthetic((16, 34, 29), (2.5, 0.9, 0.9), 1)
    prepared = agree(volume, label, plan(["rescale_0_1"], (7.0, 1.1, 1.1), flat=True))
    assert prepared.restore.spacing_planned == (2.5, 1.1, 1.1)


def test_prediction_without_label_agrees():
    volume, _ = synthetic((16, 34, 29), (2.5, 0.9, 0.9), 1)
    ours = plan(["zscore"], (1.5, 1.1, 1.1), masked=True)
    image, _, _ = nnunet(volume, None, ours)
    assert np.abs(prepare(volume, ours, "stage").image - image).max() <= 1e-5


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "case", "kind", "spacing"),
    [
        ("hippocampus/Dataset004_Hippocampus", "hippocampus_003", "zscore", (1.0, 1.0, 1.0)),
        ("hippocampus/Dataset004_Hippocampus", "hippocampus_003", "zscore", (1.3, 0.8, 1.1)),
        ("brats-like-4ch/Dataset114_BraTSlike4ch", None, "zscore", (1.7, 1.5, 1.5)),
        ("ct-organs-totalsegmentator/Dataset110_TSAbdomenCT", None, "ct", (3.5, 2.5, 2.5)),
    ],
)
def test_real_cases_agree(data_root, folder, case, kind, spacing):
    labels = sorted((data_root / folder / "labelsTr").glob("*.nii.gz"))
    chosen = next((p for p in labels if case is not None and p.name.startswith(case)), labels[0])
    images = sorted((data_root / folder / "imagesTr").glob(chosen.name.removesuffix(".nii.gz") + "_????.nii.gz"))
    volume, _ = read_channels(images)
    label, _ = read_label(chosen)
    marks = np.minimum(label.array[0], 2)
    agree(volume, marks, plan([kind] * len(images), spacing, masked=kind == "zscore"))


def test_the_way_back_survives_its_record():
    volume, label = synthetic((16, 34, 29), (2.5, 0.9, 0.9), 1)
    restore = prepare(volume, plan(["ct"], (1.5, 1.1, 1.1)), "stage", label=label).restore
    assert Restore.from_record(restore.to_record()) == restore


@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("regions", [False, True])
def test_as_many_foreground_locations_as_nnunet(regions, ignore):
    rng = np.random.default_rng(0)
    label = (rng.random((60, 120, 180)) ** 4 * 4).astype(np.int16)
    if regions:
        labels = LabelSet(names={"background": 0, "x": (1, 2, 3), "y": (2, 3)}, regions_class_order=(1, 2))
        keys = {1: (1, 2, 3), 2: (2, 3)}
    else:
        labels = LabelSet(names={"background": 0, "x": 1, "y": 2, "z": 3, "absent": 9})
        keys = {1: 1, 2: 2, 3: 3, 9: 9}
    if ignore is not None:
        label[label == 3] = 4 if regions else 3
        labels = labels.model_copy(update={"ignore": 11})
        label[:5] = 11
        keys[-1] = (-1, *labels.values)
    peer = DefaultPreprocessor._sample_foreground_locations(label[None], list(keys.values()))
    found = {f.key: f for f in sample_foreground(label, labels)}
    assert set(found) == set(keys)
    for key, theirs in keys.items():
        assert len(found[key].index) == len(peer[theirs])
        values = np.unique(label.reshape(-1)[found[key].index])
        assert set(values) <= set(theirs if isinstance(theirs, tuple) else (theirs,))


def test_label_values_that_do_not_fit_are_refused():
    volume, label = synthetic((16, 34, 29), (2.5, 0.9, 0.9), 1)
    with pytest.raises(ImageError, match="32767"):
        prepare(volume, plan(["ct"], (1.5, 1.1, 1.1)), "stage", label=label.astype(np.uint16) * 20000)
