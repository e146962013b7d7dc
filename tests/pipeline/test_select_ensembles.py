"""rfmed_select with ensembles: pairs predicted out of fold, the choice, the archive of the winner, interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
from support.commands import run, run_error, run_ok, unfinished_files
from support.small_rfmedsam2 import config
from support.tiny_model import NAME, make_plan, write_image, write_model

from rfmedsam2.pipeline.datasets.label_agreement import LabelTable
from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.prediction.cascade import FirstStageLabels
from rfmedsam2.pipeline.prediction.checkpoints import checkpoints_of
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.pipeline.selection import select as verb
from rfmedsam2.pipeline.selection.choice import gain_of, is_clear
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.plan import Augmentation, Inference, Plan
from rfmedsam2.records.report import Evaluation, Selection
from rfmedsam2.store.images import read_label
from rfmedsam2.store.raw import open_dataset, read_case

MODELS = ("rfmed__2d", "rfmed__3d_fullres", "other__3d_fullres")
PAIR = "rfmed__2d+rfmed__3d_fullres"
FOLDS = {"0": ("a", "b", "c"), "1": ("d", "e", "f")}
EVERY = tuple(id for ids in FOLDS.values() for id in ids)


def write_labels(path: Path, array: np.ndarray, like: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, nib.load(like).affine), path)


def organs(seed: int) -> np.ndarray:
    volume = np.zeros((22, 25, 14), np.uint8)
    volume[2:10, 2 : 10 + seed, 2:8] = 1
    volume[12:18, 3:13, 2:8] = 2
    return volume


def eroded(seed: int, axis: int) -> np.ndarray:
    """Organs without the first half of each along an axis."""
    volume = organs(seed)
    (volume[:6] if axis == 0 else volume[:, :5])[:] = 0
    return volume


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("select")
    raw = root / "raw" / NAME
    for seed, id in enumerate(EVERY):
        image = write_image(raw / "imagesTr" / f"{id}_0000.nii.gz", seed)
        write_labels(raw / "labelsTr" / f"{id}.nii.gz", organs(seed), image)
    labels = {"background": 0, "liver": 1, "spleen": 2}
    table = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": len(EVERY)}
    (raw / "dataset.json").write_text(json.dumps(table))
    for number, model in enumerate(MODELS):
        name, _, stage = model.partition("__")
        for fold, ids in FOLDS.items():
            folder = root / "results" / NAME / model
            # another training of the same plan would have other weights
            write_model(folder, make_plan(name=name), fold=fold, stage=stage)
            out = folder / f"fold_{fold}" / "validation"
            for id in ids:
                seed = EVERY.index(id)
                label = raw / "labelsTr" / f"{id}.nii.gz"
                write_labels(out / f"{id}.nii.gz", eroded(seed, axis=number % 2), label)
            evaluate(out, raw / "labelsTr", LabelTable(labels=make_plan().labels, source="plan"), out=out, cases=ids)
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return shutil.copytree(made, tmp_path / "root")


def selection_of(root: Path) -> Selection:
    return Selection.load(root / "results" / NAME / "selection.json")


class Predictions:
    """Counts what networks predict, and ends the program at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.last = 0, None
        inner = Predictor.predict_prepared

        def counted(*args, **options):
            if self.count == self.last:
                raise KeyboardInterrupt
            self.count += 1
            return inner(*args, **options)

        monkeypatch.setattr(Predictor, "predict_prepared", counted)


def test_every_pair_is_predicted_by_the_networks_of_the_fold(root, tmp_path, monkeypatch) -> None:
    predictions = Predictions(monkeypatch)
    out = run_ok("select", "-d", "Tiny", "--root", root, "--device", "cpu").out
    assert predictions.count == len(MODELS) * len(EVERY), "each model predicts each case once"
    found = selection_of(root)
    names = {one.name: one.members for one in found.candidates}
    assert set(names) - set(MODELS) == {
        "other__3d_fullres+rfmed__2d",
        "other__3d_fullres+rfmed__3d_fullres",
        "rfmed__2d+rfmed__3d_fullres",
    }
    assert names[PAIR] == tuple(PAIR.split("+"))
    assert found.winner in MODELS, "networks that nobody trained make no good ensemble"
    assert PAIR in out
    results = root / "results" / NAME
    folder = results / "ensembles" / PAIR / "fold_1" / "validation"
    images = [root / "raw" / NAME / "imagesTr" / f"{id}_0000.nii.gz" for id in FOLDS["1"]]
    models = [results / name for name in names[PAIR]]
    run_ok("predict", "-i", *images, "-o", tmp_path / "out", "-m", *models, "-f", "1", "--device", "cpu")
    for id in FOLDS["1"]:
        ours, other = (read_label(place / f"{id}.nii.gz")[0].array for place in (folder, tmp_path / "out"))
        np.testing.assert_array_equal(ours, other)
    run_ok("evaluate", "-p", tmp_path / "out", "-g", root / "raw" / NAME / "labelsTr", "-o", tmp_path / "scores",
           "--cases", *FOLDS["1"])  # fmt: skip
    scores = [Evaluation.load(place / "metrics.json") for place in (folder, tmp_path / "scores")]
    assert scores[0].mean == scores[1].mean
    page = (results / "selection.html").read_text()
    assert "default-src 'none'" in page
    assert page.count("<tr>") == 2 + 2 * len(found.candidates)
    assert f"-p {found.winner.partition('__')[0]} -c 3d_fullres" in page
    assert 'src="data:image/png' in page
    assert not [*(tmp_path / "temporary").iterdir()], "probabilities are gone"
    assert not [*root.rglob("*.b2nd")]
    assert not unfinished_files(root)


def test_an_interrupted_selection_goes_on(root, monkeypatch) -> None:
    words = ("select", "-d", "Tiny", "--root", root, "--device", "cpu", "--no-postprocessing")
    predictions = Predictions(monkeypatch)
    predictions.last = 7
    assert "interrupted" in run(*words).err
    results = root / "results" / NAME
    assert not (results / "selection.json").exists()
    assert not unfinished_files(root)
    predictions.count, predictions.last = 0, None
    run_ok(*words)
    assert predictions.count == len(MODELS) * (len(EVERY) - 2), "two cases were finished before"
    first = (results / "selection.json").read_bytes()
    predictions.count = 0
    run_ok(*words)
    assert predictions.count == 0
    assert (results / "selection.json").read_bytes() == first
    # scores are never those of label maps before
    folder = results / "ensembles" / PAIR / "fold_0" / "validation"
    (folder / "a.nii.gz").unlink()
    run_ok(*words)
    assert predictions.count == 2, "only the models of this pair"
    assert (results / "selection.json").read_bytes() == first
    changed = make_plan(name="rfmed", reorient="RAS")
    write_model(results / "rfmed__2d", changed, fold="0", stage="2d")
    predictions.count = 0
    run_ok(*words)
    assert predictions.count == 3 * len(FOLDS["0"])


def test_probabilities_that_validations_kept_are_read(root, tmp_path, monkeypatch) -> None:
    results, images = root / "results" / NAME, root / "raw" / NAME / "imagesTr"
    for model in PAIR.split("+"):
        for fold, ids in FOLDS.items():
            out = results / model / f"fold_{fold}" / "validation"
            shutil.rmtree(out)
            cases = [images / f"{id}_0000.nii.gz" for id in ids]
            run_ok("predict", "-i", *cases, "-o", out, "-m", results / model, "-f", fold, "--device", "cpu",
                   "--probabilities")  # fmt: skip
            run_ok("evaluate", "-p", out, "-g", root / "raw" / NAME / "labelsTr", "-o", out, "--cases", *ids)
    predictions = Predictions(monkeypatch)
    words = ("select", "-d", "Tiny", "--root", root, "--device", "cpu", "--no-postprocessing")
    run_ok(*words)
    assert predictions.count == len(EVERY), "the third model kept none"
    folder = results / "ensembles" / PAIR
    found = {path.name: read_label(path)[0].array for path in folder.rglob("*.nii.gz")}
    assert set(found) == {f"{id}.nii.gz" for id in EVERY}

    # a member that kept none of one fold predicts that fold alone
    for path in (results / "rfmed__2d" / "fold_1" / "validation").glob("*.b2nd"):
        path.replace(tmp_path / path.name)
    shutil.rmtree(results / "ensembles")
    predictions.count = 0
    run_ok(*words)
    assert predictions.count == len(EVERY) + len(FOLDS["1"])
    for path in folder.rglob("*.nii.gz"):
        np.testing.assert_array_equal(read_label(path)[0].array, found[path.name])
    for path in tmp_path.glob("*.b2nd"):
        path.replace(results / "rfmed__2d" / "fold_1" / "validation" / path.name)

    kept = results / "rfmed__2d" / "fold_0" / "validation"
    shutil.copy(kept / "b.probabilities.b2nd", kept / "a.probabilities.b2nd")
    (kept / "b.probabilities.b2nd").write_bytes((kept / "b.probabilities.b2nd").read_bytes()[:-40])
    expression = blosc2.open(str(kept / "c.probabilities.b2nd"), mode="r") + 1
    expression.save(str(kept / "expression.b2nd"))
    (kept / "expression.b2nd").replace(kept / "c.probabilities.b2nd")
    other = results / "rfmed__2d" / "fold_1" / "validation"
    record = json.loads((other / "predictions.json").read_text())
    record["cases"]["d"]["input_sha256"] = "0" * 64
    record["cases"]["e"]["made_by"] = "0" * 64
    (other / "predictions.json").write_text(json.dumps(record))
    shutil.rmtree(results / "ensembles")
    predictions.count = 0
    run_ok(*words)
    assert predictions.count == len(EVERY) + 5
    for path in folder.rglob("*.nii.gz"):
        np.testing.assert_array_equal(read_label(path)[0].array, found[path.name])


def by_hand(label_map: Callable[[int], np.ndarray], root: Path) -> Callable[..., object]:
    """Stands in for the networks of one pair: its label maps are given."""
    inner = verb.validate_pairs

    def validate(layout, pairs: Sequence, folds: Sequence[str], **options):
        (chosen,) = [pair for pair in pairs if {model.name for model in pair} == set(PAIR.split("+"))]
        (found,) = inner(layout, [chosen], folds, **options)
        scored = {}
        for fold, ids in FOLDS.items():
            out = found.validation(fold)
            for id in ids:
                image = root / "raw" / NAME / "labelsTr" / f"{id}.nii.gz"
                write_labels(out / f"{id}.nii.gz", label_map(EVERY.index(id)), image)
            table = LabelTable(labels=make_plan().labels, source="plan")
            scored[fold] = evaluate(out, root / "raw" / NAME / "labelsTr", table, cases=ids)
        return [type(found)(model=found.model, folds=scored, members=found.members)]

    return validate


def with_island(seed: int) -> np.ndarray:
    volume = organs(seed)
    volume[20:22, 22:25, 12:14] = 1
    return volume


def test_an_ensemble_that_is_clearly_better_wins_with_its_rule(root, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(verb, "validate_pairs", by_hand(with_island, root))
    archive = tmp_path / "best.zip"
    out = run_ok("select", "-d", "Tiny", "--root", root, "--device", "cpu", "-o", archive).out
    assert f"Best: {PAIR}" in out
    assert f"rfmed_predict -d {NAME} -p ensemble -c {PAIR}" in out
    found = selection_of(root)
    assert found.candidates[0].members == tuple(PAIR.split("+"))
    assert found.ensemble_gain is not None
    assert found.ensemble_gain.low is not None
    assert found.ensemble_gain.low > 0
    assert found.rule is not None
    assert found.postprocessed_dsc == 1.0
    assert found.candidates[1].difference.high is not None
    assert found.candidates[1].difference.high < 0
    folder = root / "results" / NAME / f"ensemble__{PAIR}"
    predictor = Predictor.load(folder, device="cpu")
    assert predictor.rule == found.rule
    assert [model.fold for model in predictor.models] == ["0", "1", "0", "1"]
    image = root / "raw" / NAME / "imagesTr" / "a_0000.nii.gz"
    labels = predictor(image).labels

    # a selection that names it no more takes it away, but not an imported one
    imported = folder.with_name("ensemble__mine")
    (imported / "model_0").mkdir(parents=True)
    shutil.copy(folder / "ensemble.json", imported)
    run_ok("select", "-d", "Tiny", "--root", root, "--device", "cpu", "--no-ensembles")
    assert selection_of(root).winner in MODELS
    assert "removed" in caplog.text
    assert not folder.exists()
    assert (imported / "ensemble.json").is_file()

    shutil.rmtree(root / "results")
    packed = Predictor.load(archive, device="cpu")
    np.testing.assert_array_equal(packed(image).labels, labels)
    assert packed.rule == found.rule


def test_the_simpler_model_wins_a_tie(root, monkeypatch) -> None:
    """Better in one of six cases, else the same."""

    def mixed(seed: int) -> np.ndarray:
        return eroded(seed, axis=1) if seed else organs(seed)

    monkeypatch.setattr(verb, "validate_pairs", by_hand(mixed, root))
    out = run_ok("select", "-d", "Tiny", "--root", root, "--device", "cpu", "--no-postprocessing").out
    found = selection_of(root)
    means = {one.name: one.dsc.mean or 0.0 for one in found.candidates}
    assert max(means, key=lambda name: means[name]) == PAIR
    assert found.winner in MODELS
    assert "selected, as the simpler one: the interval reaches 0" in out
    assert not (root / "results" / NAME / f"ensemble__{PAIR}").exists()


def test_a_gain_counts_classes_that_both_have() -> None:
    single = {str(i): (0.5, np.nan, 0.2) for i in range(6)}
    better = {str(i): (0.6, 1.0, np.nan) for i in range(6)}
    gain = gain_of(better, single)
    assert gain.mean == pytest.approx(0.1)
    assert is_clear(gain)
    assert not is_clear(gain_of({"0": better["0"]}, single)), "of one case nothing is known"
    assert not is_clear(gain_of(single, single))


def test_models_with_other_labels_are_a_sentence(root) -> None:
    results = root / "results" / NAME
    labels = LabelSet.model_validate({"names": {"background": 0, "spleen": 1, "liver": 2}})
    for fold in FOLDS:
        write_model(results / "other__3d_fullres", make_plan(name="other", labels=labels), fold=fold)
    told = run_error("select", "-d", "Tiny", "--root", root)
    assert "other__3d_fullres and rfmed__2d have different labels and cannot be compared" in told
    assert "-p" in told
    run_ok("select", "-d", "Tiny", "-p", "rfmed", "--root", root, "--device", "cpu")


def test_what_an_ensemble_needs_is_a_sentence(root, tmp_path) -> None:
    words = ("select", "-d", "Tiny", "--root", root, "--device", "cpu")
    (root / "raw" / NAME / "imagesTr" / "b_0000.nii.gz").write_bytes(b"no image")
    told = run_error(*words)
    assert "The ensembles cannot be validated: b" in told
    assert "--no-ensembles" in told
    (tmp_path / "notes.zip").write_text("mine")
    assert "notes.zip" in run_error(*words, "--no-ensembles", "-o", tmp_path / "notes.zip")
    assert (tmp_path / "notes.zip").read_text() == "mine"
    shutil.rmtree(root / "raw")
    run_ok(*words)
    assert {one.name for one in selection_of(root).candidates} == set(MODELS)


def test_a_cascade_and_rfmedsam2_are_averaged(root, tmp_path) -> None:
    """Each in its own way: the second stage is given what the first has found in the cases of its fold."""
    results = root / "results" / NAME
    shutil.rmtree(results / "other__3d_fullres")
    shutil.rmtree(results / "rfmed__2d")
    plan = make_plan()
    full = plan.stages["3d_fullres"]
    one_pass = {"augmentation": Augmentation(mirror_axes=()), "inference": Inference(step_size=1.0)}
    full = full.model_copy(update=one_pass)
    refined = full.model_copy(update={"model": config(), "patch_size": (4, 32, 32)})
    plan = make_plan(
        stages={
            "3d_fullres": full,
            "3d_cascade": full.model_copy(update={"previous_stage": "3d_fullres"}),
            "sam": refined,
        }
    )
    for stage in plan.stages:
        for fold, ids in FOLDS.items():
            model = results / f"rfmed__{stage}"
            write_model(model, plan, fold=fold, stage=stage)
            out = model / f"fold_{fold}" / "validation"
            shutil.rmtree(out, ignore_errors=True)
            images = [root / "raw" / NAME / "imagesTr" / f"{id}_0000.nii.gz" for id in ids]
            given = (
                ("--previous-stage", results / f"rfmed__3d_fullres/fold_{fold}/validation") if "casc" in stage else ()
            )
            run_ok("predict", "-i", *images, "-o", out, "-m", model, "-f", fold, "--device", "cpu", *given)
            evaluate(
                out, root / "raw" / NAME / "labelsTr", LabelTable(labels=plan.labels, source="plan"), out=out, cases=ids
            )
    run_ok("select", "-d", "Tiny", "--root", root, "--device", "cpu", "--no-postprocessing")
    assert {one.name for one in selection_of(root).candidates if one.members} == {
        "rfmed__3d_cascade+rfmed__3d_fullres",
        "rfmed__3d_cascade+rfmed__sam",
        "rfmed__3d_fullres+rfmed__sam",
    }
    for fold, ids in FOLDS.items():
        by_members = mean_of_members(root, plan, fold, ids[0])
        path = results / "ensembles" / "rfmed__3d_cascade+rfmed__sam" / f"fold_{fold}" / "validation"
        labels = read_label(path / f"{ids[0]}.nii.gz")[0].array[0]
        assert labels.any()
        np.testing.assert_array_equal(labels, by_members.argmax(0))

    image = root / "raw" / NAME / "imagesTr" / "a_0000.nii.gz"
    models = [results / "rfmed__3d_cascade", results / "rfmed__sam"]
    run_ok("predict", "-i", image, "-o", tmp_path / "out", "-m", *models, "--device", "cpu")
    found = [Predictor.load(model, device="cpu")(image, probabilities=True).probabilities for model in models]
    mean = np.mean(np.asarray(found, np.float32), axis=0)
    np.testing.assert_array_equal(read_label(tmp_path / "out" / "a.nii.gz")[0].array[0], mean.argmax(0))


def mean_of_members(root: Path, plan: Plan, fold: str, id: str) -> np.ndarray:
    """Probabilities of the cascade's second stage and RFMedSAM 2 of a fold, averaged; (classes, z, y, x)."""
    results = root / "results" / NAME
    (case,) = [case for case in open_dataset(root / "raw" / NAME).training if case.id == id]
    volume, header = read_case(case, channels=1)
    previous = FirstStageLabels.open(results / "rfmed__3d_fullres" / f"fold_{fold}" / "validation", [case], plan.labels)
    found = []
    for stage, given in (("3d_cascade", previous), ("sam", None)):
        predictor = Predictor.load(
            checkpoints_of(results / f"rfmed__{stage}", folds=[fold]), previous=given, device="cpu"
        )
        prepared = predictor.prepare(volume, previous=None if given is None else given.of(case, header))
        found.append(np.asarray(predictor.predict_prepared(prepared, probabilities=True).probabilities, np.float32))
    return np.mean(found, axis=0)
