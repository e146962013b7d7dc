"""Published weights: what can be read, what is refused with which sentence, and where the tensors go."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from rfmedsam2.errors import CheckpointError
from rfmedsam2.nn.sam2.build import build_base
from rfmedsam2.nn.sam2.sizes import HIERA
from rfmedsam2.nn.sam2.weights import NEW_IN_2_1, load_sam2
from rfmedsam2.store.published_weights import read_published

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(3)}


def same(read) -> bool:
    return set(read) == set(TENSORS) and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"model": TENSORS},
        {"state_dict": TENSORS, "epoch": 3, "name": "x"},
        {"model": {"model_state_dict": TENSORS}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_read_and_taken_out_of_envelopes(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert same(read_published(tmp_path / "w.pt"))


def test_safetensors_are_read_whatever_their_name(tmp_path):
    save_file(TENSORS, tmp_path / "w.bin")
    assert same(read_published(tmp_path / "w.bin"))


def test_a_file_that_holds_more_than_tensors_is_not_opened(tmp_path):
    torch.save({"model": TENSORS, "by": Fraction(1, 2)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors.*fractions\.Fraction"):
        read_published(tmp_path / "w.pt")


class Attack:
    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("plain", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, plain):
    target = tmp_path / "executed"
    if plain:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(Attack(target), protocol=2))
    else:
        torch.save(Attack(target), tmp_path / "w.pt")
    with pytest.raises(CheckpointError):
        read_published(tmp_path / "w.pt")
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_damaged(tmp_path, zipped, share):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(5000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"damaged.*w\.pt.*Download it again"):
        read_published(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html>404</html>", "error page of the download"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (pickle.dumps({"a": 1}), "torch did not write"),
        (b"GIF89a and more", "another kind of file"),
        (b"PK\x03\x04" + bytes(60), "damaged"),
        (b"\x80\x02abcdef", "damaged"),
        ((12).to_bytes(8, "little") + json.dumps({"a": 1}).encode()[:4], "damaged"),
    ],
)
def test_other_files_are_told_what_they_are(tmp_path, content, told):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        read_published(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{}, [torch.ones(2)], torch.ones(2), {"epoch": 3}, {**TENSORS, "epoch": 3}])
def test_torch_files_without_named_tensors_alone_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="not a file of weights"):
        read_published(tmp_path / "w.pt")


def test_missing_files_and_folders_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_published(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="folder"):
        read_published(tmp_path)


def state(backbone: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a published size, without memory."""
    with torch.device("meta"):
        return build_base(backbone, frame_size=64).state_dict()


def empty_base(backbone: str):
    with torch.device("meta"):
        return build_base(backbone, frame_size=64)


@pytest.mark.parametrize("found", [*HIERA])
def test_weights_of_another_size_are_named(found):
    planned = next(name for name in HIERA if name != found)
    with pytest.raises(CheckpointError, match=rf"w\.pt.*Expected weights of {planned}.*Found weights of {found}"):
        load_sam2(empty_base(planned), state(found), where="w.pt")


def test_weights_of_another_model_are_named():
    with pytest.raises(CheckpointError, match="other than SAM 2"):
        load_sam2(empty_base("sam2_tiny"), TENSORS, where="w.pt")


def test_what_lacks_is_listed():
    weights = state("sam2_tiny")
    del weights["maskmem_tpos_enc"]
    weights["no_mem_embed"] = torch.zeros(1, 1, 7)
    with pytest.raises(CheckpointError, match=r"1 missing \(maskmem_tpos_enc\); 1 of another shape \(no_mem_embed\)"):
        load_sam2(empty_base("sam2_tiny"), weights, where="w.pt")


def test_every_weight_is_loaded_and_what_is_unknown_is_named():
    torch.manual_seed(0)
    base = build_base("sam2_tiny", frame_size=64)
    weights = {name: torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
    report = load_sam2(base, {**weights, "more": torch.zeros(1)}, where="w.pt")
    assert report.loaded == tuple(weights)
    assert report.missing == ()
    assert report.unexpected == ("more",)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_weights_of_sam_2_0_lack_what_came_later():
    base = build_base("sam2_tiny", frame_size=64)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items() if name not in NEW_IN_2_1}
    report = load_sam2(base, weights, where="w.pt")
    assert set(report.missing) == set(NEW_IN_2_1)
    assert set(report.loaded) == set(weights)
    for name in NEW_IN_2_1:
        assert (base.state_dict()[name] == 0).all()
