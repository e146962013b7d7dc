"""The doctor tells what is there, warns of what is lacking, and never fails."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

import rfmedsam2
from rfmedsam2.cli.console import show_doctor
from rfmedsam2.pipeline import doctor as module
from rfmedsam2.pipeline.doctor import doctor
from rfmedsam2.store.layout import Layout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def messages(report: module.DoctorReport) -> str:
    return "\n".join(advice.message for advice in report.warnings)


def test_the_report_is_complete_json(tmp_path: Path) -> None:
    report = doctor(Layout.under(tmp_path), folders_from="--root")
    content = json.loads(json.dumps(report.as_json()))
    assert content["package"] == rfmedsam2.__version__
    assert content["packages"]["torch"]
    assert content["devices"][0]["kind"] == "cpu"
    assert content["ram_gib"] >= content["ram_free_gib"] > 0
    assert content["folders_from"] == "--root"
    assert [folder["name"] for folder in content["folders"]] == ["raw", "preprocessed", "results"]


def test_folders_that_commands_would_make_count_as_writable(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    raw, preprocessed, _ = doctor(Layout.under(tmp_path)).folders
    assert (raw.exists, raw.writable) == (True, True)
    assert (preprocessed.exists, preprocessed.writable) == (False, True)
    assert raw.free_gib is not None
    assert not (tmp_path / "preprocessed").exists()


def test_a_file_in_the_way_of_a_folder_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    assert "raw folder cannot be written" in messages(doctor(Layout.under(tmp_path / "root")))


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="permissions do not bind")
def test_an_unwritable_folder_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir(mode=0o500)
    assert "raw folder cannot be written" in messages(doctor(Layout.under(tmp_path)))


def test_without_a_layout_the_default_is_shown() -> None:
    assert doctor().folders[0].path == Path("rfmed_data/raw").absolute()


def test_a_missing_package_is_a_warning_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.metadata, "requires", lambda name: ["numpy>=1", "no-such-package-anywhere>=2"])
    report = doctor(Layout.under(tmp_path))
    assert report.packages["no-such-package-anywhere"] is None
    assert any(advice.remedy == "pip install no-such-package-anywhere" for advice in report.warnings)


@pytest.mark.parametrize("error", [ImportError("no torch"), OSError("libcudart.so.12: cannot open")])
def test_a_broken_torch_is_a_warning(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    report = doctor(Layout.under(tmp_path))
    assert [device.kind for device in report.devices] == ["cpu"]
    assert str(error) in messages(report)


class _Cuda:
    """A torch that has one GPU."""

    broken = False

    def __init__(self) -> None:
        self.cuda = self
        self.backends = self
        self.mps = self

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def get_device_name(self, index: int) -> str:
        return "Some GPU"

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if self.broken:
            raise RuntimeError("CUDA driver is too old")
        return 20 * 2**30, 24 * 2**30


def test_a_gpu_is_listed_with_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: _Cuda())
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    report = doctor(Layout.under(tmp_path))
    gpu = report.devices[1]
    assert (gpu.kind, gpu.name, gpu.memory_gib, gpu.free_gib) == ("cuda:0", "Some GPU", 24, 20)
    assert "No GPU" not in messages(report)
    assert "no C++ compiler" in messages(report)


def test_a_gpu_that_cannot_be_used_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = _Cuda()
    torch.broken = True
    monkeypatch.setattr(importlib, "import_module", lambda name: torch)
    assert "driver is too old" in messages(doctor(Layout.under(tmp_path)))


def test_low_limits_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_open_file_limits", lambda: (256, 4096))
    monkeypatch.setattr(module, "_free_gib", lambda path: 0.1)
    monkeypatch.setattr(module, "total_bytes", lambda: 2 << 30)
    monkeypatch.setattr(module, "free_bytes", lambda: 2 << 30)
    report = doctor(Layout.under(tmp_path))
    text = messages(report)
    assert report.ram_gib == 2.0
    for words in ("256 files", "0.1 GiB of disk", "2 GiB of memory", "/dev/shm"):
        assert words in text
    assert all(advice.remedy for advice in report.warnings)


def test_trained_models_are_listed_and_those_of_nnunet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "results" / "Dataset004_Hippocampus"
    files = (
        "rfmed__3d_fullres/fold_0/checkpoint_final.safetensors",
        *(f"nnUNetTrainer__nnUNetPlans__3d_fullres/fold_{fold}/checkpoint_final.pth" for fold in (0, 1, "all")),
        "nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json",
        "nnUNetTrainer__nnUNetPlans__2d/fold_0/checkpoint_final.pth",  # without its plans it is no model
        "nnUNetTrainer__nnUNetPlans__3d_fullres/crossval_results_folds_0_1_2_3_4/summary.json",
    )
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    report = doctor(Layout.under(tmp_path))
    assert [(m.trained_by, m.dataset, m.plan, m.configuration, m.folds) for m in report.models] == [
        ("rfmedsam2", home.name, "rfmed", "3d_fullres", ("0",)),
        ("nnU-Net", home.name, "nnUNetPlans", "3d_fullres", ("0", "1", "all")),
    ]
    assert report.as_json()["models"][1]["folder"] == str(home / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    show_doctor(report)
    assert re.search(r"nnUNetPlans +3d_fullres +0, 1, all +nnU-Net", capsys.readouterr().out)


def test_what_is_needed_and_what_is_optional_is_what_the_metadata_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = tomllib.loads((Path(rfmedsam2.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    added = [f"{text}; extra == '{extra}'" for extra, texts in extras.items() for text in texts]
    monkeypatch.setattr(module.metadata, "requires", lambda name: [*project["dependencies"], *added])

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[]", text)[0] for text in requirements}

    report = doctor(Layout.under(tmp_path))
    assert set(report.packages) == names(project["dependencies"])
    assert {"sam2", "segment-anything", "surface-distance"} <= set(report.packages)
    shown = {name for extra, requirements in extras.items() if extra != "test" for name in names(requirements)}
    assert set(report.optional_packages) == shown
    assert "tensorboard" in report.optional_packages


def test_without_metadata_the_report_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "requires", absent)
    report = doctor(Layout.under(tmp_path))
    assert not report.packages
    assert "rfmedsam2 is not installed" in messages(report)
