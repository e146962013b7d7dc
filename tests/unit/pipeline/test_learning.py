"""Learning postprocessing: what helps is taken, what hurts a class is not, and absent classes are left out."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rfmedsam2.errors import ImageError, UsageError
from rfmedsam2.metrics.volumes import case_metrics
from rfmedsam2.pipeline.selection.learning import Learned, ValidationCase, learn_rule
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.prediction import PostprocessingStep
from rfmedsam2.store.images import read_label
from rfmedsam2.transforms.postprocess import postprocess

LABELS = LabelSet(names={"background": 0, "liver": 1, "spleen": 2})
EDGE_MM = 2.0


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T, np.diag([EDGE_MM] * 3 + [1.0])), path)
    return path


def pair(folder: Path, id: str, prediction: np.ndarray, reference: np.ndarray) -> ValidationCase:
    return ValidationCase(
        id=id,
        prediction=write(folder / "p" / f"{id}.nii.gz", prediction),
        reference=write(folder / "r" / f"{id}.nii.gz", reference),
    )


def organs() -> np.ndarray:
    volume = np.zeros((14, 20, 24), np.uint8)
    volume[2:10, 2:10, 2:10] = 1
    volume[3:11, 12:18, 12:20] = 2
    return volume


def learn(cases, **options) -> Learned:
    return learn_rule(cases, LABELS, "Dataset001_X", **options)


def done(learned: Learned) -> list[tuple[str, str | None, float | None]]:
    return [(step.action, step.of, step.smallest_ml) for step in learned.rule.steps]


def test_islands_are_removed_of_the_class_that_has_them(tmp_path) -> None:
    reference, prediction = organs(), organs()
    prediction[12:14, 16:20, 0:4] = 1
    reference[0, 0, 20:24] = 2
    prediction[0, 0, 20:24] = 2
    learned = learn([pair(tmp_path, f"c{i}", prediction, reference) for i in range(2)])
    assert done(learned) == [("keep_largest", "liver", None)]
    assert learned.after == {"liver": 1.0, "spleen": 1.0}
    assert learned.rule.steps[0].gain == pytest.approx(1 - learned.before["liver"])
    assert (learned.rule.cases, learned.rule.dataset) == (2, "Dataset001_X")


def test_two_true_parts_and_crumbs_ask_for_a_smallest_volume(tmp_path) -> None:
    reference = organs()
    reference[12:14, 16:20, 0:4] = 1  # 32 voxels: 0.256 ml
    prediction = reference.copy()
    prediction[0, 0, 22:24] = 1  # 0.016 ml
    assert done(learn([pair(tmp_path, "c", prediction, reference)])) == [("drop_small", None, 0.03)]


def test_holes_are_filled_where_that_helps(tmp_path) -> None:
    reference = organs()
    prediction = reference.copy()
    prediction[5, 5, 5] = 0
    learned = learn([pair(tmp_path, "c", prediction, reference)])
    assert [step[0] for step in done(learned)] == ["fill_holes"]
    reference[5, 5, 5] = 0
    assert done(learn([pair(tmp_path, "d", prediction, reference)])) == []


def test_what_helps_one_case_and_hurts_the_mean_is_left(tmp_path) -> None:
    islands, reference = organs(), organs()
    islands[12, 16, 0:2] = 1
    apart = organs()
    apart[12:14, 14:20, 0:8] = 1
    cases = [pair(tmp_path, "a", islands, reference), pair(tmp_path, "b", apart, apart)]
    assert done(learn(cases, actions=["keep_largest"])) == []


def test_a_gain_that_no_figure_shows_is_none(tmp_path) -> None:
    reference = np.zeros((40, 40, 40), np.uint8)
    reference[2:38, 2:38, 2:30] = 1
    prediction = reference.copy()
    prediction[20, 20, 39] = 1  # of 36288 voxels: the DSC rises by 0.00001
    learned = learn([pair(tmp_path, "a", prediction, reference)])
    assert learned.before["liver"] < 1
    assert done(learned) == []
    prediction[10:30, 20, 39] = 1
    found = learn([pair(tmp_path, "b", prediction, reference)]).rule.steps
    assert [f"{step.gain:+.4f}" for step in found] == ["+0.0003"]


def test_absent_classes_count_in_no_mean(tmp_path) -> None:
    only_liver = np.where(organs() == 1, organs(), 0).astype(np.uint8)
    prediction = only_liver.copy()
    prediction[0, 0, 20:23] = 2
    learned = learn([pair(tmp_path, "a", prediction, only_liver), pair(tmp_path, "b", organs(), organs())])
    assert learned.before == {"liver": 1.0, "spleen": 0.5}
    assert learned.after == {"liver": 1.0, "spleen": 1.0}, "what is in neither map has no score, not 0"


def test_the_foreground_is_taken_only_if_no_class_falls(tmp_path) -> None:
    reference = organs()
    prediction = reference.copy()
    prediction[0, 18:20, 0:12] = 1
    learned = learn([pair(tmp_path, "a", prediction, reference)], actions=["keep_largest"])
    assert done(learned) == [("keep_largest", "liver", None)], "liver and spleen do not touch"


def test_the_rule_gives_the_scores_that_it_was_learned_by(tmp_path) -> None:
    rng = np.random.default_rng(3)
    cases = []
    for i in range(3):
        noise = rng.random(organs().shape)
        prediction = np.where(noise < 0.01, 1, np.where(noise > 0.99, 2, organs())).astype(np.uint8)
        prediction[rng.random(organs().shape) < 0.01] = 0
        cases.append(pair(tmp_path, f"c{i}", prediction, organs()))
    learned = learn(cases, workers=2)
    assert len(learned.rule.steps) >= 3
    assert learn(cases) == learned
    scores = {name: [] for name in LABELS.foreground}
    for case in cases:
        prediction, reference = (read_label(path)[0].array[0] for path in (case.prediction, case.reference))
        after = postprocess(prediction, learned.rule.steps, LABELS, voxel_ml=EDGE_MM**3 / 1000)
        for name, found in case_metrics(reference, after, LABELS, (EDGE_MM,) * 3).items():
            scores[name].append(found.dsc)
    assert {name: np.mean(found) for name, found in scores.items()} == pytest.approx(learned.after)
    assert all(learned.after[name] > learned.before[name] for name in scores)


def test_faults_are_sentences(tmp_path) -> None:
    with pytest.raises(UsageError, match="no validation cases"):
        learn([])
    strange = organs()
    strange[0, 0, 0] = 7
    with pytest.raises(ImageError, match="the prediction holds 7"):
        learn([pair(tmp_path, "a", strange, organs())])
    with pytest.raises(ImageError, match="different grids"):
        learn([pair(tmp_path, "b", organs()[:-1], organs())])


def test_steps_read_as_words() -> None:
    assert (
        str(PostprocessingStep(action="drop_small", of="liver", smallest_ml=0.3))
        == "drop components of liver below 0.3 ml"
    )


def test_a_ring_in_one_slice_of_a_volume_has_no_hole(tmp_path) -> None:
    reference = np.zeros((9, 12, 12), np.uint8)
    reference[4, 3:8, 3:8] = 1
    ring = reference.copy()
    ring[4, 5, 5] = 0
    assert done(learn([pair(tmp_path, "a", ring, reference)])) == [], "above and below it is open"
