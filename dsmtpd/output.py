"""A text stream that may be a pipe nobody reads: written to piece by piece, and not for ever."""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

# So many characters fit into what a pipe takes at once, when it takes any, even if each is escaped
# in ten octets (4,096 octets on Linux, POSIX wants 512).
_PIECE = 400

# Seconds for which the last lines wait for a reader, and milliseconds between two looks.
LAST = 0.5
_LOOK = 100


class Output:
    """Writes to *stream*, and flushes it each time.

    A pipe that is full, or a terminal that has been stopped, is waited for until *deadline*, a time
    of `time.monotonic`.
    """

    def __init__(self, stream: TextIO) -> None:
        """Wait for a reader for ever, as yet."""
        self.deadline = float("inf")
        self._stream = stream
        with suppress(AttributeError):  # It is no file, and takes any character.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
        self._poll: Any = None
        if sys.platform != "win32" and hasattr(select, "poll"):  # Windows asks sockets only.
            with suppress(OSError):  # It may be no file.
                number = stream.fileno()
                self._poll = select.poll()
                self._poll.register(number, select.POLLOUT)

    def write(self, text: str) -> bool:
        """Write *text*; return whether that was done before the deadline; raises `OSError`."""
        for begin in range(0, len(text), _PIECE):
            if not self._can_write():
                return False
            self._stream.write(text[begin : begin + _PIECE])
            self._stream.flush()
        return True

    def _can_write(self) -> bool:
        """Wait until the stream takes something, or nobody has read for too long."""
        while self._poll is not None and not self._poll.poll(_LOOK):
            if time.monotonic() > self.deadline:
                return False
        return True

    def hurry(self) -> None:
        """Drop what nobody reads in half a second from now on: the process is to end."""
        self.deadline = time.monotonic() + LAST

    def close(self) -> None:
        """Leave nothing unwritten behind: Python would fail on it at its exit, with code 120."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
