"""rfmed_select: models compared by their cross-validation, a rule for the best; missing folds; interruptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from support.commands import run_error, run_ok, unfinished_files
from support.tiny_model import NAME, make_plan, write_model

from rfmedsam2.pipeline.datasets.label_agreement import LabelTable
from rfmedsam2.pipeline.evaluation.evaluate import evaluate
from rfmedsam2.pipeline.prediction.predictor import Predictor
from rfmedsam2.pipeline.selection import rules
from rfmedsam2.pipeline.selection import select as verb
from rfmedsam2.records.prediction import PredictingModel, PredictionsRecord
from rfmedsam2.records.report import Evaluation, Selection
from rfmedsam2.store.checkpoint_header import read_record_of
from rfmedsam2.system.atomic import write_record

GOOD, POOR, HALF = "rfmed__3d_fullres", "rfmed__2d", "other__3d_fullres"
SINGLE = "--no-ensembles"
FOLDS = {"0": ("a", "b", "c"), "1": ("d", "e", "f")}


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)


def organs(seed: int) -> np.ndarray:
    volume = np.zeros((20, 18, 12), np.uint8)
    volume[2:10, 2 : 10 + seed, 2:8] = 1
    volume[12:18, 3:13, 2:8] = 2
    return volume


def predicted(model: str, seed: int) -> np.ndarray:
    """Good: an island of liver. Poor: half the spleen, and the island."""
    volume = organs(seed)
    volume[0:2, 15:18, 10:12] = 1
    if model == POOR:
        volume[12:15] = 0
    return volume


@pytest.fixture(scope="module")
def validated_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("select")
    raw = root / "raw" / NAME
    every = [id for ids in FOLDS.values() for id in ids]
    for seed, id in enumerate(every):
        write(raw / "labelsTr" / f"{id}.nii.gz", organs(seed))
        write(raw / "imagesTr" / f"{id}_0000.nii.gz", organs(seed))
    labels = {"background": 0, "liver": 1, "spleen": 2}
    table = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": len(every)}
    (raw / "dataset.json").write_text(json.dumps(table))
    for model in (GOOD, POOR, HALF):
        name, _, stage = model.partition("__")
        plan = make_plan(name=name)
        for fold, ids in FOLDS.items():
            if (model, fold) == (HALF, "1"):
                continue
            folder = root / "results" / NAME / model
            write_model(folder, plan, fold=fold, stage=stage)
            out = folder / f"fold_{fold}" / "validation"
            for id in ids:
                write(out / f"{id}.nii.gz", predicted(model, every.index(id)))
    score(root)
    return root


def score(root: Path) -> None:
    """Evaluate all validation predictions, as trainings do."""
    table = LabelTable(labels=make_plan().labels, source="the plan")
    for fold, ids in FOLDS.items():
        for out in (root / "results" / NAME).glob(f"*/fold_{fold}/validation"):
            evaluate(out, root / "raw" / NAME / "labelsTr", table, out=out, cases=ids)


@pytest.fixture
def root(validated_root, tmp_path) -> Path:
    return shutil.copytree(validated_root, tmp_path / "root")


def selection_of(root: Path) -> Selection:
    return Selection.load(root / "results" / NAME / "selection.json")


def test_models_are_ranked_on_all_folds_and_the_best_gets_a_rule(root) -> None:
    done = run_ok("select", "-d", "Tiny", SINGLE, "--root", root)
    assert f"Best: {GOOD}" in done.out
    assert f"Left out: {HALF}, which was not validated on fold(s) 1" in done.out
    assert "Postprocessing: drop components of the foreground below 0.1 ml" in done.out
    found = selection_of(root)
    assert [one.name for one in found.candidates] == [GOOD, POOR]
    assert found.folds == ("0", "1")
    assert found.left_out == {HALF: "fold(s) 1"}
    results = root / "results" / NAME
    parts = [Evaluation.load(results / GOOD / f"fold_{fold}" / "validation" / "metrics.json") for fold in FOLDS]
    every = [np.mean([c.dsc for c in case.classes.values()]) for part in parts for case in part.cases]
    assert found.candidates[0].dsc.mean == pytest.approx(np.mean(every))
    assert found.candidates[0].dsc.cases == 6
    difference = found.candidates[1].difference
    assert difference.high is not None
    assert difference.high < 0, "the poor model is worse in every case"
    assert found.postprocessed_dsc == 1.0
    assert found.unprocessed_dsc == pytest.approx(np.mean(every))
    assert found.rule is not None
    assert found.rule.cases == 6
    assert Predictor.load(results / GOOD, device="cpu").rule == found.rule
    assert Predictor.load(results / POOR, device="cpu").rule is None
    assert not unfinished_files(root)


def test_the_table_is_the_same_in_pandas_as_csv_and_on_screen(root) -> None:
    done = run_ok("select", "-d", "Tiny", SINGLE, "--root", root, "--json")
    found = Selection.from_json(done.out)
    assert found == selection_of(root)
    csv = pd.read_csv(root / "results" / NAME / "selection.csv", dtype={"fold": str})
    pd.testing.assert_frame_equal(csv, found.to_dataframe(), check_dtype=False)
    assert len(csv) == 2 * 3 * 3
    fold = csv[(csv.candidate == POOR) & (csv.fold == "1") & (csv.name == "spleen")]
    part = Evaluation.load(root / "results" / NAME / POOR / "fold_1" / "validation" / "metrics.json")
    assert fold.dsc.item() == pytest.approx(part.classes["spleen"]["dsc"].mean)
    shown = run_ok("select", "-d", "Tiny", SINGLE, "--root", root).out
    assert f"{found.candidates[1].dsc.mean:.4f}" in shown
    assert "fold 0" in shown


def test_folds_and_plans_can_be_chosen(root) -> None:
    run_ok("select", "-d", "Tiny", SINGLE, "-f", "0", "--root", root)
    assert {one.name for one in selection_of(root).candidates} == {GOOD, POOR, HALF}
    run_ok("select", "-d", "Tiny", SINGLE, "-f", "0", "-p", "other", "--root", root)
    assert [one.name for one in selection_of(root).candidates] == [HALF]
    assert "No model was trained with this plan" in run_error("select", "-d", "Tiny", "-p", "none", "--root", root)
    assert "validated for none of the models" in run_error("select", "-d", "Tiny", "-f", "7", "--root", root)


def test_a_rule_by_hand_stays_and_a_learned_one_is_replaced(root) -> None:
    place = root / "results" / NAME / GOOD / "postprocessing.json"
    run_ok("select", "-d", "Tiny", SINGLE, "--root", root)
    learned = place.read_text()
    hand = json.loads(learned) | {"cases": 0, "steps": [{"action": "fill_holes"}]}
    place.write_text(json.dumps(hand))
    assert "was written by hand and stays" in run_ok("select", "-d", "Tiny", SINGLE, "--root", root).out
    assert json.loads(place.read_text()) == hand
    run_ok("select", "-d", "Tiny", SINGLE, "--root", root, "--overwrite")
    assert place.read_text() == learned
    for path in (root / "results" / NAME / GOOD).glob("fold_*/validation/*.nii.gz"):
        shutil.copy(root / "raw" / NAME / "labelsTr" / path.name, path)
    score(root)
    assert "no step raises the scores" in run_ok("select", "-d", "Tiny", SINGLE, "--root", root).out
    assert not place.exists()


def test_an_interrupted_selection_leaves_nothing_and_is_done_again(root, monkeypatch) -> None:
    def killed(*args, **options):
        raise KeyboardInterrupt

    before = json.loads(run_ok("select", "-d", "Tiny", SINGLE, "--root", root, "--json").out)
    results = root / "results" / NAME
    for name in ("selection.json", "selection.csv", f"{GOOD}/postprocessing.json"):
        (results / name).unlink()
    with monkeypatch.context() as broken:
        broken.setattr(rules, "learn_rule", killed)
        with pytest.raises(KeyboardInterrupt):
            verb.select(verb.Layout.under(root), NAME, options=verb.SelectOptions(ensembles=False))
    assert not {"selection.json", "selection.csv", "selection"} & {path.name for path in results.iterdir()}
    assert not unfinished_files(root)
    assert json.loads(run_ok("select", "-d", "Tiny", SINGLE, "--root", root, "--json").out) == before


def test_what_cannot_be_selected_from_is_a_sentence(root) -> None:
    words = ("select", "-d", "Tiny", SINGLE, "--root", root)
    results = root / "results" / NAME
    (results / GOOD / "fold_1" / "validation" / "e.nii.gz").unlink()
    sentence = run_error(*words)
    assert "e: no prediction" in sentence
    assert "--no-postprocessing" in sentence
    run_ok(*words, "--no-postprocessing")
    twice = results / POOR / "fold_1" / "validation" / "metrics.json"
    twice.write_bytes((results / POOR / "fold_0" / "validation" / "metrics.json").read_bytes())
    assert "validation cases in common" in run_error(*words)
    twice.write_text("{")
    assert "is not valid JSON" in run_error(*words)
    for path in results.glob("*/fold_*/validation"):
        shutil.rmtree(path)
    assert "No fold has been validated" in run_error(*words)
    shutil.rmtree(results)
    assert "No model was trained" in run_error(*words)


@pytest.mark.parametrize("changed", ["label", "prediction"])
@pytest.mark.parametrize("model", [GOOD, POOR])
def test_label_maps_that_changed_since_they_were_scored_are_named(root, changed, model) -> None:
    """Scores of other labels would choose a model, and teach a rule, that fit nothing that is there."""
    words = ("select", "-d", "Tiny", "--root", root, "--no-postprocessing", SINGLE)
    raw, results = root / "raw" / NAME / "labelsTr", root / "results" / NAME
    path = raw / "b.nii.gz" if changed == "label" else results / model / "fold_0" / "validation" / "b.nii.gz"
    write(path, organs(5))
    sentence = run_error(*words)
    assert "Weights or label maps have changed since the validation" in sentence
    assert f"Found the {changed} of b (fold 0)." in sentence
    assert "--validate-only" in sentence
    score(root)
    run_ok(*words)


def test_a_model_that_was_trained_on_since_is_named(root) -> None:
    folder = root / "results" / NAME / GOOD
    checkpoint = folder / "fold_0" / "checkpoint_final.safetensors"
    model = PredictingModel(
        fold="0", step=1, weights_sha256=read_record_of(checkpoint).weights_sha256, checkpoint=checkpoint.name
    )
    plan = make_plan(name="rfmed")
    record = PredictionsRecord(
        dataset=NAME,
        plan=plan.name,
        stage="3d_fullres",
        labels=dict(plan.labels.names),
        models=(model,),
        options={},
        made_by="0",
        code_version="0",
        cases={},
    )
    write_record(folder / "fold_0" / "validation" / "predictions.json", record)
    run_ok("select", "-d", "Tiny", SINGLE, "--root", root)
    shutil.copy(folder / "fold_1" / checkpoint.name, checkpoint)
    assert "Found the weights of fold 0." in run_error("select", "-d", "Tiny", SINGLE, "--root", root)


def test_scores_of_earlier_versions_know_no_label_maps(root) -> None:
    for file in (root / "results").rglob("metrics.json"):
        record = json.loads(file.read_text())
        for case in record["cases"]:
            del case["reference_sha256"], case["prediction_sha256"]
        file.write_text(json.dumps(record))
    write(root / "raw" / NAME / "labelsTr" / "b.nii.gz", organs(5))
    run_ok("select", "-d", "Tiny", SINGLE, "--root", root)
