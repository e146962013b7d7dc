"""What the words of a command mean: folders, dataset, plan, fold, trained model, labels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, get_args

import pytest
from typing_extensions import get_type_hints
from tyro.constructors import PrimitiveConstructorSpec

from rfmedsam2.cli.command import _light
from rfmedsam2.cli.replacing import require_replaceable
from rfmedsam2.cli.resolve import dataset_name, labels_for, places, planned, trained_model
from rfmedsam2.cli.training_flags import training_words
from rfmedsam2.errors import RecordError, UsageError
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record
from segment_anything_hq.choices import AnyMethod
from segment_anything_hq.cli.flag_groups import NetworkChoice

BTCV, PHANTOM = "Dataset217_BTCV", "Dataset900_PhantomCT"


@pytest.fixture
def layout(tmp_path) -> Layout:
    return Layout.under(tmp_path)


def have(layout, *names, where="raw"):
    for name in names:
        (getattr(layout, where) / name).mkdir(parents=True)


def have_model(layout, dataset=BTCV, plan="rfmed", stage="3d_fullres", fold="0"):
    folder = layout.fold_folder(dataset, plan, stage, fold)
    folder.mkdir(parents=True)
    (folder / "checkpoint_final.safetensors").touch()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("3d_fullres fold 0", (None, "3d_fullres", "0")),
        ("3d_fullres 3", (None, "3d_fullres", "3")),
        ("2d", (None, "2d", "0")),
        ("BTCV 3d_fullres 0", ("BTCV", "3d_fullres", "0")),
        ("BTCV 3d_fullres", ("BTCV", "3d_fullres", "0")),
        ("4 2d", ("4", "2d", "0")),
        ("3d_fullres official", (None, "3d_fullres", "official")),
        ("217 3d_fullres fold all", ("217", "3d_fullres", "all")),
        ("3d_fullres btcv_24_6", (None, "3d_fullres", "btcv_24_6")),
    ],
)
def test_training_words_have_both_orders(words, meant):
    assert training_words(words.split()) == meant


@pytest.mark.parametrize("words", ["", "fold", "BTCV 3d_fullres fold 0 1"])
def test_too_few_or_too_many_words_are_a_sentence(words):
    with pytest.raises(UsageError, match=r"rfmed_train 3d_fullres fold 0"):
        training_words(words.split())


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_is_not_replaced_by_a_file(tmp_path, overwrite):
    with pytest.raises(UsageError, match=r"Expected a file, found a folder.*Name a file in it") as caught:
        require_replaceable((tmp_path,), read_record, overwrite=overwrite)
    assert "--overwrite" not in str(caught.value)


@pytest.mark.parametrize(
    "moment", [1_000_060, pytest.param(1_000_000 - 11 * 86_400, id="after the clock was set back")]
)
def test_a_table_that_somebody_has_changed_is_not_replaced(tmp_path, moment):
    record, table, chart = files = [tmp_path / name for name in ("scores.json", "scores.csv", "scores.png")]
    for path in files:
        path.write_text("ours")
    os.utime(record, (1_000_000, 1_000_000))
    os.utime(chart, (1_000_001.5, 1_000_001.5))
    os.utime(table, (999_999, 999_999))
    require_replaceable(files, Path.read_text, overwrite=False)
    os.utime(table, (moment, moment))
    with pytest.raises(UsageError, match=r"changed since the command wrote it: .*scores\.csv\. Choose"):
        require_replaceable(files, Path.read_text, overwrite=False)
    require_replaceable(files, Path.read_text, overwrite=True)


def test_choices_are_listed_in_their_order():
    method = get_type_hints(NetworkChoice, include_extras=True)["method"]
    for kind in (method, Literal["hq_sam", "sam"] | None):
        word, *marks = get_args(_light(kind))
        (reader,) = [mark for mark in marks if isinstance(mark, PrimitiveConstructorSpec)]
        names = get_args(AnyMethod) if kind is method else ("hq_sam", "sam")
        assert (word, reader.choices) == (object, names)
    assert get_args(AnyMethod)[:2] + get_args(AnyMethod)[-2:] == ("hq_sam", "hq_sam2", "sam", "sam2")


def test_the_root_is_the_flag_else_the_variable_else_nnunets_else_here(tmp_path):
    nnunet = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    both = nnunet | {"RFMED_ROOT": str(tmp_path / "ours")}
    assert places(tmp_path / "flag", both).layout.raw == tmp_path / "flag" / "raw"
    assert places(None, both).layout.raw == tmp_path / "ours" / "raw"
    assert places(None, nnunet).layout.results == tmp_path / "nnUNet_results"
    assert places(None, {"nnUNet_raw": "only_one"}).layout.raw == Path("rfmed_data/raw")
    assert places(None, {}).layout.raw == Path("rfmed_data/raw")


@pytest.mark.parametrize("wanted", ["217", "BTCV", "btcv", BTCV])
def test_a_dataset_has_three_names(layout, wanted):
    have(layout, BTCV, PHANTOM)
    assert dataset_name(layout, wanted, {}, among="raw") == BTCV


def test_a_named_dataset_comes_before_the_variable_before_the_only_one(layout):
    have(layout, BTCV, PHANTOM)
    have(layout, PHANTOM, where="preprocessed")
    assert dataset_name(layout, "BTCV", {"RFMED_DATASET": PHANTOM}, among="raw") == BTCV
    assert dataset_name(layout, None, {"RFMED_DATASET": "217"}, among="raw") == BTCV
    assert dataset_name(layout, None, {}, among="preprocessed") == PHANTOM


def test_none_or_several_datasets_are_a_sentence(layout):
    with pytest.raises(UsageError, match=r"No raw dataset was found"):
        dataset_name(layout, None, {}, among="raw")
    have(layout, BTCV, PHANTOM)
    with pytest.raises(UsageError, match=f"There are several datasets.*{BTCV}, {PHANTOM}.*-d"):
        dataset_name(layout, None, {}, among="raw")
    with pytest.raises(UsageError, match=f"The dataset does not exist: 4.*{BTCV}"):
        dataset_name(layout, "4", {}, among="raw")


def test_models_of_nnunet_are_named_where_there_is_none_of_ours(layout):
    folder = layout.results / BTCV / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    for file in ("fold_0/checkpoint_final.pth", "plans.json"):
        (folder / file).touch()
    with pytest.raises(UsageError, match=f"-m takes {folder}, and rfmed_import_model imports it"):
        trained_model(layout, {}, dataset=None, plan=None, configuration=None)


def test_none_or_several_models_are_listed(layout):
    with pytest.raises(UsageError, match=r"No trained model was found.*rfmed_train"):
        trained_model(layout, {}, dataset=None, plan=None, configuration=None)
    have_model(layout)
    assert trained_model(layout, {}, dataset=None, plan=None, configuration=None).dataset == BTCV
    have_model(layout, stage="2d")
    have_model(layout, dataset=PHANTOM)
    with pytest.raises(UsageError, match=f"Several.*-d {BTCV} -p rfmed -c 2d.*-d {PHANTOM}.*Name one"):
        trained_model(layout, {}, dataset=None, plan=None, configuration=None)
    with pytest.raises(UsageError, match=f"No trained model matches.*-d {PHANTOM}"):
        trained_model(layout, {}, dataset=None, plan="nnunet", configuration=None)


def test_what_is_named_narrows_the_choice_of_a_model(layout):
    have_model(layout)
    have_model(layout, stage="2d", fold="3")
    have_model(layout, dataset=PHANTOM, plan="nnunet")
    assert trained_model(layout, {"RFMED_DATASET": "900"}, dataset=None, plan=None, configuration=None).plan == "nnunet"
    assert trained_model(layout, {}, dataset="BTCV", plan=None, configuration="2d").folds == ("3",)
    assert trained_model(layout, {}, dataset=None, plan="nnunet", configuration=None).dataset == PHANTOM


def test_files_beside_the_plans_are_no_plans(layout):
    folder = layout.preprocessed / BTCV
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text('{"plans_name": "nnUNetPlans"}')
    (folder / "list.json").write_text("[1]")
    for name in ("dataset", "splits_final", "rfmed_fingerprint", ".partial-1-rfmed"):
        (folder / f"{name}.json").write_text('{"format": ')
    with pytest.raises(UsageError, match=r"The plan does not exist.*rfmed_plan_and_preprocess -d Dataset217_BTCV"):
        planned(layout, BTCV, None, stage="3d_fullres")


def test_several_plans_ask_for_a_name_and_a_broken_one_is_a_sentence(layout):
    folder = layout.preprocessed / BTCV
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text('{"format": 1, "stages": {}}')
    with pytest.raises(UsageError, match=r"There are several plans.*one, two.*-p"):
        planned(layout, BTCV, None, stage="3d_fullres")
    with pytest.raises(UsageError, match=r"The plan does not exist.*three.*one, two"):
        planned(layout, BTCV, "three", stage="3d_fullres")
    with pytest.raises(RecordError, match=r"patch|name"):
        planned(layout, BTCV, "one", stage="3d_fullres")


@pytest.mark.parametrize("wanted", ["torn", None])
@pytest.mark.parametrize("text", ['{"format": 1, "stages": ', '{"format": 1, "stbges": {}}'])
def test_a_damaged_plan_is_named_with_what_is_wrong(layout, wanted, text):
    folder = layout.preprocessed / BTCV
    folder.mkdir(parents=True)
    (folder / "torn.json").write_text(text)
    with pytest.raises(RecordError, match=r"The plan (is not valid JSON|has .* fault).*torn\.json"):
        planned(layout, BTCV, wanted, stage="3d_fullres")
    (folder / "whole.json").write_text('{"format": 1, "stages": {}}')
    with pytest.raises(UsageError if wanted is None else RecordError, match="torn"):  # the other is not taken instead
        planned(layout, BTCV, wanted, stage="3d_fullres")


def test_labels_come_from_a_file_or_a_dataset(layout, tmp_path):
    def declare(folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, name: 1}, "numTraining": 1}
        (folder / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))
        return folder / "dataset.json"

    def names(**asked):
        found = labels_for(layout, asked.pop("environment", {}), **({"dataset": None, "file": None} | asked))
        return None if found is None else list(found.names)[1:]

    declare(layout.raw / BTCV, "organ")
    have(layout, PHANTOM)
    own = declare(tmp_path / "elsewhere", "other")
    assert names(file=own, dataset="BTCV") == ["other"]
    assert names(dataset="BTCV") == ["organ"]
    assert names(environment={"RFMED_DATASET": "217"}) == ["organ"]
    assert names() is None
    with pytest.raises(UsageError, match=r"The names of the label values are unknown.*--labels"):
        names(dataset=PHANTOM)
