"""Work over many cases in threads."""

from __future__ import annotations

import threading
import time

import pytest

from rfmedsam2.errors import ImageError, MemoryShortError, UsageError, WorkerError
from rfmedsam2.system.parallel import map_cases


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    def slow_first(n):
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    assert list(map_cases(slow_first, range(9), workers=workers, name=str)) == [n * n for n in range(9)]


def test_numbers_of_workers_beyond_reason():
    assert list(map_cases(abs, range(4), workers=10**19, name=str)) == [0, 1, 2, 3]
    assert list(map_cases(abs, (), workers=2, name=str)) == []
    with pytest.raises(UsageError, match="workers must be a whole number from 0"):
        list(map_cases(abs, range(4), workers=-1, name=str))


def test_an_error_of_ours_keeps_its_kind():
    def fail(n):
        raise ImageError("The file is truncated", where=f"case {n}")

    with pytest.raises(ImageError, match="case 0"):
        list(map_cases(fail, range(4), workers=2, name=str))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_other_error_names_the_case(workers):
    def fail(n):
        if n == 2:
            raise ZeroDivisionError("division by zero")
        return n

    with pytest.raises(WorkerError, match=r"ZeroDivisionError.*: liver_2") as caught:
        list(map_cases(fail, range(4), workers=workers, name=lambda n: f"liver_{n}"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_no_memory_is_said_so():
    def fail(n):
        raise MemoryError

    with pytest.raises(MemoryShortError, match=r"Memory ran out: 0.*GiB in use.*fewer workers"):
        list(map_cases(fail, range(2), workers=2, name=str))


def test_what_was_too_much_for_many_is_tried_once_more_with_half_as_many(caplog):
    running, lock, tried = 0, threading.Lock(), []

    def work(n):
        nonlocal running
        with lock:
            running += 1
            crowded = running > 2
            tried.append(n)
        try:
            time.sleep(0.02)
            if crowded:
                raise MemoryError
            return n * n
        finally:
            with lock:
                running -= 1

    assert list(map_cases(work, range(12), workers=4, name=str)) == [n * n for n in range(12)]
    assert caplog.text.count("Retrying with 2 worker(s)") == 1
    assert len(tried) > 12


def test_no_more_cases_than_workers_run_at_once_and_few_results_wait():
    running, most, begun, lock = 0, 0, 0, threading.Lock()

    def work(n):
        nonlocal running, most, begun
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        return n

    results = map_cases(work, range(50), workers=3, name=str)
    next(iter(results))
    time.sleep(0.1)
    assert begun <= 2 * 3 + 1
    assert list(results) == list(range(1, 50))
    assert most <= 3


def test_after_an_error_no_further_case_begins():
    begun = []

    def fail(n):
        begun.append(n)
        raise ValueError

    with pytest.raises(WorkerError):
        list(map_cases(fail, range(100), workers=2, name=str))
    assert len(begun) <= 6


def test_progress_sees_every_case():
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        for item in items:
            seen.append(item)
            yield item

    list(map_cases(str, [1, 2], workers=2, name=str, track=track, description="Reading"))
    assert seen == [("Reading", 2), "1", "2"]
