"""Lists of images to predict, as spreadsheets, shells and people write them: no row is lost, no path is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfmedsam2.errors import DatasetError
from rfmedsam2.store.input_discovery import find_cases

TWO = {"p1": ["a_0000.nii.gz"], "p2": ["b_0000.nii.gz"]}


def found(folder: Path, content: object, name: str = "list.csv", channels: int = 1) -> dict[str, list[str]]:
    for image in ("a_0000.nii.gz", "b_0000.nii.gz"):
        (folder / image).touch()
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    cases = find_cases(folder / name, channels=channels, file_ending=".nii.gz")
    return {case.id: [path.name for path in case.images] for case in cases}


@pytest.mark.parametrize(
    "text",
    [
        "id,image\np1,a_0000.nii.gz\np2,b_0000.nii.gz\n",
        "id;image\np1;a_0000.nii.gz\np2;b_0000.nii.gz\n",
        "p1;a_0000.nii.gz\np2;b_0000.nii.gz\n",
        "id\timage\np1\ta_0000.nii.gz\np2\tb_0000.nii.gz\n",
        "sep=;\r\nid;image\r\np1;a_0000.nii.gz\r\np2;b_0000.nii.gz\r\n",
        "sep=,\r\nid,image\r\np1,a_0000.nii.gz\r\np2,b_0000.nii.gz\r\n",
        '\ufeff"id","image"\r\n"p1","a_0000.nii.gz"\r\n"p2","b_0000.nii.gz"\r\n',
        "\rid,image\rp1,a_0000.nii.gz\rp2,b_0000.nii.gz",
        "id,image,\n,,\np1,a_0000.nii.gz,\np2,b_0000.nii.gz,\n,,\n",
        "\ufeffid;image\r\np1;a_0000.nii.gz\r\np2;b_0000.nii.gz\r\n".encode("utf-16-le"),
        "\ufeffid\timage\r\np1\ta_0000.nii.gz\r\np2\tb_0000.nii.gz\r\n".encode("utf-16-be"),
    ],
)
def test_lists_of_spreadsheets_are_read(text, tmp_path: Path) -> None:
    assert found(tmp_path, text) == TWO


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_a_list_that_powershell_wrote_is_read(name: str, tmp_path: Path) -> None:
    text = "a_0000.nii.gz\r\nb_0000.nii.gz\r\n".encode("utf-16")
    assert found(tmp_path, text, name) == {"a": ["a_0000.nii.gz"], "b": ["b_0000.nii.gz"]}


def test_a_first_row_of_names_without_ending_is_a_case(tmp_path: Path) -> None:
    for folder in ("series1", "series2"):
        (tmp_path / folder).mkdir()
    both = {"p1": ["series1"], "p2": ["series2"]}
    assert found(tmp_path, "p1,series1\np2,series2\n") == both
    assert found(tmp_path, "id,folder\np1,series1\np2,series2\n") == both
    assert found(tmp_path, "series1\nseries2\n") == {"series1": ["series1"], "series2": ["series2"]}


@pytest.mark.parametrize("image", ["x;y_0000.nii.gz", "x,y_0000.nii.gz", "#x_0000.nii.gz"])
@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_marks_in_names_of_existing_files_are_part_of_them(image: str, name: str, tmp_path: Path) -> None:
    (tmp_path / image).touch()
    read = found(tmp_path, f"a_0000.nii.gz\n{image}\n", name)
    assert read == {"a": ["a_0000.nii.gz"], image.removesuffix("_0000.nii.gz"): [image]}


def test_comments_of_a_text_list_stay_comments(tmp_path: Path) -> None:
    assert found(tmp_path, "# by hand\na_0000.nii.gz\n#b.nii.gz\n", "list.txt") == {"a": ["a_0000.nii.gz"]}


@pytest.mark.parametrize("row", ["p1,,b_0000.nii.gz", ",a_0000.nii.gz,b_0000.nii.gz"])
def test_a_missing_channel_or_id_is_named_by_its_line(row: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="an empty cell before others in line 2"):
        found(tmp_path, f"id,ct,mr\n{row}\n", channels=2)


def test_one_image_for_two_channels_is_not_taken_in_silence(tmp_path: Path, caplog) -> None:
    same = ["a_0000.nii.gz"] * 2
    assert found(tmp_path, {"p1": same}, "list.json", channels=2) == {"p1": same}
    assert caplog.messages == ["One image is given for several channels of case p1: a_0000.nii.gz, a_0000.nii.gz"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"p1": ""}, "the images of p1 are not a path or a list of paths"),  # not the list's own folder
        ({"p1": None}, "the images of p1 are not"),
        ({"p1": {"image": "a_0000.nii.gz"}}, "the images of p1 are not"),
        ({"p1": ["a_0000.nii.gz", ""]}, "the images of p1 are not"),
        ([{"id": "p1", "images": {"a_0000.nii.gz": 1}}], "the images of p1 are not"),
        ([{"id": None, "images": "a_0000.nii.gz"}], "an id is neither text nor a whole number"),
        ([{"id": True, "images": "a_0000.nii.gz"}], "an id is neither text nor a whole number"),
        ([{"id": ["p"], "images": "a_0000.nii.gz"}], "an id is neither text nor a whole number"),
        (["a_0000.nii.gz", ""], 'an entry lacks "id" or "images"'),
        ([5], 'an entry lacks "id" or "images"'),
        (5, "neither a list nor an object of case ids"),
        ({"p1": "x" * 300}, "Input files do not exist"),
    ],
)
def test_faulty_lists_are_sentences(content: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=sentence):
        found(tmp_path, content, "list.json")


def test_ids_may_be_whole_numbers(tmp_path: Path) -> None:
    assert found(tmp_path, [{"id": 7, "images": ["a_0000.nii.gz"]}], "list.json") == {"7": ["a_0000.nii.gz"]}
