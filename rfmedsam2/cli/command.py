"""Code shared by all commands: error messages with exit code 2, output that never fails, choice of folders.

Only `rfmedsam2.cli` prints, reads environment variables and imports late, so that `--help` runs before heavy imports.
"""

from __future__ import annotations

import errno
import inspect
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from typing_extensions import get_type_hints
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

from rfmedsam2.arguments import options_as_flags
from rfmedsam2.errors import RfMedSamError, UsageError, sentences
from rfmedsam2.system.terminal import SafeStream, is_read, plain_lines

if TYPE_CHECKING:
    from rfmedsam2.engine.task import Progress
    from rfmedsam2.pipeline.preprocessing.memory_estimate import MemoryNeed
    from rfmedsam2.store.layout import Layout

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes)
DEBUG = "With --debug, an error also shows its traceback, and all log lines and warnings are printed."
WIDTHS = (40, 1000)
"""Least and most columns of the terminal."""
PATIENCE_SECONDS = 1.0
"""How long a message of the work waits for whoever reads it."""
REFUSALS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP}
"""What the system may answer to any path that a user names, before anything is read or written."""
SAY_NOTHING = ("None", "False", "True", "", "()")
"""Defaults that --help does not show."""


def command(function: Callable[..., None], *, family: str = "rfmed") -> Callable[[], None]:
    """Make an entry point: parse arguments by signature and docstring, run, turn errors into messages and exit codes.

    Args:
        function: implementation of the command; `train` of the family `rfmed` is the command `rfmed_train`.
        family: prefix of the command's name.
    """
    name = f"{family}_{function.__name__}"

    def run() -> None:
        _understand_every_name()
        _choose_width()
        with _safe_streams(name), options_as_flags():
            answer()

    def answer() -> None:
        words = [word for word in sys.argv[1:] if word != "--debug"]
        debug = len(words) != len(sys.argv) - 1
        level = logging.INFO if debug else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", handlers=[_LogLines()])
        if not debug:
            warnings.simplefilter("ignore")
        # before torch loads its thread pool: waiting threads should sleep, not spin. If anything else runs on the same
        # cores (data workers, a second command), spinning made a training step 4 times slower on two cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # blosc2 brings numexpr, which we do not use and which cannot read every valid OMP_NUM_THREADS (4,2 or 128)
        os.environ.setdefault("NUMEXPR_NUM_THREADS", "1")
        try:
            if not {"-h", "--help"} & set(words):
                _require_sound_environment(os.environ)
            _require_words(words)
            plain = _plainly(function)
            _require_once(words, _flags_of(plain))
            tyro.cli(plain, prog=name, description=_description(function), args=words, config=CONFIG)
        except RfMedSamError as error:
            if debug:
                raise
            _complain(f"{name}: {error}")
            sys.exit(2)
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            cause = None if debug else _cause(error)
            if cause is None:
                raise
            _complain(f"{name}: {cause}")
            sys.exit(2)
        except KeyboardInterrupt:
            _complain(f"{name}: interrupted")
            sys.exit(130)

    return run


def _choose_width() -> None:
    """Keep the width of help and tables within reason: tyro never ends on a terminal of one column."""
    columns = shutil.get_terminal_size().columns
    if not WIDTHS[0] <= columns <= WIDTHS[1]:
        os.environ["COLUMNS"] = str(min(max(columns, WIDTHS[0]), WIDTHS[1]))


def _cause(error: BaseException) -> RfMedSamError | None:
    """The sentence for what the system or a library says where no code of ours expects it; None: an error of ours."""
    from rfmedsam2.system.memory import memory_ran_out, memory_words

    if memory_ran_out(error):
        remedy = "Free memory, or use fewer workers, a smaller patch, batch or image"
        return RfMedSamError("Memory ran out", found=memory_words(), remedy=remedy)
    if isinstance(error.__context__, OSError) and error.__context__.errno == errno.ELOOP:
        error = error.__context__  # pathlib's resolve() tells of links in a circle by a RuntimeError, until Python 3.13
    if isinstance(error, OSError) and error.errno in REFUSALS and error.filename is not None:
        return UsageError(f"The system refuses this path ({error.strerror})", where=error.filename)
    return None


def _require_words(words: Sequence[str]) -> None:
    """Check that no argument is empty, which as a path would be the folder that the user happens to be in.

    Raises:
        UsageError: one is.
    """
    if "" in words:
        before = words[: words.index("")]
        raise UsageError(
            "An argument is empty",
            where=f"after {before[-1]}" if before else None,
            remedy="Give it, or check the shell variable it was to come from; . is the folder here",
        )


def _flags_of(function: Callable[..., None]) -> dict[str, str]:
    """Every spelling of a command's flags, with the one that --help shows first."""
    flags: dict[str, str] = {}
    for owner in (function, *(kind for kind in function.__annotations__.values() if is_dataclass(kind))):
        for name, kind in owner.__annotations__.items():
            marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
            renamed = next((mark.name for mark in marks if getattr(mark, "name", None)), None)
            aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
            flag = f"--{renamed or name}".replace("_", "-")
            flags |= dict.fromkeys((*aliases, flag, flag.replace("--", "--no-", 1)), flag)
    return flags


def _require_once(words: Sequence[str], flags: Mapping[str, str]) -> None:
    """Check that no flag is given twice, since of `-m A -m B` only B would be used, without a word.

    Raises:
        UsageError: one is.
    """
    spelled = [word.partition("=")[0] for word in words]
    given = [flags.get(word.replace("_", "-") if word.startswith("--") else word) for word in spelled]
    twice = next((flag for flag in given if flag is not None and given.count(flag) > 1), None)
    if twice is not None:
        where = " ".join(word for word, flag in zip(words, given, strict=True) if flag == twice)
        remedy = "Give it once; where it takes several values, all of them behind it"
        raise UsageError(f"{twice} is given more than once", found=where, remedy=remedy)


def _require_sound_environment(environment: Mapping[str, str]) -> None:
    """Check the variables that libraries read when they are loaded, and fail on without a word of what is wrong.

    Raises:
        UsageError: names the variable.
    """
    from rfmedsam2.system.ranks import ranks_of

    ranks_of(environment)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        threads = environment.get(name, "")
        if threads and not re.fullmatch(r"\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*", threads, re.ASCII):
            raise UsageError(
                f"The environment variable {name} is not valid",
                expected="a number of threads from 1",
                found=repr(threads[:40]),
                remedy="Set it to a number, or unset it to use all cores",
            )


def _understand_every_name() -> None:
    """Read file names as UTF-8 whatever the locale is.

    In a locale without UTF-8 (LC_ALL=C, Latin-1) file names cannot be decoded or written into records, so the command
    restarts in Python's UTF-8 mode, in the same process.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        words = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, words, {**os.environ, "PYTHONUTF8": "1"})  # noqa: S606 - itself


@contextmanager
def _safe_streams(name: str) -> Iterator[None]:
    """Keep a closed pipe, a full disk or a missing letter from ending the work.

    What reads the answer may leave early (`| head -1`); where it could not be written for another reason, the command
    says so when its work is done, and ends with 2.
    """
    before = sys.stdout, sys.stderr
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would take its place and what is printed
            os.open(os.devnull, os.O_RDWR)
    answers = SafeStream(sys.stdout)
    sys.stdout, sys.stderr = answers, SafeStream(sys.stderr)  # type: ignore[assignment]
    try:
        yield
        answers.flush()
        if isinstance(answers.fault, OSError) and not isinstance(answers.fault, BrokenPipeError):
            _complain(f"{name}: The answer cannot be written ({answers.fault.strerror}). The work itself is done.")
            sys.exit(2)
    finally:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            if getattr(stream, "fault", None) is not None:  # what is still buffered shall not fail once more at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        sys.stdout, sys.stderr = before


class _LogLines(logging.Handler):
    """Writes to where standard error is now: above the line of progress, if there is one.

    The work logs while it goes on: where nobody reads (a pipe that is full, a terminal after Ctrl-S), it does not wait.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a sentence, whose first word is the level, not the module that logs it; or drop it."""
        if not is_read(sys.stderr, PATIENCE_SECONDS):
            return
        print(plain_lines(sentences([f"{record.levelname.capitalize()}: {self.format(record)}"])), file=sys.stderr)


def _plainly(function: Callable[..., None]) -> Callable[..., None]:
    """Hide uninformative defaults from --help: None, False, an empty list."""
    # typing_extensions': before Python 3.11, typing's own hides flags whose default is None inside Optional
    types = get_type_hints(function, include_extras=True)
    for group in types.values():
        if is_dataclass(group):
            group.__annotations__ = _quiet(get_type_hints(group, include_extras=True))
    function.__annotations__ = _quiet(types)
    return function


def _description(function: Callable[..., None]) -> str:
    """The docstring's text without its arguments, and the flag that all commands have."""
    text = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()
    return f"{text}\n\n{DEBUG}"


def _quiet(types: dict[str, Any]) -> dict[str, Any]:
    quiet = arg(help_behavior_hint=lambda default: "" if default in SAY_NOTHING else f"(default: {default})")
    apart = {name for name, kind in types.items() if name == "return" or is_dataclass(kind)}
    return {name: kind if name in apart else Annotated[_light(kind), quiet] for name, kind in types.items()}


def _light(kind: Any) -> Any:
    """The same flag in words that tyro checks defaults against without typeguard, a third of the time of --help.

    `X | None` as Union[None, X], as None is the default; `tuple[X, ...]` as object, with tyro's own reader of tuples.
    Likewise `Literal[...] | None`, whose words tyro would list in random order, and None among them.
    """
    base, *marks = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    names = [member for member in get_args(base) if member is not NoneType]
    if get_origin(base) in (UnionType, Union) and len(names) == 1 and get_origin(names[0]) is Literal:
        reader = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(names[0], set()))
        base, marks = object, [*marks, reader]
    elif isinstance(base, UnionType):
        base = Union[tuple(sorted(get_args(base), key=lambda member: member is not NoneType))]  # noqa: UP007 - see above
    elif get_origin(base) is tuple:
        reader = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(base, set()))
        base, marks = object, [*marks, reader]
    return Annotated[(base, *marks)] if marks else base  # type: ignore[return-value]


def layout_of(root: Path | None) -> Layout:
    """The folder layout from --root, an environment variable or the default; reports which."""
    from rfmedsam2.cli import resolve

    chosen = resolve.places(root, os.environ)
    say(f"Data: {chosen.layout.raw.parent} ({chosen.source})")
    return chosen.layout


def say(text: str) -> None:
    """Print a message that is not a result, to standard error, on the main rank only."""
    from rfmedsam2.system.ranks import ranks_of

    if ranks_of(os.environ).is_main:
        _complain(text)


def tell(text: str) -> None:
    """Give the answer, or a part of it, in words: standard output."""
    print(plain_lines(text))


def tell_json(text: str) -> None:
    """Give the answer as JSON: standard output."""
    # JSON itself escapes all control characters but these
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def _complain(text: str) -> None:
    print(plain_lines(text), file=sys.stderr)


def say_memory(need: MemoryNeed) -> None:
    """Print the memory estimate before preprocessing starts."""
    workers = "1 worker" if need.workers == 1 else f"{need.workers} workers"
    peak = math.ceil(need.peak_bytes / 1e7) / 100  # rounded up, as it is an upper bound
    say(f"Memory: at most {peak:.2f} GB with {workers} ({need.free_bytes / 1e9:.1f} GB free)")


def end_if_stopped(progress: Progress) -> None:
    """Exit with the code that schedulers expect if a signal stopped the training."""
    if progress.status == "stopped":
        by = progress.signal or "another process of this training"
        tell(f"Stopped by {by} after step {progress.step}; run the same command again to resume.")
        sys.exit(128 + getattr(signal.Signals, str(progress.signal), signal.SIGTERM))
