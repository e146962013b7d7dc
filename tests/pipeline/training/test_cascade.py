"""Training the second stage of a cascade on what the first has predicted in cases that it was not trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.commands import run_ok

from rfmedsam2 import Predictor
from rfmedsam2.engine.runtime import start_runtime
from rfmedsam2.errors import CheckpointError, ImageError, UsageError
from rfmedsam2.inference.volume import preprocess_case
from rfmedsam2.pipeline.datasets.splits import read_splits
from rfmedsam2.pipeline.prediction.cascade import predictions_of_others
from rfmedsam2.pipeline.training.cascade import FirstStage
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.records.plan import Plan, Split
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.store.images import read_label
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import open_dataset, read_case
from rfmedsam2.system.atomic import read_record
from rfmedsam2.system.progress import silent
from rfmedsam2.tasks.feed import PatchFeed
from rfmedsam2.tasks.patches import Beside

PHANTOM, FIRST, SECOND = "Dataset900_PhantomCT", "3d_fullres", "3d_cascade_fullres"
QUIET = TrainOptions(device="cpu")


@pytest.fixture
def layout(planned_root, tmp_path) -> Layout:
    """The planned phantom in two folds, with a cascade on the cases of its 3d_fullres."""
    root = Path(shutil.copytree(planned_root, tmp_path / "root"))
    layout = Layout.under(root)
    path = layout.plan_file(PHANTOM, "rfmed_cpu")
    content = json.loads(path.read_text())
    content["stages"][FIRST]["train"] |= {"epochs": 1, "iterations_per_epoch": 2, "workers": 0}
    content["stages"][FIRST]["validation"] |= {"cases_while_training": 1}
    content["stages"][SECOND] = content["stages"][FIRST] | {"previous_stage": FIRST}
    path.write_text(json.dumps(content))
    shutil.copytree(*(layout.cases_folder(PHANTOM, "rfmed_cpu", stage) for stage in (FIRST, SECOND)))
    splits = layout.splits_file(PHANTOM)
    ids = [case.id for case in open_dataset(layout.raw / PHANTOM).training]
    halves = ids[::2], ids[1::2]
    splits.write_text(json.dumps([{"train": a, "val": b} for a, b in (halves, halves[::-1])]))
    return layout


def plan_of(layout: Layout) -> Plan:
    return read_record(layout.plan_file(PHANTOM, "rfmed_cpu"), Plan)


def test_a_cascade_is_trained_and_predicted(layout, tmp_path):
    plan = plan_of(layout)
    with pytest.raises(UsageError, match=r"3d_fullres.*fold\(s\) 0, 1, trained and validated.*rfmed_train"):
        train(layout, plan, SECOND, options=QUIET)
    train(layout, plan, FIRST, fold=0, options=QUIET)
    with pytest.raises(UsageError, match=r"fold\(s\) 1, trained"):
        train(layout, plan, SECOND, options=QUIET)
    train(layout, plan, FIRST, fold=1, options=QUIET)
    done = train(layout, plan, SECOND, options=QUIET)
    assert done.evaluation is not None
    made = json.loads((done.folder / "validation" / "predictions.json").read_text())
    assert made["options"]["previous_stage"] == "given"  # not by all folds, of which one has learned these cases
    record = read_record_of(done.folder / "checkpoint_final.safetensors")
    assert record.previous_labels is not None
    what_it_is_given(layout, plan)

    case = open_dataset(layout.raw / PHANTOM).training[0]
    words = ("-i", *case.images, "-o", tmp_path / "out", "-m", done.folder.parent, "--device", "cpu")
    run_ok("predict", *words)
    predictor = Predictor.load(done.folder.parent, device="cpu")
    assert isinstance(predictor.previous, Predictor)
    assert len(predictor.previous.networks) == 2
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1

    # other labels of the first stage are another training
    path = layout.fold_folder(PHANTOM, plan.name, FIRST, 0) / "validation"
    changed = next(path.glob("*.nii.gz"))
    image = nib.load(changed)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine, image.header), changed)
    with pytest.raises(CheckpointError, match="labels of the first stage"):
        train(layout, plan, SECOND, options=QUIET)

    # values that mean nothing are not left out in silence, nor are numbers read by another table
    nib.save(nib.Nifti1Image(np.full(image.shape, 77, np.uint8), image.affine, image.header), changed)
    with pytest.raises(ImageError, match=r"values that the model does not know.*Found 77"):
        train(layout, plan, SECOND, options=QUIET)
    names = plan.labels.names | {"spleen": plan.labels.names["liver"], "liver": plan.labels.names["spleen"]}
    swapped = plan.model_copy(update={"labels": plan.labels.model_copy(update={"names": names})})
    folds = [case for split in read_splits(layout.splits_file(PHANTOM)) for case in split.val]
    with pytest.raises(CheckpointError, match=r"trained with other labels than the plan has now.*--restart"):
        predictions_of_others(layout, swapped, FIRST, folds)


def what_it_is_given(layout: Layout, plan: Plan) -> None:
    """The same as when it predicts with the same label map."""
    stage, store = plan.stages[SECOND], CaseStore(layout.cases_folder(PHANTOM, plan.name, SECOND))
    ids = store.ids()
    with start_runtime("cpu") as runtime:
        split = Split(train=ids, val=ids)
        where = {"layout": layout, "plan": plan, "stage": SECOND, "fold": "0", "store": store}
        labels = FirstStage(**where, split=split, runtime=runtime, track=silent).run()
        feed = PatchFeed(
            stage, labels=plan.labels, store=store, split=split, runtime=runtime, beside=Beside(previous=labels.store)
        )
        for case in open_dataset(layout.raw / PHANTOM).training[:2]:
            (path,) = layout.model_folder(PHANTOM, plan.name, FIRST).glob(f"fold_*/validation/{case.id}.nii.gz")
            volume, _ = read_case(case, channels=len(plan.channels))
            previous = read_label(path)[0].array[0]
            expected = preprocess_case(volume, plan, SECOND, previous=previous).prepared.image
            found = feed.whole_input(store.open(case.id))
            assert found.shape == expected.shape
            assert len(found) == plan.inputs_of(stage)
            assert previous.any()
            assert (found[1:] != expected[1:]).mean() < 1e-3  # "outside" is a label of its own there
            assert np.allclose(found[:1], expected[:1], atol=1e-4)
        batch = next(feed.training(0))
        assert batch.image.shape[1] == plan.inputs_of(stage)
        assert set(np.unique(batch.image[:, 1:])) <= {0.0, 1.0}
