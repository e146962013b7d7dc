"""Which files of a folder are the frames of a video, and in which order."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfmedsam2.errors import UsageError
from segment_anything_hq.video.frames import Video


def folder_of(folder: Path, names: list[str]) -> Path:
    """Images whose brightness is their place in the list."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(np.full((16, 20, 3), 10 * number + 5, np.uint8)).save(folder / name, quality=95)
    return folder


def order(folder: Path) -> list[int]:
    video = Video(folder)
    return [round((int(video.image(i)[0, 0, 0]) - 5) / 10) for i in range(len(video))]


@pytest.mark.parametrize(
    "names",
    [
        [f"{i}.jpg" for i in range(12)],
        [f"frame_{i}.png" for i in range(12)],
        [f"clip-7 frame-{i}.JPEG" for i in range(9, 21)],
        [f"cam{i // 6}_{i % 6 + 5}.png" for i in range(12)],
        [f"{i:05d}.jpg" for i in range(8)] + [f"{i}.jpg" for i in range(8, 12)],
        [f"{t / 4:.2f}.png" for t in range(0, 48, 4)],
        ["0.5.png", "0.75.png", "1.0.png", "2.0.png", "10.0.png"],
        ["first.png", "second.png", "third.png"],
        ["a1.png", "b2.png", "c10.png"],
        [f"v1.{i}.png" for i in range(1, 13)],
        [f"t{t / 4:.2f}s.png" for t in range(0, 48, 4)],
        ["2024-01-09 10.00.30.png", "2024-01-09 10.01.00.png", "2024-01-10 09.00.00.png"],
        ["0.jpg", "1.png", "2.webp", "10.bmp"],
        ["only.png"],
        ["shot12.png"],
        ["IMG_1.JPG", "img_2.jpg", "Img_10.png"],
    ],
)
def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path, names: list[str]) -> None:
    assert order(folder_of(tmp_path / "v", names)) == list(range(len(names)))


def test_hidden_files_and_other_files_are_not_frames(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "v", [f"{i:05d}.jpg" for i in range(3)])
    (folder / "._00000.jpg").write_bytes(b"\0\5\26\7" + b"x" * 60)
    (folder / ".cover.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("5")
    (folder / "7.jpg").mkdir()
    assert order(folder) == [0, 1, 2]


@pytest.mark.parametrize("other", ["cover.png", "mask_1.png", "thumb.jpg", "frame_3_old.png"])
def test_another_image_among_numbered_frames_is_named(tmp_path: Path, other: str) -> None:
    folder = folder_of(tmp_path / "v", [*(f"frame_{i}.png" for i in range(3)), other])
    with pytest.raises(UsageError, match=rf"other images beside the numbered frames.*frame_0\.png.*Found {other}"):
        Video(folder)


def test_a_frame_number_that_occurs_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"same frame number.*(01\.jpg and 1\.png|1\.png and 01\.jpg)"):
        Video(folder_of(tmp_path / "v", ["00.jpg", "01.jpg", "1.png"]))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["8_cat.png", "9_dog.png", "10_cow.png"], "10_cow.png or 8_cat.png as frame 0"),
        (["frame_9_a8f.png", "frame_10_bc1.png"], "frame_10_bc1.png or frame_9_a8f.png as frame 0"),
        (["t0.25.png", "t0.5.png", "t0.75.png", "t1.0.png"], "t0.5.png or t0.25.png as frame 0"),
        (["0,25 s.png", "0,5 s.png", "1,0 s.png"], "0,5 s.png or 0,25 s.png as frame 0"),
    ],
)
def test_names_that_may_be_ordered_in_two_ways_are_refused(tmp_path: Path, names: list[str], found: str) -> None:
    with pytest.raises(UsageError, match=rf"ordered in two ways.*Found {re.escape(found)}"):
        Video(folder_of(tmp_path / "v", names))


def test_a_folder_without_images_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no frames"):
        Video(folder_of(tmp_path / "v", []))
    with pytest.raises(UsageError, match="does not exist"):
        Video(tmp_path / "w")
