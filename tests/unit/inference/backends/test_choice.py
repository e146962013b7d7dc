"""Which backend runs the networks: as asked, or the faster one; what is missing or impossible is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_model import make_plan

from rfmedsam2 import models
from rfmedsam2.errors import ConversionError, MissingPackageError, UsageError
from rfmedsam2.inference.backends import choice
from rfmedsam2.inference.backends.backend import SourceNetwork
from rfmedsam2.inference.volume import PredictOptions

CPU = torch.device("cpu")


@pytest.fixture
def source() -> SourceNetwork:
    plan = make_plan()
    stage = plan.stages["3d_fullres"]
    network = models.build_stage(plan, stage).eval()
    return SourceNetwork(network=network, model=stage.model, input_shape=(1, 8, 16, 16), weights_sha256="0" * 64)


def stand_in(
    monkeypatch, *, seconds: float = 1.0, is_new: bool = True, fault: str | None = None
) -> list[SourceNetwork]:
    """A backend that takes so long for a tile for which torch takes 1 s; gives what it has prepared."""
    prepared: list[SourceNetwork] = []

    class StandIn:
        def __init__(self, cache: object) -> None:
            self.cache = cache

        def prepare(self, source: SourceNetwork) -> Any:
            if fault:
                raise ConversionError("OpenVINO cannot run this network", found=fault)
            prepared.append(source)
            return SimpleNamespace(seconds={"torch": 1.0, "openvino": seconds}, is_new=is_new)

    monkeypatch.setattr(choice, "OpenVinoBackend", StandIn)
    monkeypatch.setattr(choice, "load_openvino", lambda: None)
    return prepared


def lack_openvino(monkeypatch) -> None:
    def missing() -> None:
        raise MissingPackageError("OpenVINO is not installed", remedy="pip install 'rfmedsam2[openvino]'")

    monkeypatch.setattr(choice, "load_openvino", missing)


def test_auto_takes_what_is_faster_for_all_folds(source, monkeypatch, tmp_path) -> None:
    prepared = stand_in(monkeypatch, seconds=0.5)
    running = choice.run_networks([source, source], device=CPU, cache=tmp_path)
    assert (running.backend, len(prepared), len(running.networks)) == ("openvino", 2, 2)
    assert running.note == "Backend: OpenVINO, 2 times as fast as torch here (0.5 s for a tile, torch 1 s)"


def test_auto_stays_with_torch_where_it_is_as_fast(source, monkeypatch, tmp_path) -> None:
    stand_in(monkeypatch, seconds=0.95)
    running = choice.run_networks([source], device=CPU, cache=tmp_path)
    assert running.networks == (source.network,)
    assert running.note is not None
    assert "not faster here" in running.note


def test_what_was_known_is_not_said_once_more(source, monkeypatch, tmp_path) -> None:
    stand_in(monkeypatch, seconds=0.5, is_new=False)
    assert choice.run_networks([source], device=CPU, cache=tmp_path).note is None


def test_auto_names_the_operation_that_cannot_be_converted(source, monkeypatch, tmp_path) -> None:
    stand_in(monkeypatch, fault="the operation aten::strange")
    running = choice.run_networks([source], device=CPU, cache=tmp_path)
    assert running.backend == "torch"
    assert running.note == "Backend: torch, since OpenVINO cannot run the operation aten::strange"
    with pytest.raises(ConversionError, match="aten::strange"):
        choice.run_networks([source], wanted="openvino", device=CPU, cache=tmp_path)


def test_without_the_package_auto_is_torch_and_openvino_names_the_extra(source, monkeypatch, tmp_path) -> None:
    lack_openvino(monkeypatch)
    assert choice.run_networks([source], device=CPU, cache=tmp_path).backend == "torch"
    with pytest.raises(MissingPackageError, match=r"pip install 'rfmedsam2\[openvino\]'"):
        choice.run_networks([source], wanted="openvino", device=CPU, cache=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"device": torch.device("cuda")}, "the device cuda"), ({"precision": "bf16"}, "precision bf16")],
)
def test_what_openvino_does_not_do_is_torchs(source, monkeypatch, tmp_path, change, words) -> None:
    stand_in(monkeypatch, seconds=0.1)
    how = {"device": CPU, "cache": tmp_path, **change}
    assert choice.run_networks([source], **how).backend == "torch"
    with pytest.raises(UsageError, match=words):
        choice.run_networks([source], wanted="openvino", **how)


def test_torch_as_asked_touches_nothing_else(source, monkeypatch, tmp_path) -> None:
    prepared = stand_in(monkeypatch, seconds=0.1)
    assert choice.run_networks([source], wanted="torch", device=CPU, cache=tmp_path / "new").backend == "torch"
    assert not prepared
    assert not (tmp_path / "new").exists()


def test_options_name_known_backends_and_a_folder(tmp_path) -> None:
    assert PredictOptions(cache_folder=str(tmp_path)).cache_folder == Path(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Unknown backend"):
        PredictOptions(backend="onnx")  # type: ignore[arg-type]
