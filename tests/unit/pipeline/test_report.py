"""The report page: self-contained, escaped, complete; pictures and curves hold what they should."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from matplotlib.image import imread

from rfmedsam2.errors import GeometryError, RecordError, StoreError, UsageError
from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.evaluation.overlays import Scene, best_planes, case_png, read_scene, scene_png
from rfmedsam2.pipeline.evaluation.report import write_report
from rfmedsam2.pipeline.evaluation.score_plot import spread_png
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Normalization, Plan, Stage
from rfmedsam2.records.report import Evaluation
from rfmedsam2.reporting.training_curves import progress_png, read_training, training_png
from rfmedsam2.store.checkpoints import weights_sha256, write_checkpoint

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert(1)</script>"
LABELS = LabelSet(names={"background": 0, "organ": 1, HOSTILE: 2})
SPACING = (3.0, 1.0, 1.0)


def write(path: Path, array: np.ndarray, direction: tuple[float, ...] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    if direction is not None:
        image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))
    return path


def body(shift: int = 0) -> np.ndarray:
    array = np.zeros((6, 24, 28), np.uint8)
    array[1:4, 4:12, 5 + shift : 14 + shift] = 1
    array[2:5, 14:20, 5 : 12 + shift] = 2
    return array


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "fold_0"
    folder.mkdir()
    lines = []
    for step in range(1, 31):
        event = {"event": "step", "step": step, "epoch": (step - 1) // 10, "loss": 1 / step, "lr": 0.01, "seconds": 0.5}
        lines.append(event | {"losses": {"dice": 0.5 / step, "cross_entropy": 0.5 / step}})
        if step % 10 == 0:
            scores = {"score": step / 40, "dsc/organ": step / 40}
            lines.append({"event": "validation", "step": step, "epoch": (step - 1) // 10, "scores": scores})
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"event": "st'
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    random = np.random.default_rng(0)
    for i in range(5):
        name = f"case_{i}" if i else "a&b"
        write(tmp_path / "references" / f"{name}.nii.gz", body())
        write(tmp_path / "predictions" / f"{name}.nii.gz", body(i))
        write(tmp_path / "images" / f"{name}_0000.nii.gz", random.normal(size=(6, 24, 28)).astype(np.float32))
    return evaluate(tmp_path / "predictions", tmp_path / "references", LABELS)


class _Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_of_training_and_evaluation_holds_everything(training, evaluation, tmp_path) -> None:
    path = tmp_path / "report.html"
    write_report(
        path,
        title="Fold <0>",
        training=training,
        evaluation=evaluation,
        images=tmp_path / "images",
        about={"Plan": "rfmed_cpu"},
    )
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    for words in ("Fold <0>", "Research use only", "rfmed_cpu", "a&b", "case_4", "Training time", "15 s", "0.750"):
        assert words in page.text
    assert evaluation.empty_policy in page.text
    # two charts in two themes, and five cases pictured once each
    assert page.tags.count("source") == 2
    assert page.tags.count("figure") == 5
    assert text.count('class="tag Worst"') == 3


def test_page_needs_nothing_from_outside(training, evaluation, tmp_path) -> None:
    write_report(tmp_path / "r.html", title="x", training=training, evaluation=evaluation)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert page.addresses
    assert all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    for address in page.addresses:
        assert imread(io.BytesIO(base64.b64decode(address.split(",")[1]))).ndim == 3


def test_names_of_files_and_labels_are_escaped(evaluation, tmp_path) -> None:
    write_report(tmp_path / "r.html", title=HOSTILE, evaluation=evaluation, about={HOSTILE: HOSTILE})
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert text.count("<script>") == 1
    assert HOSTILE in _Page(text).text


def test_training_alone_and_evaluation_alone_make_a_page(training, evaluation, tmp_path) -> None:
    write_report(tmp_path / "t.html", title="t", training=training)
    write_report(tmp_path / "e.html", title="e", evaluation=evaluation)
    assert "All cases" not in (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "Training loss" not in (tmp_path / "e.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="needs a training or an evaluation"):
        write_report(tmp_path / "n.html", title="n")


def test_the_checkpoint_says_what_was_trained(training, tmp_path) -> None:
    unet = UNetConfig(
        features=(4, 8), kernel_sizes=((3,) * 3,) * 2, strides=((1,) * 3, (2,) * 3), encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )  # fmt: skip
    stage = Stage(
        spacing_mm=(3.0, 1.0, 1.0), median_shape=(8, 8, 8), patch_size=(8, 8, 8), batch_size=2,
        normalization=(Normalization(kind="zscore"),), model=unet,
    )  # fmt: skip
    intensities = IntensityStatistics(mean=0, median=0, std=1, min=0, max=1, percentile_00_5=0, percentile_99_5=1)
    plan = Plan(
        name="rfmed_tiny", dataset="Dataset001_Tiny", fingerprint="x", channels=("MR",), labels=LABELS,
        file_ending=".nii.gz", intensities=(intensities,), stages={"3d_fullres": stage},
    )  # fmt: skip
    weights = {"layer": torch.zeros(2)}
    record = CheckpointRecord(
        plan=plan, stage="3d_fullres", fold="3", step=30, weights_sha256=weights_sha256(weights), code_version="0",
        torch_version="2", created="2026-01-01",
    )  # fmt: skip
    write_checkpoint(training / "checkpoint_final.safetensors", record, {"model/layer": weights["layer"]}, {})
    write_report(tmp_path / "r.html", title="x", training=training)
    text = _Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    for words in ("Dataset001_Tiny", "rfmed_tiny", "8 × 8 × 8 voxels at 3 × 1 × 1 mm", "30 of 250000 steps"):
        assert words in text


def test_a_broken_checkpoint_does_not_prevent_the_page(training, tmp_path) -> None:
    (training / "checkpoint_final.safetensors").write_bytes(b"broken")
    write_report(tmp_path / "r.html", title="x", training=training)
    assert (tmp_path / "r.html").is_file()


def test_a_case_that_cannot_be_drawn_is_named_with_the_reason(evaluation, tmp_path) -> None:
    (tmp_path / "predictions" / "case_4.nii.gz").unlink()
    write_report(tmp_path / "r.html", title="x", evaluation=evaluation)
    text = _Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert re.search(r"Not shown: case_4: .*case_4.nii.gz", text)


def test_the_page_says_how_much_a_mean_counts_and_what_was_trained_on(tmp_path) -> None:
    for i in range(2):  # organ is found in one of two cases
        write(tmp_path / "references" / f"case_{i}.nii.gz", body())
        write(tmp_path / "predictions" / f"case_{i}.nii.gz", body() if i else np.zeros_like(body()))
    evaluation = evaluate(tmp_path / "predictions", tmp_path / "references", LABELS)
    evaluation = evaluation.model_copy(update={"trained_on": ("case_0", "case_1")})
    write_report(tmp_path / "r.html", title="x", evaluation=evaluation)
    text = _Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "Scored on training cases. The model was trained on 2 of these 2 cases" in text
    assert "mean over 1 of 2 cases" in text  # HD95, in the key figures
    assert text.count("1 of 2 cases") >= 3  # there, by class and in the mean
    assert "Confidence intervals of fewer than 5 cases are left out." in text
    write_report(tmp_path / "r.html", title="x", evaluation=evaluation.model_copy(update={"trained_on": ()}))
    assert "training cases" not in _Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_overlays_are_found_from_any_folder(evaluation, tmp_path, monkeypatch) -> None:
    for case in evaluation.cases:
        assert Path(case.reference).is_absolute()
        assert Path(case.prediction).is_absolute()
    # files of earlier versions hold the paths as they were given
    scores = tmp_path / "run" / "scores"
    old = [
        case.model_copy(
            update={
                "reference": f"references/{Path(case.reference).name}",
                "prediction": f"predictions/{Path(case.prediction).name}",
            }
        )
        for case in evaluation.cases
    ]
    evaluation.model_copy(update={"cases": tuple(old)}).save(scores / "metrics.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write_report(tmp_path / "r.html", title="x", evaluation=scores / "metrics.json")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("<figure>") == 5


def test_overlays_are_found_where_the_folders_moved_together(evaluation, tmp_path) -> None:
    project = tmp_path / "project"
    for part in ("references", "predictions"):
        (project / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).rename(project / part)
    scores = evaluate(project / "predictions", project / "references", LABELS, out=project / "scores")
    assert "project" in scores.cases[0].reference
    (tmp_path / "laptop").mkdir()
    project.rename(tmp_path / "laptop" / "project")
    page = tmp_path / "r.html"
    write_report(page, title="x", evaluation=tmp_path / "laptop" / "project" / "scores" / "metrics.json")
    assert page.read_text(encoding="utf-8").count("<figure>") == 5


def test_overlays_that_cannot_be_drawn_are_named_to_the_user(evaluation, tmp_path, caplog) -> None:
    for folder in ("references", "predictions"):
        (tmp_path / folder).rename(tmp_path / f"moved_{folder}")
    write_report(tmp_path / "r.html", title="x", evaluation=evaluation)
    assert "5 of 5 overlays are not in the report" in caplog.text
    assert "does not exist" in caplog.text


@pytest.mark.parametrize("content", ['{"dataset": "d", "models": [], "cases": {}}', '{"stages": {}, "format": 2}'])
def test_another_json_than_metrics_is_named_for_what_it_is(content, tmp_path) -> None:
    (tmp_path / "predictions.json").write_text(content)
    with pytest.raises(
        UsageError, match=r"does not hold scores: .*predictions\.json.*metrics\.json.*rfmed_evaluate -p"
    ):
        write_report(tmp_path / "r.html", title="x", evaluation=tmp_path / "predictions.json")


def test_damaged_metrics_list_their_faults(evaluation, tmp_path) -> None:
    path = tmp_path / "metrics.json"
    evaluation.save(path)
    path.write_text(path.read_text().replace('"empty_policy"', '"empty_polcy"'))
    with pytest.raises(RecordError, match="empty_policy"):
        write_report(tmp_path / "r.html", title="x", evaluation=path)
    path.write_text('{"mean": ')
    with pytest.raises(RecordError, match="not valid JSON"):
        write_report(tmp_path / "r.html", title="x", evaluation=path)


def test_unwritable_place_is_a_sentence(evaluation, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Expected a folder"):
        write_report(tmp_path / "file" / "r.html", title="x", evaluation=evaluation)


def test_undefined_scores_make_dashes_not_faults(tmp_path) -> None:
    write(tmp_path / "r" / "x.nii.gz", np.zeros((3, 4, 5), np.uint8))
    write(tmp_path / "p" / "x.nii.gz", np.zeros((3, 4, 5), np.uint8))
    evaluation = evaluate(tmp_path / "p", tmp_path / "r", LABELS)
    write_report(tmp_path / "r.html", title="x", evaluation=evaluation)
    assert "–" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_training_is_read_by_epoch_without_the_torn_line(training) -> None:
    found = read_training(training)
    assert found.steps.tolist() == list(range(1, 31))
    assert found.score_names == ("score", "dsc/organ")
    assert found.series("score")[1].tolist() == [0.25, 0.5, 0.75]
    assert found.epochs[0]["loss"] == pytest.approx(np.mean([1 / s for s in range(1, 11)]))


def test_scores_of_refinement_stand_by_step_and_class(training, tmp_path) -> None:
    scores = {"step0/dsc/liver": 0.5, "step0/dsc": 0.4, "step2/dsc/liver": 0.625, "step2/dsc": 0.6, "score": 0.6}
    step = {"event": "step", "step": 1, "epoch": 0, "loss": 1.0, "lr": 0.01, "seconds": 0.5, "losses": {}}
    validation = {"event": "validation", "step": 1, "epoch": 0, "scores": scores | {"dsc/liver": 0.625}}
    (training / "metrics.jsonl").write_text(f"{json.dumps(step)}\n{json.dumps(validation)}\n")
    table = read_training(training).scores_by_step()
    assert table == {"liver": {"Step 0": 0.5, "Step 2": 0.625}, "mean": {"Step 0": 0.4, "Step 2": 0.6}}
    write_report(tmp_path / "r.html", title="x", training=training)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<td>liver</td><td>0.500</td><td>0.625</td>" in page


def test_progress_is_drawn_beside_the_metrics(training) -> None:
    path = progress_png(training)
    assert path == training / "progress.png"
    assert imread(path).std() > 0.02
    assert [p.name for p in training.iterdir() if p.name.startswith(".")] == []


def test_themes_differ_in_ground(training, evaluation) -> None:
    for draw in (
        lambda t: training_png(read_training(training), theme=t),
        lambda t: spread_png(evaluation, "dsc", "DSC", theme=t),
    ):
        light, dark = (imread(io.BytesIO(draw(theme)))[0, 0, :3].mean() for theme in ("light", "dark"))
        assert light > 0.9
        assert dark < 0.2


def test_progress_before_the_first_epoch_ends_is_drawn(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert progress_png(tmp_path).is_file()


def test_missing_or_foreign_metrics_are_a_sentence(tmp_path) -> None:
    with pytest.raises(RecordError, match="training metrics do not exist"):
        progress_png(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(RecordError, match="not a training event"):
        progress_png(tmp_path)


def test_planes_go_through_the_most_wrong_voxels_else_through_the_most_foreground() -> None:
    reference = np.zeros((5, 6, 7), np.uint8)
    reference[1, 2:4, 3:6] = 1
    assert best_planes(reference, reference)[0] == 1
    prediction = reference.copy()
    prediction[4, 5, 0:2] = 1
    assert best_planes(reference, prediction) == (4, 5, 0)


def test_scene_is_turned_to_display_orientation(tmp_path) -> None:
    # index x runs to the patient's right, y to the front: both must be turned
    marked = np.zeros((4, 5, 6), np.uint8)
    marked[3, 0, 0] = 1
    flipped = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
    reference = write(tmp_path / "r.nii.gz", marked, flipped)
    prediction = write(tmp_path / "p.nii.gz", marked, flipped)
    scene = read_scene(reference, prediction, None)
    assert np.argwhere(scene.reference).tolist() == [[3, 4, 5]]
    assert scene.spacing_zyx_mm == pytest.approx(SPACING)


def test_ignored_voxels_are_not_outlined(tmp_path) -> None:
    labels = LabelSet(names={"background": 0, "organ": 1}, ignore=2)
    reference = write(tmp_path / "r.nii.gz", body())
    prediction = write(tmp_path / "p.nii.gz", np.ones_like(body()))
    scene = read_scene(reference, prediction, None, labels)
    assert set(np.unique(scene.reference)) == {0, 1}
    assert (scene.prediction > 0).sum() == (body() != 2).sum()


def test_picture_shows_two_colors_and_the_image(tmp_path) -> None:
    reference, prediction = write(tmp_path / "r.nii.gz", body()), write(tmp_path / "p.nii.gz", body(3))
    image = write(tmp_path / "i.nii.gz", np.random.default_rng(0).normal(size=(6, 24, 28)).astype(np.float32))
    pixels = imread(io.BytesIO(case_png(reference, prediction, image)))[..., :3]
    green = (pixels[..., 1] > pixels[..., 0] + 0.3) & (pixels[..., 1] > pixels[..., 2] + 0.2)
    pink = (pixels[..., 0] > pixels[..., 1] + 0.3) & (pixels[..., 2] > pixels[..., 1] + 0.15)
    assert green.sum() > 200
    assert pink.sum() > 200
    plain = imread(io.BytesIO(case_png(reference, prediction, None)))[..., :3]
    assert plain.mean() < pixels.mean()


def test_pictures_of_flat_and_empty_volumes_are_drawn() -> None:
    for shape in ((1, 5, 6), (4, 1, 1)):
        empty = np.zeros(shape, np.uint8)
        scene = Scene(image=empty.astype(np.float32), reference=empty, prediction=empty, spacing_zyx_mm=SPACING)
        assert scene_png(scene).startswith(b"\x89PNG")


def test_files_on_other_grids_are_refused(tmp_path) -> None:
    reference, prediction = write(tmp_path / "r.nii.gz", body()), write(tmp_path / "p.nii.gz", body()[:5])
    with pytest.raises(GeometryError, match="different grids"):
        case_png(reference, prediction, None)
