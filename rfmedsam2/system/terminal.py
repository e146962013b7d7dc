"""Text on its way to a terminal: names shown as they are, and streams that may break without ending the work."""

from __future__ import annotations

import re
import select
from typing import Any, TextIO

# control characters (an escape sequence begins with one), lone surrogates, line separators, and marks that turn the
# direction of what follows
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object) -> str:
    r"""One line that a terminal shows as it is: control characters become `\x1b`, `\n` and so on."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def plain_lines(text: object) -> str:
    """The same for a text of several lines."""
    return "\n".join(plain(line) for line in str(text).split("\n"))


def is_read(stream: TextIO, seconds: float) -> bool:
    """Whether a stream takes text within this time; streams without a descriptor, and files, always do."""
    try:
        return bool(select.select([], [stream.fileno()], [], seconds)[1])
    except (OSError, ValueError, AttributeError, TypeError):  # closed, in memory, or no descriptor to wait for
        return True


class SafeStream:
    """A text stream that ends nothing: after a failed write (closed pipe, full disk) all else is dropped.

    Characters that its encoding does not have are written as escapes.

    Args:
        stream: what is written to; None: nothing is (a process whose descriptor was closed has none).

    Attributes:
        fault: the first error; None: all was written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.fault: BaseException | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def write(self, text: str) -> int:
        """Write as far as that is possible; says that all was written."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush as far as that is possible."""
        self._try("flush")

    @property
    def encoding(self) -> str:
        """Of the stream; where there is none, all characters can be dropped alike."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return self._try("isatty") or False

    def _try(self, name: str, *arguments: str) -> Any:
        if self._stream is None or self.fault is not None:
            return None
        try:
            return getattr(self._stream, name)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the file was closed
            self.fault = error
            return None

    def __getattr__(self, name: str) -> Any:
        """Everything else (buffer, fileno) is the stream's own."""
        return getattr(self._stream, name)
