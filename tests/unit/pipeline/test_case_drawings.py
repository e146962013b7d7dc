"""Drawings of label maps: colors on the right side, names and volumes, what is refused."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.commands import run, run_ok

from rfmedsam2.errors import GeometryError, RfMedSamError, UsageError
from rfmedsam2.pipeline.evaluation.case_drawings import (
    DrawnCase,
    cases_of_folder,
    class_color,
    drawing_png,
    write_drawings,
)
from rfmedsam2.records.dataset import LabelSet

LABELS = LabelSet(names={"background": 0, "left lung": 1, "right lung": 2})
RAS = np.diag([1.0, 1.0, 2.0, 1.0])


def save(path, array, affine=RAS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def lungs() -> np.ndarray:
    """x grows toward the patient's right (RAS+): 1 lies on the left, 2 on the right."""
    array = np.zeros((40, 40, 20), np.uint8)
    array[4:14, 10:30, 5:15] = 1
    array[26:36, 10:30, 5:15] = 2
    return array


def columns_of(png: bytes, value: int) -> np.ndarray:
    """Columns of the drawing above its legend where the pure color of a class is."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    found = np.abs(pixels - np.round(255 * np.array(class_color(value)))).max(axis=2) <= 2
    return np.flatnonzero(found[: int(0.85 * len(found)), : pixels.shape[1] // 3].any(axis=0))


def test_classes_are_drawn_on_their_side(tmp_path):
    path = save(tmp_path / "a.nii.gz", lungs())
    png = drawing_png(DrawnCase(id="a", label=path, image=None), LABELS)
    left, right = columns_of(png, 1), columns_of(png, 2)
    assert len(left) > 10 < len(right)
    assert right.max() < left.min()  # radiological convention
    turned = np.diag([-1.0, 1.0, 2.0, 1.0])
    turned[0, 3] = 39
    other = save(tmp_path / "b.nii.gz", lungs()[::-1], turned)  # the same body, stored otherwise
    assert drawing_png(DrawnCase(id="b", label=other, image=None), LABELS) == png


def test_the_legend_names_what_is_there_with_its_volume(tmp_path, monkeypatch):
    legends = []
    drawn = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda self, **k: legends.append(k) or drawn(self, **k))

    def legend(array, labels):
        drawing_png(DrawnCase(id="a", label=save(tmp_path / "a.nii.gz", array), image=None), labels)
        return [patch.get_label() for patch in legends[-1]["handles"]]

    assert legend(lungs(), LABELS) == ["left lung 4 ml", "right lung 4 ml"]
    assert legend(lungs(), None) == ["1 4 ml", "2 4 ml"]
    regions = LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2), ignore=3)
    assert legend(lungs() + (lungs() == 2), regions) == ["whole 4 ml", "ignore 4 ml"]
    many = np.zeros((40, 40, 20), np.uint8)
    many.flat[:30] = np.arange(1, 31)
    assert legend(many, None)[-1] == "and 6 more"
    drawing_png(DrawnCase(id="a", label=save(tmp_path / "e.nii.gz", 0 * many), image=None), LABELS)  # no foreground


def test_label_maps_find_the_images_of_their_ids(tmp_path):
    for name in (
        "labels/a.nii.gz",
        "labels/b.nii.gz",
        "images/a_0000.nii.gz",
        "images/a_0001.nii.gz",
        "images/b.nii.gz",
    ):
        save(tmp_path / name, lungs())
    (tmp_path / "labels" / "predictions.json").write_text("{}")
    found = cases_of_folder(tmp_path / "labels", tmp_path / "images", channel=1)
    assert [(case.id, case.image and case.image.name) for case in found] == [
        ("a", "a_0001.nii.gz"),
        ("b", "b.nii.gz"),
    ]
    for labels, images in (("nowhere", None), ("labels", "nowhere"), ("labels", "empty"), ("empty", None)):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=r"nowhere|empty"):
            cases_of_folder(tmp_path / labels, images and tmp_path / images)


def test_a_case_with_a_fault_does_not_stop_the_others(tmp_path):
    labels, images = tmp_path / "labels", tmp_path / "images"
    for name in ("a", "b"):
        save(labels / f"{name}.nii.gz", lungs())
        save(images / f"{name}.nii.gz", lungs() if name == "b" else lungs()[1:])
    cases = cases_of_folder(labels, images)
    with pytest.raises(
        RfMedSamError, match=r"1 of 2 cases could not be drawn.*a: Image and label map are on different"
    ):
        write_drawings(cases, tmp_path / "out", LABELS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]
    with pytest.raises(GeometryError):
        drawing_png(cases[0])
    with pytest.raises(UsageError, match=r"1 file\(s\) would be replaced.*b\.png.*overwrite"):
        write_drawings(cases[1:], tmp_path / "out", LABELS)
    assert len(write_drawings(cases[1:], tmp_path / "out", LABELS, overwrite=True)) == 1
    for folder in (labels, images):
        with pytest.raises(UsageError, match="among the images or label maps"):
            write_drawings(cases[1:], folder, LABELS, overwrite=True)
    with pytest.raises(UsageError, match="opacity"):
        write_drawings(cases[1:], tmp_path / "more", LABELS, opacity=2)


def test_the_command_draws_a_dataset_or_predictions(raw_root, tmp_path):
    said = run_ok("overlay", "-o", tmp_path / "out", "--root", raw_root, "--cases", "phantom_001", "phantom_002")
    assert "Drew 2 case(s)" in said.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["phantom_001.png", "phantom_002.png"]
    raw = raw_root / "raw" / "Dataset900_PhantomCT"
    run_ok(
        "overlay", "-p", raw / "labelsTr", "-i", raw / "imagesTr", "-o", tmp_path / "again", "--cases", "phantom_001"
    )
    assert (tmp_path / "again" / "phantom_001.png").read_bytes() == (tmp_path / "out" / "phantom_001.png").read_bytes()
    for words, sentence in (
        (("--cases", "nobody"), "There is no such case"),
        (("--channel", 7), "does not have this channel"),
        (("-p", raw / "labelsTr", "-i", raw / "imagesTr", "--channel", -1), "channel must be a whole number from 0"),
        (("--workers", -1), "workers must be a whole number from 0"),
        (("-i", raw / "imagesTr"), "There are images and no label maps"),
    ):
        told = run("overlay", "-o", tmp_path / "none", "--root", raw_root, *words)
        assert told.code == 2
        assert sentence in told.err
        assert not (tmp_path / "none").exists()
