"""Messages of errors: their parts and the lists in them."""

from __future__ import annotations

from rfmedsam2.errors import UsageError, shortlist


def test_a_message_has_its_parts_in_order() -> None:
    error = UsageError("The fold does not exist.", where="Hippocampus", expected="0 to 4", found=7, remedy="Choose one")
    assert str(error) == "The fold does not exist: Hippocampus. Expected 0 to 4. Found 7. Choose one."


def test_a_shortlist_says_how_many_it_leaves_out() -> None:
    assert shortlist([]) == ""
    assert shortlist("abcde") == "a, b, c, d, e"
    assert shortlist("abcdef") == "a, b, c, d, e and 1 more"
    assert shortlist(range(9), limit=2, separator="; ") == "0; 1 and 7 more"
