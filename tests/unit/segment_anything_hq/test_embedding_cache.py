"""Frozen embeddings kept on disk: the same cold and warm, encoded again where a file is damaged."""

from __future__ import annotations

import errno
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rfmedsam2.errors import StoreError, UsageError
from rfmedsam2.nn.segmenter import Embedded, PromptBatch
from segment_anything_hq import models
from segment_anything_hq.inference.embedding_cache import EmbeddingCache
from segment_anything_hq.nn.sam2_refiner import SAM2Refiner

pytestmark = pytest.mark.slow

SIZE = 64
METHODS = [
    ("hq_sam", "vit_nano"),
    ("sam_ref", "vit_nano"),
    ("sam_decoder", "vit_nano"),
    ("hq_sam2", "hiera_nano"),
    ("sam2_ref", "hiera_nano"),
    ("sam2_refiner", "hiera_nano"),
    ("sam2", "hiera_nano"),
]


def built(method: str, backbone: str, seed: int = 0) -> models.Network:
    torch.manual_seed(seed)
    return models.build(cast(Any, method), cast(Any, backbone), frame_size=SIZE)


network_of = cache(built)


def images(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng)


def tensors_of(embedded: Embedded) -> dict[str, Tensor]:
    """All tensors, levels of a refiner by number."""
    named = {field.name: getattr(embedded, field.name) for field in fields(embedded)}
    levels = {f"level {i}": level for i, level in enumerate(named.pop("levels", ()))}
    return {name: tensor for name, tensor in {**named, **levels}.items() if tensor is not None}


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("method", "backbone"), METHODS)
def test_masks_are_those_of_the_encoder_within_half_precision(method: str, backbone: str, tmp_path: Path) -> None:
    network, frames = network_of(method, backbone), images(2)
    prompted = PromptBatch(images=torch.tensor([1, 0]), boxes=torch.tensor([[5.0, 6, 40, 50], [20, 20, 60, 44]]))
    with torch.no_grad():
        expected = network.segment(network.encode(network.normalize(frames)), prompted).final
        for _ in ("cold", "warm"):
            embedded = EmbeddingCache(network, folder=tmp_path).embed(frames)
            got = network.segment(embedded, prompted).final
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(("method", "backbone"), METHODS)
def test_it_makes_no_difference_what_was_kept(method: str, backbone: str, tmp_path: Path) -> None:
    network, frames = network_of(method, backbone), images(3)
    without, cold, warm = (EmbeddingCache(network, folder=folder) for folder in (None, tmp_path, tmp_path))
    results = [tensors_of(embeddings.embed(frames)) for embeddings in (without, cold, warm)]
    assert (without.encoded, cold.encoded, warm.encoded) == (3, 3, 0)
    assert results[0].keys() == results[1].keys() == results[2].keys()
    for name, tensor in results[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, results[1][name]), name
        assert torch.equal(tensor, results[2][name]), name


def test_files_hold_what_the_method_reads_and_nothing_else(tmp_path: Path) -> None:
    held = {}
    for method, backbone in METHODS:
        EmbeddingCache(network_of(method, backbone), folder=tmp_path / method).embed(images(1))
        (path,) = files_in(tmp_path / method)
        tensors = load_file(path)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        held[method] = set(tensors)
    finer = {"embedding", "middle", "fine"}
    assert held["hq_sam"] == {"embedding", "early"}
    assert held["sam_ref"] == held["sam_decoder"] == {"embedding"}
    assert held["hq_sam2"] == held["sam2_ref"] == held["sam2"] == finer
    assert held["sam2_refiner"] == finer | {f"local_{name}" for name in finer}


def test_gradients_reach_what_is_learned_of_the_encoding(tmp_path: Path) -> None:
    network = built("sam2_refiner", "hiera_nano")
    assert isinstance(network, SAM2Refiner)
    for _ in ("cold", "warm"):
        network.zero_grad()
        embedded = EmbeddingCache(network, folder=tmp_path).embed(images(1))
        embedded.embedding.square().sum().backward()
        reached = [p.grad is not None and bool(p.grad.any()) for p in network.localization.parameters()]
        assert any(reached)
        assert all(p.grad is None for p in network.sam.parameters())
    assert not tensors_of(EmbeddingCache(network_of("hq_sam", "vit_nano"), folder=None).embed(images(1)))[
        "embedding"
    ].requires_grad


def test_only_missing_frames_are_encoded_and_as_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, frames, batches = built("sam_ref", "vit_nano"), images(4), []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda frames: (batches.append(len(frames)), encode(frames))[1])
    embeddings = EmbeddingCache(network, folder=tmp_path)
    embeddings.embed(frames[[0, 2]])
    embeddings.embed(frames)
    embeddings.embed(frames[[3, 1]])
    assert batches == [2, 2]
    assert (embeddings.requested, embeddings.encoded) == (8, 4)


def test_a_frame_twice_in_a_batch_is_encoded_once(tmp_path: Path) -> None:
    network, frames = network_of("sam2_refiner", "hiera_nano"), images(2)[[0, 1, 0]]
    embeddings = EmbeddingCache(network, folder=tmp_path)
    with torch.no_grad():
        embedded = embeddings.embed(frames)
    assert embeddings.encoded == len(files_in(tmp_path)) == 2
    assert torch.equal(embedded.embedding[0], embedded.embedding[2])
    assert not torch.equal(embedded.embedding[0], embedded.embedding[1])


@pytest.mark.parametrize("fault", ["cut", "empty", "damaged", "foreign", "of another frame", "no safetensors"])
def test_a_file_that_cannot_be_used_is_made_anew(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, frames = network_of("hq_sam", "vit_nano"), images(2)
    expected = tensors_of(EmbeddingCache(network, folder=tmp_path).embed(frames))
    path, other = files_in(tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-5] ^= 64
    content = {"cut": whole[:-9], "empty": b"", "damaged": bytes(damaged), "no safetensors": b"Hello there, reader"}
    content["of another frame"] = other.read_bytes()
    if fault == "foreign":
        save_file({"weight": torch.ones(3)}, path)
    else:
        path.write_bytes(content[fault])
    again = EmbeddingCache(network, folder=tmp_path)
    got = tensors_of(again.embed(frames))
    assert again.encoded == 1
    assert "encoding the frame again" in caplog.text
    assert path.name in caplog.text
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-3, atol=2e-3)  # encoded in another batch
    assert len(path.read_bytes()) == len(whole)
    last = EmbeddingCache(network, folder=tmp_path)
    last.embed(frames)
    assert last.encoded == 0


def test_other_frozen_weights_have_their_own_files_and_trained_ones_do_not(tmp_path: Path) -> None:
    first, second = (built("hq_sam2", "hiera_nano", seed) for seed in (1, 2))
    EmbeddingCache(first, folder=tmp_path).embed(images(1))
    with torch.no_grad():
        for _, parameter in first.trained_parameters():
            parameter.add_(1)
    trained, other = (EmbeddingCache(network, folder=tmp_path) for network in (first, second))
    trained.embed(images(1))
    other.embed(images(1))
    assert (trained.encoded, other.encoded) == (0, 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_precision_is_part_of_the_name(tmp_path: Path) -> None:
    network = network_of("sam_ref", "vit_nano")
    embeddings = EmbeddingCache(network, folder=tmp_path)
    full = embeddings.embed(images(1)).embedding
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = embeddings.embed(images(1)).embedding
    assert embeddings.encoded == 2
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)


def test_the_encoder_evaluates_while_the_network_trains() -> None:
    network = built("sam_decoder", "vit_nano").train()
    network.get_submodule("mask_decoder.transformer").eval()
    before = {name: module.training for name, module in network.named_modules()}
    seen = []
    network.get_submodule("image_encoder").register_forward_hook(lambda module, *_: seen.append(module.training))
    EmbeddingCache(network, folder=None).embed(images(1))
    assert seen == [False]
    assert {name: module.training for name, module in network.named_modules()} == before


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="The disk is full"):
        EmbeddingCache(network_of("sam_ref", "vit_nano"), folder=tmp_path).embed(images(1))
    assert not files_in(tmp_path)


@pytest.mark.parametrize("wrong", [images(1).float(), images(1)[0], images(1)[:0], images(1)[:, :1]])
def test_what_is_no_frame_is_refused(wrong: Tensor) -> None:
    with pytest.raises(UsageError, match="wrong shape or type"):
        EmbeddingCache(network_of("sam_ref", "vit_nano"), folder=None).embed(wrong)
