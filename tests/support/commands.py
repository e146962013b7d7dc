"""Running the commands inside the test's process, as a shell would."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from rfmedsam2.cli import comparison, data_and_models, pipeline, plans, selection, zero_shot

OURS = ("RFMED_ROOT", "RFMED_DATASET", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

TINY = (
    "3d_fullres.patch_size=[16,32,32]",
    "3d_fullres.model.features=[4,8,8,8]",
    "3d_fullres.train.workers=0",
    "3d_fullres.validation.patches_while_training=1",
    "2d.patch_size=[32,32]",
    "2d.model.features=[4,8,8,8]",
    "2d.train.workers=0",
    "2d.validation.patches_while_training=1",
)
"""Changes of a cpu plan of the phantom that let a training take a second."""
PLANNING = ("--preset", "cpu", "-c", "3d_fullres", "--set", *TINY)
"""Options that make such a plan."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a shell would see."""

    code: int
    out: str
    err: str


def run(name: str, *words: object, environment: Mapping[str, object] | None = None) -> Outcome:
    """Run rfmed_NAME; an exception that a user would see as a traceback goes through to the test."""
    modules = (pipeline, comparison, data_and_models, plans, selection, zero_shot)
    entry = next(found for module in modules if (found := getattr(module, f"{name}_command", None)))
    out, err = io.StringIO(), io.StringIO()
    code = 0
    variables = {key: str(value) for key, value in (environment or {}).items()}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "argv", [f"rfmed_{name}", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for key in OURS:
            if key not in variables:
                os.environ.pop(key, None)
        try:
            entry()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def run_ok(name: str, *words: object, environment: Mapping[str, object] | None = None) -> Outcome:
    """Run a command that must succeed."""
    outcome = run(name, *words, environment=environment)
    assert outcome.code == 0, outcome.err + outcome.out
    return outcome


def run_error(name: str, *words: object, environment: Mapping[str, object] | None = None) -> str:
    """Run a command that must end with one sentence and exit code 2; gives the sentence."""
    outcome = run(name, *words, environment=environment)
    assert outcome.code == 2, outcome.err + outcome.out
    assert "Traceback" not in outcome.err
    start = outcome.err.find(f"rfmed_{name}: ")
    assert start >= 0, outcome.err
    return outcome.err[start:]


def unfinished_files(folder: Path) -> list[Path]:
    """Files and folders that something unfinished has left."""
    return [p for p in folder.rglob("*") if p.name.startswith((".partial-", ".import-", ".building", ".export"))]
