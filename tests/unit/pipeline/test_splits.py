"""Splits: folds, groups, names, files that users wrote."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rfmedsam2.errors import DatasetError, RecordError, UsageError
from rfmedsam2.pipeline.datasets.published_splits import AMOS_TRAINING, AMOS_VALIDATION, case_number, published_split
from rfmedsam2.pipeline.datasets.splits import (
    copies_apart,
    get_split,
    groups_of,
    leaks,
    load_or_make_splits,
    make_splits,
    named_splits,
    read_splits,
    warnings_of,
)
from rfmedsam2.records.dataset import DatasetJson
from rfmedsam2.records.plan import Split
from rfmedsam2.store.layout import Layout

BTCV = [*range(1, 11), *range(21, 41)]


def dataset(ids, tmp_path=Path("raw"), groups=None, **extra):
    name = "Dataset001_A"
    plain = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz", **extra}
    if groups:
        plain["groups"] = groups
    cases = tuple(SimpleNamespace(id=i, group=(groups or {}).get(i)) for i in ids)
    folder = tmp_path / "raw" / name
    return SimpleNamespace(name=name, folder=folder, json=DatasetJson.parse(plain), training=cases)


def singles(ids):
    return {i: i for i in ids}


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "raw" / "Dataset001_A").mkdir(parents=True)
    return Layout.under(tmp_path)


@pytest.mark.parametrize("count", [5, 7, 30, 260])
def test_folds_equal_nnunets(count):
    generate = pytest.importorskip("nnunetv2.utilities.crossval_split").generate_crossval_split
    ids = sorted(f"case_{i:03d}" for i in range(count))
    expected = [(list(map(str, s["train"])), list(map(str, s["val"]))) for s in generate(ids)]
    found = [(list(s.train), list(s.val)) for s in make_splits(singles(reversed(ids)))]
    assert found == expected


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_cases_give_as_many_folds_as_there_are_cases(count):
    splits = make_splits(singles("abcd"[:count]))
    assert len(splits) == count
    assert sorted(case for s in splits for case in s.val) == list("abcd"[:count])


def test_a_single_case_trains_and_validates_on_itself_with_a_warning():
    splits = make_splits({"only": "only"})
    assert splits == [Split(train=("only",), val=("only",))]
    assert "its scores do not reflect unseen cases" in warnings_of({"0": splits[0]}, {"only": "only"})[0]


def test_no_cases_are_refused():
    with pytest.raises(DatasetError, match="no training cases"):
        make_splits({})


def test_patients_stay_on_one_side():
    groups = {f"s{i // 2}_{i % 2}": f"s{i // 2}" for i in range(20)}
    splits = dict(enumerate(make_splits(groups)))
    assert len(splits) == 5
    assert leaks({str(k): s for k, s in splits.items()}, groups) == []
    assert all(len(s.val) == 4 and len(s.train) == 16 for s in splits.values())


def test_copies_of_an_image_in_training_and_validation_are_a_warning():
    splits = [
        Split(train=("a", "b"), val=("c", "d")),
        Split(train=("c", "d"), val=("a", "b")),
        Split(train=("a", "c"), val=("b", "d")),
        Split(train=("a", "b", "c", "d"), val=("a", "b", "c", "d")),  # which has a warning of its own
    ]
    assert copies_apart(splits, []) == copies_apart(splits[:2], [("a", "b")]) == []
    (note,) = copies_apart(splits, [("b", "c"), ("d", "c"), ("x", "y")])
    assert "fold(s) 0, 1, 2, so their scores come out too good: b = c, c = d." in note
    assert "fold(s) 2," in copies_apart(splits, [("a", "b")])[0]


def test_a_leak_names_the_patient():
    split = Split(train=("a_1", "b_1"), val=("a_2",))
    found = leaks({"0": split}, {"a_1": "a", "a_2": "a", "b_1": "b"})
    assert found == ["Split 0 has 1 patient(s) in training and validation: a."]


def test_groups_come_from_dataset_json_or_a_regular_expression():
    ids = ["sub1_a", "sub1_b", "sub2_a", "x"]
    assert groups_of(dataset(ids, groups={"sub1_a": "p", "x": "p"}))["sub1_a"] == "p"
    assert groups_of(dataset(ids, groups={"sub1_a": "p", "x": "p"}))["sub1_b"] == "sub1_b"
    found = groups_of(dataset(ids), r"^(sub\d)_")
    assert found == {"sub1_a": "sub1", "sub1_b": "sub1", "sub2_a": "sub2", "x": "x"}


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), ("patient", "matches no case id")])
def test_a_bad_group_expression_is_a_sentence(pattern, message):
    with pytest.raises(UsageError, match=message):
        groups_of(dataset(["a", "b"]), pattern)


@pytest.mark.parametrize(
    ("case", "number"),
    [("img0035", 35), ("0035", 35), ("btcv_0035", 35), ("amos_0600", 600), ("label0001_v2", 2), ("spleen", None)],
)
def test_ids_are_matched_by_their_number(case, number):
    assert case_number(case) == number


@pytest.mark.parametrize("form", ["img{:04d}", "{:04d}", "btcv_{:04d}"])
def test_the_published_btcv_splits(form):
    ids = [form.format(n) for n in BTCV]
    split = published_split("btcv_24_6", ids)
    assert split is not None
    assert split.val == tuple(form.format(n) for n in range(35, 41))
    assert len(split.train) == 24
    synapse = published_split("synapse_18_12", ids)
    assert synapse is not None
    assert synapse.val == tuple(form.format(n) for n in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38))
    assert len(synapse.train) == 18


def test_the_official_amos22_split_and_its_ct_part():
    everything = [f"amos_{n:04d}" for n in sorted(AMOS_TRAINING | AMOS_VALIDATION)]
    both = published_split("amos22", everything)
    assert both is not None
    assert (len(both.train), len(both.val)) == (240, 120)
    ct = published_split("amos22", [i for i in everything if int(i[5:]) <= 500])
    assert ct is not None
    assert (len(ct.train), len(ct.val)) == (200, 100)
    assert not set(ct.train) & set(ct.val)


@pytest.mark.parametrize("ids", [["img0001", "img0002"], [f"img{n:04d}" for n in BTCV[:-1]], ["a", "b"], []])
def test_other_cases_have_no_published_split(ids):
    assert published_split("btcv_24_6", ids) is None


def test_dataset_json_may_name_splits():
    chosen = {"paper": {"train": ["a"], "val": ["b"]}}
    assert named_splits(dataset(["a", "b"], splits=chosen)) == {"paper": Split(train=("a",), val=("b",))}
    with pytest.raises(DatasetError, match="unknown case"):
        named_splits(dataset(["a", "c"], splits=chosen))


@pytest.mark.parametrize("name", ["0", "007", "all"])
def test_a_split_is_not_called_like_another_fold(name, layout, tmp_path):
    """Its results would lie in the folder of that fold, which could not be chosen any more, or it could not."""
    chosen = {name: {"train": ["a"], "val": ["b"]}}
    with pytest.raises(DatasetError, match=rf"names that mean other folds.*dataset\.json, splits.*Found {name}"):
        named_splits(dataset(["a", "b"], splits=chosen))
    load_or_make_splits(dataset(["a", "b"], tmp_path), layout)
    path = layout.splits_file("Dataset001_A").with_name("splits_named.json")
    path.write_text(json.dumps(chosen))
    with pytest.raises(DatasetError, match=rf"names that mean other folds.*splits_named\.json.*Found {name}"):
        get_split(layout, "Dataset001_A", "1")


def test_new_splits_are_written_in_nnunets_format_with_the_named_ones(layout, tmp_path):
    ids = [f"img{n:04d}" for n in BTCV]
    splits = load_or_make_splits(dataset(ids, tmp_path), layout)
    written = json.loads(layout.splits_file("Dataset001_A").read_text())
    assert [set(entry) for entry in written] == [{"train", "val"}] * 5
    assert written[0]["val"] == list(splits[0].val)
    assert get_split(layout, "Dataset001_A", "2", ids=ids) == splits[2]
    assert len(get_split(layout, "Dataset001_A", "synapse_18_12").val) == 12
    assert get_split(layout, "Dataset001_A", "all").val == tuple(ids)
    with pytest.raises(UsageError, match=r"one of 0, 1, 2, 3, 4, btcv_24_6, synapse_18_12, all"):
        get_split(layout, "Dataset001_A", "7")


def test_splits_that_a_user_wrote_are_kept(layout, tmp_path):
    ids = ["a", "b", "c"]
    mine = [{"train": ["a"], "val": ["b"]}]
    (layout.raw / "Dataset001_A" / "splits_final.json").write_text(json.dumps(mine))
    splits = load_or_make_splits(dataset(ids, tmp_path), layout)
    assert splits == [Split(train=("a",), val=("b",))]
    assert json.loads(layout.splits_file("Dataset001_A").read_text()) == mine
    assert warnings_of({"0": splits[0]}, singles(ids)) == ["1 case(s) are in no split: c."]
    assert load_or_make_splits(dataset(ids, tmp_path), layout) == splits


def test_raw_and_preprocessed_splits_must_agree(layout, tmp_path):
    load_or_make_splits(dataset(["a", "b", "c"], tmp_path), layout)
    (layout.raw / "Dataset001_A" / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]')
    with pytest.raises(DatasetError, match="disagree"):
        load_or_make_splits(dataset(["a", "b", "c"], tmp_path), layout)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('[{"train": ["a", "z"], "val": ["b"]}]', DatasetError, "1 unknown case.*: z"),
        ('[{"train": ["a", "b"], "val": ["b"]}]', DatasetError, "trains and validates on 1 case.*: b"),
        ('[{"train": ["a", "a"], "val": ["b"]}]', DatasetError, "lists a twice"),
        ('[{"train": [], "val": ["b"]}]', DatasetError, "0 training and 1 validation"),
        ('[{"train": ["a"]}]', RecordError, "val"),
        ('{"train": ["a"]}', RecordError, "not hold a list of folds"),
        ("[", RecordError, "not valid JSON"),
    ],
)
def test_bad_splits_are_a_sentence(tmp_path, content, error, message):
    path = tmp_path / "splits_final.json"
    path.write_text(content)
    with pytest.raises(error, match=message):
        read_splits(path, ["a", "b"])


def test_other_parts_of_a_split_are_left_out_as_in_nnunet(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text('[{"train": ["a"], "val": ["b"], "test": ["c"]}]')
    assert read_splits(path, ["a", "b"]) == [Split(train=("a",), val=("b",))]


def test_missing_splits_say_what_makes_them(tmp_path):
    with pytest.raises(RecordError, match="rfmed_plan_and_preprocess"):
        read_splits(tmp_path / "splits_final.json")
