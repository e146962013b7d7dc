"""Private parts of other packages: all there now, and a sentence where a release has removed one."""

from __future__ import annotations

import types

import pytest
import torch
from sam2.modeling.sam2_base import SAM2Base

from rfmedsam2.engine.loader import batches
from rfmedsam2.errors import PackageVersionError
from rfmedsam2.pipeline.doctor import doctor
from rfmedsam2.system import private_apis
from rfmedsam2.system.private_apis import KNOWN_TO_WORK, PRIVATE, missing, private


def test_everything_that_is_used_is_there() -> None:
    assert not [str(error) for error in missing()]
    assert {package for package, _, _ in PRIVATE} == set(KNOWN_TO_WORK)


def test_what_is_there_is_given() -> None:
    assert private(types.SimpleNamespace(_part=3), "_part", package="torch") == 3


def test_a_part_that_is_gone_is_a_sentence_with_versions(monkeypatch) -> None:
    with pytest.raises(PackageVersionError) as caught:
        private(SAM2Base, "_use_nothing", package="sam2")
    sentence = str(caught.value)
    for word in ("SAM2Base._use_nothing", "Expected sam2 >=1.1,<2", "Found sam2 1.", "pip install 'sam2>=1.1,<2'"):
        assert word in sentence
    monkeypatch.delattr(SAM2Base, "_use_multimask")
    assert [error.where for error in missing()] == ["sam2.modeling.sam2_base.SAM2Base._use_multimask"]


def test_the_doctor_names_it(monkeypatch) -> None:
    monkeypatch.delattr(SAM2Base, "_use_mask_as_output")
    found = [advice for advice in doctor().warnings if "_use_mask_as_output" in advice.message]
    assert len(found) == 1
    assert "pip install 'sam2" in found[0].remedy


def test_a_module_that_moved_is_missing_and_a_package_that_is_not_here_is_not(monkeypatch) -> None:
    moved = ("torch", "torch.nn.no_such_module", "x")
    absent = ("sam2", "no_such_package.part", "x")
    monkeypatch.setattr(private_apis, "PRIVATE", (moved, absent))
    monkeypatch.setattr(private_apis, "_version", lambda package: None if package == "sam2" else "9.9")
    assert [error.where for error in missing()] == ["torch.nn.no_such_module"]


def test_a_loader_of_a_torch_that_has_changed_ends_in_a_sentence(monkeypatch) -> None:
    monkeypatch.delattr(torch.utils.data._utils.signal_handling, "_remove_worker_pids")
    made = batches(float, 0, 2, workers=1, seed=0, timeout_seconds=60, describe=str)
    with pytest.raises(PackageVersionError, match=r"_remove_worker_pids(.|\n)*torch >=2"):
        next(made)
