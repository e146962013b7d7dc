"""The U-Net task: its scores by hand, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rfmedsam2.engine.runtime import Runtime
from rfmedsam2.errors import StoreError
from rfmedsam2.geometry import Grid
from rfmedsam2.pipeline.datasets.label_tables import BTCV_LABELS
from rfmedsam2.pipeline.datasets.phantom import phantom_case
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Augmentation, Normalization, Plan, SegmentationLoss, Split, Stage, Validation
from rfmedsam2.records.training import AdamW, TrainConfig
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.system.progress import Silent
from rfmedsam2.tasks.unet import UNetTask, overlap_counts, scores_of
from rfmedsam2.transforms.prepare import Restore

CLASSES = LabelSet(names={"background": 0, "a": 1, "b": 2})
TARGET = torch.tensor([[[0, 1, 1], [2, 2, 0]]], dtype=torch.int16)


def logits_of(predicted: list[list[int]], outputs: int) -> torch.Tensor:
    """(1, K, 2, 3) whose arg-max is `predicted`."""
    return torch.nn.functional.one_hot(torch.tensor([predicted]), outputs).movedim(-1, 1).float()


def test_counts_of_classes():
    # a: hits 1 of 2, wrong once; b: hits 2, misses none, wrong once
    counts = overlap_counts(logits_of([[1, 1, 2], [2, 2, 0]], 3), TARGET, CLASSES)
    np.testing.assert_array_equal(counts, [[1, 1, 1], [2, 1, 0]])


def test_counts_follow_names_in_whatever_order_they_are_declared():
    turned = LabelSet(names={"b": 2, "background": 0, "a": 1})
    counts = overlap_counts(logits_of([[1, 1, 2], [2, 2, 0]], 3), TARGET, turned)
    assert scores_of(counts, turned) == pytest.approx({"dsc/b": 4 / 5, "dsc/a": 2 / 4, "score": 0.65})


def test_counts_of_values_with_gaps():
    gaps = LabelSet(names={"background": 0, "b": 7, "a": 3})
    target = torch.tensor([[[0, 3, 3], [7, 7, 0]]], dtype=torch.int16)
    counts = overlap_counts(logits_of([[1, 1, 2], [2, 2, 0]], 3), target, gaps)
    np.testing.assert_array_equal(counts, [[2, 1, 0], [1, 1, 1]])


def test_counts_of_nested_regions():
    regions = LabelSet(names={"background": 0, "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
    whole = [[9.0, -1, 1], [1, 1, -1]]  # one wrong, one missed
    core = [[-1.0, -1, -1], [1, -1, 5]]  # one hit, one missed, one wrong
    counts = overlap_counts(torch.tensor([[whole, core]]), TARGET, regions)
    np.testing.assert_array_equal(counts, [[3, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_ignored_voxels_count_nowhere(kind):
    names = {"background": 0, "a": 1, "b": 2} if kind == "classes" else {"background": 0, "a": (1, 2), "b": (2,)}
    labels = LabelSet(names=names, regions_class_order=None if kind == "classes" else (1, 2), ignore=3)
    target = TARGET.clone()
    target[0, 0, 1] = target[0, 1, 0] = 3
    classes, regions = logits_of([[0, 1, 1], [2, 2, 0]], 3), torch.tensor([[[[-1.0, 1, 1], [1, 1, -1]]] * 2])
    counts = overlap_counts(classes if kind == "classes" else regions, target, labels)
    expected = [[1, 0, 0], [1, 0, 0]] if kind == "classes" else [[2, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(counts, expected)


def test_a_class_that_occurs_nowhere_has_no_score():
    assert scores_of(np.array([[0.0, 0, 0], [3, 1, 1]]), CLASSES) == {"dsc/b": 0.75, "score": 0.75}
    assert scores_of(np.zeros((2, 3)), CLASSES) == {"score": 0.0}
    assert scores_of(np.array([[0.0, 0, 5], [0, 2, 0]]), CLASSES) == {"dsc/a": 0, "dsc/b": 0, "score": 0}


def tiny_plan(patch=(8, 32, 32), *, dimensions=3) -> Plan:
    network = UNetConfig(
        features=(8, 16, 16),
        kernel_sizes=((3,) * dimensions,) * 3,
        strides=((1,) * dimensions, (2,) * dimensions, (2,) * dimensions),
        encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1),
    )
    stage = Stage(
        spacing_mm=(3, 1.5, 1.5),
        median_shape=(8, 32, 32),
        patch_size=patch,
        batch_size=2,
        normalization=(Normalization(kind="zscore"),),
        augmentation=Augmentation(rotation_probability=0, scale_probability=0),
        model=network,
        loss=SegmentationLoss(),
        train=TrainConfig(epochs=1, iterations_per_epoch=40, learning_rate=1e-2, optimizer=AdamW(), workers=0),
        validation=Validation(patches_while_training=2),
    )
    unit = IntensityStatistics(mean=0, median=0, std=1, min=-1, max=1, percentile_00_5=-1, percentile_99_5=1)
    return Plan(
        name="tiny",
        dataset="Dataset900_PhantomCT",
        fingerprint="",
        channels=("CT",),
        labels=LabelSet(names={"background": 0, **{k: v for k, v in BTCV_LABELS.items() if v}}),
        file_ending=".nii.gz",
        intensities=(unit,),
        stages={"3d_fullres": stage},
    )


@pytest.fixture
def phantom_store(tmp_path) -> CaseStore:
    """One phantom of exactly a patch."""
    case = phantom_case((8, 32, 32), seed=3)
    image, label = np.zeros((1, 8, 32, 32), np.float32), np.zeros((8, 32, 32), np.int16)
    z, y, x = case.image.shape
    image[0, :z, :y, :x] = (case.image.astype(np.float32) - case.image.mean()) / case.image.std()
    label[:z, :y, :x] = case.labels
    restore = Restore(
        source_grid=Grid(shape_zyx=label.shape, spacing_zyx_mm=(3.0, 1.5, 1.5)),
        box=((0, 8), (0, 32), (0, 32)),
        transpose_forward=(0, 1, 2),
        shape_cropped=label.shape,
        shape_planned=label.shape,
        spacing_source=(3.0, 1.5, 1.5),
        spacing_planned=(3.0, 1.5, 1.5),
    )
    places = [(v, 1, np.flatnonzero(label == v).astype(np.int32)) for v in np.unique(label).tolist() if v]
    store = CaseStore(tmp_path / "cases", (8, 32, 32))
    store.write("phantom", image, label, geometry=restore.to_record(), foreground=places, source="s")
    return store


def task_on(store: CaseStore, plan: Plan, ids=("phantom",)) -> UNetTask:
    split = Split(train=ids, val=ids)
    return UNetTask(plan, "3d_fullres", store=store, split=split, runtime=Runtime(device=torch.device("cpu")))


def test_one_patch_is_learned_by_heart(phantom_store):
    plan = tiny_plan()
    task = task_on(phantom_store, plan)
    optimizer, losses = task.optimizer(), []
    batch = task._feed._validation.batch(0)  # the same patch without random changes
    for _ in range(30):
        loss = torch.stack(list(task.loss(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < losses[0] - 1.5


def test_training_batches_are_functions_of_their_number(phantom_store):
    task = task_on(phantom_store, tiny_plan())
    first, later = list(task.batches(0)), list(task.batches(37))
    assert (len(first), len(later)) == (40, 3)
    assert torch.equal(first[37].image, later[0].image)
    assert torch.equal(first[39].target, later[2].target)
    assert first[0].ids == ("phantom", "phantom")


def test_first_weights_are_a_function_of_the_seed(phantom_store):
    plan = tiny_plan()
    one, two = (task_on(phantom_store, plan).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_validating_leaves_the_model_as_it_was(phantom_store):
    task = task_on(phantom_store, tiny_plan())
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    assert set(task.loss(next(task._feed.validation()))) == {"cross_entropy", "dice"}
    task.validate()
    assert task.model.training
    assert task.model.deep_supervision is True
    assert isinstance(task.model(torch.zeros(1, 1, 8, 32, 32)), list | tuple)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())


def test_a_case_that_is_not_there_is_a_sentence(phantom_store):
    with pytest.raises(StoreError, match="absent"):
        next(iter(task_on(phantom_store, tiny_plan(), ids=("absent",)).batches(0)))


@pytest.mark.parametrize(
    ("epochs", "steps", "every", "expected"), [(1, 1, 1, 1), (3, 2, 2, 4), (1, 4, 5, 4), (9, 50, 1, 20)]
)
def test_validation_never_exceeds_the_training_before_it(phantom_store, epochs, steps, every, expected):
    plan = tiny_plan()
    train = TrainConfig(epochs=epochs, iterations_per_epoch=steps, validate_every_epochs=every, workers=0)
    changes = {"train": train, "validation": Validation(patches_while_training=20)}
    plan = plan.model_copy(update={"stages": {"3d_fullres": plan.stages["3d_fullres"].model_copy(update=changes)}})
    seen: list[tuple[str, int, int]] = []

    class Shown(Silent):
        def __call__(self, items, description, total, /):
            items = list(items)
            seen.append((description, total, len(items)))
            return items

    split = Split(train=("phantom",), val=("phantom",))
    runtime = Runtime(device=torch.device("cpu"))
    UNetTask(plan, "3d_fullres", store=phantom_store, split=split, runtime=runtime, track=Shown()).validate()
    assert seen == [("validation patches", expected, expected)]
