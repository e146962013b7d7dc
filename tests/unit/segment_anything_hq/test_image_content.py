"""Images by content: the held-out part follows moved and renamed files, and trained images are recognized anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfmedsam2.errors import ImageError, UsageError
from segment_anything_hq.data.content import content_digest, digests_of, seen_images
from segment_anything_hq.data.datasets import ImageSet
from segment_anything_hq.data.looks import looks_of, saved_again
from segment_anything_hq.data.open_data import list_data, open_data, split_held_out
from segment_anything_hq.evaluation.overlap import counted, trained_on


def make(folder: Path, count: int = 13) -> Path:
    """Images of noise, each with a mask."""
    rng = np.random.default_rng(0)
    for number in range(count):
        for part, values in (("images", rng.integers(0, 256, (8, 9, 3))), ("masks", np.full((8, 9), 255))):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(folder / part / f"{number:02d}.png")
    return folder


def renamed(folder: Path, target: Path) -> Path:
    """The same files in another folder, under other names."""
    for part in ("images", "masks"):
        (target / part).mkdir(parents=True)
        for number, path in enumerate(sorted((folder / part).iterdir())):
            shutil.copyfile(path, target / part / f"photo{99 - number}.png")
    return target


def contents(sets: tuple[ImageSet, ...]) -> set[str]:
    return set(digests_of(sets).values())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_moved_and_renamed_images_stay_on_their_side(tmp_path, share):
    here = make(tmp_path / "here", 40)
    there = renamed(here, tmp_path / "there")
    kept, held = map(contents, split_held_out(open_data([str(here)]), share))
    assert len(kept) + len(held) == 40
    assert 0.4 < len(held) / (40 * share) < 1.8
    assert tuple(map(contents, split_held_out(open_data([str(there)]), share))) == (kept, held)
    fewer = ImageSet(name="fewer", samples=open_data([str(there)])[0].samples[:20])
    assert contents(split_held_out((fewer,), share)[1]) <= held


def test_copies_and_all_objects_of_an_image_go_together(tmp_path):
    folder = make(tmp_path / "data", 6)
    for number in range(6):
        shutil.copyfile(folder / "images" / f"{number:02d}.png", folder / "images" / f"copy{number}.png")
        for name in (f"copy{number}", f"{number:02d}_2"):
            shutil.copyfile(folder / "masks" / f"{number:02d}.png", folder / "masks" / f"{name}.png")
    kept, held = split_held_out(open_data([str(folder)]), 0.5)
    assert not contents(kept) & contents(held)
    assert {len(part[0].samples) % 3 for part in (kept, held)} == {0}


def test_a_side_without_images_says_which_and_what_to_do(tmp_path):
    sets = open_data([str(make(tmp_path / "data", 2))])
    with pytest.raises(UsageError, match=r"No image is left to hold out.*share of 1e-09 of 2 image.*a larger share"):
        split_held_out(sets, 1e-9)
    with pytest.raises(UsageError, match=r"No image is left to train on.*share of 0\.999999 of 2.*a smaller share"):
        split_held_out(sets, 0.999999)


def test_a_digest_is_of_the_bytes(tmp_path):
    folder = make(tmp_path / "data", 2)
    one, other = sorted((folder / "images").iterdir())
    before = content_digest(one)
    assert before != content_digest(other)
    one.write_bytes(other.read_bytes() + b"x")
    assert content_digest(one) not in (before, content_digest(other))
    one.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        content_digest(one)


def test_training_images_are_counted_by_set(tmp_path):
    data = make(tmp_path / "data", 5)
    sets = open_data([str(data)])
    trained = sorted(contents(sets))[:2]
    assert seen_images(sets, trained) == {"data": (2, 5)}
    assert seen_images(sets, ["0" * 16]) == {}
    seen = trained_on(sets, trained, model=tmp_path / "m", held_out=None)
    assert counted(seen) == ["2 of 5 images of data"]
    assert trained_on(sets, None, model=tmp_path / "m", held_out=None) == {}
    assert trained_on(sets, None, model=None, held_out=0.1) == {}  # published weights: their images are unknown
    with pytest.raises(UsageError, match=r" held_out=0\.1 holds training images.*2 of 5 images of data"):
        trained_on(sets, trained, model=tmp_path / "m", held_out=0.1)
    with pytest.raises(UsageError, match="does not say which images"):
        trained_on(sets, None, model=tmp_path / "m", held_out=0.1)
    assert trained_on(sets, ["0" * 16], model=tmp_path / "m", held_out=0.1) == {}


def photographs(folder: Path, names: str) -> Path:
    """Smooth images of noise, another for every name, each with a mask."""
    for name in names:
        small = np.random.default_rng(ord(name)).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        for part, image in (("images", Image.fromarray(small)), ("masks", Image.new("L", (8, 6), 255))):
            (folder / part).mkdir(parents=True, exist_ok=True)
            image.resize((160, 120), Image.Resampling.BICUBIC).save(folder / part / f"{name}.png")
    return folder


@pytest.mark.parametrize("how", ["recompressed", "bmp", "jpeg", "poor_jpeg", "half", "gray", "turned"])
def test_photographs_that_were_saved_again_are_recognized(tmp_path, how):
    here, there = photographs(tmp_path / "here", "abcdef"), photographs(tmp_path / "there", "efgh")
    ending = {"bmp": "bmp", "jpeg": "jpg", "poor_jpeg": "jpg", "turned": "jpg"}.get(how, "png")
    for path in sorted((there / "images").iterdir()):
        image = Image.open(path).copy()
        path.unlink()
        image = image.resize((80, 60)) if how == "half" else image.convert("L") if how == "gray" else image
        image = image.transpose(Image.Transpose.ROTATE_90) if how == "turned" else image
        exif = Image.Exif()
        exif[0x0112] = 6 if how == "turned" else 1
        options = {"jpg": {"quality": 50 if how == "poor_jpeg" else 95, "exif": exif}, "png": {"compress_level": 1}}
        image.save(path.with_suffix(f".{ending}"), **options.get(ending, {}))
    trained, sets = open_data([str(here)]), open_data([str(there)])
    assert seen_images(sets, contents(trained)) == {}
    looks = sorted(looks_of(trained).values())
    assert saved_again(sets, looks, contents(trained)) == {"there": (2, 4)}
    assert saved_again(trained, looks, contents(trained)) == {}  # the same files
    assert saved_again(sets, (), contents(trained)) == {}


def test_images_without_any_shade_do_not_look_like_each_other(tmp_path):
    for name, level in (("here", 0), ("there", 255)):
        (photographs(tmp_path / name, "a") / "images" / "a.png").unlink()
        Image.new("RGB", (160, 120), (level,) * 3).save(tmp_path / name / "images" / "a.png")
    looks = sorted(looks_of(open_data([str(tmp_path / "here")])).values())
    assert saved_again(open_data([str(tmp_path / "there")]), looks, ()) == {}


def test_links_and_other_folders_change_no_content(tmp_path):
    here = photographs(tmp_path / "here", "abcd")
    linked = tmp_path / "deep" / "er"
    (linked / "images").mkdir(parents=True)
    (linked / "masks").symlink_to(here / "masks")
    for path in (here / "images").iterdir():
        (linked / "images" / path.name).symlink_to(path)
    trained = open_data([str(here)])
    assert seen_images(open_data([str(linked)]), contents(trained)) == {"er": (4, 4)}
    both = open_data([str(here), str(linked)])
    kept, held = split_held_out(both, 0.5)
    assert not contents(kept) & contents(held)


def test_a_mask_rule_that_nothing_would_follow_is_refused(tmp_path, caplog):
    folder = make(tmp_path / "data", 1)
    named = f"grabcut={tmp_path}"
    for opened in (open_data, list_data):
        with pytest.raises(UsageError, match=r"Collections have their own mask rules: rule='any'.*grabcut="):
            opened([named], rule="any")
    list_data([named])
    assert list_data([str(folder), named], rule="any")[0].samples[0].mask.rule == "any"
    assert "rule='any' is applied to folders only; grabcut=" in caplog.text
    assert open_data([str(folder)])[0].samples[0].mask.rule == "above_128"


def test_a_jpeg_looks_like_its_own_pixels(tmp_path):
    """Decoding a JPEG small saves time, and must not change where a nearly even sky becomes darker."""
    for number in range(30):
        small = np.random.default_rng(number).integers(118, 128, (6, 8, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
        for part in ("here", "there"):
            (tmp_path / part / "masks").mkdir(parents=True, exist_ok=True)
            (tmp_path / part / "images").mkdir(exist_ok=True)
            Image.new("L", image.size, 255).save(tmp_path / part / "masks" / f"{number}.png")
        image.save(tmp_path / "here" / "images" / f"{number}.jpg", quality=90)
        Image.open(tmp_path / "here" / "images" / f"{number}.jpg").save(tmp_path / "there" / "images" / f"{number}.png")
    looks = sorted(looks_of(open_data([str(tmp_path / "here")])).values())
    assert saved_again(open_data([str(tmp_path / "there")]), looks, ()) == {"there": (30, 30)}
