from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from dsmtpd import logs
from dsmtpd.output import LAST
from tests.tools import PATIENCE, posix

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def root() -> Iterator[logging.Logger]:
    """Yield the root logger as in a new process, without pytest's handlers."""
    logger = logging.getLogger()
    handlers, logger.handlers = logger.handlers, []
    try:
        yield logger
    finally:
        logger.handlers = handlers


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("dsmtpd", logging.INFO, __file__, 1, text, (), None)


def test_a_record_is_one_line_with_the_time_and_the_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with root():
        logs.configure()
        logging.getLogger("dsmtpd").info("Hello, %s", "é")
        logging.getLogger("dsmtpd").debug("not shown")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO: Hello, é\n", line)


def test_times_are_the_same_as_in_logging() -> None:
    ours, theirs = logs.Formatter(logs.FORMAT), logging.Formatter(logs.FORMAT)
    for seconds in (0, 0.9996, 1, 1, 15_897_600.5, 1):
        made = record("x")
        made.created, made.msecs = seconds, seconds % 1 * 1000
        assert ours.format(made) == theirs.format(made)


def shown(level: int, text: object, *args: object) -> str:
    """Return what a terminal shows after the time of a record."""
    record = logging.LogRecord("dsmtpd", level, __file__, 1, text, args, None)
    time, line = logs.TerminalFormatter(logs.FORMAT).format(record).split("\x1b[0m ", 1)
    assert re.fullmatch(r"\x1b\[2m\S+ \S+", time)
    assert logs.Formatter(logs.FORMAT).format(record).endswith(re.sub(r"\x1b\[\d+m", "", line))
    return line


def test_on_a_terminal_the_important_parts_stand_out() -> None:
    mail = {"peer": "::1", "mail_from": "a@x", "subject": "Hi"}
    line = shown(logging.INFO, "%(peer)s: %(mail_from)s [%(subject)s]", mail)
    assert line == "INFO: \x1b[2m::1\x1b[0m: a@x [\x1b[1mHi\x1b[0m]"
    line = shown(logging.WARNING, "%s: %s", "::1", "text")
    assert line == "\x1b[33mWARNING\x1b[0m: \x1b[2m::1\x1b[0m: text"
    assert shown(logging.ERROR, "%s", "text") == "\x1b[31mERROR\x1b[0m: text"
    assert shown(logging.INFO, "Cleaning up") == "INFO: Cleaning up"
    assert shown(logging.INFO, "%s: as it is") == "INFO: %s: as it is"
    assert shown(logging.ERROR, ValueError("x")) == "\x1b[31mERROR\x1b[0m: x"


@pytest.mark.parametrize(
    ("platform", "environment", "is_terminal", "formatter"),
    [
        ("linux", {"TERM": "xterm"}, True, logs.TerminalFormatter),
        ("linux", {"TERM": "xterm", "NO_COLOR": ""}, True, logs.TerminalFormatter),
        ("linux", {"TERM": "xterm"}, False, logs.Formatter),
        ("linux", {"TERM": "dumb"}, True, logs.Formatter),
        ("linux", {"TERM": "xterm", "NO_COLOR": "1"}, True, logs.Formatter),
        ("win32", {"TERM": "xterm"}, True, logs.Formatter),
    ],
)
def test_only_a_terminal_that_may_show_colours_gets_them(
    platform: str,
    environment: dict[str, str],
    formatter: type[logging.Formatter],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_terminal: bool,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with root() as logger:
        logs.configure()
        assert type(logger.handlers[0].formatter) is formatter


def test_only_errors_of_asyncio_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with root():
        logs.configure()
        logging.getLogger("asyncio").warning("socket.send() raised exception.")
        logging.getLogger("asyncio").error("told")
    assert re.fullmatch(r"\S+ \S+ ERROR: told\n", capsys.readouterr().err)


def test_existing_handlers_are_left_alone() -> None:
    with root() as logger:
        logger.addHandler(logging.NullHandler())
        logs.configure()
        assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]


def test_a_closed_stderr_is_replaced_by_devnull(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with root():
        logs.configure()
        with sys.stderr:
            assert sys.stderr.name == os.devnull
            logging.getLogger("dsmtpd").info("nobody reads this")


@pytest.mark.parametrize("buffering", [1, -1], ids=["line", "block"])
def test_a_pipe_without_a_reader_drops_records_and_leaves_nothing_to_flush(buffering: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering, encoding="utf-8") as stream:
        handler = logs.StderrHandler(stream)
        handler.emit(record("lost"))
        # As logging does when the process ends.
        logging.shutdown([weakref.ref(handler)])
        # Had the record stayed in the buffer, this would raise BrokenPipeError.
        stream.flush()


def full_pipe() -> tuple[int, int]:
    """Return the ends of a full pipe."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for piece in (b"x" * 4096, b"x"):
        with suppress(BlockingIOError):
            while True:
                os.write(writer, piece)
    os.set_blocking(writer, True)
    return reader, writer


@posix
@pytest.mark.parametrize("text", ["short", "long " * 10_000])
def test_a_late_reader_gets_every_line(text: str) -> None:
    reader, writer = full_pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "w", encoding="utf-8") as stream:
        handler = logs.StderrHandler(stream)
        thread = threading.Thread(target=handler.emit, args=(record(text),))
        thread.start()
        read = b""
        while not read.endswith(b"\n"):
            read += pipe.read1(4096)
        thread.join(PATIENCE)
    assert read.lstrip(b"x").decode() == f"{text}\n"


@posix
def test_at_shutdown_unread_records_are_dropped_within_a_second() -> None:
    reader, writer = full_pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "w") as stream, root() as logger:
        logger.addHandler(handler := logs.StderrHandler(stream))
        logger.addHandler(logging.NullHandler())
        thread = threading.Thread(target=handler.emit, args=(record("dropped"),))
        thread.start()
        # No event marks what must not happen: giving up before shutdown.
        thread.join(2 * LAST)
        assert thread.is_alive()
        begin = time.monotonic()
        logs.hurry()
        for _ in range(100):
            handler.emit(record("dropped"))
        thread.join(PATIENCE)
        assert LAST <= time.monotonic() - begin < 2 * LAST


def test_at_shutdown_records_are_still_written(capfd: pytest.CaptureFixture[str]) -> None:
    with root():
        logs.configure()
        logs.hurry()
        logging.getLogger("dsmtpd").info("the last")
    assert capfd.readouterr().err.endswith(" INFO: the last\n")


def test_a_mistake_in_a_record_is_still_reported(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logs.StderrHandler(io.StringIO())
    mistake = record("%d")
    mistake.args = ("no number",)
    handler.emit(mistake)
    assert "TypeError" in capsys.readouterr().err
