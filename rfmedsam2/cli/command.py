"""Code shared by all commands: common flags, error messages with exit code 2, choice of folders.

Only `rfmedsam2.cli` prints, reads environment variables and imports late, so that `--help` runs before heavy imports.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import get_type_hints
from tyro.conf import arg

from rfmedsam2.errors import RfMedSamError
from rfmedsam2.store.layout import Layout

if TYPE_CHECKING:
    from rfmedsam2.engine.task import Progress
    from rfmedsam2.pipeline.preprocessing.memory_estimate import MemoryNeed

ROOT = "Folder of raw/ preprocessed/ results/; else RFMED_ROOT, nnU-Net's three variables, or ./rfmed_data."
DATASET = "Id (217), name (BTCV) or folder (Dataset217_BTCV); else RFMED_DATASET, or the only dataset."
Root = Annotated[Path | None, arg(metavar="DIR", help=ROOT)]
AsJson = Annotated[bool, arg(name="json", help="Print the result as JSON.")]
DatasetName = Annotated[str | None, arg(aliases=("-d",), metavar="NAME", help=DATASET)]
PlanName = Annotated[str | None, arg(aliases=("-p",), metavar="NAME", help="Name of the plan, if there are several.")]
StageName = Annotated[str | None, arg(aliases=("-c",), metavar="NAME", help="2d, 3d_fullres or 3d_lowres.")]
Folds = Annotated[tuple[str, ...], arg(aliases=("-f",), metavar="FOLD", help="Folds; default: all trained ones.")]
Model = Annotated[
    Path | None,
    arg(aliases=("-m",), metavar="DIR", help="Folder with fold_0 ..., instead of -d, -p and -c."),
]
Device = Annotated[str, arg(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[int, arg(metavar="N", help="Number of cases processed in parallel.")]
Set = Annotated[
    tuple[str, ...],
    arg(name="set", metavar="FIELD=VALUE", help="Override fields of the plan: 3d_fullres.train.learning_rate=0.01 ..."),
]

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
SAY_NOTHING = ("None", "False", "True", "", "()")
"""Defaults that --help does not show."""


def command(function: Callable[..., None], *, family: str = "rfmed") -> Callable[[], None]:
    """Make an entry point: parse arguments by signature and docstring, run, turn errors into messages and exit codes.

    Args:
        function: implementation of the command; `train` of the family `rfmed` is the command `rfmed_train`.
        family: prefix of the command's name.
    """

    def run() -> None:
        _understand_every_name()
        words = [word for word in sys.argv[1:] if word != "--debug"]
        debug = len(words) != len(sys.argv) - 1
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
        if not debug:
            warnings.simplefilter("ignore")
        # before torch loads its thread pool: waiting threads should sleep, not spin. If anything else runs on the same
        # cores (data workers, a second command), spinning made a training step 4 times slower on two cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        name = f"{family}_{function.__name__}"
        try:
            tyro.cli(_plainly(function), prog=name, args=words, config=CONFIG)
        except RfMedSamError as error:
            if debug:
                raise
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def _understand_every_name() -> None:
    """Read file names as UTF-8 whatever the locale is, and never fail to print one.

    In a locale without UTF-8 (LC_ALL=C, Latin-1) file names cannot be decoded or written into records, so the command
    restarts in Python's UTF-8 mode, in the same process.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        words = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, words, {**os.environ, "PYTHONUTF8": "1"})  # noqa: S606 - itself
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a terminal, or PYTHONIOENCODING, without these letters


def _plainly(function: Callable[..., None]) -> Callable[..., None]:
    """Hide uninformative defaults from --help: None, False, an empty list."""
    # typing_extensions': before Python 3.11, typing's own hides flags whose default is None inside Optional
    types = get_type_hints(function, include_extras=True)
    quiet = arg(help_behavior_hint=lambda default: "" if default in SAY_NOTHING else f"(default: {default})")
    function.__annotations__ = {k: t if k == "return" else Annotated[t, quiet] for k, t in types.items()}
    return function


def layout_of(root: Path | None) -> Layout:
    """The folder layout from --root, an environment variable or the default; reports which."""
    from rfmedsam2.cli import resolve

    chosen = resolve.places(root, os.environ)
    say(f"Data: {chosen.layout.raw.parent} ({chosen.source})")
    return chosen.layout


def trained_folder(layout: Layout, dataset: str | None, plan: str | None, configuration: str | None) -> Path:
    """The folder of the only trained model that matches the arguments."""
    from rfmedsam2.cli import resolve

    return resolve.trained_model(layout, os.environ, dataset=dataset, plan=plan, configuration=configuration).folder


def say(text: str) -> None:
    """Print a message that is not a result, to standard error, on the main rank only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr)


def say_memory(need: MemoryNeed) -> None:
    """Print the memory estimate before preprocessing starts."""
    workers = "1 worker" if need.workers == 1 else f"{need.workers} workers"
    peak = math.ceil(need.peak_bytes / 1e7) / 100  # rounded up, as it is an upper bound
    say(f"Memory: at most {peak:.2f} GB with {workers} ({need.free_bytes / 1e9:.1f} GB free)")


def end_if_stopped(progress: Progress) -> None:
    """Exit with the code that schedulers expect if a signal stopped the training."""
    if progress.status == "stopped":
        print(f"Stopped by {progress.signal} after step {progress.step}; run the same command again to resume.")
        sys.exit(128 + getattr(signal.Signals, str(progress.signal), signal.SIGTERM))
