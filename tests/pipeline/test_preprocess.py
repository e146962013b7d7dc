"""Fingerprint and preprocessing of whole datasets: what is skipped, rebuilt, refused."""

from __future__ import annotations

import errno
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import pytest

import rfmedsam2.pipeline.preprocessing.case_reader as source_module
from rfmedsam2.errors import DatasetError, PlanError, RfMedSamError, StoreError
from rfmedsam2.pipeline.preprocessing.case_reader import CaseReader
from rfmedsam2.pipeline.preprocessing.case_source import changes_since
from rfmedsam2.pipeline.preprocessing.fingerprint import Distribution, fingerprint, mixture_statistics, same_images
from rfmedsam2.pipeline.preprocessing.memory_estimate import case_bytes, memory_need
from rfmedsam2.pipeline.preprocessing.preprocess import preprocess
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Normalization, Plan, Stage
from rfmedsam2.store.layout import Layout
from rfmedsam2.store.lock import InUseError, shared_lock
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.raw import RawDataset, open_dataset

NAME = "Dataset001_Toy"
CASES = ("toy_1", "toy_2", "toy_3")


@dataclass
class Toy:
    layout: Layout

    @property
    def folder(self) -> Path:
        return self.layout.raw / NAME

    def dataset(self) -> RawDataset:
        return open_dataset(self.folder)

    def image(self, case: str) -> Path:
        return self.folder / "imagesTr" / f"{case}_0000.nii.gz"

    def label(self, case: str) -> Path:
        return self.folder / "labelsTr" / f"{case}.nii.gz"

    def write(self, case: str, *, seed: int = 0, floating: bool = False) -> None:
        rng = np.random.default_rng(seed)
        image = rng.integers(-200, 400, (14, 16, 10)).astype(np.int16)
        label = np.zeros(image.shape, np.uint8)
        label[3:8, 4:10, 2:6], label[9:12, 4:10, 5:8] = 1, 2
        affine = np.diag([1.0, 1.0, 2.0, 1.0])
        self.image(case).parent.mkdir(parents=True, exist_ok=True)
        self.label(case).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(image + np.float32(0.25) if floating else image, affine), self.image(case))
        nib.save(nib.Nifti1Image(label, affine), self.label(case))

    def plan(self, channels: tuple[str, ...] = ("CT",), normalization: Literal["ct", "zscore"] = "ct") -> Plan:
        found = fingerprint(self.dataset(), self.layout)
        model = UNetConfig(
            features=(4, 4),
            kernel_sizes=((3, 3, 3),) * 2,
            strides=((1, 1, 1), (2, 2, 2)),
            encoder_blocks=(1, 1),
            decoder_blocks=(1,),
        )
        fine = Stage(
            spacing_mm=(1.6, 1.0, 1.0),
            median_shape=(12, 16, 14),
            patch_size=(8, 8, 8),
            batch_size=2,
            normalization=(Normalization(kind=normalization),) * len(channels),
            model=model,
        )
        return Plan(
            name="plan",
            dataset=NAME,
            fingerprint=found.digest,
            channels=channels,
            labels=self.dataset().json.label_set,
            file_ending=".nii.gz",
            intensities=found.intensities,
            stages={
                "3d_fullres": fine,
                "3d_wide": fine.model_copy(update={"batch_size": 4}),
                "3d_lowres": fine.model_copy(update={"spacing_mm": (3.0, 2.0, 2.0)}),
            },
        )

    def store(self, stage: str = "3d_fullres") -> CaseStore:
        return CaseStore(self.layout.cases_folder(NAME, "plan", stage))


@pytest.fixture
def toy(tmp_path) -> Toy:
    made = Toy(Layout.under(tmp_path))
    for seed, case in enumerate(CASES):
        made.write(case, seed=seed)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (made.folder / "dataset.json").write_text(json.dumps(content))
    return made


def counts(summary) -> tuple[int, int, int]:
    return summary.done, summary.skipped, summary.rebuilt


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Ids of the cases whose files are decoded, as it happens."""
    seen: list[str] = []
    real = source_module.examine_case

    def counted(case, dataset_json):
        seen.append(case.id)
        return real(case, dataset_json)

    monkeypatch.setattr(source_module, "examine_case", counted)
    return seen


def test_a_second_run_skips_everything_and_reads_nothing(toy, reads):
    plan = toy.plan()
    first = preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    assert counts(first) == (3, 0, 0)
    assert first.bytes > 0
    reads.clear()
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 3, 0)
    assert reads == []
    assert toy.store().ids() == CASES


def test_touched_files_change_nothing(toy, reads):
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    before = {path.name: path.stat().st_mtime_ns for path in toy.store().folder.glob("*.b2nd")}
    reads.clear()
    for path in toy.folder.rglob("*.gz"):
        os.utime(path, (5, 5))
    assert toy.plan().fingerprint == plan.fingerprint
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 3, 0)
    assert reads == []
    assert {path.name: path.stat().st_mtime_ns for path in toy.store().folder.glob("*.b2nd")} == before
    record = toy.store().open("toy_1").record
    assert {file.modified_ns for file in record.sources.values()} == {5 * 10**9}  # so that they are not compared again


def test_other_contents_of_the_same_size_and_an_earlier_time_are_noticed(toy):
    """As after a clock that was set back, or from an archive."""
    path = toy.label("toy_2")
    content = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8).copy()

    def write():
        path.write_bytes(gzip.compress(content.tobytes(), compresslevel=0, mtime=0))
        return path.stat().st_size

    before = write()
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    voxels = content[352:]
    voxels[:] = np.array([0, 2, 1], np.uint8)[voxels]
    assert write() == before
    os.utime(path, (9, 9))
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 2, 1)
    assert np.argmax(np.bincount(toy.store().open("toy_2").label().ravel() + 1)[2:]) == 1  # the larger one is 2 now


def test_channels_that_are_listed_in_another_order_are_noticed(toy):
    """With an explicit file list all files stay as they are."""
    content = json.loads((toy.folder / "dataset.json").read_text())
    content["channel_names"] = {"0": "T1", "1": "T2"}

    def listed(*names: str) -> RawDataset:
        files = {case: [f"imagesTr/{case}_{name}.nii.gz" for name in names] for case in CASES}
        content["dataset"] = {c: {"images": files[c], "label": f"labelsTr/{c}.nii.gz"} for c in CASES}
        (toy.folder / "dataset.json").write_text(json.dumps(content))
        return toy.dataset()

    for seed, case in enumerate(CASES, start=5):
        toy.image(case).rename(toy.image(case).with_name(f"{case}_t1.nii.gz"))
        toy.write(case, seed=seed)
        toy.image(case).rename(toy.image(case).with_name(f"{case}_t2.nii.gz"))
    dataset = listed("t1", "t2")
    plan = toy.plan(("T1", "T2"), "zscore")
    preprocess(dataset, plan, ["3d_fullres"], toy.layout)
    before = toy.store().open("toy_1").image()
    assert not any(changes_since(toy.store().open(c.id).record, c, plan, "3d_fullres").files for c in dataset.training)
    turned = listed("t2", "t1")
    changes = [changes_since(toy.store().open(case.id).record, case, plan, "3d_fullres") for case in turned.training]
    assert changes[0].files == ("toy_1_t2.nii.gz", "toy_1_t1.nii.gz")
    assert counts(preprocess(turned, plan, ["3d_fullres"], toy.layout)) == (0, 0, 3)
    np.testing.assert_array_equal(toy.store().open("toy_1").image(), before[::-1])


def test_a_file_that_changes_while_it_is_read_is_named(toy, monkeypatch):
    real = source_module.examine_case

    def changing(case, dataset_json):
        found = real(case, dataset_json)
        if case.id == "toy_2":
            toy.write("toy_2", seed=50)
        return found

    monkeypatch.setattr(source_module, "examine_case", changing)
    with pytest.raises(RfMedSamError, match="A file of case toy_2 changed while it was read"):
        toy.plan()


def test_cases_are_not_rebuilt_under_whoever_reads_them(toy):
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    before = toy.store().open("toy_1").image()
    with shared_lock(toy.store().folder):
        assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 3, 0)
        toy.write("toy_1", seed=50)
        with pytest.raises(InUseError, match=r"Another run .* 1 case\(s\) here that must be made: toy_1\. Wait until"):
            preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    np.testing.assert_array_equal(toy.store().open("toy_1").image(), before)
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 2, 1)
    assert not np.array_equal(toy.store().open("toy_1").image(), before)


def test_ids_that_end_like_files_of_others_are_finished_once(toy):
    for name in ("toy_1_label", "toy_1.image"):
        toy.write(name, seed=3)
    plan = toy.plan()
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (5, 0, 0)
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 5, 0)


@pytest.mark.parametrize("harm", ["image missing", "label missing", "wrong ending", "truncated", "foreign value"])
def test_a_case_with_an_error_is_refused_by_name_and_left_out_on_request(toy, harm):
    if harm == "image missing":
        toy.image("toy_2").unlink()
    elif harm == "label missing":
        toy.label("toy_2").unlink()
    elif harm == "wrong ending":
        nib.save(nib.load(toy.image("toy_2")), toy.image("toy_2").with_name("toy_2_0000.nii"))
        toy.image("toy_2").unlink()
        toy.label("toy_2").unlink()
    elif harm == "truncated":
        toy.image("toy_2").write_bytes(toy.image("toy_2").read_bytes()[:300])
    else:
        label = nib.load(toy.label("toy_2"))
        nib.save(nib.Nifti1Image(np.asarray(label.dataobj) * 4, label.affine), toy.label("toy_2"))
    with pytest.raises(DatasetError, match=r"(?s)toy_2.*skip_faulty=True"):
        fingerprint(toy.dataset(), toy.layout)
    assert not toy.layout.preprocessed.exists()
    whole = fingerprint(toy.dataset(), toy.layout, skip_faulty=True)
    assert list(whole.left_out) == ["toy_2" if harm != "wrong ending" else "toy_2_0000"]
    assert [case.id for case in whole.cases] == ["toy_1", "toy_3"]
    with pytest.raises(DatasetError, match="toy_2"):  # not even then it is left out in silence
        fingerprint(toy.dataset(), toy.layout)
    toy.image("toy_2").with_name("toy_2_0000.nii").unlink(missing_ok=True)
    toy.write("toy_2", seed=1)
    assert fingerprint(toy.dataset(), toy.layout).left_out == {}


@pytest.mark.parametrize("found", [False, True])
def test_links_that_lead_nowhere_are_faults_of_their_cases(toy, found):
    """The first was named alone, and could not be left out."""
    if found:
        fingerprint(toy.dataset(), toy.layout)
    for path in (toy.image("toy_2"), toy.label("toy_2"), toy.label("toy_3")):
        path.unlink()
        path.symlink_to(path if path == toy.label("toy_3") else path.with_name("nowhere.nii.gz"))
    with pytest.raises(DatasetError, match=r"(?s)3 fault.*toy_2: .*a link to .*nowhere.*toy_3: .*skip_faulty"):
        fingerprint(toy.dataset(), toy.layout)
    whole = fingerprint(toy.dataset(), toy.layout, skip_faulty=True)
    assert [case.id for case in whole.cases] == ["toy_1"]
    assert list(whole.left_out) == ["toy_2", "toy_3"]


def test_cases_with_the_same_image_are_known_whatever_their_labels(toy):
    assert same_images(toy.dataset(), fingerprint(toy.dataset(), toy.layout).cases) == []
    toy.image("toy_3").write_bytes(toy.image("toy_1").read_bytes())
    toy.label("toy_2").write_bytes(toy.label("toy_1").read_bytes())
    assert same_images(toy.dataset(), fingerprint(toy.dataset(), toy.layout).cases) == [("toy_1", "toy_3")]


def test_no_case_without_errors_is_refused(toy):
    for case in CASES:
        toy.image(case).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"3 fault"):
        fingerprint(toy.dataset(), toy.layout, skip_faulty=True)


def test_one_read_serves_fingerprint_and_all_stages(toy, reads):
    plan = toy.plan()
    reads.clear()
    source = CaseReader(toy.dataset(), budget_bytes=1 << 24)
    fingerprint(source, toy.layout, clean=True)
    summary = preprocess(source, plan, ["3d_fullres", "3d_wide", "3d_lowres"], toy.layout)
    assert counts(summary) == (9, 0, 0)
    assert sorted(reads) == list(CASES)
    assert toy.store("3d_lowres").open("toy_1").shape == (7, 8, 7)


def test_what_does_not_fit_in_memory_is_read_again(toy, reads):
    plan = toy.plan()
    one = CaseReader(toy.dataset()).read(toy.dataset().training[0]).volume.array.nbytes
    reads.clear()
    # packed, noise takes more than half as much: room for one case, not for two
    source = CaseReader(toy.dataset(), budget_bytes=one)
    fingerprint(source, toy.layout, workers=1, clean=True)
    preprocess(source, plan, ["3d_fullres"], toy.layout, workers=1)
    assert reads == ["toy_1", "toy_2", "toy_3", "toy_2", "toy_3"]


def test_a_kept_volume_is_not_used_after_its_file_changed(toy):
    source = CaseReader(toy.dataset(), budget_bytes=1 << 24)
    case = source.dataset.training[0]
    before = source.read(case, last=False)
    toy.write(case.id, seed=77)
    assert not np.array_equal(source.read(case).volume.array, before.volume.array)


def test_a_broken_case_and_one_with_a_changed_source_are_rebuilt(toy):
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    before = toy.store().open("toy_2").image()
    broken = toy.store().folder / "toy_1.b2nd"
    broken.write_bytes(broken.read_bytes()[:-40])
    toy.write("toy_2", seed=99)
    assert counts(preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)) == (0, 1, 2)
    assert np.isfinite(toy.store().open("toy_1").image()).all()
    assert not np.array_equal(toy.store().open("toy_2").image(), before)


def test_another_normalization_rebuilds_and_another_batch_size_does_not(toy):
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    stage = plan.stages["3d_fullres"]
    larger = plan.model_copy(update={"stages": {"3d_fullres": stage.model_copy(update={"batch_size": 7})}})
    assert counts(preprocess(toy.dataset(), larger, ["3d_fullres"], toy.layout)) == (0, 3, 0)
    other = stage.model_copy(update={"normalization": (Normalization(kind="zscore"),)})
    changed = plan.model_copy(update={"stages": {"3d_fullres": other}})
    assert counts(preprocess(toy.dataset(), changed, ["3d_fullres"], toy.layout)) == (0, 0, 3)


def test_all_bad_cases_are_named_and_the_good_ones_done(toy):
    plan = toy.plan()
    truncated = toy.image("toy_1")
    truncated.write_bytes(truncated.read_bytes()[:400])
    label = nib.load(toy.label("toy_3"))
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) * 4, label.affine), toy.label("toy_3"))
    with pytest.raises(DatasetError, match="2 of 3 cases") as caught:
        preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    assert "toy_1" in str(caught.value)
    assert "toy_3" in str(caught.value)
    assert "label value" in str(caught.value)
    assert toy.store().ids() == ("toy_2",)


def test_a_nan_voxel_is_named(toy):
    plan = toy.plan()
    image = np.zeros((14, 16, 10), np.float32)
    image[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(image, np.diag([1.0, 1.0, 2.0, 1.0])), toy.image("toy_2"))
    with pytest.raises(DatasetError, match=r"toy_2.*NaN"):
        preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    with pytest.raises(DatasetError, match=r"(?s)toy_2.*NaN"):
        fingerprint(toy.dataset(), toy.layout)


def test_a_full_disk_is_a_sentence_and_finished_cases_stay(toy, monkeypatch):
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    for suffix in (".json", ".b2nd"):
        (toy.store().folder / ("toy_3" + suffix)).unlink()

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="disk is full"):
        preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)
    assert toy.store().ids() == ("toy_1", "toy_2")
    assert not list(toy.store().folder.glob("*partial*"))


def test_an_unwritable_folder_is_a_sentence(toy, monkeypatch):
    plan = toy.plan()

    def refuse(**where):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("rfmedsam2.system.atomic.tempfile.mkstemp", refuse)
    with pytest.raises(StoreError, match=r"folder cannot be written: .*plan_3d_fullres"):
        preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)


def test_a_file_in_place_of_the_folder_is_a_sentence(toy):
    plan = toy.plan()
    toy.layout.cases_folder(NAME, "plan", "3d_fullres").write_text("not a folder")
    with pytest.raises(StoreError, match="Expected a folder"):
        preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout)


def test_an_unknown_stage_is_refused(toy):
    with pytest.raises(PlanError, match="3d_fullres, 3d_wide, 3d_lowres"):
        preprocess(toy.dataset(), toy.plan(), ["4d"], toy.layout)


def test_one_worker_gives_what_three_give(toy, tmp_path):
    plan = toy.plan()
    preprocess(toy.dataset(), plan, ["3d_fullres"], toy.layout, workers=3)
    other = Layout(raw=toy.layout.raw, preprocessed=tmp_path / "other", results=tmp_path / "results")
    preprocess(toy.dataset(), plan, ["3d_fullres"], other, workers=1)
    for case in CASES:
        ours = toy.store().open(case)
        theirs = CaseStore(other.cases_folder(NAME, "plan", "3d_fullres")).open(case)
        np.testing.assert_array_equal(ours.image(), theirs.image())
        np.testing.assert_array_equal(ours.label(), theirs.label())
        for key, index in ours.foreground.items():
            np.testing.assert_array_equal(index, theirs.foreground[key])


def test_fewer_workers_when_memory_is_short(toy, monkeypatch):
    plan, source = toy.plan(), CaseReader(toy.dataset())

    def workers(free):
        monkeypatch.setattr("rfmedsam2.pipeline.preprocessing.memory_estimate.free_bytes", lambda: free)
        need = memory_need(source, plan, ["3d_fullres"], 8)
        assert need.free_bytes == free
        return need.workers

    each = case_bytes(source.extents()[0], plan, ["3d_fullres"])
    assert workers(1 << 34) == 8
    assert [workers(int(n * each / 0.6) + 10) for n in (0, 1, 2, 3)] == [1, 1, 2, 8]


def test_the_fingerprint_is_taken_once(toy, reads):
    first = fingerprint(toy.dataset(), toy.layout)
    assert len(reads) == 3
    assert fingerprint(toy.dataset(), toy.layout) == first
    assert len(reads) == 3
    fingerprint(toy.dataset(), toy.layout, clean=True)
    assert len(reads) == 6


def test_a_changed_or_broken_fingerprint_is_taken_anew(toy, reads):
    first = fingerprint(toy.dataset(), toy.layout)
    toy.write("toy_1", seed=50)
    second = fingerprint(toy.dataset(), toy.layout)
    assert second.digest != first.digest
    assert second.intensities != first.intensities
    toy.layout.fingerprint_file(NAME).write_text('{"format": 1')
    assert fingerprint(toy.dataset(), toy.layout) == second
    assert len(reads) == 9


def test_what_verification_warns_of_is_said_once_for_each_kind(toy, caplog):
    """Whoever plans at once never sees the table of rfmed_verify."""
    content = json.loads((toy.folder / "dataset.json").read_text())
    (toy.folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 9}))
    for case in CASES[1:]:
        for path in (toy.image(case), toy.label(case)):
            image = nib.load(path)
            moved = image.affine.copy()
            moved[0, 3] += 40
            image.set_sform(image.affine, 2)
            image.set_qform(moved, 1)
            nib.save(image, path)
    fingerprint(toy.dataset(), toy.layout)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "numTraining is 9, but there are 3 training cases" in text
    assert "2 case(s) (toy_2, toy_3): ITK and nibabel place this image differently, by up to 40 mm" in text
    assert text.count("nibabel place") == 1
    caplog.clear()
    fingerprint(toy.dataset(), toy.layout)  # nothing is read
    assert [record.getMessage()[:14] for record in caplog.records] == ["numTraining is"]


def test_a_dataset_without_any_foreground_is_refused(toy):
    for case in CASES:
        image = nib.load(toy.label(case))
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), toy.label(case))
    with pytest.raises(DatasetError, match="foreground"):
        fingerprint(toy.dataset(), toy.layout)


def test_all_faults_of_all_cases_are_in_the_fingerprints_error(toy):
    for case in ("toy_1", "toy_2"):
        path = toy.image(case)
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"2 fault") as caught:
        fingerprint(toy.dataset(), toy.layout)
    assert "toy_1" in str(caught.value)
    assert "toy_2" in str(caught.value)


def test_the_mixture_weighs_cases_equally():
    many = Distribution.of(np.full(1000, 10, np.int16), 4096)
    few = Distribution.of(np.array([20, 30], np.int16), 4096)
    found = mixture_statistics([many, None, few])
    assert found.mean == pytest.approx(17.5)
    assert found.std == pytest.approx(np.sqrt(0.5 * 7.5**2 + 0.25 * 2.5**2 + 0.25 * 12.5**2))
    assert (found.median, found.percentile_00_5, found.percentile_99_5) == (10, 10, 30)
    assert (found.min, found.max) == (10, 30)


def test_thinned_quantiles_are_close_to_all_values():
    values = np.random.default_rng(0).gamma(2, 300, 400_000).astype(np.float32)
    thin = mixture_statistics([Distribution.of(values, 4096)])
    low, median, high = np.percentile(values, [0.5, 50, 99.5])
    assert thin.percentile_00_5 == pytest.approx(low, rel=0.03)
    assert thin.median == pytest.approx(median, rel=1e-3)
    assert thin.percentile_99_5 == pytest.approx(high, rel=0.01)
    assert thin.mean == pytest.approx(float(values.mean(dtype=np.float64)), rel=1e-9)
    assert thin.max == values.max()
