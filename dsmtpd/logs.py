"""How log records look, and where they go."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from functools import lru_cache

FORMAT = "%(asctime)s %(levelname)s: %(message)s"


class Formatter(logging.Formatter):
    """Formats records as `logging` does, but each second only once.

    Where no mail is stored, that is worth 8 %.
    """

    def formatTime(self, record: logging.LogRecord, _datefmt: str | None = None) -> str:
        """Return the local time of *record*, with milliseconds."""
        return f"{_local_time(int(record.created))},{int(record.msecs):03}"


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no [TextIO] before 3.11
    """Writes records to stderr; one that cannot be written is dropped and stops nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, or drop it: the reader of a pipe may be gone, or the disk be full."""
        try:
            self.stream.write(f"{self.format(record)}\n")
            self.stream.flush()
        except OSError:
            pass
        except Exception:  # noqa: BLE001  # a mistake in the record
            self.handleError(record)

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


@lru_cache(maxsize=1)
def _local_time(second: int) -> str:
    return time.strftime(Formatter.default_time_format, time.localtime(second))


def configure() -> None:
    """Send the records of INFO and above to stderr, unless logging has been set up already."""
    if sys.stderr is None:
        # Started with stderr closed. Its number, 2, would go to the next file that is opened, and
        # with it what the interpreter prints there: that file must not be a mail.
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  # open until the end
    handler = StderrHandler()
    handler.setFormatter(Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It warns of each reply to a client that has left.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
