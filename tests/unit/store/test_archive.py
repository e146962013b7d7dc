"""Model archives: what goes out comes in again; what is damaged or hostile leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from rfmedsam2.errors import CheckpointError, UsageError
from rfmedsam2.pipeline.prediction.checkpoints import find_models
from rfmedsam2.pipeline.prediction.model_archive import export_model, import_model
from rfmedsam2.records.checkpoint import CheckpointRecord
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.records.model import UNetConfig
from rfmedsam2.records.plan import Normalization, Plan, Stage
from rfmedsam2.store import archive as archives
from rfmedsam2.store.checkpoints import read_all, write_checkpoint

NAME = "Dataset901_Zip"
WEIGHTS = "fold_0/checkpoint_final.safetensors"


def tiny_plan(**changes) -> Plan:
    network = UNetConfig(
        features=(2, 2),
        kernel_sizes=((3, 3), (3, 3)),
        strides=((1, 1), (2, 2)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    stage = Stage(
        spacing_mm=(1, 1, 1),
        median_shape=(8, 8, 8),
        patch_size=(8, 8),
        batch_size=1,
        normalization=(Normalization(kind="zscore"),),
        model=network,
    )
    zeros = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"), 0.0)
    return Plan.model_validate(
        {
            "name": "rfmed",
            "dataset": NAME,
            "fingerprint": "f",
            "channels": ("CT",),
            "labels": LabelSet.model_validate({"names": {"background": 0, "a": 1}}),
            "file_ending": ".nii.gz",
            "intensities": (zeros,),
            "stages": {"2d": stage},
        }
        | changes
    )


def train(results: Path, *, plan: Plan | None = None, fold: str = "0") -> Path:
    """A model folder with one fold that holds weights and optimizer state."""
    plan = plan or tiny_plan()
    folder = results / plan.dataset / f"{plan.name}__2d"
    record = CheckpointRecord(
        plan=plan,
        stage="2d",
        fold=fold,
        step=3,
        weights_sha256="",
        code_version="0",
        torch_version="2",
        created="2026-01-01T00:00:00Z",
    )
    tensors = {"model/w": torch.arange(50.0), "optimizer/w": torch.ones(50)}
    (folder / f"fold_{fold}").mkdir(parents=True)
    write_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.safetensors", record, tensors, {"step": 3})
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    train(tmp_path / "trained", fold="1")
    return train(tmp_path / "trained")


@pytest.fixture
def archive(model: Path, tmp_path: Path) -> Path:
    export_model(model, tmp_path / "model.zip", folds=["0"])
    return tmp_path / "model.zip"


def rebuilt(archive: Path, *, add: dict | None = None, change: dict | None = None, manifest=None) -> Path:
    """The archive again with members added, contents changed or the manifest edited."""
    path = archive.with_name("changed.zip")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            data = (change or {}).get(member.filename, source.read(member))
            if member.filename == "manifest.json" and manifest is not None:
                document = json.loads(data)
                manifest(document)
                data = json.dumps(document)
            target.writestr(member.filename, data)
        for member, data in (add or {}).items():
            target.writestr(member, data)
    return path


def import_fails(archive: Path, tmp_path: Path, match: str) -> None:
    """Importing fails with a sentence and leaves neither a model nor a temporary file."""
    before = {p for p in tmp_path.rglob("*") if "results" not in p.parts}
    with pytest.raises(CheckpointError, match=match):
        import_model(archive, tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []
    assert {p for p in tmp_path.rglob("*") if "results" not in p.parts} == before


def test_a_model_goes_out_and_comes_in_without_training_state(model, tmp_path) -> None:
    manifest = export_model(model, tmp_path / "out" / "model.zip")
    found = import_model(tmp_path / "out" / "model.zip", tmp_path / "results")
    assert (found.dataset, found.plan, found.stage, found.folds) == (NAME, "rfmed", "2d", ("0", "1"))
    assert find_models(tmp_path / "results") == [found]
    for fold, listed in zip(("0", "1"), manifest.models, strict=True):
        old, _, _ = read_all(model / f"fold_{fold}" / "checkpoint_final.safetensors")
        new, tensors, state = read_all(found.folder / f"fold_{fold}" / "checkpoint_final.safetensors")
        assert listed.weights_sha256 == new.weights_sha256 == old.weights_sha256
        assert set(tensors) == {"model/w"}
        assert state == {}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.zip"]


def test_equal_models_give_equal_archives(model, tmp_path) -> None:
    export_model(model, tmp_path / "a.zip")
    export_model(model, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_model_that_is_there_is_replaced_only_by_force(archive, tmp_path) -> None:
    found = import_model(archive, tmp_path / "results")
    (found.folder / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        import_model(archive, tmp_path / "results")
    assert (found.folder / "note.txt").is_file()
    import_model(archive, tmp_path / "results", force=True)
    assert not (found.folder / "note.txt").exists()
    assert [p.name for p in (tmp_path / "results").iterdir()] == [NAME]


def test_a_failed_import_by_force_keeps_the_old_model(archive, tmp_path) -> None:
    found = import_model(archive, tmp_path / "results")
    with pytest.raises(CheckpointError):
        import_model(rebuilt(archive, change={WEIGHTS: b"x" * 10}), tmp_path / "results", force=True)
    assert (found.folder / WEIGHTS).is_file()


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "fold_0/../../evil.json",
        "/tmp/evil.json",
        "C:/evil.json",
        "C:\\evil.json",
        "..\\evil.json",
        "fold_0/run.py",
        "fold_0/weights.pth",
        "a/b/c/d.json",
        ".hidden.json",
        "fold_0/",
        "x\n.json",
    ],
)
def test_names_that_could_leave_the_folder_or_run_are_refused(archive, tmp_path, name) -> None:
    import_fails(rebuilt(archive, add={name: b"{}"}), tmp_path, "not allowed in a model archive")


def test_links_are_refused(archive, tmp_path) -> None:
    link = zipfile.ZipInfo("fold_0/link.json")
    link.create_system = 3
    link.external_attr = 0o120777 << 16
    import_fails(rebuilt(archive, add={link: b"/etc/passwd"}), tmp_path, "other than a regular file")


def test_names_that_differ_only_in_case_are_refused(archive, tmp_path) -> None:
    import_fails(
        rebuilt(archive, add={"Fold_0/checkpoint_final.safetensors": b"x"}), tmp_path, "two files of the same name"
    )


def test_a_file_that_the_manifest_does_not_list_is_refused(archive, tmp_path) -> None:
    import_fails(rebuilt(archive, add={"fold_0/more.json": b"{}"}), tmp_path, "does not hold what its manifest lists")


def test_a_changed_file_is_refused(archive, tmp_path) -> None:
    with zipfile.ZipFile(archive) as members:
        data = bytearray(members.read(WEIGHTS))
    data[-1] ^= 1
    import_fails(rebuilt(archive, change={WEIGHTS: bytes(data)}), tmp_path, "does not match the manifest")


def test_a_pickle_dressed_as_a_checkpoint_is_refused_and_not_run(archive, tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    data = pickle.dumps(Bomb())

    def swear(manifest: dict) -> None:
        manifest["files"] = [{"name": WEIGHTS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]

    import_fails(rebuilt(archive, change={WEIGHTS: data}, manifest=swear), tmp_path, "pickle")
    assert not (tmp_path / "ran").exists()


def test_a_torch_file_dressed_as_a_checkpoint_is_refused(archive, tmp_path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream)
    data = stream.getvalue()

    def swear(manifest: dict) -> None:
        manifest["files"] = [{"name": WEIGHTS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]

    import_fails(rebuilt(archive, change={WEIGHTS: data}, manifest=swear), tmp_path, "never opened")


def test_a_manifest_that_names_another_model_is_refused(archive, tmp_path) -> None:
    def lie(manifest: dict) -> None:
        manifest["models"][0]["weights_sha256"] = "0" * 64

    import_fails(rebuilt(archive, manifest=lie), tmp_path, "does not match the manifest")


@pytest.mark.parametrize("dataset", ["Dataset902_../../x", "..", "/abs", "Dataset902_a\\b", "liver"])
def test_a_dataset_name_that_leaves_the_results_folder_is_refused(archive, tmp_path, dataset) -> None:
    plan = tiny_plan().model_copy(update={"dataset": dataset})
    record = read_all(tmp_path / "trained" / NAME / "rfmed__2d" / WEIGHTS)[0].model_copy(update={"plan": plan})
    hostile = tmp_path / "hostile.safetensors"
    write_checkpoint(hostile, record, {"model/w": torch.arange(50.0)}, {})
    data = hostile.read_bytes()

    def adapt(manifest: dict) -> None:
        manifest["dataset"] = dataset
        manifest["files"] = [{"name": WEIGHTS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]

    hostile = rebuilt(archive, change={WEIGHTS: data}, manifest=adapt)
    import_fails(hostile, tmp_path, "not named like a dataset|expected a plain name")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_refused(archive, tmp_path, share) -> None:
    path = tmp_path / "short.zip"
    path.write_bytes(archive.read_bytes()[: int(share * archive.stat().st_size)])
    import_fails(path, tmp_path, "truncated")


def test_any_flipped_byte_is_refused_or_harmless(archive, tmp_path) -> None:
    whole = archive.read_bytes()
    wanted = read_all(tmp_path / "trained" / NAME / "rfmed__2d" / WEIGHTS)[0].weights_sha256
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        data = bytearray(whole)
        data[place] ^= 0x55
        path = tmp_path / "flipped.zip"
        path.write_bytes(data)
        try:
            found = import_model(path, tmp_path / "results", force=True)
        except CheckpointError:
            continue
        assert read_all(found.folder / WEIGHTS)[0].weights_sha256 == wanted


def test_a_zip_without_manifest_and_a_missing_file_are_sentences(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.json", "{}")
    import_fails(tmp_path / "x.zip", tmp_path, "not a model archive")
    import_fails(tmp_path / "absent.zip", tmp_path, "archive does not exist")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(archive, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    import_fails(archive, tmp_path, "too large")


def test_a_member_larger_than_its_header_says_is_not_unpacked_whole(archive, tmp_path) -> None:
    path = archive.with_name("bomb.zip")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("manifest.json", source.read("manifest.json"))
        target.writestr(WEIGHTS, source.read(WEIGHTS) * 100)
    import_fails(path, tmp_path, "does not hold what its manifest lists")


def test_a_member_that_is_packed_too_far_is_refused_before_it_is_unpacked(archive, tmp_path) -> None:
    path = archive.with_name("bomb.zip")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("manifest.json", source.read("manifest.json"))
        target.writestr(WEIGHTS, b"\0" * 5_000_000)
    import_fails(path, tmp_path, "too high a compression ratio")


def test_folds_without_a_checkpoint_cannot_be_exported(model, tmp_path) -> None:
    with pytest.raises(UsageError, match="fold has not been trained"):
        export_model(model, tmp_path / "m.zip", folds=["5"])
    assert not (tmp_path / "m.zip").exists()
