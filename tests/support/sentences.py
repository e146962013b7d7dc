"""Listens to every error of ours that the tests raise: are its messages sentences with one mark at their end?"""

from __future__ import annotations

import re
from typing import Any

from rfmedsam2.errors import RfMedSamError

DOUBLED = re.compile(r"(?<![./])\.\.(?=\s|$)|\.{4,}(?=\s|$)|(?<=[a-z)])[.?!][;,](?=\s|$)|[?!]\.(?=\s|$)|\n\.\s")
"""A mark after another; an ellipsis is one mark, and `..` below a folder is none."""
_heard: list[str] = []


def doubled(message: str) -> bool:
    """Whether a message has two marks in a row."""
    return DOUBLED.search(message) is not None


def listen() -> None:
    """Note every faulty message from now on."""
    before = RfMedSamError.__init__

    def init(self: RfMedSamError, *words: Any, **parts: Any) -> None:
        before(self, *words, **parts)
        if doubled(str(self)):
            _heard.append(str(self))

    RfMedSamError.__init__ = init  # type: ignore[method-assign]


def faulty_messages() -> list[str]:
    """What was noted since the last call."""
    heard = list(_heard)
    _heard.clear()
    return heard
