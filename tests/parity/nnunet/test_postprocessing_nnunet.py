"""Postprocessing by the largest component, against nnU-Net's: the same decisions, label maps and means."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from rfmedsam2.pipeline.selection.learning import ValidationCase, learn_rule
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.images import read_label
from rfmedsam2.transforms.postprocess import postprocess

nnunet = pytest.importorskip("nnunetv2.postprocessing.remove_connected_components")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
DATASET = {"labels": LABELS, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
PLANS = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}


def reference(rng: np.random.Generator, *, touching: bool) -> np.ndarray:
    """Three classes, side by side or apart; c is absent in some cases."""
    volume = np.zeros((16, 20, 24), np.uint8)
    gap = 0 if touching else 3
    volume[3:12, 4:14, 2:8] = 1
    volume[3:12, 4:14, 8 + gap : 13 + gap] = 2
    if rng.random() < 0.6:
        volume[4:10, 5:12, 13 + 2 * gap : 16 + 2 * gap] = 3
    return volume


def spoiled(rng: np.random.Generator, volume: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """With islands of some classes, and small errors everywhere."""
    result = volume.copy()
    for value in classes:
        z, y = rng.integers(0, 3), rng.integers(15, 18)
        result[13 + z : 15 + z, y : y + 2, 3 * value : 3 * value + 2] = value
    result[rng.random(volume.shape) < 0.01] = 0
    return result


@pytest.mark.parametrize(("touching", "islands"), [(True, (1, 2, 3)), (False, (2, 3)), (False, ())])
def test_the_same_components_are_removed(touching, islands, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    cases = []
    for i in range(5):
        truth = reference(rng, touching=touching)
        places = {"p": spoiled(rng, truth, islands), "r": truth}
        for name, array in places.items():
            path = tmp_path / name / f"case{i}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)
        files = [tmp_path / name / f"case{i}.nii.gz" for name in places]
        cases.append(ValidationCase(id=f"case{i}", prediction=files[0], reference=files[1]))
    _, theirs = nnunet.determine_postprocessing(str(tmp_path / "p"), str(tmp_path / "r"), PLANS, DATASET, 1)
    labels = LabelSet.from_dataset_json(LABELS)
    ours = learn_rule(cases, labels, "Dataset001_X", actions=["keep_largest"])
    values = [[1, 2, 3] if step.of is None else labels.foreground[step.of][0] for step in ours.rule.steps]
    assert values == [options["labels_or_regions"] for options in theirs]
    assert bool(values) == bool(islands)
    for case in cases:
        before, after = (read_label(path)[0].array[0] for path in (case.prediction, theirs_of(case)))
        np.testing.assert_array_equal(postprocess(before, ours.rule.steps, labels, voxel_ml=0.002), after)
    means = json.loads((tmp_path / "p" / "postprocessing.json").read_text())
    before = {name: means["input_folder"]["mean"][str(value)]["Dice"] for name, value in [*LABELS.items()][1:]}
    assert ours.before == pytest.approx(before, abs=1e-9)
    assert pickle.loads((tmp_path / "p" / "postprocessing.pkl").read_bytes())[1] == theirs  # written here just now


def theirs_of(case: ValidationCase) -> Path:
    return case.prediction.parent / "postprocessed" / case.prediction.name
