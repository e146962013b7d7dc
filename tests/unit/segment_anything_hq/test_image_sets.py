"""Image sets: pairing, counting and checking of images and masks, in every layout and color mode."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from tifffile import imwrite

from rfmedsam2.errors import DatasetError, ImageError
from segment_anything_hq.choices import MaskRule
from segment_anything_hq.data.checks import check_set, check_sets, total
from segment_anything_hq.data.coco import coco_lvis, open_annotations
from segment_anything_hq.data.coco_masks import counts_mask, polygons_mask
from segment_anything_hq.data.datasets import (
    COLLECTIONS,
    HQSEG_TEST,
    HQSEG_TEST_IMAGES,
    HQSEG_TRAINING,
    HQSEG_TRAINING_IMAGES,
    SBD_INSTANCES,
    open_folders,
    open_sbd,
    read_ahead,
)
from segment_anything_hq.data.image_io import image_size, read_ground_truth, read_image


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def image(seed: int = 0, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def mask(value: int = 255, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[1:4, 2:5] = value
    return array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        save(tmp_path / "images" / f"{i}.jpg", image(i))
        save(tmp_path / "masks" / f"{i}.png", mask())
    return tmp_path


def test_the_published_totals_are_the_sums_of_the_sets() -> None:
    assert sum(layout.expected or 0 for layout in HQSEG_TRAINING) == HQSEG_TRAINING_IMAGES == 44_320
    assert sum(layout.expected or 0 for layout in HQSEG_TEST) == HQSEG_TEST_IMAGES == 1_537


def test_a_folder_without_faults(folder: Path) -> None:
    found = check_set(open_folders(folder / "images", folder / "masks"))
    assert (found.samples, found.images, found.faults, found.complete) == (3, 3, (), True)
    assert found.summary() == f"{folder.name}: 3 samples, no faults"


def test_all_faults_are_listed_at_once(folder: Path) -> None:
    images, masks = folder / "images", folder / "masks"
    save(images / "no_mask.jpg", image())
    save(masks / "no_image.png", mask())
    for name, array in (("small", mask(shape=(6, 7))), ("empty", mask(0)), ("ones", mask(1)), ("full", mask() | 255)):
        save(images / f"{name}.jpg", image())
        save(masks / f"{name}.png", array)
    save(images / "cut.jpg", image(shape=(90, 90)))
    save(masks / "cut.png", mask(shape=(90, 90)))
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:1500])
    (images / "text.jpg").write_text("no image")
    save(masks / "text.png", mask())
    (images / "Thumbs.db").write_text("")
    (images / "._0.jpg").write_text("")
    found = check_set(open_folders(images, masks))
    faults = {Path(f.where).name: f.what for f in found.faults}
    assert len(found.faults) == 8
    assert faults["no_mask.jpg"] == "the image has no mask"
    assert faults["no_image.png"] == "the mask has no image"
    assert faults["small.png"] == "the mask has 6 x 7 pixels, its image 6 x 8"
    assert faults["empty.png"] == "the mask is empty"
    assert faults["ones.png"] == (
        "the mask is empty: its largest value is 1, and object pixels are above 128 "
        "(rule='any' takes every value but 0)"
    )
    assert faults["full.png"] == "the mask covers the whole image"
    assert "cannot be read" in faults["cut.jpg"]
    assert "cannot be read" in faults["text.jpg"]
    assert not found.complete


def test_sizes_alone_are_compared_from_the_heads_of_files(folder: Path) -> None:
    save(folder / "masks" / "1.png", mask(0, shape=(6, 7)))
    found = check_set(open_folders(folder / "images", folder / "masks"), pixels=False)
    assert [f.what for f in found.faults] == ["the mask has 6 x 7 pixels, its image 6 x 8"]


def test_missing_folders_and_duplicate_names_are_faults(folder: Path) -> None:
    assert [f.what for f in open_folders(folder / "images", folder / "nowhere").faults] == ["the folder is missing"]
    save(folder / "images" / "1.bmp", image())
    (fault,) = open_folders(folder / "images", folder / "masks").faults
    assert "same name as" in fault.what
    with pytest.raises(DatasetError, match="no samples"):
        open_folders(folder, folder / "masks").require_samples()


def test_several_objects_of_one_image(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a_1.jpg", image())
    for name in ("a_1_1", "a_1_2", "a_1#3"):
        save(tmp_path / "masks" / f"{name}.png", mask())
    found = open_folders(tmp_path / "images", tmp_path / "masks")
    assert sorted(s.id for s in found.samples) == ["a_1#3", "a_1_1", "a_1_2"]
    assert {s.image.name for s in found.samples} == {"a_1.jpg"}
    read = list(read_ahead(found.samples))
    assert read[0][1] is read[2][1]


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save(tmp_path / "cascade_psp" / "fss_all" / f"{name}.jpg", image())
        save(tmp_path / "cascade_psp" / "fss_all" / f"{name}.png", mask())
    sets = {s.name: s for s in COLLECTIONS["hqseg44k_train"](tmp_path)}
    assert [s.id for s in sets["FSS"].samples] == ["x", "y"]
    checks = check_sets(tuple(sets.values()))
    assert total(checks) == "2 samples of 44320 that are published in 7 sets, 8 faults"
    assert {c.name: c.summary() for c in checks}["FSS"] == "FSS: 2 samples of 10000 that are published, no faults"


def test_only_some_samples(folder: Path) -> None:
    found = open_folders(folder / "images", folder / "masks")
    assert [s.id for s in found.subset(["2", "0"]).samples] == ["0", "2"]
    with pytest.raises(DatasetError, match="does not contain"):
        found.subset(["7"])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_images_of_every_color_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(mask())
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    gray.convert("RGB").convert(mode).save(path)
    read = read_image(path)
    assert (read.shape, read.dtype) == ((6, 8, 3), np.uint8)
    assert (read[2, 3] == 255).all()
    assert (read[0, 0] == 0).all()
    assert np.array_equal(read_ground_truth(path), mask() // 255)


def test_palettes_give_colors_not_indices(tmp_path: Path) -> None:
    image = Image.new("P", (8, 6))
    image.putpalette([0, 0, 0, 200, 10, 60])
    image.putdata(mask(1).ravel().tolist())
    image.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png")[2, 3].tolist() == [200, 10, 60]
    assert np.array_equal(read_ground_truth(tmp_path / "a.png"), mask(1))


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    save(tmp_path / "a.png", mask().astype(np.uint16) * 257)
    assert read_image(tmp_path / "a.png").max() == 255
    assert np.array_equal(read_ground_truth(tmp_path / "a.png"), mask() // 255)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", image(), exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (8, 6, 3)
    assert image_size(tmp_path / "a.jpg") == (8, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_a_mask_is_turned_as_its_image_is(tmp_path: Path, ending: str, orientation: int) -> None:
    """Both files say how they are turned: the object stays on its pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = mask()
    stored[5, 6:] = 255
    path = save(tmp_path / f"a.{ending}", stored, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    found = read_ground_truth(path)
    turned = stored.T if orientation > 4 else stored
    rows, columns = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    assert np.array_equal(found, turned[::rows, ::columns] // 255)
    assert np.array_equal(found, read_image(path)[..., 0] // 255)
    assert image_size(path) == found.shape == ((8, 6) if orientation > 4 else (6, 8))


def test_mask_values_follow_the_mask_rule(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 1, 127, 128, 129, 255]], np.uint8))
    assert read_ground_truth(path).tolist() == [[0, 0, 0, 0, 1, 1]]
    assert read_ground_truth(path, "ignore_128").tolist() == [[0, 0, 0, -1, 1, 1]]
    assert read_ground_truth(path, "any").tolist() == [[0, 1, 1, 1, 1, 1]]
    colored = save(tmp_path / "b.png", np.array([[[0, 0, 9], [0, 0, 0]]], np.uint8))
    assert read_ground_truth(colored, "any").tolist() == [[1, 0]]


@pytest.mark.parametrize("rule", ["above_128", "any"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_background(tmp_path: Path, mode: str, rule: MaskRule) -> None:
    """A white shape on a transparent ground, whose hidden color may be anything; and an opacity that says nothing."""
    shape = Image.new("L", (8, 6), 255)
    shape.putalpha(Image.fromarray(mask()))
    shape.convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(read_ground_truth(tmp_path / "a.png", rule), mask() // 255)
    for opacity in (0, 90):
        gray = Image.fromarray(mask())
        gray.putalpha(opacity)
        gray.convert(mode).save(tmp_path / "b.png")
        assert np.array_equal(read_ground_truth(tmp_path / "b.png", rule), mask() // 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("opacity", [1, 100, 254])
def test_a_little_of_an_object_is_object(tmp_path: Path, mode: str, opacity: int) -> None:
    shape = Image.fromarray(mask(1)).convert(mode)
    shape.putalpha(Image.fromarray(mask(opacity)))
    shape.save(tmp_path / "a.png")
    assert np.array_equal(read_ground_truth(tmp_path / "a.png", "any"), mask(1))


@pytest.mark.parametrize(("dtype", "ending"), [("uint16", "png"), ("uint16", "tif"), ("int32", "tif")])
def test_numbers_of_objects_are_never_rounded_to_background(tmp_path: Path, dtype: str, ending: str) -> None:
    most = 70_000 if dtype == "int32" else 65_535
    path = save(tmp_path / f"a.{ending}", np.array([[0, 1, 255, 256, most]], dtype))
    assert read_ground_truth(path, "any").tolist() == [[0, 1, 1, 1, 1]]
    if dtype == "int32":
        with pytest.raises(ImageError, match=r"32 bits.*at most 65535.*Found 70000"):
            read_ground_truth(path)
        with pytest.raises(ImageError, match="32 bits"):
            read_image(path)
        with pytest.raises(ImageError, match=r"negative numbers.*Found -1"):
            read_ground_truth(save(tmp_path / "b.tif", np.array([[0, -1]], dtype)))
    else:
        assert read_ground_truth(path).tolist() == [[0, 0, 0, 0, 1]]


@pytest.mark.parametrize("number", [1, 129, 255])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_per_color_are_no_numbers_of_objects(tmp_path: Path, ending: str, number: int) -> None:
    """Pillow reads the upper 8 of their bits: 255 and less would become background."""
    colors = np.stack([mask(1).astype(np.uint16) * number] * 3, -1)
    path = tmp_path / f"a.{ending}"
    (write_png if ending == "png" else imwrite)(path, colors)
    with pytest.raises(ImageError, match=r"of 16 bits per color only the upper 8.*Found 3 channels.*as gray PNG"):
        read_ground_truth(path, "any")
    (write_png if ending == "png" else imwrite)(path, np.where(colors > 0, 65535, 0).astype(np.uint16))
    assert np.array_equal(read_ground_truth(path), mask(1))


def write_png(path: Path, colors: np.ndarray) -> None:
    """A PNG of (H, W, 3) uint16, which Pillow does not write."""
    height, width = colors.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("ending", "options", "name"),
    [("jpg", {}, "JPEG"), ("webp", {"quality": 50}, "WebP"), ("tif", {"compression": "jpeg", "quality": 50}, "JPEG")],
)
def test_compression_with_loss_makes_no_object_of_the_background(
    tmp_path: Path, ending: str, options: dict[str, Any], name: str
) -> None:
    path = save(tmp_path / f"a.{ending}", mask(shape=(24, 24)), **options)
    with pytest.raises(ImageError, match=rf"Every value but 0 is to be object, but {name}.*as PNG from their source"):
        read_ground_truth(path, "any")
    assert np.abs(read_ground_truth(path) - mask(shape=(24, 24)) // 255).sum() <= 2
    labels = save(tmp_path / "b.webp", mask(1) + mask(2), lossless=True)
    assert np.array_equal(read_ground_truth(labels, "any"), mask(1))


def test_ritm_sets_use_their_own_mask_rules(tmp_path: Path) -> None:
    save(tmp_path / "data_GT" / "llama.jpg", image())
    save(tmp_path / "boundary_GT" / "llama.bmp", np.where(mask() > 0, 255, 128).astype(np.uint8))
    (found,) = COLLECTIONS["grabcut"](tmp_path)
    assert found.samples[0].ground_truth().min() == -1
    check = check_set(found)
    assert check.summary() == "GrabCut: 1 samples of 50 that are published, 1 with ignored pixels, no faults"
    save(tmp_path / "img" / "bear.jpg", image())
    save(tmp_path / "gt" / "bear.png", np.stack([mask(0), mask(1), mask(0)], -1))
    (davis,) = COLLECTIONS["davis"](tmp_path)
    assert davis.samples[0].ground_truth().sum() == 9


def test_sbd_has_a_sample_for_every_instance(tmp_path: Path) -> None:
    instances = np.zeros((6, 8), np.uint8)
    instances[1:3, 1:3], instances[4:, 4:] = 1, 2
    (tmp_path / "inst").mkdir()
    for name in ("a", "b"):
        savemat(tmp_path / "inst" / f"{name}.mat", {"GTinst": {"Segmentation": instances, "Categories": [1, 2]}})
    save(tmp_path / "img" / "a.jpg", image())
    (tmp_path / "inst" / "c.mat").write_bytes(b"no matlab")
    (tmp_path / "val.txt").write_text("a\nb\nc\nd\n")
    found = open_sbd(tmp_path)
    assert [s.id for s in found.samples] == ["a_1", "a_2"]
    assert [int(s.ground_truth().sum()) for s in found.samples] == [4, 8]
    assert found.expected == SBD_INSTANCES
    whats = [f.what for f in found.faults]
    assert whats[0] == "the image is missing"
    assert "cannot be read" in whats[1]
    assert whats[2] == "the instances are missing"
    assert check_set(open_sbd(tmp_path / "nowhere")).faults[0].what == "the list of images is missing"


def test_polygons_are_filled_as_the_official_api_fills_them() -> None:
    square = np.array([1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0])
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = True
    assert np.array_equal(polygons_mask([square], 5, 6), expected)
    # made with pycocotools 2.0.11
    star = np.array([0.5, 0.2, 6.7, 1.1, 3.3, 3.9, 7.8, 6.1, 1.2, 5.4])
    rows = ["01100000", "01111100", "01111000", "01110000", "01110000", "00111100", "00000000"]
    found = ["".join(map(str, row)) for row in polygons_mask([star], 7, 8).astype(int)]
    assert found == rows


def test_run_lengths_go_down_the_columns() -> None:
    expected = np.array([[0, 1, 0], [1, 1, 0]], bool)
    assert np.array_equal(counts_mask([1, 3, 2], 2, 3), expected)
    assert np.array_equal(counts_mask("132", 2, 3), expected)
    with pytest.raises(DatasetError, match="do not fill"):
        counts_mask([1, 3], 2, 3)


def annotated(root: Path) -> None:
    save(root / "train2017" / "000000000001.jpg", image())
    square = [1, 1, 4, 1, 4, 3, 1, 3]
    images = [
        {"id": 1, "height": 6, "width": 8, "file_name": "000000000001.jpg"},
        {"id": 2, "height": 6, "width": 8, "file_name": "000000000002.jpg"},
    ]
    annotations = [
        {"id": 10, "image_id": 1, "area": 6, "segmentation": [square], "iscrowd": 0},
        {"id": 11, "image_id": 1, "area": 9, "segmentation": {"size": [6, 8], "counts": [6, 6, 36]}, "iscrowd": 0},
        {"id": 12, "image_id": 1, "area": 9, "segmentation": {"size": [6, 8], "counts": [6, 6, 36]}, "iscrowd": 1},
        {"id": 13, "image_id": 1, "area": 1, "segmentation": [[1, 1, 2, 2]]},
        {"id": 14, "image_id": 2, "area": 6, "segmentation": [square]},
        {"id": 15, "image_id": 3, "area": 6, "segmentation": [square]},
        {"id": 16, "image_id": 1, "area": 6, "segmentation": {"size": [8, 6], "counts": [48]}},
    ]
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    lvis = {k: v for k, v in images[0].items() if k != "file_name"}
    lvis["coco_url"] = "http://images.cocodataset.org/train2017/000000000001.jpg"
    (root / "lvis_v1_train.json").write_text(json.dumps({"images": [lvis], "annotations": annotations[:1]}))


def test_annotations_of_coco_and_lvis(tmp_path: Path) -> None:
    annotated(tmp_path)
    coco, lvis = coco_lvis(tmp_path)
    assert [s.id for s in coco.samples] == ["000000000001_10", "000000000001_11"]
    assert [int(s.ground_truth().sum()) for s in coco.samples] == [6, 6]
    assert [s.id for s in lvis.samples] == ["000000000001_10"]
    assert {f.where: f.what.split(" in ")[0] for f in coco.faults} == {
        "annotation 13": "no polygon with at least three points",
        "annotation 16": "run lengths are for a size of [8, 6], the image has [6, 8]",
        "image 2": "the image is missing",
        "image 3": "has 1 annotations but no entry",
    }
    check = check_set(coco)
    assert (check.samples, check.images, len(check.faults)) == (2, 1, 4)
    large = open_annotations(coco.samples[0].mask.source, tmp_path / "train2017", min_area=7)
    assert [s.id for s in large.samples] == ["000000000001_11"]


def test_invalid_annotation_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is missing"):
        coco_lvis(tmp_path)
    path = tmp_path / "a.json"
    for text, sentence in (
        ("{", "not valid JSON"),
        ("{}", "no annotations"),
        ('{"images": [{}], "annotations": []}', "lack required fields"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=sentence):
            open_annotations(path, tmp_path)


def test_reading_ahead_stops_at_a_mask_of_another_size(folder: Path) -> None:
    save(folder / "masks" / "1.png", mask(shape=(6, 7)))
    samples = iter(read_ahead(open_folders(folder / "images", folder / "masks").samples))
    assert next(samples)[0].id == "0"
    with pytest.raises(ImageError, match="another size"):
        next(samples)


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "a.png")


@pytest.mark.data
def test_real_images_pair_without_faults(data_root: Path) -> None:
    ecssd = open_folders(data_root / "ecssd-300" / "images", data_root / "ecssd-300" / "masks")
    vgg = open_folders(data_root / "vgg-iseg-151" / "images", data_root / "vgg-iseg-151" / "masks", rule="ignore_128")
    found = check_sets((ecssd, vgg))
    assert [(c.samples, c.with_ignored, c.faults) for c in found] == [(300, 0, ()), (151, 143, ())]
