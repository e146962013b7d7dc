"""Messages of errors: their parts and lists, as sentences with one mark at their end."""

from __future__ import annotations

import pytest
from support.sentences import doubled

from rfmedsam2.errors import DatasetError, UsageError, sentences, shortlist


def test_a_message_has_its_parts_in_order() -> None:
    error = UsageError("The fold does not exist.", where="Hippocampus", expected="0 to 4", found=7, remedy="Choose one")
    assert str(error) == "The fold does not exist: Hippocampus. Expected 0 to 4. Found 7. Choose one."


def test_a_shortlist_says_how_many_it_leaves_out() -> None:
    assert shortlist([]) == ""
    assert shortlist("abcde") == "a, b, c, d, e"
    assert shortlist("abcdef") == "a, b, c, d, e and 1 more"
    assert shortlist(range(9), limit=2, separator="; ") == "0; 1 and 7 more"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"where": "x."}, "A is wrong: x."),
        ({"where": "."}, "A is wrong: ."),
        ({"expected": "one of a, b ..."}, "A is wrong. Expected one of a, b ..."),
        ({"found": UsageError("B is wrong", remedy="Try C")}, "A is wrong. Found B is wrong. Try C."),
        ({"found": "c", "remedy": "Did you mean d?"}, "A is wrong. Found c. Did you mean d?"),
        ({"found": "\n  one. Do it.\n", "remedy": "Correct it."}, "A is wrong. Found \n  one. Do it.\nCorrect it."),
    ],
)
def test_every_sentence_ends_once(parts, message):
    for what in ("A is wrong", "A is wrong."):
        assert str(DatasetError(what, **parts)) == message


def test_sentences_that_commands_say_end_once():
    assert sentences(["Not evaluated: a.mat: The instances cannot be read."]) == (
        "Not evaluated: a.mat: The instances cannot be read."
    )
    assert sentences(["One", "Two.", "Three?"]) == "One. Two. Three?"


@pytest.mark.parametrize(
    ("message", "faulty"),
    [
        ("A is wrong..", True),
        ("A is wrong.. Do it.", True),
        ("A: B is wrong.; C.", True),
        ("A is wrong.\n. Do it.", True),
        ("Did you mean a?.", True),
        ("A, b ... Do it.", False),
        ("The folder does not exist: ../x.", False),
        ("The file is called a...b.", False),
    ],
)
def test_two_marks_in_a_row_are_heard(message, faulty):
    assert doubled(message) is faulty
