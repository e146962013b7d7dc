"""Parsing JSON: the only place where it is done, so that every kind of damaged text is one kind of error."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


class JsonError(ValueError):
    """Text that is not JSON, or that no program writes; the message says why, without the file."""


def parse_json(text: str | bytes, *, unique: bool = True) -> Any:
    """Plain data of JSON text; bytes are UTF-8, UTF-16 or UTF-32.

    Args:
        text: the text.
        unique: refuse objects with several values under one key, which costs time in files of hundreds of MB.

    Raises:
        JsonError: a syntax error, another encoding, thousands of nested brackets, a number of thousands of digits, or
            an object with several values under one key.
    """
    try:
        return json.loads(text, object_pairs_hook=_members if unique else None)
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("brackets are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from None
    except ValueError:  # Python converts no integer of more than 4300 digits
        raise JsonError("a number has thousands of digits") from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise JsonError(f"one object has several values for {', '.join(map(repr, twice[:10]))}")
    return members
