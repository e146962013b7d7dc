"""Running samhq_* inside the test's process, as a shell would, and small images to run them on."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from segment_anything_hq.cli import coco, inspect, predict_evaluate, training
from support.commands import Outcome

SIZES = {"a": (40, 60), "b": (50, 30)}
"""Height and width of the images."""


def run(name: str, *words: object) -> Outcome:
    """Run samhq_NAME; an exception that a user would see as a traceback goes through to the test."""
    entry = next(
        found
        for module in (coco, inspect, training, predict_evaluate)
        if (found := getattr(module, f"{name}_command", None))
    )
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", [f"samhq_{name}", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            entry()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def run_ok(name: str, *words: object) -> Outcome:
    """Run a command that must succeed."""
    outcome = run(name, *words)
    assert outcome.code == 0, outcome.err + outcome.out
    return outcome


def run_error(name: str, *words: object) -> str:
    """Run a command that must fail with exit code 2, and return its error message."""
    outcome = run(name, *words)
    assert outcome.code == 2, outcome.err + outcome.out
    start = outcome.err.find(f"samhq_{name}: ")
    assert start >= 0, outcome.err
    return outcome.err[start:]


def write_images(folder: Path) -> Path:
    """Noise with a brighter rectangle, in folder/images; masks of it in folder/masks."""
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        ground_truth = np.zeros((height, width), bool)
        ground_truth[10:30, 8:24] = True
        image = rng.integers(0, 100, (height, width, 3)) + 120 * ground_truth[..., None]
        for part, values, ending in (("images", image, "png"), ("masks", ground_truth * 255, "png")):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(folder / part / f"{name}.{ending}")
    return folder


def written(path: Path, content: object) -> Path:
    """A file of this text, or JSON of anything else."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path
