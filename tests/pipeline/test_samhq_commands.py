"""samhq_check_data, samhq_summary, samhq_predict and samhq_evaluate as a user meets them, on tiny images."""

from __future__ import annotations

import csv
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from support.samhq_commands import SIZES, run, run_error, run_ok, write_images, written

COMMANDS = {"inspect": ("check_data", "summary"), "predict_evaluate": ("predict", "evaluate")}
HEAVY = {"torch", "numba", "pandas", "scipy", "nibabel", "SimpleITK", "matplotlib"}
NANO = ("-b", "vit_nano", "--frame-size", 64, "--device", "cpu")
BOXES = [{"image": "a.png", "box": [8, 10, 24, 30]}, {"image": "b.png", "points": [[16, 20]], "labels": [1]}]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / "data")


def masks_words(data: Path, out: Path, prompts: object = BOXES, name: str = "p.json") -> tuple[object, ...]:
    return ("-i", data / "images", "-p", written(data / name, prompts), "-o", out)


# samhq_check_data


def test_whole_data_pass_and_are_counted(data):
    told = run_ok("check_data", "--data", data).out
    assert "data: 2 samples, no faults" in told
    assert "2 samples in 1 sets, no faults" in told
    assert json.loads(run_ok("check_data", "--data", data, "--json", "--no-pixels").out)["faults"] == 0


def test_faults_of_all_sets_are_listed_and_end_with_2(data, tmp_path):
    Image.fromarray(np.zeros((7, 7), np.uint8)).save(data / "masks" / "b.png")
    (data / "images" / "c.png").write_bytes((data / "images" / "a.png").read_bytes())
    (tmp_path / "nothing").mkdir()
    sets = (data, f"hqseg44k_test={tmp_path / 'nothing'}", f"grabcut={tmp_path / 'gone'}", tmp_path / "nowhere")
    outcome = run("check_data", "--data", *sets)
    assert outcome.code == 2
    for sentence in (
        "the mask has 7 x 7 pixels, its image 50 x 30",
        "the mask is empty",
        "the image has no mask",
        "HRSOD: 0 samples of 287 that are published",
        "the folder is missing",
        "The collection's folder does not exist",
        "The data folder does not exist",
    ):
        assert sentence in outcome.out, sentence
    found = json.loads(run("check_data", "--data", *sets, "--json").out)
    assert [s["complete"] for s in found["sets"]] == [False] * 7
    assert found["faults"] == sum(len(s["faults"]) for s in found["sets"])


@pytest.mark.parametrize(("name", "total"), [("hqseg44k_train", 44_320), ("hqseg44k_test", 1_537)])
def test_known_totals_are_told(name, total, tmp_path):
    assert f"0 samples of {total} that are published" in run("check_data", "--data", f"{name}={tmp_path}").out


def test_sizes_alone_do_not_find_what_pixels_do(data):
    Image.fromarray(np.zeros((50, 30), np.uint8)).save(data / "masks" / "b.png")
    run_ok("check_data", "--data", data, "--no-pixels")
    assert "the mask is empty" in run("check_data", "--data", data).out


def test_an_unknown_collection_is_a_sentence(data):
    assert "one of hqseg44k_train" in run_error("check_data", "--data", f"hqseg={data}")


# samhq_summary


def test_a_summary_counts_parts_beside_the_papers_figure():
    told = run_ok("summary", "hq_sam", "-b", "vit_h").out
    assert "Trained: 1.595 M parameters, 6.09 MiB in fp32." in told
    assert "HQ-SAM paper says 6.1 MB; here it is 6.09" in told
    found = json.loads(run_ok("summary", "sam2_refiner", "--backbone", "hiera_l", "--json").out)
    assert found["trained"] + found["frozen"] == found["parameters"]
    assert found["published"]["value"] == 12
    assert {"localization", "retargeting", "refinement"} <= {p["name"] for p in found["parts"] if p["trained"]}
    assert json.loads(run_ok("summary", "sam", "-b", "vit_tiny", "--json").out)["trained"] == 0


def test_a_summary_of_what_cannot_be_is_a_sentence():
    assert "hq_sam is not built on hiera_t" in run_error("summary", "hq_sam", "-b", "hiera_t")
    for backbone, size in (
        ("vit_b", 100),
        ("vit_b", 10**8),
        ("vit_b", 10**12),
        ("vit_tiny", 2**40),
        ("hiera_t", 10**19 * 32),
    ):
        method = "sam2" if backbone == "hiera_t" else "hq_sam"
        assert "Invalid frame size" in run_error("summary", method, "-b", backbone, "--frame-size", size)


# samhq_predict


@pytest.mark.parametrize(("method", "backbone"), [("hq_sam", "vit_nano"), ("sam2_refiner", "hiera_nano")])
def test_masks_have_the_sizes_of_their_images(method, backbone, data, tmp_path):
    out = tmp_path / "out"
    prompts = [*BOXES, {"image": "b.png", "box": [1, 1, 9, 9]}]
    words = masks_words(data, out, prompts)
    outcome = run_ok("predict", method, "-b", backbone, "--frame-size", 64, "--device", "cpu", *words)
    assert "Written: 3 masks of 2 images" in outcome.out
    assert "random weights: for tests only" in outcome.err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b_1.png", "b_2.png", "predictions.json"]
    for path in out.glob("*.png"):
        mask = Image.open(path)
        assert mask.mode == "L"
        assert (mask.height, mask.width) == SIZES[path.name[0]]
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
    record = json.loads((out / "predictions.json").read_text())
    assert [o["file"] for o in record["objects"]] == ["a.png", "b_1.png", "b_2.png"]
    assert record["objects"][0]["box"] == [8, 10, 24, 30]
    assert record["network"]["method"] == method
    assert all(o["seconds"] > 0 and np.isfinite(o["score"]) for o in record["objects"])


def test_csv_prompts_and_json_answers(data, tmp_path):
    lines = "image,x0,y0,x1,y1\na.png,8,10,24,30\n"
    words = masks_words(data, tmp_path / "out", lines, "p.csv")
    outcome = run_ok("predict", "sam", *NANO, *words, "--json")
    assert json.loads(outcome.out)["objects"][0]["file"] == "a.png"


def test_masks_are_not_replaced_unasked(data, tmp_path):
    words = masks_words(data, tmp_path / "out")
    run_ok("predict", "sam", *NANO, *words)
    before = (tmp_path / "out" / "predictions.json").read_bytes()
    assert "already exist" in run_error("predict", "sam", *NANO, *words)
    assert (tmp_path / "out" / "predictions.json").read_bytes() == before
    run_ok("predict", "sam", *NANO, *words, "--overwrite")
    assert "overwrite images" in run_error("predict", "sam", *NANO, *masks_words(data, data / "images"), "--overwrite")


FAULTY = {
    "image not found": [{"image": "z.png", "box": [1, 1, 2, 2]}],
    "the box lies outside": [{"image": "a.png", "box": [1, 1, 100, 2]}],
    "the box ends before it begins": [{"image": "a.png", "box": [3, 1, 1, 2]}],
    "1 point and 0 labels": [{"image": "a.png", "points": [[1, 1]]}],
    "1 point and 2 labels": [{"image": "a.png", "points": [[1, 1]], "labels": [1, 1]}],
    "a point lies outside": [{"image": "a.png", "points": [[100, 1]], "labels": [1]}],
    "neither a box nor points": [{"image": "a.png"}],
    "unknown fields boxes": [{"image": "a.png", "boxes": [1, 1, 2, 2]}],
    "not four numbers": [{"image": "a.png", "box": [1, 1, 2, "x"]}],
    "not valid JSON": "{",
    "Wrong columns in the prompt file": "image,left,top\na.png,1,1\n",
    "a point is not two numbers": "image,x,y,label\na.png,one,1,1\n",
}


@pytest.mark.parametrize("sentence", FAULTY)
def test_faulty_prompts_are_refused_before_anything_is_written(sentence, data, tmp_path):
    content = FAULTY[sentence]
    name = "p.csv" if isinstance(content, str) and content.startswith("image") else "p.json"
    told = run_error("predict", "sam", *NANO, *masks_words(data, tmp_path / "out", content, name))
    assert sentence in told
    assert not (tmp_path / "out").exists()


def test_all_faults_are_told_in_one_go(data, tmp_path):
    prompts = [entry for content in FAULTY.values() if isinstance(content, list) for entry in content]
    told = run_error("predict", "sam", *NANO, *masks_words(data, tmp_path / "out", prompts))
    for sentence, content in FAULTY.items():
        assert not isinstance(content, list) or sentence in told


CHOICES = {
    "No network was given": (),
    "sam needs a backbone": ("sam",),
    "needs the weights of vit_b": ("sam", "-b", "vit_b"),
    "sam is not built on hiera_t": ("sam", "-b", "hiera_t", "-w", "none.pt"),
    "file of weights does not exist": ("sam", "-b", "vit_b", "-w", "none.pt"),
    "has its own mask decoder": ("sam", *NANO, "--decoder", "none.pt"),
    "does not exist": ("--model", "none.pt"),
    "Unknown device": ("sam", "-b", "vit_nano", "--device", "tpu"),
    "Invalid frame size": ("sam", "-b", "vit_nano", "--frame-size", 0),
}


@pytest.mark.parametrize("sentence", CHOICES)
@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_networks_that_cannot_be_are_refused_before_anything_is_written(name, sentence, data, tmp_path):
    out = tmp_path / "out"
    rest = masks_words(data, out) if name == "predict" else ("--data", data, "-o", out)
    assert sentence in run_error(name, *CHOICES[sentence], *rest)
    assert not out.exists()


# samhq_evaluate


class Tags(HTMLParser):
    """Counts tags, and tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img", "br", "line", "polyline", "path", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open, tag
        if self.open[-1] == tag:
            self.open.pop()


def test_an_evaluation_is_a_page_a_record_and_a_csv_a_protocol(data, tmp_path):
    out = tmp_path / "out"
    protocols = ("box", "box_0.4", "center", "points_2", "clicks")
    words = ("--data", data, "-o", out, "--clicks", 3, "--protocol", *protocols)
    outcome = run_ok("evaluate", "sam_ref", *NANO, *words)
    assert "mIoU %" in outcome.out
    assert "NoC90" in outcome.out
    assert "NoF95 legacy" in outcome.out
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(f"{name}.csv" for name in protocols), "evaluation.html", "evaluation.json"]
    )
    with (out / "clicks.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["iou_3"]
    record = json.loads((out / "evaluation.json").read_text())
    assert set(record["protocols"]) == set(protocols)
    assert record["data"] == {"data": 2}
    assert 0 <= record["protocols"]["box"]["overall"]["iou"] <= 1
    assert record["protocols"]["clicks"]["overall"]["nof95"] <= 2
    page = (out / "evaluation.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.seen.count("svg") == len(protocols)
    assert tags.seen.count("figure") == 2 * len(protocols)
    assert "sam_ref on vit_nano" in page
    assert "random weights: for tests only" in page


def test_latency_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr("segment_anything_hq.evaluation.latency.sat_latency.__kwdefaults__", {
        "grid": 2, "size": 64, "warm_up": 1
    })  # fmt: skip
    outcome = run_ok("evaluate", "sam", *NANO, "--protocol", "sat", "-o", tmp_path / "out")
    assert "SAT latency" in outcome.out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["evaluation.json"]
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["latency"]["points"] == 4
    assert record["protocols"] == {}
    for words in (("--held-out", 2), ("--samples", 3), ("--mask-rule", "any")):
        told = run_error("evaluate", "sam", *NANO, "--protocol", "sat", "-o", tmp_path / "none", *words)
        assert f"There are no images to choose from. Found {words[0]}. Add --data" in told


def test_only_the_first_or_held_out_samples(data, tmp_path):
    for number, name in enumerate("cdefghij"):
        Image.fromarray(np.asarray(Image.open(data / "images" / "a.png")) + np.uint8(number)).save(
            data / "images" / f"{name}.png"
        )
        (data / "masks" / f"{name}.png").write_bytes((data / "masks" / "a.png").read_bytes())
    words = ("evaluate", "sam", *NANO, "--data", data, "--json")
    assert json.loads(run_ok(*words, "--samples", 3, "-o", tmp_path / "1").out)["data"] == {"data": 3}
    held = json.loads(run_ok(*words, "--held-out", 0.4, "-o", tmp_path / "2").out)
    assert 0 < held["data"]["data"] < 10
    assert held["held_out"] == 0.4


def test_evaluating_on_training_images_is_marked_or_refused(data, tmp_path):
    for number in range(8):
        Image.fromarray(np.asarray(Image.open(data / "images" / "a.png")) + np.uint8(number + 1)).save(
            data / "images" / f"n{number}.png"
        )
        (data / "masks" / f"n{number}.png").write_bytes((data / "masks" / "a.png").read_bytes())
    tiny = ("--set", "train.workers=0", "validation_samples=1", "train.iterations_per_epoch=1", "train.epochs=1")
    run_ok("train", "hq_sam", "-b", "vit_nano", "--frame-size", 64, "--device", "cpu", "--batch-size", 1,
           "--data", data, "--held-out", 0.4, "--no-score-base", *tiny, "-o", tmp_path / "run")  # fmt: skip
    moved = tmp_path / "moved"
    data.rename(moved)
    for part in ("images", "masks"):
        for path in (moved / part).iterdir():
            path.rename(path.with_name(f"renamed_{path.name}"))
    words = ("evaluate", "-m", tmp_path / "run" / "checkpoint_final.safetensors", "--device", "cpu", "--data", moved)
    held = run_ok(*words, "--held-out", 0.4, "--json", "-o", tmp_path / "held")
    record = json.loads(held.out)
    assert record["trained_on"] == {}
    count = record["data"]["moved"]
    assert 0 < count < 10
    alike = record["looks_trained_on"]["moved"]  # all are one image, in more or less light
    assert 0 < alike[0] <= alike[1] == count
    assert (
        f"Warning: {alike[0]} of {count} images of moved look like images that the network was trained on" in held.err
    )
    every = run_ok(*words, "-o", tmp_path / "every")
    sentence = f"{10 - count} of 10 images of moved"
    assert f"the network was trained on {sentence}" in every.err
    assert json.loads((tmp_path / "every" / "evaluation.json").read_text())["trained_on"] == {"moved": [10 - count, 10]}
    assert sentence in (tmp_path / "every" / "evaluation.html").read_text()
    # another share than that of the training holds training images
    assert "holds training images" in run_error(*words, "--held-out", 0.8, "-o", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_masks_of_0_and_1_name_the_rule_that_reads_them(data, tmp_path):
    for path in (data / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)
    remedy = "its largest value is 1, and object pixels are above 128 (--mask-rule any takes every value but 0)"
    assert remedy in run("check_data", "--data", data).out.replace("\n", " ")
    assert remedy in run("evaluate", "sam", *NANO, "--data", data, "-o", tmp_path / "none").err
    run_ok("check_data", "--data", data, "--mask-rule", "any")
    outcome = run_ok("evaluate", "sam", *NANO, "--data", data, "--mask-rule", "any", "--json", "-o", tmp_path / "any")
    assert json.loads(outcome.out)["protocols"]["box"]["skipped"] == []
    tiny = ("--set", "train.workers=0", "train.iterations_per_epoch=1", "train.epochs=1")
    words = ("train", "hq_sam", *NANO[:4], "--data", data, "--held-out", 0, *tiny, "-o", tmp_path / "run")
    assert remedy in run_error(*words)


def test_a_mask_rule_for_a_collection_is_refused(tmp_path):
    for name in ("check_data", "evaluate"):
        words = ("sam", *NANO, "-o", tmp_path / "out") if name == "evaluate" else ()
        sentence = run_error(name, *words, "--data", f"grabcut={tmp_path}", "--mask-rule", "any")
        assert "Collections have their own mask rules: --mask-rule any" in sentence


def test_the_same_seed_gives_the_same_figures(data, tmp_path):
    words = ("evaluate", "sam", *NANO, "--data", data, "--protocol", "points_1", "box_0.4", "--json", "-o")
    found = [json.loads(run_ok(*words, tmp_path / str(i), "--seed", seed).out) for i, seed in enumerate((1, 1, 2))]
    figures = [{k: p["sets"] for k, p in record["protocols"].items()} for record in found]
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]


def test_an_evaluation_is_not_replaced_unasked(data, tmp_path):
    words = ("evaluate", "sam", *NANO, "--data", data, "-o", tmp_path / "out")
    run_ok(*words)
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    assert "already holds an evaluation" in run_error(*words)
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    run_ok(*words, "--overwrite")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--protocol", "boxes"), "Unknown protocol"),
        (("--protocol", "box", "--data", "nowhere"), "data folder does not exist"),
        (("--protocol", "box", "--data", __file__), f"data folder is a file, not a folder: {__file__}"),
        (("--protocol", "box", "--data", f"davis={__file__}"), f"folder is a file, not a folder: {__file__}"),
        (("--protocol", "clicks", "--clicks", 0), "max_clicks must be"),
        (("--seed", -1), "Invalid seed: --seed. Expected 0 or more. Found -1"),
        (("--samples", 0), "--samples must be at least 1"),
        (("--held-out", 2), "held-out share must be"),
    ],
)
def test_evaluations_that_cannot_be_are_sentences(words, sentence, data, tmp_path):
    given = () if "--data" in words else ("--data", data)
    assert sentence in run_error("evaluate", "sam", *NANO, *given, *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_samhq_train_is_all_that_is_named(data, tmp_path):
    figures = ("--epochs", 1, "--iterations", 1, "--batch-size", 2, "--held-out", 0)
    run_ok("train", "sam_ref", *NANO, "--data", data, "-o", tmp_path / "run", *figures)
    model = ("--model", tmp_path / "run" / "checkpoint_final.safetensors")
    masks = masks_words(data, tmp_path / "masks")
    found = json.loads(run_ok("predict", *model, *masks, "--json").out)
    assert found["network"]["method"] == "sam_ref"
    assert found["network"]["frames"].startswith("64 x 64")
    scores = json.loads(run_ok("evaluate", *model, "--data", data, "-o", tmp_path / "scores", "--json").out)
    assert scores["weights_sha256"] == found["weights_sha256"]
    for words, sentence in (
        (("hq_sam",), "another method than given"),
        (("-b", "vit_b"), "another backbone than given"),
        (("--frame-size", 128), "another frame size than given"),
    ):
        out = masks_words(data, tmp_path / "not")
        assert sentence in run_error("predict", *words, *model, *out)
    assert not (tmp_path / "not").exists()


def test_no_data_is_a_sentence(tmp_path):
    assert "No data were given" in run_error("evaluate", "sam", *NANO, "-o", tmp_path / "out")


@pytest.mark.data
def test_mobile_sam_masks_a_real_image_from_a_box(data_root, tmp_path):
    source = data_root / "ecssd-300"
    image = sorted((source / "images").iterdir())[0]
    ground_truth = np.asarray(Image.open(source / "masks" / f"{image.stem}.png").convert("L")) > 128
    rows, columns = (np.flatnonzero(ground_truth.any(axis)) for axis in (1, 0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])]
    prompts = written(tmp_path / "p.json", [{"image": image.name, "box": box}])
    words = ("-i", image, "-p", prompts, "-o", tmp_path / "out", "--device", "cpu")
    weights = data_root / "weights-mobilesam" / "mobile_sam.pt"
    outcome = run_ok("predict", "sam", "-b", "vit_tiny", "-w", weights, *words)
    assert "Note" not in outcome.err
    mask = np.asarray(Image.open(tmp_path / "out" / f"{image.stem}.png")) > 0
    assert (mask & ground_truth).sum() / (mask | ground_truth).sum() > 0.8


def test_an_output_that_is_a_file_is_refused_before_the_work(data, tmp_path):
    words = masks_words(data, written(tmp_path / "text.txt", "kept"))
    sentence = "Expected a folder, but a file exists at this path"
    with mock.patch("segment_anything_hq.cli.flag_groups.NetworkChoice.load", side_effect=AssertionError):
        assert f"{sentence}: {tmp_path / 'text.txt'}. Move" in run_error("predict", "sam", *NANO, *words)
        evaluate = ("evaluate", "sam", *NANO, "--data", data, "-o", tmp_path / "text.txt" / "deeper")
        assert f"{sentence}: {tmp_path / 'text.txt'}. Move" in run_error(*evaluate)


def test_a_collection_without_its_folder_is_not_the_folder_here(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    for part, name in (("images", "data_GT"), ("masks", "boundary_GT")):
        (data / part).rename(data / name)
    assert "The collection has no folder: grabcut=" in run_error("check_data", "--data", "grabcut=")


def test_annotations_and_detections_that_are_pipes_are_sentences(tmp_path):
    pytest.importorskip("pycocotools")
    os.mkfifo(tmp_path / "pipe.json")
    words = ("--annotations", tmp_path / "pipe.json", "-i", tmp_path)
    with mock.patch.object(Path, "read_bytes", side_effect=AssertionError):  # it would not end
        assert "not an ordinary file" in run_error("evaluate_coco", "sam", *NANO, *words)
