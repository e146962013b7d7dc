"""Training patches: what is drawn, where it lies, what it is padded with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rfmedsam2.geometry import Grid
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Augmentation, Normalization, Sampling, Stage
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.tasks.patches import PatchSource, read_padded
from rfmedsam2.transforms.foreground import ANNOTATED
from rfmedsam2.transforms.prepare import Restore

LABELS = LabelSet(names={"background": 0, "a": 1, "b": 2})
STILL = Augmentation(rotation_probability=0, scale_probability=0)


def stage(patch=(8, 8, 8), batch=3, oversample=0.34) -> Stage:
    dimensions = len(patch)
    return Stage(
        spacing_mm=(1, 1, 1),
        median_shape=(12, 12, 12),
        patch_size=patch,
        batch_size=batch,
        normalization=(Normalization(kind="zscore"),),
        sampling=Sampling(oversample_foreground=oversample),
        augmentation=STILL,
        model=UNetConfig(
            features=(4, 8),
            kernel_sizes=((3,) * dimensions,) * 2,
            strides=((1,) * dimensions, (2,) * dimensions),
            encoder_blocks=(1, 1),
            decoder_blocks=(1,),
        ),
    )


def geometry(shape):
    return Restore(
        source_grid=Grid(shape_zyx=shape, spacing_zyx_mm=(1.0, 1.0, 1.0)),
        box=((0, shape[0]), (0, shape[1]), (0, shape[2])),
        transpose_forward=(0, 1, 2),
        shape_cropped=shape,
        shape_planned=shape,
        spacing_source=(1.0, 1.0, 1.0),
        spacing_planned=(1.0, 1.0, 1.0),
    ).to_record()


@pytest.fixture
def store(tmp_path) -> CaseStore:
    """Two cases whose image is the flat voxel index + 1; class 1 is one voxel at (1, 2, 3), class 2 at (10, 4, 9)."""
    store = CaseStore(tmp_path, (8, 8, 8))
    for name, shape in (("large", (16, 14, 12)), ("small", (5, 20, 12))):
        image = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(1, *shape)
        label = np.zeros(shape, np.int16)
        label[1, 2, 3] = 1
        places = [(1, 1, np.flatnonzero(label == 1).astype(np.int32))]
        if name == "large":
            label[10, 4, 9] = 2
            places.append((2, 1, np.flatnonzero(label == 2).astype(np.int32)))
        store.write(name, image, label, geometry=geometry(shape), foreground=places, source="s")
    return store


def source(store, ids=("large", "small"), *, config=None, augment=False, rank=0, ranks=1, labels=LABELS):
    return PatchSource(store, ids, config or stage(), labels=labels, augment=augment, seed=5, rank=rank, ranks=ranks)


def test_batch_is_a_function_of_its_number(store):
    one, two = source(store), source(store)
    two.batch(0)
    assert torch.equal(one.batch(7).image, two.batch(7).image)
    assert not torch.equal(one.batch(7).image, one.batch(8).image)


def test_ranks_draw_different_batches(store):
    assert not torch.equal(source(store, rank=0, ranks=2).batch(1).image, source(store, rank=1, ranks=2).batch(1).image)


def test_cases_are_known_without_reading(store):
    drawn = source(store)
    assert drawn.cases(4) == drawn.batch(4).ids


def test_last_third_holds_foreground_and_classes_are_drawn_equally(store):
    drawn = source(store, ("large",))
    targets = [drawn.batch(step).target[-1] for step in range(40)]
    assert all((target > 0).any() for target in targets)
    share = np.mean([bool((target == 2).any()) for target in targets])
    assert 0.2 < share < 0.8


def test_probabilistic_oversampling_forces_every_patch_by_chance(store):
    config = stage(batch=2, oversample=0.25)
    config = config.model_copy(
        update={"sampling": config.sampling.model_copy(update={"oversampling": "probabilistic"})}
    )
    drawn = source(store, ("large",), config=config)
    rng = np.random.default_rng(0)
    for slot in (0, 1):
        assert np.mean([drawn._forced(slot, rng) for _ in range(4000)]) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drawn.batch(3).image, source(store, ("large",), config=config).batch(3).image)
    always = config.sampling.model_copy(update={"oversample_foreground": 1.0})
    drawn = source(store, ("large",), config=config.model_copy(update={"sampling": always}))
    assert all((target > 0).any() for step in range(10) for target in drawn.batch(step).target)


def test_image_and_target_stay_together(store):
    drawn = source(store, ("large",))
    for step in range(10):
        batch = drawn.batch(step)
        places = torch.nonzero(batch.target)
        for b, z, y, x in places.tolist():
            value = int(batch.image[b, 0, z, y, x]) - 1
            expected = {1: (1, 2, 3), 2: (10, 4, 9)}[int(batch.target[b, z, y, x])]
            assert np.unravel_index(value, (16, 14, 12)) == expected


def test_small_volume_is_padded_with_zeros_and_background(store):
    batch = source(store, ("small",)).batch(0)
    assert batch.image.shape == (3, 1, 8, 8, 8)
    padded = batch.image == 0
    assert padded.any()
    assert batch.target.min() == 0


def test_padding_of_a_box_beyond_every_border(store):
    image, label = read_padded(store.open("small"), [(-2, 6), (-1, 3), (10, 14)])
    assert image.shape == (1, 8, 4, 4)
    assert (image[0, :2] == 0).all()
    assert (label[:2] == -1).all()
    assert (label[7:] == -1).all()
    assert label[3, 3, 2] == -1
    assert image[0, 2, 1, 0] == 11


def test_a_2d_stage_gives_slices(store):
    batch = source(store, config=stage(patch=(8, 8))).batch(0)
    assert batch.image.shape == (3, 1, 8, 8)
    assert batch.target.shape == (3, 8, 8)


def test_with_ignore_label_every_patch_holds_annotation(tmp_path):
    labels = LabelSet(names={"background": 0, "a": 1}, ignore=2)
    store = CaseStore(tmp_path, (8, 8, 8))
    shape = (40, 40, 40)
    label = np.full(shape, 2, np.int16)
    label[3:5, 30, 30] = (0, 1)
    places = [
        (ANNOTATED, 2, np.flatnonzero(label < 2).astype(np.int32)),
        (1, 1, np.flatnonzero(label == 1).astype(np.int32)),
    ]
    store.write("c", np.ones((1, *shape), np.float32), label, geometry=geometry(shape), foreground=places, source="s")
    batch = source(store, ("c",), labels=labels).batch(0)
    assert all((target < 2).any() for target in batch.target)


def test_missing_case_is_a_sentence(store):
    from rfmedsam2.errors import StoreError

    with pytest.raises(StoreError, match="rfmed_plan_and_preprocess"):
        source(store, ("gone",)).batch(0)
