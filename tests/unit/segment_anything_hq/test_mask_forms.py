"""Masks as editors and annotation tools save them: the right object, or a warning that says what else may be meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tifffile import imwrite

from rfmedsam2.errors import ImageError
from segment_anything_hq.choices import MaskRule
from segment_anything_hq.data import doubts
from segment_anything_hq.data.image_io import read_ground_truth, read_image
from segment_anything_hq.data.open_data import open_data
from segment_anything_hq.tasks import train

SHAPE = np.zeros((6, 8), bool)
SHAPE[1:4, 2:5] = True
OTHER = np.zeros((6, 8), bool)
OTHER[4:, 5:] = True
GRAY = SHAPE.astype(np.uint8) * 255


@pytest.fixture(autouse=True)
def _each_warning_anew() -> None:
    doubts._warned().clear()


def save(path: Path, image: np.ndarray | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


@pytest.mark.parametrize("rule", ["above_128", "any"])
@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("ending", ["gif", "bmp", "pgm"])
def test_gif_bmp_and_netpbm_masks(tmp_path: Path, ending: str, mode: str, rule: MaskRule) -> None:
    image = Image.fromarray(GRAY) if ending == "pgm" else Image.fromarray(GRAY).convert(mode)
    assert np.array_equal(read_ground_truth(save(tmp_path / f"a.{ending}", image), rule), SHAPE)


def test_a_netpbm_mask_is_as_white_as_its_header_says(tmp_path: Path) -> None:
    for most, kind in ((1, "P2"), (255, "P2"), (65_535, "P2")):
        (tmp_path / "a.pgm").write_text(f"{kind}\n8 6\n{most}\n" + " ".join(map(str, SHAPE.ravel() * most)))
        assert np.array_equal(read_ground_truth(tmp_path / "a.pgm"), SHAPE)


@pytest.mark.parametrize("rule", ["above_128", "any"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_black_shape_on_a_transparent_ground_is_object(tmp_path: Path, mode: str, rule: MaskRule) -> None:
    image = Image.new("L", (8, 6))
    image.putalpha(Image.fromarray(GRAY))
    assert np.array_equal(read_ground_truth(save(tmp_path / "a.png", image.convert(mode)), rule), SHAPE)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_zero_is_white(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.tif"
    imwrite(path, np.where(SHAPE, 0, 2**bits - 1).astype(f"uint{bits}"), photometric="miniswhite")
    assert np.array_equal(read_ground_truth(path), SHAPE)
    assert np.array_equal(read_ground_truth(path, "any"), SHAPE)
    assert np.array_equal(read_image(path)[..., 0], GRAY)


def test_sixteen_bits_with_a_transparent_value(tmp_path: Path) -> None:
    image = Image.fromarray(np.where(SHAPE, 300, 65_535).astype(np.uint16))
    path = save(tmp_path / "a.png", image, transparency=65_535)
    assert np.array_equal(read_ground_truth(path, "any"), SHAPE)


@pytest.mark.parametrize("read", [read_image, read_ground_truth])
def test_what_pillow_reads_as_other_values_is_refused(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "a.tif"
    colors = np.stack([GRAY] * 3).astype(np.uint16) * 257
    imwrite(path, colors, photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match=r"kind of TIFF.*Found 3 channels of 16 bits, one after the other.*as PNG"):
        read(path)
    imwrite(path, np.where(OTHER, -1, SHAPE).astype(np.int8))
    with pytest.raises(ImageError, match=r"kind of TIFF.*Found 8 bits with a sign"):
        read(path)
    imwrite(path, np.stack([GRAY] * 3), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read(path)[2, 3] > 0, read(path)[2, 4] > 0)


@pytest.mark.parametrize("ending", ["tif", "gif", "png", "webp"])
def test_several_masks_of_a_file_are_never_the_first_alone(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    more = [Image.fromarray(OTHER.astype(np.uint8) * 255)]
    path = save(tmp_path / f"a.{ending}", GRAY, save_all=True, append_images=more)
    with pytest.raises(ImageError, match=r"several masks.*Found 2 of 8 x 6 pixels.*named like its image with _1"):
        read_ground_truth(path)
    assert read_image(path).shape == (6, 8, 3)
    assert "Only the first image of a file is read" in caplog.text


def test_previews_are_no_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = [Image.fromarray(GRAY[::2, ::2])]
    path = save(tmp_path / "a.tif", GRAY, save_all=True, append_images=small)
    assert np.array_equal(read_ground_truth(path), SHAPE)
    stereo = save(tmp_path / "a.jpg", np.stack([GRAY] * 3, -1), format="MPO", save_all=True, append_images=small)
    assert read_image(stereo).shape == (6, 8, 3)
    assert not caplog.messages
    with pytest.raises(ImageError, match="JPEG compression changes the 0"):
        read_ground_truth(stereo, "any")


def _palette(values: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([level for color in colors for level in color])
    return image


LABELS = SHAPE * 3 + OTHER * 7
VOID = LABELS.copy()
VOID[0] = 255
VOC = [(0, 0, 0)] * 256
VOC[3], VOC[7], VOC[255] = (128, 128, 0), (128, 128, 128), (224, 224, 192)
CUT_OUT = np.dstack([np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), GRAY])


@pytest.mark.parametrize(
    ("image", "rule", "sentence"),
    [
        (Image.fromarray(VOID.astype(np.uint8)), "above_128", "8 of 23 pixels that are not black are object"),
        (_palette(VOID, *VOC), "above_128", "8 of 23 pixels"),
        (Image.fromarray(VOID.astype(np.uint8)), "any", "what PASCAL VOC calls void: .*8 pixels of it"),
        (_palette(VOID, *VOC), "any", "what PASCAL VOC calls void"),
        (_palette(SHAPE + OTHER * 2, (0, 0, 0), (255, 0, 0), (0, 255, 0)), "above_128", "9 of 15 pixels"),
        (_palette(SHAPE, (68, 1, 84), (253, 231, 37)), "any", "it has no 0"),
        (Image.fromarray(CUT_OUT), "above_128", r"\d of 9 pixels"),
    ],
)
def test_labels_void_and_colors_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, image: Image.Image, rule: MaskRule, sentence: str
) -> None:
    path = save(tmp_path / "a.png", image)
    read_ground_truth(path, rule)
    (message,) = caplog.messages
    assert re.search(sentence, message)
    assert str(path) in message
    read_ground_truth(path, rule)
    assert len(caplog.messages) == 1, "said once"


@pytest.mark.parametrize("rule", ["above_128", "ignore_128", "any"])
def test_ordinary_masks_raise_no_doubt(tmp_path: Path, caplog: pytest.LogCaptureFixture, rule: MaskRule) -> None:
    large = np.kron(GRAY, np.ones((20, 20), np.uint8))
    smooth = Image.fromarray(large).resize((100, 80), Image.Resampling.BICUBIC)
    images = {"gray": Image.fromarray(large), "smooth": smooth, "rgb": smooth.convert("RGB")}
    if rule == "ignore_128":
        images["ignored"] = Image.fromarray(np.where(GRAY > 0, 255, 128).astype(np.uint8))
    if rule == "above_128":
        images["red"] = Image.fromarray(np.stack([large, large * 0, large * 0], -1))
        save(tmp_path / "b.jpg", smooth.convert("RGB"), quality=50)
        read_ground_truth(tmp_path / "b.jpg", rule)
    if rule == "any":
        images["labels"] = Image.fromarray(LABELS.astype(np.uint8))
    for name, image in images.items():
        read_ground_truth(save(tmp_path / f"{name}.png", image), rule)
    assert not caplog.messages


def test_twelve_bits_in_sixteen_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for most, count in ((65_535, 0), (255, 0), (4095, 1)):
        read_image(save(tmp_path / "a.png", (SHAPE * most).astype(np.uint16)))
        assert len(caplog.messages) == count
    assert "nearly black" in caplog.text
    assert "largest value is 4095 of 65535" in caplog.text


def test_what_is_left_out_of_a_set_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        save(tmp_path / "data" / "images" / f"{number}.jpg", np.stack([GRAY] * 3, -1))
        save(tmp_path / "data" / "masks" / f"{number}{'_mask' if number else ''}.png", GRAY)
    (found,) = open_data([str(tmp_path / "data")])
    assert len(found.samples) == 1
    (message,) = caplog.messages
    assert message.startswith("Left out of data: ")
    assert message.endswith(", and 5 more. samhq_check_data lists everything")


def test_a_training_looks_at_masks_of_every_set_before_its_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, mask in (("plain", GRAY), ("labels", VOID.astype(np.uint8))):
        for number in range(40):
            save(tmp_path / name / "images" / f"{number}.jpg", np.stack([GRAY] * 3, -1))
            save(tmp_path / name / "masks" / f"{number}.png", mask)
    train._note_doubts(open_data([str(tmp_path / "plain")]))
    assert not caplog.messages
    train._note_doubts(open_data([str(tmp_path / "plain"), str(tmp_path / "labels")]))
    assert "8 of 23 pixels that are not black are object" in caplog.text
