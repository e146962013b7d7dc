"""The images of a checkpoint where they are unknown, and one mask rule for training and validation data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support.samhq_commands import run_error, run_ok, write_images, written

from rfmedsam2.errors import ImageError
from rfmedsam2.store.checkpoint_header import record_sha256
from segment_anything_hq.data.content import content_digest

NANO = ("-b", "vit_nano", "--device", "cpu")
TINY = ("--frame-size", 64, "--batch-size", 1, "--no-score-base", "--set", "train.workers=0", "validation_samples=1",
        "train.iterations_per_epoch=1", "train.epochs=1")  # fmt: skip
UNKNOWN = "does not say which images it was trained on"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / "data")


@pytest.fixture
def old_decoder(data, tmp_path) -> Path:
    """A decoder's checkpoint as versions before 0.2 wrote it: without its training images."""
    run_ok("train", "sam_decoder", *NANO, *TINY, "--data", data, "--held-out", 0, "-o", tmp_path / "decoder")
    with safe_open(tmp_path / "decoder" / "checkpoint_final.safetensors", "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record = {k: v for k, v in json.loads(metadata["record"]).items() if not k.startswith("training_")}
    text = json.dumps(record)
    path = tmp_path / "old.safetensors"
    save_file(weights, path, {**metadata, "record": text, "record_sha256": record_sha256(text)})
    return path


def test_a_decoder_that_does_not_say_its_images_is_a_note(data, old_decoder, tmp_path):
    words = ("evaluate", "sam_ref", *NANO, "--frame-size", 64, "--decoder", old_decoder, "--data", data)
    assert UNKNOWN in run_ok(*words, "-o", tmp_path / "all").err
    sentence = run_error(*words, "--held-out", 0.06, "-o", tmp_path / "held")  # holds out b
    assert f"{UNKNOWN}, so nothing is known to be held out" in sentence


def test_a_decoder_that_does_not_say_its_images_is_trained_on(data, old_decoder, tmp_path, caplog):
    words = ("train", "sam_ref", *NANO, *TINY, "--decoder", old_decoder, "-o", tmp_path / "run")
    run_ok(*words, "--data", data, "--validation", data)
    assert f"The decoder's checkpoint {UNKNOWN}" in caplog.text
    assert "2 of 2 validation images of data are also training images" in caplog.text


def test_average_precision_says_that_training_images_are_unknown(data, old_decoder, tmp_path):
    pytest.importorskip("pycocotools")
    width, height = Image.open(data / "images" / "a.png").size
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 10, 16, 20], "area": 320, "iscrowd": 0,
                         "segmentation": [[8, 10, 24, 10, 24, 30, 8, 30]]}],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    words = ("--annotations", written(tmp_path / "a.json", content), "-i", data / "images")
    model = ("sam_ref", *NANO, "--frame-size", 64, "--decoder", old_decoder)
    assert UNKNOWN in run_ok("evaluate_coco", *model, *words).err


@pytest.mark.parametrize("folder_is", ["training", "validation"])
def test_a_mask_rule_holds_for_the_folder_beside_a_collection(data, tmp_path, folder_is, caplog):
    named = tmp_path / "GrabCut"
    shutil.copytree(data / "images", named / "data_GT")
    shutil.copytree(data / "masks", named / "boundary_GT")
    words = (data, f"grabcut={named}") if folder_is == "training" else (f"grabcut={named}", data)
    train = ("train", "hq_sam", *NANO, *TINY, "--mask-rule", "any", "-o", tmp_path / "run")
    run_ok(*train, "--data", words[0], "--validation", words[1])
    assert f"--mask-rule any is applied to folders only; grabcut={named}: own rules" in caplog.text
    both = ("--data", f"grabcut={named}", "--validation", f"grabcut={named}")
    assert "Collections have their own mask rules" in run_error(*train, *both)


def test_a_pipe_among_the_images_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with pytest.raises(ImageError, match="not an ordinary file"):  # first, as reading the pipe would not end
        content_digest(tmp_path / "null.png")
    with pytest.raises(ImageError, match="not an ordinary file"):
        content_digest(tmp_path / "a.png")
