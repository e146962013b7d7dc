"""Speeds are those of late, bars of the Python API count, and streams that break end nothing."""

from __future__ import annotations

import errno
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfmedsam2.engine.monitoring.time_left import TimeLeft
from rfmedsam2.records.training import TrainConfig
from rfmedsam2.system.progress import OnStep, Speed, StepReport, silent
from rfmedsam2.system.progress_bars import ProgressBars, progress_bars
from rfmedsam2.system.terminal import SafeStream, plain, plain_lines


def test_the_speed_forgets_what_was_long_ago() -> None:
    speed = Speed()
    assert speed.seconds_per_unit is None
    for _ in range(1000):
        speed.add(1, 0.1)
    assert speed.seconds_per_unit == pytest.approx(0.1)
    for _ in range(30):
        speed.add(1, 10.0)
    assert speed.seconds_per_unit == pytest.approx(10, rel=0.15)


def test_one_slow_unit_is_not_taken_for_the_speed() -> None:
    speed = Speed()
    for seconds in (1.0,) * 60 + (10.0,):
        speed.add(1, seconds)
    assert speed.seconds_per_unit is not None
    assert speed.seconds_per_unit < 1.6


def test_the_time_left_of_a_training_counts_steps_and_validations_by_their_recent_speed() -> None:
    config = TrainConfig(epochs=10, iterations_per_epoch=100, validate_every_epochs=3)
    left = TimeLeft(config)
    assert left.seconds(0, 0) == 0
    for _ in range(100):
        left.add_step(0.1)
    assert left.seconds(100, 0) == pytest.approx(900 * 0.1)
    for _ in range(200):
        left.add_step(1.0)
    left.add_validation(60.0)
    # after epoch 3: validations after epochs 6, 9 and 10
    assert left.seconds(300, 300) == pytest.approx(700 * 1.0 + 3 * 60, rel=0.01)
    assert left.seconds(1000, 1000) == 0


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_no_text_moves_the_terminal(text: str) -> None:
    for shown in (plain(text), plain_lines(text).replace("\n", "")):
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in shown)
        assert shown.encode("utf-8").decode("utf-8") == shown
    if text.isprintable():
        assert plain(text) == text


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left"), ValueError("closed file")],
)
def test_a_stream_that_breaks_is_given_up(error: Exception) -> None:
    class Broken(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise error

    broken = Broken()
    stream = SafeStream(broken)
    print("one", file=stream)
    print("two", file=stream)
    stream.flush()
    assert stream.fault is error
    assert broken.writes == 1


def test_a_stream_that_is_not_there_takes_all() -> None:
    stream = SafeStream(None)
    assert stream.encoding == "utf-8"  # tyro asks before it draws --help
    print("nothing", file=stream)
    stream.flush()
    assert not stream.isatty()


def test_letters_that_an_encoding_lacks_are_written_as_escapes() -> None:
    under = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(under, encoding="ascii"))
    print("漢 é", file=stream)
    stream.flush()
    assert under.getvalue() == b"\\u6f22 \\xe9\n"
    assert stream.fault is None


def test_bars_of_the_python_api_count_and_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    bars = progress_bars(True)
    assert list(bars(range(3), "tumor [b] \x1b[31m", 3)) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert r"tumor [b] \x1b[31m" in shown
    assert "3/3" in shown or "0/3" in shown


def test_bars_of_a_training_go_on_where_it_went_on(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars()
    fields = {"total": 4, "epoch": 0, "loss": 0.5, "lr": 0.1, "seconds": 1.0, "eta_seconds": 1.0, "memory_mb": None}
    for step in (3, 4):
        bars.step(StepReport(step=step, **fields))
    bars.step(StepReport(step=4, scores={"score": 0.25}, **fields))
    shown = capsys.readouterr().err
    assert "4/4" in shown or "2/4" in shown


def test_bars_that_cannot_be_written_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sys.stderr", Closed())
    assert list(ProgressBars()(range(3), "x", 3)) == [0, 1, 2]


def test_progress_may_be_asked_for_refused_or_given() -> None:
    assert progress_bars(False) is silent
    own = OnStep(print)
    assert progress_bars(own) is own
    assert list(own([1], "x", 1)) == [1]
