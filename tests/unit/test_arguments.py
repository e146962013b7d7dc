"""What programs hand to the Python API on a bad day: every refusal is a sentence, NumPy's numbers are numbers."""

from __future__ import annotations

import ast
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from support.tiny_model import make_plan, write_image, write_model

from rfmedsam2 import (
    Evaluation,
    Grid,
    Layout,
    PatchDataset,
    Plan,
    PlanOptions,
    PredictOptions,
    Predictor,
    TrainOptions,
    Volume,
    build_stage,
    evaluate,
    open_dataset,
    plan_and_preprocess,
    train,
)
from rfmedsam2.arguments import option, options_as_flags
from rfmedsam2.errors import GeometryError, ImageError, PlanError, UsageError
from rfmedsam2.inference.sliding_window import tile_starts
from segment_anything_hq import InteractivePredictor, load_model

SPACING = (2.0, 0.8, 0.9)
OURS = Path(__file__).resolve().parents[2]
OF_COMMANDS = ("cli/", "doctor.py")
COMMANDS = ("rfmed_", "samhq_", "pip install", "container", "gdcmconv", "dcmconv", "ffmpeg", "ulimit")
"""A text may quote the flag of a command that it names."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for fold in ("0", "1"):
        write_model(folder, make_plan(), fold=fold)
    return folder


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor.load(model, device="cpu")


@pytest.mark.parametrize("given", [None, 5, b"folder", ["folder"]], ids=repr)
def test_what_is_not_a_path_is_named(given, tmp_path: Path, predictor: Predictor) -> None:
    plan = make_plan()
    calls = {
        "root": [lambda: Layout.under(given), lambda: open_dataset("Name", root=given)],
        "raw": [lambda: Layout(raw=given, preprocessed=tmp_path, results=tmp_path)],
        "path": [lambda: Plan.load(given), lambda: plan.save(given), lambda: Evaluation.load(given)],
        "predictions": [lambda: evaluate(given, tmp_path)],
        "references": [lambda: evaluate(tmp_path, given)],
        "folder": [lambda: PatchDataset(given, plan, "3d_fullres")],
    }
    if given is not None:  # None: not given
        calls |= {
            "out": [
                lambda: predictor.predict_file(tmp_path / "never_read.nii.gz", given),
                lambda: evaluate(tmp_path, tmp_path, out=given),
            ],
            "unet": [lambda: TrainOptions(unet=given)],
            "published": [lambda: PlanOptions(published=given)],
            "weights": [lambda: load_model("hq_sam", "vit_nano", frame_size=64, weights=given)],
            "checkpoint": [lambda: load_model("hq_sam", "vit_nano", frame_size=64, checkpoint=given)],
        }
    for name, several in calls.items():
        for call in several:
            with pytest.raises(UsageError, match=f"^{name} is not a path.*{type(given).__name__}"):
                call()


def test_text_that_no_path_can_hold_is_a_sentence(tmp_path: Path, predictor: Predictor) -> None:
    image = write_image(tmp_path / "a_0000.nii.gz")
    calls = (
        lambda: predictor(image).save("a\0.nii.gz"),
        lambda: predictor.predict_file(image, "a\0.nii.gz"),
        lambda: make_plan().save("a\0.json"),
        lambda: Plan.load(Path("a\0.json")),
        lambda: evaluate("a\0", tmp_path),
    )
    for call in calls:
        with pytest.raises(UsageError, match=r"is not a path\. Expected text without null characters.*a\\x00"):
            call()


def test_folds_and_devices_are_taken_as_programs_have_them(model: Path) -> None:
    for folds in (1, np.int64(1), [np.int32(1)], "1", (n for n in (1,))):
        assert [r.fold for r in Predictor.load(model, folds=folds, device=torch.device("cpu")).records] == ["1"]
    for folds in (2, 1.0, np.int64(7), [None]):
        with pytest.raises(UsageError, match="fold has not been trained"):
            Predictor.load(model, folds=folds)
    for device in (None, "gpu", "cuda:x", ("cpu",)):
        with pytest.raises(UsageError, match="Unknown device"):
            Predictor.load(model, device=device)  # type: ignore[arg-type]


def test_options_are_checked_when_they_are_given(model: Path, predictor: Predictor) -> None:
    for options in ({"mirror": False}, "fast", 1):
        with pytest.raises(UsageError, match="options is not a PredictOptions"):
            Predictor.load(model, options=options)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="options is not a PredictOptions"):
            predictor.using(options)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="options is not a TrainOptions"):
            train(Layout.under("nowhere"), make_plan(), "3d_fullres", fold=0, options=options)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="dataset is not a RawDataset"):
            plan_and_preprocess(options, Layout.under("nowhere"), PlanOptions())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Unknown precision. Expected one of auto, fp32, bf16, fp16. Found 'fp8'"):
        PredictOptions(precision="fp8")  # type: ignore[arg-type]
    for threads in (0, -2, "2", 2.5, True):
        with pytest.raises(UsageError, match="threads must be a whole number from 1"):
            PredictOptions(threads=threads)  # type: ignore[arg-type]
    assert PredictOptions(threads=np.int64(2)).threads == 2


@pytest.mark.parametrize("given", [None, 5, 5.5, b"x", ["a"], "", "a/b", "..", True])
def test_a_layout_gives_places_of_names_only(given, tmp_path: Path) -> None:
    layout = Layout.under(tmp_path)
    calls = {
        "dataset": [
            lambda: layout.plan_file(given, "p"),
            lambda: layout.splits_file(given),
            lambda: layout.fingerprint_file(given),
            lambda: layout.cases_folder(given, "p", "s"),
            lambda: layout.model_folder(given, "p", "s"),
        ],
        "plan": [lambda: layout.plan_file("D", given), lambda: layout.cases_folder("D", given, "s")],
        "stage": [lambda: layout.cases_folder("D", "p", given), lambda: layout.model_folder("D", "p", given)],
        "fold": [] if given == 5 else [lambda: layout.fold_folder("D", "p", "s", given)],
    }
    for name, tried in calls.items():
        for call in tried:
            with pytest.raises(
                UsageError, match=rf"^{name} (is not a name. Expected a plain name|must be a whole number)"
            ):
                call()
    assert layout.fold_folder("D", "p", "s", np.int64(3)) == tmp_path / "results/D/p__s/fold_3"  # type: ignore[arg-type]


@pytest.mark.parametrize("step_size", [1e-9, 0.01, 0.0, -1.0, float("nan"), 1.01])
def test_tiles_that_begin_at_the_same_voxels_again_are_refused(step_size: float) -> None:
    with pytest.raises(PlanError, match=r"step size is out of range. Expected 0.031 to 1 for a patch of 8 x 16 x 16"):
        tile_starts((20, 20, 20), (8, 16, 16), step_size)
    # a step of a voxel along the longest axis is slow and nothing else
    assert tile_starts((20, 20, 20), (8, 16, 16), 1 / 16)[1] == [0, 1, 2, 3, 4]


def test_messages_for_programs_name_no_flags(model: Path, predictor: Predictor) -> None:
    volume = Volume.from_numpy(np.zeros((4, 20, 20), np.float32), spacing_zyx_mm=SPACING)
    calls = (
        lambda: Predictor.load(model, checkpoint="best"),
        lambda: Predictor.load(model, device="cuda:99"),
        lambda: predictor.using(PredictOptions(step=1))(volume),
        lambda: predictor(volume, boxes=[]),
        lambda: Layout.under(model).dataset_name("Liver"),
        lambda: evaluate(model, model, cases=["x"]),
    )
    for call in calls:
        with pytest.raises((UsageError, ValueError)) as caught:
            call()
        assert "--" not in str(caught.value)


def test_images_that_cannot_be_read_any_more_are_sentences(predictor: Predictor, tmp_path: Path) -> None:
    path = write_image(tmp_path / "image.nii.gz")
    lazy = nib.load(path)
    cut = path.with_name("cut.nii.gz")
    cut.write_bytes(path.read_bytes()[:2000])
    path.unlink()
    for image in (lazy, nib.load(cut)):
        with pytest.raises(ImageError, match=r"image cannot be read.*(image|cut)\.nii\.gz"):
            predictor.predict_nibabel(image)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="type of image is not supported"), io.BytesIO(b"NIfTI") as stream:
        predictor(stream)  # type: ignore[arg-type]
    objects = sitk.LabelImageToLabelMap(sitk.GetImageFromArray(np.zeros((4, 4, 4), np.uint8)))
    with pytest.raises(ImageError, match="holds label objects and no voxels"):
        Volume.from_sitk(objects)


def test_half_precision_hides_no_infinity(predictor: Predictor) -> None:
    array = np.zeros((4, 20, 20), np.float16)
    array[1, 2, 3] = np.inf
    with pytest.raises(ImageError, match=r"not finite.*Found 1 voxel\(s\) of NaN or infinity"):
        predictor(array, spacing_zyx_mm=SPACING)
    array[1, 2, 3] = np.finfo(np.float16).max
    assert predictor(array, spacing_zyx_mm=SPACING).labels.shape == array.shape


def test_halves_of_a_prediction_take_what_they_say(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="volume is not a Volume"):
        predictor.prepare(tmp_path / "image.nii.gz")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prepared_case is not a PreparedCase"):
        predictor.predict_prepared(np.zeros((4, 20, 20)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cannot be written in this format.*labels\.txt"):
        predictor.predict_file(tmp_path / "never_read.nii.gz", tmp_path / "labels.txt")


def test_progress_may_be_any_truth(predictor: Predictor, capsys) -> None:
    array = np.zeros((4, 20, 20), np.float32)
    for progress, shown in ((1, True), ("yes", True), (0, False), (None, False)):
        predictor(array, spacing_zyx_mm=SPACING, progress=progress)  # type: ignore[arg-type]
        assert ("tiles" in capsys.readouterr().err) is shown


def test_grids_are_made_of_any_three_numbers() -> None:
    grid = Grid(shape_zyx=(2, 3, 4), spacing_zyx_mm=SPACING)
    given = Grid(shape_zyx=np.array([2, 3, 4]), spacing_zyx_mm=list(SPACING), direction=np.eye(3))  # type: ignore[arg-type]
    assert (given, hash(given)) == (grid, hash(grid))
    wrong = (
        {"shape_zyx": None},
        {"shape_zyx": (1.5, 2, 3)},
        {"shape_zyx": ("1", 2, 3)},
        {"spacing_zyx_mm": None},
        {"spacing_zyx_mm": 2},
        {"spacing_zyx_mm": ("a", 1, 1)},
        {"origin_xyz_mm": (0, 0)},
        {"direction": np.eye(2)},
        {"direction": "x"},
    )
    for changes in wrong:
        with pytest.raises(GeometryError):
            Grid(**{"shape_zyx": (2, 3, 4), "spacing_zyx_mm": SPACING, **changes})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="grid is not a Grid"):
        Volume(array=np.zeros((1, 2, 3, 4)), grid=None)  # type: ignore[arg-type]


def test_networks_are_built_of_plans() -> None:
    for plan in (None, "plan.json", {}):
        with pytest.raises(UsageError, match="plan is not a Plan"):
            build_stage(plan, "3d_fullres")  # type: ignore[arg-type]
    for stage in (None, 5, ["3d_fullres"]):
        with pytest.raises(PlanError, match=r"configuration does not exist.*3d_fullres"):
            build_stage(make_plan(), stage)  # type: ignore[arg-type]


def test_evaluations_name_the_argument(tmp_path: Path) -> None:
    for changes, words in (
        ({"both_empty": "foo"}, "Unknown both_empty.*skip, perfect.*'foo'"),
        ({"nsd_tolerance_mm": "2"}, "nsd_tolerance_mm must be 0 or more"),
        ({"nsd_tolerance_mm": float("nan")}, "nsd_tolerance_mm must be 0 or more"),
        ({"workers": -1}, "workers must be a whole number from 0"),
        ({"cases": []}, "No case is named"),
        ({"cases": 5}, "cases is not a list of names"),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate(tmp_path, tmp_path, **changes)  # type: ignore[arg-type]
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.uint8)), str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.uint8)), str(tmp_path / "b.nii.gz"))
    assert [case.id for case in evaluate(tmp_path, tmp_path, cases="b").cases] == ["b"]


def test_clicks_and_networks_of_images_are_checked(caplog) -> None:
    caplog.set_level(logging.ERROR)
    for size in (None, "64", 64.0):
        with pytest.raises(UsageError, match="frame_size must be a whole number from 64"):
            load_model("hq_sam", "vit_nano", frame_size=size, device="cpu")  # type: ignore[arg-type]
    network = load_model("hq_sam", "vit_nano", frame_size=np.int64(64), device="cpu")  # type: ignore[arg-type]
    for wrong in (None, "hq_sam", InteractivePredictor):
        with pytest.raises(UsageError, match="This is not a segmenter"):
            InteractivePredictor(wrong)
    with pytest.raises(UsageError, match=r"Unknown fit. Expected one of pad, stretch.*'crop'"):
        InteractivePredictor(network, fit="crop")  # type: ignore[arg-type]
    clicks = InteractivePredictor(network)
    clicks.set_image(np.zeros((20, 30, 3), np.uint8))
    for positive in ("no", None, 2):
        with pytest.raises(UsageError, match="positive is not a bool"):
            clicks.click(3, 4, positive=positive)  # type: ignore[arg-type]
    assert clicks.click(3, 4, positive=np.bool_(False)).shape == (20, 30)
    assert clicks.prompt.labels == (0,)


def spoken(module: Path) -> Iterator[str]:
    """Texts of a module that somebody may read: no docstrings, no names of flags handed to `option`."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr | ast.keyword)}
    silent -= {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg != "flag"
    }  # remedy="..."
    whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    silent |= {id(part) for text in whole for part in text.values}
    yield from ("".join(_plain(part) for part in text.values) for text in whole)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value


def _plain(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "_"


def test_no_message_of_the_api_names_flags_of_a_command() -> None:
    """They go through `option`, which knows who asks."""
    found = []
    for package in ("rfmedsam2", "segment_anything_hq"):
        for module in (OURS / package).rglob("*.py"):
            if not any(part in module.as_posix() for part in OF_COMMANDS):
                flags = (text for text in spoken(module) if re.search(r"(?<![\w-])(--[a-z]|-[a-z]\b)", text))
                found += [f"{module.name}: {text}" for text in flags if not any(name in text for name in COMMANDS)]
    assert found == []


def test_an_option_is_named_as_its_user_writes_it() -> None:
    assert option("overwrite", True) == "overwrite=True"
    assert option("preset", "cpu") == "preset='cpu'"
    assert option("out", flag="-o") == "out"
    with options_as_flags():
        assert option("overwrite", True) == "--overwrite"
        assert option("preset", "cpu") == "--preset cpu"
        assert option("held_out", 0.1) == "--held-out 0.1"
        assert option("changes", ("a=1", "b=2"), flag="--set") == "--set a=1 b=2"
        assert option("out", flag="-o") == "-o"
    assert option("changes", ("a=1",), flag="--set") == "changes=('a=1',)"
