"""Writes to a text stream in pieces, with a deadline, as it may be a pipe that nobody reads."""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

# A pipe that is ready takes this many characters at once, even if each is escaped as ten octets: it
# takes 4,096 octets on Linux (POSIX demands 512).
_PIECE = 400

# Seconds that the last lines wait for a reader, and milliseconds between two looks.
LAST = 0.5
_LOOK = 100


class Output:
    """Writes to *stream*, and flushes it each time.

    It waits for a full pipe or a stopped terminal until *deadline*, a time of `time.monotonic`.
    """

    def __init__(self, stream: TextIO) -> None:
        """Have no deadline yet."""
        self.deadline = float("inf")
        self._stream = stream
        with suppress(AttributeError):  # It is not a file, and accepts any character.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
        self._poll: Callable[[float], object] | None = None
        # Windows can only ask sockets whether they are ready.
        if sys.platform != "win32" and hasattr(select, "poll"):
            with suppress(OSError):  # It may not be a file.
                poll = select.poll()
                poll.register(stream.fileno(), select.POLLOUT)
                self._poll = poll.poll

    def write(self, text: str) -> bool:
        """Write *text*; return False if the deadline came first; raises `OSError`."""
        for begin in range(0, len(text), _PIECE):
            if not self._can_write():
                return False
            self._stream.write(text[begin : begin + _PIECE])
            self._stream.flush()
        return True

    def _can_write(self) -> bool:
        """Wait until the stream is ready; return False if the deadline came first."""
        while self._poll is not None and not self._poll(_LOOK):
            if time.monotonic() > self.deadline:
                return False
        return True

    def hurry(self) -> None:
        """Set the deadline to half a second from now: the process is about to end."""
        self.deadline = time.monotonic() + LAST

    def close(self) -> None:
        """Leave nothing unwritten: Python would fail on it when it exits, with code 120."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
