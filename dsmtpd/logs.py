"""How log records look, and where they go."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from copy import copy
from functools import lru_cache
from typing import TextIO

from dsmtpd.output import Output

FORMAT = "%(asctime)s %(levelname)s: %(message)s"

_COLOURS = {"WARNING": 33, "ERROR": 31}


class Formatter(logging.Formatter):
    """Formats records as `logging` does, but formats each second only once.

    If no mail is stored, that is worth 8 %.
    """

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002
        """Return the local time of *record*, with milliseconds."""
        return f"{_local_time(int(record.created))},{int(record.msecs):03}"


class TerminalFormatter(Formatter):
    """Formats records for terminals: time and peer dim, subject bold, the level coloured."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the local time of *record*, with milliseconds."""
        return _styled(2, super().formatTime(record, datefmt))

    def format(self, record: logging.LogRecord) -> str:
        """Return *record* as a line; that of a mail names its peer and its subject."""
        shown = copy(record)
        if isinstance(record.args, dict) and {"peer", "subject"} <= record.args.keys():
            peer, subject = _styled(2, record.args["peer"]), _styled(1, record.args["subject"])
            shown.args = {**record.args, "peer": peer, "subject": subject}
        elif isinstance(record.args, tuple) and record.args and str(record.msg).startswith("%s: "):
            shown.args = (_styled(2, record.args[0]), *record.args[1:])
        if colour := _COLOURS.get(record.levelname):
            shown.levelname = _styled(colour, record.levelname)
        return super().format(shown)


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no [TextIO] before 3.11
    """Writes records to stderr; drops what cannot be written."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to *stream*, by default to stderr."""
        super().__init__(stream)
        self.output = Output(self.stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, or drop it: a pipe's reader may be gone, or the disk full."""
        try:
            self.output.write(f"{self.format(record)}\n")
        except OSError:
            pass
        except Exception:  # noqa: BLE001  # a mistake in the record
            self.handleError(record)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        """Leave nothing unwritten."""
        super().close()
        self.output.close()


def hurry() -> None:
    """Drop what nobody reads within half a second: the process is about to end."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrHandler):
            handler.output.hurry()


@lru_cache(maxsize=1)
def _local_time(second: int) -> str:
    return time.strftime(Formatter.default_time_format, time.localtime(second))


def _styled(number: int, text: object) -> str:
    """Return *text* in the style with this *number* (ECMA-48, section 8.3.117)."""
    return f"\x1b[{number}m{text}\x1b[0m"


def _is_terminal() -> bool:
    """Return whether stderr is a terminal that may show colours (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    # Not every Windows console knows the sequences.
    return not plain and sys.platform != "win32" and sys.stderr.isatty()


def configure() -> None:
    """Log INFO and above to stderr, unless logging is already set up."""
    if sys.stderr is None:
        # Started with stderr closed: the next opened file would get its descriptor, 2, and whatever
        # the interpreter prints there. That file must not be a mail.
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  # open until the end
    handler = StderrHandler()
    handler.setFormatter((TerminalFormatter if _is_terminal() else Formatter)(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It warns about each reply to a client that has left.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
