"""`rfmed_predict` with RFMedSAM 2: every generator, steps, boxes from label maps and from JSON, wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from support.commands import run_error, run_ok

from rfmedsam2 import models
from rfmedsam2.errors import GeometryError, ImageError, RecordError, RfMedSamError, UsageError
from rfmedsam2.inference.volume import PredictOptions
from rfmedsam2.nn.rfmedsam2 import RFMedSam2
from rfmedsam2.pipeline.prediction.predict import predict_files
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.pipeline.training.train import TrainOptions, train
from rfmedsam2.records.box_prompts import BoxPrompt
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.fingerprint import IntensityStatistics
from rfmedsam2.records.model import AdapterConfig, RFMedSam2Config, UNetConfig
from rfmedsam2.records.plan import Augmentation, Compute, Inference, Normalization, Plan, Stage, Validation
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.store.case_files import Case
from rfmedsam2.store.checkpoints import write_checkpoint
from rfmedsam2.store.layout import Layout
from rfmedsam2.system.atomic import read_record
from rfmedsam2.volume import Volume

UNET = UNetConfig(
    features=(4, 8),
    kernel_sizes=((3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2)),
    encoder_blocks=(1, 1),
    decoder_blocks=(1,),
)
GENERATORS = ("unet", "object_queries", "scored_object_queries", "point_embeddings", "hierarchical_masks", "gt")
NAMES = {"background": 0, "liver": 1, "spleen": 2}
SHAPE = (12, 30, 26)
"""z, y, x of the images; files have x first."""


def make_plan(names=NAMES, regions_class_order=None, channels: int = 1, **model) -> Plan:
    given = {"unet": UNET, "backbone": "nano", "frame_size": 32, "adapters": AdapterConfig(blocks="none")}
    unets = {} if model.get("generator", "unet") == "unet" else {"unet": None}
    stage = Stage(
        spacing_mm=(2.0, 1.0, 1.0),
        median_shape=SHAPE,
        patch_size=(4, 32, 32),
        batch_size=2,
        normalization=(Normalization(kind="zscore"),) * channels,
        augmentation=Augmentation(mirror_axes=(2,)),
        inference=Inference(step_size=1.0),
        compute=Compute(memory_mb=64),
        model=RFMedSam2Config.parse({**given, **unets, **model}),
    )
    statistics = IntensityStatistics(mean=0, std=1, median=0, min=-3, max=3, percentile_00_5=-2, percentile_99_5=2)
    return Plan(
        name="rfmed",
        dataset="Dataset900_Tiny",
        fingerprint="none",
        channels=tuple(f"c{i}" for i in range(channels)),
        labels=LabelSet.model_validate({"names": names, "regions_class_order": regions_class_order}),
        file_ending=".nii.gz",
        intensities=(statistics,) * channels,
        stages={"3d_fullres": stage},
    )


def write_model(folder: Path, plan: Plan) -> Path:
    torch.manual_seed(3)
    network = models.build_stage(plan, plan.stages["3d_fullres"])
    state = {f"model/{name}": value for name, value in network.state_dict().items()}
    record = CheckpointRecord(
        plan=plan,
        stage="3d_fullres",
        fold="0",
        step=10,
        weights_sha256="",
        code_version="0",
        torch_version=torch.__version__,
        created="2026-01-01T00:00:00Z",
    )
    path = folder / "fold_0" / "checkpoint_final.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, record, state, {})
    return folder


def write_volume(path: Path, array_zyx: np.ndarray) -> Path:
    affine = np.diag([-0.9, 0.8, 2.0, 1.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array_zyx.T, affine), path)
    return path


def labels_zyx() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:9, 4:16, 5:14] = 1
    labels[5:11, 18:26, 12:22] = 2
    return labels


def read(path: Path) -> np.ndarray:
    return nib.Nifti1Image.from_filename(path).get_fdata().T.astype(np.int16)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    rng = np.random.default_rng(0)
    volumes = [rng.integers(-100, 300, SHAPE).astype(np.int16) for _ in range(2)]
    paths = [write_volume(tmp_path / "in" / f"case{i}_0000.nii.gz", volume) for i, volume in enumerate(volumes)]
    return [Case(id=f"case{i}", images=(path,)) for i, path in enumerate(paths)]


@pytest.fixture
def references(tmp_path: Path) -> Path:
    for case in ("case0", "case1"):
        write_volume(tmp_path / "labels" / f"{case}.nii.gz", labels_zyx())
    return tmp_path / "labels"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A model folder of a generator, written once."""
    root = tmp_path_factory.mktemp("models")
    known: dict[str, Path] = {}

    def of(generator: str) -> Path:
        if generator not in known:
            known[generator] = write_model(root / generator, make_plan(generator=generator))
        return known[generator]

    return of


def one_by_one() -> list[dict]:
    """The boxes of `labels_zyx`."""
    return [{"label": "liver", "slice": z, "box": [5, 4, 13, 15]} for z in range(2, 9)] + [
        {"label": 2, "slice": z, "box": [12, 18, 21, 25]} for z in range(5, 11)
    ]


def in_boxes(labels: np.ndarray) -> bool:
    """Everything found lies on the slices of its class's boxes."""
    return (
        not labels[:2].any() and not (labels[9:] == 1).any() and not (labels[:5] == 2).any() and not labels[11:].any()
    )


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_predicts_files(generator, model_of, cases, references, tmp_path) -> None:
    boxes = references if generator == "gt" else None
    predictor = Predictor.load(model_of(generator), device="cpu")
    summary = predict_files(predictor, cases, tmp_path / "out", boxes=boxes)
    assert len(summary.written) == 2
    for path in summary.written:
        labels = read(path)
        assert labels.shape == SHAPE
        assert set(np.unique(labels)) <= {0, 1, 2}
    (network,) = predictor.networks
    assert isinstance(network, RFMedSam2)
    assert network.refiner.compute.memory_mb == 64


def test_steps_differ_and_are_part_of_what_made_a_file(model_of, cases, tmp_path) -> None:
    whole = Predictor.load(model_of("unet"), device="cpu")
    made = {}
    for step in (None, 0, 1, 2):
        predictor = whole.using(PredictOptions(step=step))
        predict_files(predictor, cases[:1], tmp_path / f"out{step}")
        record = json.loads((tmp_path / f"out{step}" / "predictions.json").read_text())
        assert record["options"]["step"] == (2 if step is None else step)
        assert record["options"]["boxes"] == "own"
        made[step] = predictor.made_by()
    assert made[None] == made[2]
    assert len({made[0], made[1], made[2]}) == 3
    results = [read(tmp_path / f"out{step}" / "case0.nii.gz") for step in (0, 1, 2, None)]
    assert (results[0] != results[1]).any()
    np.testing.assert_array_equal(results[2], results[3])
    assert (
        len(predict_files(whole.using(PredictOptions(step=1)), cases[:1], tmp_path / "out2", continue_=True).written)
        == 1
    )


def test_boxes_of_label_maps_and_of_json_are_the_same_boxes(model_of, cases, references, tmp_path) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"case0": one_by_one(), "case1": []}))
    predictor = Predictor.load(model_of("gt"), device="cpu")
    predict_files(predictor, cases, tmp_path / "json", boxes=file)
    predict_files(predictor, cases[:1], tmp_path / "labels_out", boxes=references)
    found = read(tmp_path / "json" / "case0.nii.gz")
    # at 1 mm instead of 0.8 and 0.9 labels and boxes are rounded each in their way: to a pixel
    assert (found != read(tmp_path / "labels_out" / "case0.nii.gz")).mean() < 0.1
    assert in_boxes(found)
    assert not read(tmp_path / "json" / "case1.nii.gz").any()


def test_boxes_are_part_of_the_input(model_of, cases, references, tmp_path) -> None:
    predictor = Predictor.load(model_of("gt"), device="cpu")
    predict_files(predictor, cases, tmp_path / "out", boxes=references)
    write_volume(references / "case1.nii.gz", np.roll(labels_zyx(), 1, axis=0))
    again = predict_files(predictor, cases, tmp_path / "out", boxes=references, continue_=True)
    assert [path.name for path in again.written] == ["case1.nii.gz"]


def test_label_maps_of_prompts_are_not_replaced_by_what_they_prompt(model_of, cases, tmp_path) -> None:
    predictor = Predictor.load(model_of("unet"), device="cpu")
    first = predict_files(predictor, cases[:1], tmp_path / "first").written
    before = [path.read_bytes() for path in first]
    for boxes in (tmp_path / "first", *first):
        for asked in ({}, {"overwrite": True}):
            with pytest.raises(UsageError, match="would overwrite an input"):
                predict_files(predictor, cases[:1], tmp_path / "first", boxes=boxes, **asked)
    assert [path.read_bytes() for path in first] == before
    assert predict_files(predictor, cases[:1], tmp_path / "second", boxes=tmp_path / "first").written


def test_boxes_take_the_place_of_a_u_nets_prompts(model_of, cases, references, tmp_path) -> None:
    predictor = Predictor.load(model_of("unet"), device="cpu")
    for name, boxes in (("own", None), ("given", references)):
        predict_files(predictor, cases[:1], tmp_path / name, boxes=boxes)
    assert (read(tmp_path / "own" / "case0.nii.gz") != read(tmp_path / "given" / "case0.nii.gz")).any()


def test_every_kind_of_image_takes_boxes(model_of, cases) -> None:
    predictor = Predictor.load(model_of("gt"), device="cpu")
    file, boxes = cases[0].images[0], one_by_one()
    image = nib.load(file)
    by_file = predictor(file, boxes=boxes).labels
    assert by_file.any()
    assert in_boxes(by_file)
    label_map = nib.Nifti1Image(labels_zyx().T, image.affine)
    ways = {
        "path": predictor(str(file), boxes=[BoxPrompt.parse(box) for box in boxes]).labels,
        "array": predictor.predict_array(
            read(file), spacing_zyx_mm=Volume.from_nibabel(image).grid.spacing_zyx_mm, boxes=boxes
        ),
        "nibabel": np.asarray(predictor.predict_nibabel(image, boxes=boxes).dataobj).T,
        "sitk": sitk.GetArrayFromImage(predictor.predict_sitk(sitk.ReadImage(str(file)), boxes=boxes)),
        "volume": predictor(Volume.from_nibabel(image), boxes=boxes).labels,
        "file": predictor.predict_file(file, boxes=boxes),
    }
    for way, labels in ways.items():
        np.testing.assert_array_equal(labels, by_file, err_msg=way)
    by_map = predictor(file, boxes=labels_zyx()).labels
    np.testing.assert_array_equal(predictor(file, boxes=Volume.from_nibabel(label_map)).labels, by_map)
    np.testing.assert_array_equal(predictor(file, boxes=labels_zyx().astype(float)).labels, by_map)
    assert in_boxes(by_map)


def test_faulty_boxes_in_memory_are_sentences(model_of, cases) -> None:
    predictor, file = Predictor.load(model_of("gt"), device="cpu"), cases[0].images[0]
    with pytest.raises(UsageError, match="none were given"):
        predictor(file)
    for wrong in ("boxes.json", 3, {"label": 1}):
        with pytest.raises(UsageError, match="box prompts is not supported"):
            predictor(file, boxes=wrong)
    with pytest.raises(RecordError, match="ends before it begins"):
        predictor(file, boxes=[{"label": 1, "slice": 2, "box": [3, 3, 2, 2]}])
    with pytest.raises(RecordError, match="slice"):
        predictor(file, boxes=[{"label": 1, "box": [3, 3, 4, 4]}])
    with pytest.raises(ImageError, match="fractional"):
        predictor(file, boxes=labels_zyx() + 0.5)
    with pytest.raises(GeometryError, match="shape of a label map"):
        predictor(file, boxes=labels_zyx()[1:])
    with pytest.raises(GeometryError, match="is not on the grid"):
        predictor(file, boxes=Volume.from_numpy(labels_zyx(), spacing_zyx_mm=(1, 1, 1)))


def test_boxes_of_a_tensor_are_those_of_its_array(model_of, cases) -> None:
    predictor, file = Predictor.load(model_of("gt"), device="cpu"), cases[0].images[0]
    labels = labels_zyx()
    expected = predictor(file, boxes=labels).labels
    np.testing.assert_array_equal(predictor(file, boxes=torch.from_numpy(labels)).labels, expected)


def test_regions_channels_and_folds_predict(tmp_path) -> None:
    plan = make_plan(
        names={"background": 0, "whole": (1, 2), "core": (2,)},
        regions_class_order=(1, 2),
        channels=2,
        strategy="both",
        memory_frames=2,
    )
    folder = write_model(tmp_path / "m", plan)
    file = folder / "fold_0" / "checkpoint_final.safetensors"
    array = np.random.default_rng(0).normal(size=(2, *SHAPE))
    spacing = (2.0, 1.0, 1.0)
    labels = Predictor.load([file, file], device="cpu").predict_array(array, spacing_zyx_mm=spacing)
    assert labels.shape == SHAPE
    assert set(np.unique(labels)) <= {0, 1, 2}
    np.testing.assert_array_equal(
        Predictor.load(file, device="cpu").predict_array(array, spacing_zyx_mm=(2.0, 1.0, 1.0)), labels
    )


def test_a_turned_plan_takes_boxes_in_the_axes_of_the_file(cases, references, tmp_path) -> None:
    plan = make_plan(generator="gt").model_copy(update={"reorient": "RAS", "transpose_forward": (2, 0, 1)})
    predictor = Predictor.load(write_model(tmp_path / "m", plan), device="cpu")
    predict_files(predictor, cases, tmp_path / "out", boxes=references)
    labels = read(tmp_path / "out" / "case0.nii.gz")
    # frames are sagittal here: columns without a class have no prompt
    assert not labels[..., :4].any()
    assert not labels[..., 23:].any()


def test_the_command_takes_steps_and_boxes(model_of, cases, references, tmp_path) -> None:
    folder = cases[0].images[0].parent
    common = ("-i", folder, "--device", "cpu")
    run_ok("predict", *common, "-m", model_of("unet"), "-o", tmp_path / "a", "--step", 1)
    run_ok("predict", *common, "-m", model_of("gt"), "-o", tmp_path / "b", "--boxes", references)
    assert json.loads((tmp_path / "b" / "predictions.json").read_text())["options"]["boxes"] == "given"
    message = run_error("predict", *common, "-m", model_of("gt"), "-o", tmp_path / "c")
    assert "Give boxes" in message
    message = run_error("predict", *common, "-m", model_of("object_queries"), "-o", tmp_path / "c", "--step", 0)
    assert "step 1 or 2" in message
    assert not (tmp_path / "c").exists()


def test_boxes_that_do_not_fit_the_cases_are_sentences(model_of, cases, references, tmp_path) -> None:
    predictor = Predictor.load(model_of("gt"), device="cpu")
    file = tmp_path / "boxes.json"

    def run(boxes: Path) -> None:
        predict_files(predictor, cases, tmp_path / "out", boxes=boxes)

    with pytest.raises(UsageError, match="folder or file of boxes does not exist"):
        run(tmp_path / "nothing")
    file.write_text(json.dumps({"case0": [], "case1": [], "case7": []}))
    with pytest.raises(UsageError, match=r"1 case\(s\) with boxes.*case7"):
        run(file)
    file.write_text(json.dumps({"case0": []}))
    with pytest.raises(UsageError, match=r"1 of 2 cases have no boxes.*case1"):
        run(file)
    file.write_text(json.dumps({"case0": [{"label": "kidney", "slice": 0, "box": [1, 1, 2, 2]}], "case1": []}))
    with pytest.raises(UsageError, match=r"unknown to the model.*kidney"):
        run(file)
    file.write_text(json.dumps({"case0": [{"label": "liver", "slice": 0, "box": [3, 1, 2, 2]}], "case1": []}))
    with pytest.raises(RecordError, match="ends before it begins"):
        run(file)
    file.write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        run(file)
    (references / "case1.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"no boxes.*case1.*1 \.nii\.gz"):
        run(references)


@pytest.mark.parametrize("place", ["labels/dataset.json", "dataset.json"])
def test_label_maps_of_other_labels_give_no_boxes(place: str, model_of, cases, references, tmp_path) -> None:
    predictor = Predictor.load(model_of("gt"), device="cpu")
    own = predictor.plan.labels.names
    first, second = list(own)[1:3]
    swapped = own | {first: own[second], second: own[first]}
    table = {"channel_names": {"0": "CT"}, "numTraining": 2, "file_ending": ".nii.gz"}
    for boxes in (references, references / "case0.nii.gz"):
        (tmp_path / place).write_text(json.dumps(table | {"labels": swapped}))
        with pytest.raises(UsageError, match=rf"other labels than the model.*{first} is 1 in the model and 2 in"):
            predict_files(predictor, cases[:1], tmp_path / "out", boxes=boxes)
        (tmp_path / place).write_text(json.dumps(table | {"labels": own}))
        predict_files(predictor, cases[:1], tmp_path / "out", boxes=boxes)


def test_a_box_outside_its_image_is_that_cases_fault(model_of, cases, tmp_path) -> None:
    file = tmp_path / "boxes.json"
    outside = {"label": "liver", "slice": 12, "box": [0, 0, 2, 2]}
    file.write_text(json.dumps({"case0": [outside], "case1": one_by_one()}))
    predictor = Predictor.load(model_of("gt"), device="cpu")
    with pytest.raises(RfMedSamError, match=r"1 of 2 cases.*case0: 1 box\(es\) are outside the image.*slices 0 to 11"):
        predict_files(predictor, cases, tmp_path / "out", boxes=file)
    assert (tmp_path / "out" / "case1.nii.gz").is_file()


def test_a_label_map_on_another_grid_is_that_cases_fault(model_of, cases, references, tmp_path) -> None:
    write_volume(references / "case0.nii.gz", labels_zyx()[:-1])
    predictor = Predictor.load(model_of("gt"), device="cpu")
    with pytest.raises(RfMedSamError, match=r"case0: A label map is not on the grid of its image"):
        predict_files(predictor, cases, tmp_path / "out", boxes=references)
    write_volume(references / "case0.nii.gz", labels_zyx() * 3)
    with pytest.raises(RfMedSamError, match=r"case0: A label map holds values unknown to the model"):
        predict_files(predictor, cases, tmp_path / "out", boxes=references)
    assert issubclass(ImageError, RfMedSamError)


def test_plain_u_nets_have_no_steps_and_take_no_boxes(cases, references, tmp_path) -> None:
    plan = make_plan()
    stage = plan.stages["3d_fullres"].model_copy(update={"model": UNET})
    folder = write_model(tmp_path / "m", plan.model_copy(update={"stages": {"3d_fullres": stage}}))
    predictor = Predictor.load(folder, device="cpu")
    with pytest.raises(UsageError, match="does not have this step"):
        predict_files(predictor.using(PredictOptions(step=1)), cases, tmp_path / "out")
    with pytest.raises(UsageError, match="does not accept boxes"):
        predict_files(predictor, cases, tmp_path / "out", boxes=references)
    assert "step" not in predictor.settings()


def test_models_of_reference_boxes_are_validated_with_them(planned_root, tmp_path) -> None:
    layout = Layout(raw=planned_root / "raw", preprocessed=planned_root / "preprocessed", results=tmp_path / "results")
    plan = read_record(layout.plan_file("Dataset900_PhantomCT", "rfmed_cpu"), Plan)
    changes = {
        "patch_size": (4, 32, 32),
        "batch_size": 1,
        "model": make_plan(generator="gt", freeze_backbone=False).stages["3d_fullres"].model,
        "inference": Inference(step_size=1.0, mirror=False),
        "train": TrainConfig(epochs=1, iterations_per_epoch=1, workers=0, compile="off"),
        "validation": Validation(patches_while_training=1),
    }
    stage = plan.stages["3d_fullres"].model_copy(update=changes)
    plan = plan.model_copy(update={"stages": {"3d_fullres": stage}})
    result = train(layout, plan, "3d_fullres", fold="0", options=TrainOptions(device="cpu"))
    assert result.evaluation is not None
