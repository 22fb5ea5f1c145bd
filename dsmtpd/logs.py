"""How log records look, and where they go."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

FORMAT = "%(asctime)s %(levelname)s: %(message)s"


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no [TextIO] before 3.11
    """Writes records to stderr; one that cannot be written is dropped and stops nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop *record* when nobody can read it: the pipe's reader is gone, or the disk is full."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        """Leave nothing unwritten behind: Python would fail on it at its exit, with code 120."""
        super().close()
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def configure() -> None:
    """Send the records of INFO and above to stderr, unless logging has been set up already."""
    if sys.stderr is None:
        # Started with stderr closed. Its number, 2, would go to the next file that is opened, and
        # with it what the interpreter prints there: that file must not be a mail.
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  # open until the end
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It warns of each reply to a client that has left.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
