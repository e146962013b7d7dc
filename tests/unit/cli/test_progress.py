"""Progress is right, fits the terminal, shows names as they are, and never ends or delays the work."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from rfmedsam2.cli.progress import QUIET_SECONDS, Display, fitted
from rfmedsam2.system.progress import StepReport

HOSTILE = st.text(alphabet=st.characters(exclude_categories=())) | st.sampled_from(
    ["tumor [enhancing]", "[/b]", "\x1b[31mred", "a\nb", "\x9b31m", ":smile:", "\udc80", "[link=file:///]x[/link]"]
)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def display(width: int = 80, *, terminal: bool = False, clock=time.monotonic) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
    return Display(console, clock=clock), stream


def report(step: int = 120, **changes) -> StepReport:
    fields = {"step": step, "total": 12500, "epoch": 3, "loss": 0.1234, "lr": 0.01, "seconds": 1.5}
    return StepReport(**fields | {"eta_seconds": 15000.0, "memory_mb": 2048.0} | changes)


def test_the_time_left_follows_the_recent_speed() -> None:
    """A hundred quick cases, then slow ones: the mean since the start would say a fifth of what is true."""
    clock = Clock()
    shown, _ = display(clock=clock)
    for case in shown(range(200), "Predicting", 200):
        clock.now += 1 if case < 100 else 10
        if case == 120:
            left = seconds_left(shown.line(None))
    assert left == pytest.approx(79 * 10, rel=0.15)


def test_the_time_left_counts_the_tiles_of_the_only_case() -> None:
    clock = Clock()
    shown, _ = display(clock=clock)
    for _ in shown(range(1), "Predicting", 1):
        for tile in shown(range(100), "tiles", 100):
            clock.now += 3
            if tile == 40:
                assert seconds_left(shown.line(None)) == pytest.approx(60 * 3, rel=0.05)
                assert shown.line(None).startswith("Predicting 0/1  tiles 40/100  2:03 elapsed")


def test_between_two_counts_the_clock_runs_down_by_one_at_most() -> None:
    clock = Clock()
    shown, _ = display(clock=clock)
    for case in shown(range(10), "Predicting", 10):
        clock.now += 10
        if case == 4:
            clock.now -= 10
            assert seconds_left(shown.line(None)) == 60
            clock.now += 5
            assert seconds_left(shown.line(None)) == 55
            clock.now += 500  # this case is slow
            assert seconds_left(shown.line(None)) == 50


def seconds_left(line: str) -> int:
    words = line.split()
    seconds = 0
    for part in words[words.index("left") - 1].split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_training_keeps_step_loss_and_time_at_every_width(width: int) -> None:
    shown, _ = display(width, terminal=True)
    with shown.training():
        shown.step(report())
        shown.step(report(scores={"score": 0.8123}))
        shown.step(report(step=121))
        line = shown.__rich__().plain
    assert cell_len(line) < width
    assert "121/12500  loss 0.1234" in line
    assert "4:10:00 left" in line
    assert ("score 0.8123" in line) == (width == 80)
    assert shown.steps == 2


def test_validation_patches_show_beside_the_step() -> None:
    shown, _ = display(100)
    with shown.training():
        shown.step(report())
        for patch in shown(range(8), "validation patches", 8):
            if patch == 5:
                assert "validation patches 5/8" in shown.line(80)
                assert "step 120/12500" in shown.line(80)


def test_without_a_terminal_a_line_comes_every_ten_seconds_while_one_item_takes_long() -> None:
    assert QUIET_SECONDS < 10
    clock = Clock()
    shown, stream = display(clock=clock)
    for _ in shown(range(1), "Predicting", 1):
        for tile in shown(range(2), "tiles", 2):
            if tile == 1:
                for _ in range(3):
                    clock.now += QUIET_SECONDS + 0.1
                    time.sleep(0.5)
    lines = stream.getvalue().splitlines()
    assert [line.split(" elapsed")[0] for line in lines[:-1]] == [
        "Predicting 0/1  tiles 1/2  0:09",
        "Predicting 0/1  tiles 1/2  0:18",
        "Predicting 0/1  tiles 1/2  0:27",
    ]
    assert lines[-1] == "Predicting: 1/1 in 27.3 s"


def test_the_last_validation_of_a_training_makes_room_for_what_follows() -> None:
    shown, stream = display()
    with shown.training():
        shown.step(report(step=12500, eta_seconds=0.0))
        shown.step(report(step=12500, eta_seconds=0.0, scores={"score": 0.9}))
        for _ in shown(range(3), "Predicting", 3):
            assert shown.line(None).startswith("Predicting 0/3") or "step" not in shown.line(None)
    assert "score 0.9000" in stream.getvalue()
    assert "Predicting: 3/3 in" in stream.getvalue()


def test_an_error_in_the_work_leaves_nothing_behind() -> None:
    shown, _ = display(terminal=True)

    def work() -> None:
        for _ in shown(range(3), "Predicting", 3):
            for _ in shown(range(3), "tiles", 3):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert not shown._stages
    assert list(shown(range(2), "again", 2)) == [0, 1]


def test_other_ranks_show_nothing() -> None:
    stream = io.StringIO()
    quiet = Display(Console(file=stream), shown=False)
    assert list(quiet(range(3), "Predicting", 3)) == [0, 1, 2]
    assert not stream.getvalue()


@given(name=HOSTILE, width=st.integers(20, 120), done=st.integers(0, 99))
def test_any_name_fits_any_width_and_reaches_the_terminal_as_text(name: str, width: int, done: int) -> None:
    shown, _ = display(width, terminal=True)
    for item in shown(range(100), name, 100):
        if item == done:
            line = shown.__rich__().plain
            assert cell_len(line) < width
            assert f"{done}/100" in line or width < 25
            assert line.isprintable() or not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)
            break


def test_names_are_shown_whole() -> None:
    shown, stream = display()
    for _ in shown(range(1), "tumor [enhancing] [/b] :smile: \x1b[31m", 1):
        pass
    assert stream.getvalue().startswith(r"tumor [enhancing] [/b] :smile: \x1b[31m: 1/1 in")


@given(
    parts=st.lists(st.tuples(st.integers(0, 8), st.text("abc 漢", min_size=1, max_size=20)), min_size=1, max_size=8),
    width=st.integers(1, 100),
)
def test_a_line_is_never_longer_than_its_width(parts: list[tuple[int, str]], width: int) -> None:
    assert cell_len(fitted(parts, width)) <= width
