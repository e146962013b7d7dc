"""Checkpoint files: what is written comes back; what is not ours, or no longer whole, is refused in a sentence."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import torch
from support.toy_task import make_record

from rfmedsam2.errors import CheckpointError, StoreError
from rfmedsam2.store import checkpoints
from rfmedsam2.store.checkpoint_header import read_header, read_record_of, record_sha256
from rfmedsam2.store.checkpoints import read_all, read_weights, weights_sha256, write_checkpoint


def tensors():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=rng)
    return {
        "model/a.weight": weight,
        "model/tied": weight,
        "model/part": weight[1:3],
        "model/strided": weight.t(),
        "model/half": weight.bfloat16(),
        "model/flag": torch.tensor([True, False, True]),
        "model/count": torch.tensor(7),
        "model/empty": torch.zeros(0, 3),
        "optimizer/0/step": torch.tensor(3.0),
        "random/torch": torch.arange(9, dtype=torch.uint8),
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, make_record(step=5), tensors(), {"best": float("-inf"), "names": ["ä", 1, None]})
    return path


def test_everything_comes_back_bit_for_bit(path):
    record, found, state = read_all(path)
    assert record.step == 5
    assert state == {"best": float("-inf"), "names": ["ä", 1, None]}
    expected = tensors()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_weights_come_without_prefix_and_without_the_rest(path):
    weights = read_weights(path)[1]
    assert set(weights) == {n.removeprefix("model/") for n in tensors() if n.startswith("model/")}
    assert weights_sha256(weights) == read_record_of(path).weights_sha256


def test_record_and_weights_are_of_one_step_while_a_training_writes(path, monkeypatch):
    def read_and_replace(path, kind):
        header = read_header(path, kind)
        write_checkpoint(path, make_record(step=6), {"model/a.weight": torch.ones(2)}, {"later": True})
        return header

    monkeypatch.setattr(checkpoints, "read_header", read_and_replace)
    record, found, state = read_all(path)
    assert (record.step, list(found), state) == (6, ["model/a.weight"], {"later": True})
    record, weights = read_weights(path)
    assert (record.step, record.weights_sha256) == (6, weights_sha256(weights))


def test_other_readers_of_safetensors_can_read_it(path):
    found = safetensors.torch.load_file(path)
    assert torch.equal(found["model/a.weight"], tensors()["model/a.weight"])


def test_the_digest_sees_names_shapes_kinds_and_values():
    base = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.int32)}]
    changed = torch.zeros(2, 3)
    changed[1, 1] = 1e-30
    digests = {weights_sha256(d) for d in [base, *others, {"a": changed}]}
    assert len(digests) == 5


def test_the_record_is_read_without_torch(path):
    code = (
        "import sys, pathlib; from rfmedsam2.store.checkpoint_header import read_record_of; "
        f"assert read_record_of(pathlib.Path({str(path)!r})).step == 5; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("keep", [0, 5, 8, 9, 100, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    for read in (read_record_of, read_weights, read_all):
        with pytest.raises(CheckpointError):
            read(path)


def test_appended_bytes_are_refused(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="truncated or was modified"):
        read_record_of(path)


def test_a_changed_weight_is_noticed(path):
    _flip(path, "model/a.weight")
    assert read_record_of(path).step == 5
    with pytest.raises(CheckpointError, match="weights in this checkpoint did not match"):
        read_weights(path)


def test_a_changed_optimizer_state_is_noticed_by_the_one_who_reads_it(path):
    _flip(path, "optimizer/0/step")
    read_weights(path)
    with pytest.raises(CheckpointError, match="training state"):
        read_all(path)


def test_a_changed_training_state_is_noticed(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"-Infinity", b"-1.000000"))
    with pytest.raises(CheckpointError, match="training state"):
        read_all(path)


def test_pickles_under_our_name_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    raw = tmp_path / "raw.safetensors"
    raw.write_bytes(pickle.dumps(Bomb()))
    archived = tmp_path / "archived.safetensors"
    torch.save({"a": torch.zeros(2)}, archived)
    legacy = tmp_path / "legacy.safetensors"
    torch.save({"a": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    other = tmp_path / "zip.safetensors"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("x", "y")
    for path in (raw, archived, legacy, other):
        for read in (read_record_of, read_weights, read_all):
            with pytest.raises(CheckpointError, match="can execute code"):
                read(path)


def test_random_bytes_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    rng = torch.Generator().manual_seed(1)
    for size in (1, 7, 8, 9, 50, 4096):
        path.write_bytes(bytes(torch.randint(0, 256, (size,), generator=rng).tolist()))
        with pytest.raises(CheckpointError):
            read_all(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[1]",
        b"{" * 50_000,
        b'{"a": 1}',
        b'{"a": {"data_offsets": [0]}}',
        b'{"a": {"data_offsets": [0, "9"]}}',
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_damaged_headers_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError):
        read_record_of(path)


def test_overlapping_or_impossible_tensors_are_refused(path):
    header, body = _split(path)
    header["model/a.weight"]["shape"] = [400, 600]
    _join(path, header, body)
    with pytest.raises(CheckpointError):
        read_weights(path)


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this package"):
        read_weights(path)


def test_a_record_of_another_format_is_refused(path):
    header, body = _split(path)
    record = json.loads(header["__metadata__"]["record"])
    text = json.dumps(record | {"format": 2})
    header["__metadata__"] |= {"record": text, "record_sha256": record_sha256(text)}
    _join(path, header, body)
    with pytest.raises(CheckpointError, match="format"):
        read_record_of(path)


def test_a_changed_record_is_noticed_and_one_without_digest_is_read(path):
    header, body = _split(path)
    metadata = header["__metadata__"]
    digest = metadata.pop("record_sha256")
    _join(path, header, body)
    assert read_record_of(path).step == 5
    changed = metadata["record"].replace('"step": 5', '"step": 6')
    for name in ("record_sha256", "rfcord_sha256"):
        header["__metadata__"] = metadata | {"record": changed, name: digest}
        _join(path, header, body)
        with pytest.raises(CheckpointError, match="record in this checkpoint does not match its digest"):
            read_record_of(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            read_record_of(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot hold this value: x"):
        write_checkpoint(path, make_record(), {"model/x": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(TypeError):
        write_checkpoint(path, make_record(), {}, {"x": object()})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    import errno

    def full(self, mode="r"):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(StoreError, match="disk is full"):
        write_checkpoint(tmp_path / "c.safetensors", make_record(), tensors(), {})
    assert list(tmp_path.iterdir()) == []


def _split(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _flip(path, name):
    header, _ = _split(path)
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0] + header[name]["data_offsets"][0]
    data[start + 2] ^= 1
    path.write_bytes(data)
