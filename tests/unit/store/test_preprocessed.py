"""The store of preprocessed cases."""

from __future__ import annotations

import errno
import json
import os
import pickle

import blosc2
import numpy as np
import pytest

import rfmedsam2.store.preprocessed as cases
from rfmedsam2.errors import StoreError
from rfmedsam2.records.case import CaseGeometry, SourceFile
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store import packed_arrays
from rfmedsam2.store.packed_arrays import cut
from rfmedsam2.store.preprocessed import CaseStore
from rfmedsam2.store.step0_logits import FIRST_STAGE, LOGITS, LogitsStore
from rfmedsam2.transforms.foreground import sample_foreground

SHAPE = (21, 40, 37)
LABELS = LabelSet(names={"background": 0, "a": 1, "b": 3})


def geometry() -> CaseGeometry:
    return CaseGeometry(
        shape_zyx=SHAPE,
        spacing_zyx_mm=(1, 1, 1),
        origin_xyz_mm=(0, 0, 0),
        direction=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        box_zyx=((0, 21), (0, 40), (0, 37)),
        transpose_forward=(0, 1, 2),
        shape_cropped=SHAPE,
        shape_planned=SHAPE,
        spacing_source=(1, 1, 1),
        spacing_planned=(1, 1, 1),
    )


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.int16)
    label[2:9, 5:30, 3:20], label[12:19, 10:30, 20:33] = 1, 3
    return rng.normal(size=(2, *SHAPE)).astype(np.float32), label


def write(store: CaseStore, name: str = "case_1", source: str = "s1", label: np.ndarray | None = None) -> int:
    image, marks = arrays()
    marks = marks if label is None else label
    places = [(f.key, f.voxels, f.index) for f in sample_foreground(marks, LABELS)]
    return store.write(name, image, marks, geometry=geometry(), foreground=places, source=source)


@pytest.fixture
def store(tmp_path):
    return CaseStore(tmp_path / "plan_3d", (16, 32, 32))


def test_any_patch_comes_back_as_written(store):
    write(store)
    image, label = arrays()
    case = pickle.loads(pickle.dumps(store.open("case_1")))
    assert (case.id, case.shape, case.channels) == ("case_1", SHAPE, 2)
    for box in [((0, 21), (0, 40), (0, 37)), ((3, 19), (8, 40), (5, 37)), ((20, 21), (39, 40), (0, 1))]:
        where = tuple(slice(*limits) for limits in box)
        np.testing.assert_array_equal(case.image_patch(box), image[(slice(None), *where)])
        np.testing.assert_array_equal(case.label_patch(box), label[where])
        assert case.label_patch(box).dtype == np.int16
    assert case.properties == geometry()


def test_label_values_beyond_int8_survive(store):
    _, label = arrays()
    label[label == 3] = 300
    write(store, label=label)
    np.testing.assert_array_equal(store.open("case_1").label(), label)


def test_foreground_locations_point_to_their_class(store):
    write(store)
    _, label = arrays()
    places = store.open("case_1").foreground
    assert sorted(places) == [1, 3]
    for value, index in places.items():
        assert len(index) == np.count_nonzero(label == value)
        assert np.all(label.reshape(-1)[index] == value)


def test_ids_are_those_with_a_record(store):
    assert store.ids() == ()
    write(store, "b")
    write(store, "a")
    (store.folder / "b.json").unlink()
    assert store.ids() == ("a",)
    assert store.has_any_file("b")


def test_a_case_is_complete_only_for_its_own_source(store):
    assert not store.is_complete("case_1", "s1")
    write(store)
    assert store.is_complete("case_1", "s1")
    assert not store.is_complete("case_1", "s2")


@pytest.mark.parametrize("suffix", [".b2nd", "_label.b2nd", "_foreground.npy"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_harm_to_any_file_is_noticed(store, suffix, harm):
    write(store)
    path = store.folder / ("case_1" + suffix)
    content = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content[:-7] if harm == "truncate" else content)
    assert not store.is_complete("case_1", "s1")


def test_no_id_takes_the_files_of_another(store):
    """The label of X was the image of X_label."""
    names = [
        "x",
        "x_label",
        "x.image",
        "x_label_label",
        "x_label.image",
        "x.image_label",
        "x_foreground",
        "x_label.json",
    ]
    images = {name: np.full((1, *SHAPE), number, np.float32) for number, name in enumerate(names)}
    _, label = arrays()
    for name, image in images.items():
        store.write(name, image, label, geometry=geometry(), foreground=[], source="s1")
    assert store.ids() == tuple(sorted(names))
    for name, image in images.items():
        assert store.is_complete(name, "s1"), name
        np.testing.assert_array_equal(store.open(name).image(), image)
        np.testing.assert_array_equal(store.open(name).label(), label)
    store.remove("x")
    assert all(store.is_complete(name, "s1") for name in names[1:])


def test_a_case_of_version_0_1_whose_id_ends_like_a_label_is_read_until_its_file_is_needed(store, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(cases, "_image_suffix", lambda name: ".b2nd")
        write(store, "x_label")
    image, _ = arrays()
    assert store.is_complete("x_label", "s1")
    np.testing.assert_array_equal(store.open("x_label").image(), image)
    write(store, "x")  # its label takes the name
    assert not store.looks_complete("x_label")
    write(store, "x_label")
    assert [name for name in store.ids() if store.is_complete(name, "s1")] == ["x", "x_label"]


def test_a_case_that_is_rebuilt_while_it_is_read_gives_no_patch(store):
    write(store)
    case = store.open("case_1")
    before = case.image_patch([(0, 4)] * 3), case.label_patch([(0, 4)] * 3)
    assert [patch.shape for patch in before] == [(2, 4, 4, 4), (4, 4, 4)]
    other = np.ones((2, 8, 8, 8), np.float32), np.ones((8, 8, 8), np.int16)
    store.write("case_1", *other, geometry=geometry(), foreground=[], source="s2")
    for read in (case.image_patch, case.label_patch):
        with pytest.raises(StoreError, match=r"rebuilt while it was being read: .*case_1.*rfmed_plan_and_preprocess"):
            read([(0, 4)] * 3)
    assert store.open("case_1").image_patch([(0, 4)] * 3).shape == (2, 4, 4, 4)


def test_a_case_that_is_touched_while_it_is_read_is_read_on(store):
    write(store)
    case, (image, _) = store.open("case_1"), arrays()
    for time in (1, 2):
        np.testing.assert_array_equal(case.image(), image)
        os.utime(store.folder / "case_1.b2nd", (time, time))
    np.testing.assert_array_equal(case.image(), image)


def test_sources_count_for_the_checksum_of_a_record_only_where_they_are(store):
    write(store)
    assert store.open("case_1").record.sources is None
    sources = {"case_1.nii": SourceFile(size=3, sha256="5", modified_ns=7)}
    store.note_sources("case_1", "s3", sources)
    assert store.open("case_1").record.sources == sources
    assert store.is_complete("case_1", "s3")
    record = store.folder / "case_1.json"
    record.write_text(record.read_text().replace('"modified_ns": 7', '"modified_ns": 8'))
    assert store.record("case_1") is None


def test_a_copied_case_is_still_complete(store):
    write(store)
    for path in store.folder.iterdir():
        os.utime(path, (1, 1))
    assert store.is_complete("case_1", "s1")


def test_a_broken_record_counts_as_unfinished(store):
    write(store)
    record = store.folder / "case_1.json"
    record.write_text(record.read_text()[:-20])
    assert not store.is_complete("case_1", "s1")
    with pytest.raises(StoreError, match=r"case_1\.json.*rfmed_plan_and_preprocess"):
        store.open("case_1")


def test_a_changed_record_is_noticed_and_one_without_checksum_is_read(store):
    write(store)
    record = store.folder / "case_1.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps(fields | {"channels": 3}))
    assert not store.looks_complete("case_1")
    with pytest.raises(StoreError, match=r"record is damaged.*rfmed_plan_and_preprocess"):
        store.open("case_1")
    record.write_text(json.dumps(fields | {"crc32": None}))
    assert store.looks_complete("case_1")
    assert store.open("case_1").channels == 2


def test_a_file_that_is_more_than_an_array_is_not_opened(tmp_path, monkeypatch):
    """blosc2 before 4.14.1 evaluates the expressions in a file when it opens it."""
    array = blosc2.asarray(np.arange(24, dtype=np.float16).reshape(2, 3, 4), urlpath=str(tmp_path / "a.b2nd"))
    (array + 1).save(str(tmp_path / "expression.b2nd"))
    blosc2.EmbedStore(str(tmp_path / "store.b2e"), mode="w")["/a"] = np.zeros(3)
    (tmp_path / "text.b2nd").write_bytes(b"no array" * 20)
    (tmp_path / "empty.b2nd").touch()
    assert np.array_equal(packed_arrays.open_array(tmp_path / "a.b2nd")[:], array[:])
    opened = []
    monkeypatch.setattr(blosc2, "open", lambda *words, **_: opened.append(words))
    for name in ("expression.b2nd", "store.b2e", "text.b2nd", "empty.b2nd"):
        with pytest.raises(ValueError, match="an array alone"):
            packed_arrays.open_array(tmp_path / name)
        with pytest.raises(StoreError, match="an array alone"):
            packed_arrays.read_packed(tmp_path / name, (slice(1),), what="The array", remedy="Make it again")
    assert not opened


def test_a_truncated_array_is_named_when_read(store):
    write(store)
    path = store.folder / "case_1.b2nd"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"case_1\.b2nd.*rebuilds damaged cases"):
        store.open("case_1").image()


@pytest.mark.parametrize("suffix", [".b2nd", "_label.b2nd", "_foreground.npy"])
def test_a_bit_that_the_disk_has_changed_is_noticed_by_who_reads_the_case(store, suffix):
    """Size and modification time say nothing about it."""
    write(store)
    path = store.folder / ("case_1" + suffix)
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    case = store.open("case_1")
    with pytest.raises(StoreError, match=rf"damaged.*case_1{suffix}.*rebuilds damaged cases"):
        _ = case.image(), case.label(), case.foreground
    assert not store.is_complete("case_1", "s1")


def test_a_file_is_compared_with_its_checksum_once_and_anew_in_another_process(store, monkeypatch):
    write(store)
    compared: list[str] = []
    real = packed_arrays.as_written
    monkeypatch.setattr(packed_arrays, "as_written", lambda path, file: compared.append(path.name) or real(path, file))
    case = store.open("case_1")
    for _ in range(3):
        case.image_patch([(0, 4)] * 3)
    assert compared == ["case_1.b2nd"]
    pickle.loads(pickle.dumps(case)).image_patch([(0, 4)] * 3)
    assert compared == ["case_1.b2nd"] * 2


def test_a_full_disk_leaves_no_record_and_no_partial_file(store, monkeypatch):
    write(store)

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StoreError, match="disk is full"):
        write(store)
    assert store.ids() == ()
    assert not [p for p in store.folder.iterdir() if "partial" in p.name]


def test_reading_is_possible_in_a_forked_process(store):
    write(store)
    case = store.open("case_1")
    image, _ = arrays()
    case.image()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        same = np.array_equal(case.image(), image)
        os.write(writer, b"y" if same else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"y"


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((100, 512, 512), (40, 224, 192)),
        ((1, 30, 30), (128, 128, 128)),
        ((35, 50, 35), (40, 56, 40)),
        ((300, 5, 700), (1, 320, 320)),
    ],
)
def test_blocks_and_chunks_fit_the_array_and_the_limits(shape, patch):
    block, chunk = cut(shape, patch, 4)
    assert all(1 <= b <= c <= n for b, c, n in zip(block, chunk, shape, strict=True))
    assert np.prod(block) * 4 <= 128 * 1024
    assert np.prod(chunk) * 4 <= 4 * 1024**2


def test_sampled_numbers_are_nnunets_and_draws_are_without_repetition():
    label = np.zeros((130, 130, 130), np.int16)
    label[:, :, :100], label[:50, :30, 100:107] = 1, 3
    labels = LabelSet(names={"background": 0, "big": 1, "small": 3, "absent": 7})
    found = {f.key: f for f in sample_foreground(label, labels)}
    assert [len(found[k].index) for k in (1, 3, 7)] == [16900, 10000, 0]
    assert found[1].voxels == 1_690_000
    for key in (1, 3):
        assert len(np.unique(found[key].index)) == len(found[key].index)
        assert np.all(label.reshape(-1)[found[key].index] == key)
    # uniform: the mean of a uniform draw of 16900 of 1.69 million lies within 5 standard errors
    depth = found[1].index // (130 * 130)
    assert abs(depth.mean() - 64.5) < 5 * 37.5 / np.sqrt(16900)


def test_regions_and_the_ignore_label_have_their_own_locations():
    label = np.zeros((10, 20, 20), np.int16)
    label[:5], label[5:7], label[7:9] = 1, 2, 9
    labels = LabelSet(names={"background": 0, "whole": (1, 2), "core": 2}, regions_class_order=(1, 2), ignore=9)
    found = {f.key: f for f in sample_foreground(label, labels)}
    assert {k: len(f.index) for k, f in found.items()} == {1: 2800, 2: 800, -1: 3200}
    assert set(np.unique(label.reshape(-1)[found[-1].index])) == {0, 1, 2}


@pytest.mark.parametrize("what", [LOGITS, FIRST_STAGE])
def test_logits_that_cannot_be_read_name_the_command_that_makes_them_again(store, tmp_path, monkeypatch, what):
    write(store)
    logits = LogitsStore(tmp_path / "step0", (16, 32, 32), what=what)
    whole = [(0, n) for n in SHAPE]
    class_map = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    logits.write("case_1", class_map, store.open("case_1").record, weights="w", settings="s")
    stored = logits.open("case_1")
    assert np.array_equal(stored.patch(whole), class_map.astype(np.float16))
    file = logits.folder / "case_1.b2nd"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=rf"Stored {what} are damaged.*case_1\.b2nd.*rfmed_train"):
        stored.patch(whole)
    with pytest.raises(StoreError, match=rf"Stored {what} are missing.*case_2\.json.*rfmed_train"):
        logits.open("case_2")
    # as written, but blosc2 does not understand it
    file.write_bytes(b"something else")
    monkeypatch.setattr(packed_arrays, "as_written", lambda *_: True)
    with pytest.raises(StoreError, match=rf"{what} cannot be read.*case_1\.b2nd.*rfmed_train"):
        stored.patch(whole)
