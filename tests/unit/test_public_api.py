"""Plans loaded, changed and saved; evaluations as tables; raw datasets by name; networks by name."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from support.toy_task import ToyTask, make_config, make_plan

from rfmedsam2.engine.fit import fit
from rfmedsam2.engine.task import Run
from rfmedsam2.errors import CheckpointError, DatasetError, PlanError, RecordError, StoreError, UsageError
from rfmedsam2.records.plan import Plan
from rfmedsam2.records.report import CaseMetrics, ClassMetrics, Evaluation
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.raw import open_dataset
from segment_anything_hq import InteractivePredictor, evaluate_noc, load_model


def test_plans_are_loaded_changed_and_saved(tmp_path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == plan
    longer = plan.with_overrides("3d_fullres.train.epochs=7", "file_ending=.mha", name="longer")
    assert (longer.name, longer.stage("3d_fullres").train.epochs, longer.file_ending) == ("longer", 7, ".mha")
    assert (plan.name, plan.with_overrides("3d_fullres.train.epochs=7").name) == ("toy", "toy")
    assert plan.with_overrides() == plan


def test_faults_of_plans_are_sentences(tmp_path) -> None:
    with pytest.raises(RecordError, match=r"The plan file does not exist.*nothing\.json"):
        Plan.load(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        Plan.load(tmp_path / "broken.json")
    plan = make_plan()
    data = json.loads(plan.to_json()) | {"color": "red"}
    (tmp_path / "more.json").write_text(json.dumps(data))
    with pytest.raises(RecordError, match="color"):
        Plan.load(tmp_path / "more.json")
    with pytest.raises(UsageError, match="epoch"):
        plan.with_overrides("3d_fullres.train.epoch=5")
    with pytest.raises(UsageError):
        plan.with_overrides(["3d_fullres.train.epochs=5"])
    with pytest.raises(RecordError, match="epochs"):
        plan.with_overrides("3d_fullres.train.epochs=many")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        plan.save(tmp_path / "file" / "plan.json")
    assert (tmp_path / "file").read_text() == ""


def test_an_evaluation_is_a_long_table() -> None:
    empty = ClassMetrics(
        dsc=None,
        iou=None,
        nsd=None,
        hd95_mm=None,
        volume_error_ml=0,
        relative_volume_error=None,
        reference_ml=0,
        predicted_ml=0,
    )
    some = empty.model_copy(update={"dsc": 0.75, "hd95_mm": 3.5})
    cases = tuple(
        CaseMetrics(id=name, reference="r", prediction="p", classes={"liver": some, "spleen": empty})
        for name in ("a", "b")
    )
    table = Evaluation(
        nsd_tolerance_mm=2, empty_policy="", confidence=0.95, bootstrap_samples=1, cases=cases, classes={}, mean={}
    ).to_dataframe()
    assert list(table.columns) == ["case", "class", *ClassMetrics.model_fields]
    assert table[["case", "class"]].to_numpy().tolist() == [[c, k] for c in ("a", "b") for k in ("liver", "spleen")]
    assert table.groupby("class")["dsc"].mean()["liver"] == 0.75
    assert math.isnan(table.loc[1, "dsc"])
    assert table["dsc"].dtype == float


def test_raw_datasets_open_by_name_and_read_their_cases(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "data" / "raw" / "Dataset007_Two"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    image.SetSpacing((0.5, 1.0, 3.0))
    sitk.WriteImage(image, str(folder / "imagesTr" / "one_0000.nii.gz"))
    sitk.WriteImage(image, str(folder / "imagesTs" / "two_0000.nii.gz"))
    sitk.WriteImage(sitk.Cast(image > 12, sitk.sitkUInt8), str(folder / "labelsTr" / "one.nii.gz"))
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    for source in ("Two", "7", "Dataset007_Two"):
        assert open_dataset(source, root=tmp_path / "data").folder == folder
    dataset = open_dataset(str(folder))
    volume, label = dataset.read("one")
    assert volume.grid.spacing_zyx_mm == (3.0, 1.0, 0.5)
    assert volume.array.shape == label.array.shape == (1, 2, 3, 4)
    assert (label.array == (volume.array > 12)).all()
    assert dataset.read("two")[1] is None
    assert (dataset.read(dataset.training[0])[0].array == volume.array).all()
    with pytest.raises(DatasetError, match=r"no such case.*onee.*one"):
        dataset.read("onee")
    for wrong in (None, 5, ["one"], {}):
        with pytest.raises(DatasetError, match="no such case"):
            dataset.case(wrong)  # type: ignore[arg-type]
    assert Layout.under(tmp_path / "data").dataset_name(7) == folder.name
    with pytest.raises(DatasetError, match=r"A dataset is a folder.*Give the folder: .*Dataset007_Two"):
        open_dataset(folder / "dataset.json")
    with pytest.raises(UsageError, match="dataset does not exist: Three"):
        open_dataset("Three", root=tmp_path / "data")
    with pytest.raises(DatasetError, match="dataset folder does not exist"):
        open_dataset(tmp_path / "nothing")
    monkeypatch.chdir(folder.parent)
    assert (
        open_dataset("Dataset007_Two").training == dataset.training or len(open_dataset("Dataset007_Two").training) == 1
    )


def test_a_task_of_ones_own_needs_a_folder_alone_and_goes_on(tmp_path) -> None:
    config = make_config(epochs=2)
    progress = fit(ToyTask(config), config, Run(folder=tmp_path))
    assert (progress.status, progress.step) == ("finished", 10)
    assert (tmp_path / "checkpoint_final.safetensors").is_file()
    assert fit(ToyTask(config), config, Run(folder=tmp_path), resume=True).step == 10


def test_networks_of_images_load_by_name(caplog) -> None:
    network = load_model("hq_sam", "vit_nano", frame_size=64, device="cpu")
    assert caplog.messages == ["vit_nano has random weights, which segment nothing: give published ones with weights="]
    assert not network.training
    assert next(network.parameters()).device == torch.device("cpu")
    with pytest.raises(UsageError, match=r"Unknown name 'hqsam'.*hq_sam"):
        load_model("hqsam", "vit_nano")
    with pytest.raises(UsageError, match=r"Unknown name 'vit_x'"):
        load_model("hq_sam", "vit_x")
    with pytest.raises(PlanError, match="not built on"):
        load_model("hq_sam", "hiera_t")
    with pytest.raises(UsageError, match="device"):
        load_model("hq_sam", "vit_nano", frame_size=64, device="abacus")
    with pytest.raises(CheckpointError):
        load_model("hq_sam", "vit_nano", frame_size=64, weights="nothing.pt", device="cpu")


def test_noc_takes_networks_and_predictors(tmp_path) -> None:
    from PIL import Image

    mask = np.zeros((40, 50), np.uint8)
    mask[8:30, 10:35] = 255
    for part, array in (("images", np.stack([mask] * 3, axis=-1)), ("masks", mask)):
        (tmp_path / part).mkdir()
        Image.fromarray(array).save(tmp_path / part / "square.png")
    torch.manual_seed(0)
    network = load_model("sam", "vit_nano", frame_size=64, device="cpu")
    figures = evaluate_noc(network, tmp_path, targets=(0.5,), max_clicks=3)
    assert 1 <= figures["noc50"] <= 3
    again = evaluate_noc(InteractivePredictor(network), str(tmp_path), targets=(0.5,), max_clicks=3)
    assert again["noc50"] == figures["noc50"]
    with pytest.raises(DatasetError):
        evaluate_noc(network, tmp_path / "nothing")
    for data in (None, [], [1]):
        with pytest.raises(UsageError, match="data is not a folder or sets of images"):
            evaluate_noc(network, data)  # type: ignore[arg-type]
    for clicks in (0, 1.5, "2"):
        with pytest.raises(UsageError, match="max_clicks must be a whole number from 1"):
            evaluate_noc(network, tmp_path, max_clicks=clicks)  # type: ignore[arg-type]
    for targets in ((), (1.5,), ("a",)):
        with pytest.raises(UsageError, match="targets must be IoUs"):
            evaluate_noc(network, tmp_path, targets=targets)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="model is not a segmenter"):
        evaluate_noc("hq_sam", tmp_path)  # type: ignore[arg-type]
