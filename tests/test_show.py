from __future__ import annotations

import asyncio
import io
import json
import os
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.message import EmailMessage
from threading import Event, Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd import show
from dsmtpd.message import Message
from dsmtpd.show import Arrival, Printer, as_json, as_text
from tests.tools import PATIENCE, envelope, posix, troubles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal, TextIO

LINK = "https://shop.example/reset/" + "MQ/" * 50
ENDED = "Mails are no longer printed: "


def message(content: bytes) -> Message:
    return Message.from_envelope(("::1", 1, 0, 0), envelope("a@x", ["b@x", "é@x"], content))


def whole_mail() -> bytes:
    mail = EmailMessage()
    mail["From"] = "Zoë <a@x.test>"
    mail["To"] = "b@x.test"
    mail["Subject"] = "Grüße\u202e"
    mail["Message-ID"] = "<1@x.test>"
    mail.set_content(f"\tHello!\n\n{LINK}\n\x1b[31m\n")
    mail.add_alternative(f'<a href="{LINK}2">Reset</a>', subtype="html")
    mail.add_attachment(b"x" * 1234, maintype="image", subtype="png", filename="zoë\n.png")
    mail.add_attachment(b"", maintype="text", subtype="csv")
    return mail.as_bytes().replace(b"\n", b"\r\n")


NOW = datetime(2026, 1, 7, 14, 30, 2, 1234, timezone(timedelta(hours=1)))


def test_as_text_a_mail_is_easy_to_read() -> None:
    arrival = Arrival(message(whole_mail()), NOW, file="/mails/new/1")
    assert as_text(arrival).split("\n") == [
        "From: Zoë <a@x.test>",
        "To: b@x.test",
        "Subject: Grüße\\u202e",
        "File: /mails/new/1",
        "",
        "        Hello!",
        "",
        LINK,
        r"\x1b[31m",
        "",
        "Attachment: zoë\\n.png, image/png, 1,234 octets",
        "Attachment: no name, text/csv, 0 octets",
        "",
    ]


def test_as_text_html_alone_becomes_plain_text() -> None:
    mail = b'Content-Type: text/html\r\n\r\n<p>Hi</p><a href="https://x.test/">Reset</a>\r\n'
    assert as_text(Arrival(message(mail), NOW)) == "\nHi\n\nReset <https://x.test/>\n"


def test_as_json_a_mail_is_one_line_with_everything_known_about_it() -> None:
    mail = whole_mail()
    line = as_json(Arrival(message(mail), NOW, "TLSv1.3", "app", "/mails/new/1"))
    assert line.isascii()
    assert line.endswith("}\n")
    assert line[:-1].isprintable()
    assert json.loads(line) == {
        "time": "2026-01-07T14:30:02.001+01:00",
        "peer": "[::1]:1",
        "tls": "TLSv1.3",
        "auth_user": "app",
        "mail_from": "a@x",
        "rcpt_tos": ["b@x", "é@x"],
        "subject": "Grüße\u202e",
        "message_id": "<1@x.test>",
        "size": len(mail),
        "file": "/mails/new/1",
        "text": f"\tHello!\n\n{LINK}\n\x1b[31m\n",
        "html": f'<a href="{LINK}2">Reset</a>\n',
        "links": [LINK, f"{LINK}2"],
        "attachments": [
            {"name": "zoë\n.png", "type": "image/png", "size": 1234},
            {"name": "", "type": "text/csv", "size": 0},
        ],
        "warnings": [],
    }


def test_as_json_unknown_values_are_null_and_faults_are_warnings() -> None:
    record = json.loads(as_json(Arrival(message(b"Subject: x\r\n\r\na\nb\r\n"), NOW)))
    assert (record["tls"], record["auth_user"], record["file"]) == (None, None, None)
    assert record["warnings"] == ["no From field", "1 bare LF, first in line 3"]


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """Yield the read end of a pipe, and the write end as a stream."""
    reading, writing = os.pipe()
    with suppress(OSError), os.fdopen(writing, "w", encoding="ascii") as stream:
        try:
            yield reading, stream
        finally:
            with suppress(OSError):
                os.close(reading)


def print_all(
    stream: TextIO | None, *contents: bytes, form: Literal["text", "json"] = "text", tls: Any = None
) -> None:
    """Print mails with *contents*, one after another."""
    session = SimpleNamespace(ssl=tls, auth_data=None)

    async def run() -> None:
        for content in contents:
            await printer.show(message(content), session, None)

    with Printer(form, stream) as printer:
        asyncio.run(run())


def test_a_mail_is_printed_by_the_time_show_returns(pipe: tuple[int, TextIO]) -> None:
    reading, stream = pipe

    async def run() -> None:
        for number in range(3):
            text = f"Subject: {number}\r\n\r\né\r\n".encode()
            session = SimpleNamespace(ssl={"version": "TLSv1.2"}, auth_data="app")
            await printer.show(message(text), session, "/file")
            record = json.loads(os.read(reading, 4096))
            assert (record["subject"], record["text"]) == (str(number), "é\n")
            assert (record["tls"], record["auth_user"], record["file"]) == (
                "TLSv1.2",
                "app",
                "/file",
            )
            assert (
                abs(datetime.fromisoformat(record["time"]).timestamp() - NOW.now().timestamp()) < 60
            )

    with Printer("json", stream) as printer:
        asyncio.run(run())


def test_a_rule_separates_mails_and_unencodable_characters_are_escaped(
    pipe: tuple[int, TextIO],
) -> None:
    reading, stream = pipe
    print_all(stream, b"Subject: one\r\n\r\n1\r\n", "Subject: two\r\n\r\né\r\n".encode())
    assert os.read(reading, 4096).decode() == (
        f"Subject: one\n\n1\n{'-' * 72}\nSubject: two\n\n\\xe9\n"
    )


def test_a_closed_stdout_ends_printing_with_one_warning(
    pipe: tuple[int, TextIO], caplog: pytest.LogCaptureFixture
) -> None:
    reading, stream = pipe
    os.close(reading)
    print_all(stream, b"1", b"2", b"3")
    assert troubles(caplog) == [("WARNING", f"{ENDED}Broken pipe")]


@posix
def test_a_full_disk_ends_printing_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:  # noqa: PTH123
        print_all(stream, b"1", b"2", b"3")
        stream.reconfigure(errors="strict")
    assert troubles(caplog) == [("WARNING", f"{ENDED}No space left on device")]


def test_without_a_stdout_nothing_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    print_all(None, b"1", b"2")
    assert troubles(caplog) == [("WARNING", f"{ENDED}Bad file descriptor")]


def test_without_a_thread_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", start)
    print_all(stream := io.StringIO(), b"1", b"2")
    assert stream.getvalue() == ""
    assert troubles(caplog) == [("WARNING", f"{ENDED}can't start new thread")]


@posix
def test_an_unread_pipe_briefly_delays_one_reply_and_shutdown(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(show, "_PATIENCE", 0.3)
    begin = time.monotonic()
    print_all(pipe[1], b"x" * 100_000, *[b"y"] * 100)
    assert time.monotonic() - begin < PATIENCE  # If each reply waited, this would take 30 s.
    assert troubles(caplog) == [("WARNING", f"{ENDED}Nobody reads them")]


@posix
def test_printing_ends_when_too_much_is_unread(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(show, "_PATIENCE", 0.01)
    monkeypatch.setattr(show, "_WAITING_OCTETS", 250_000)
    session = SimpleNamespace(ssl=None, auth_data=None)
    has_ended = Event()

    def watch(_record: object) -> bool:
        has_ended.set()
        return True

    async def run() -> None:
        for _ in range(3):
            assert not has_ended.is_set()
            await printer.show(message(b"x" * 100_000), session, None)
        assert await asyncio.to_thread(has_ended.wait, PATIENCE)

    monkeypatch.setattr(show.log, "filters", [watch])
    with Printer("text", pipe[1]) as printer:
        asyncio.run(run())
    assert troubles(caplog) == [("WARNING", f"{ENDED}Nobody reads them")]


def test_a_late_reader_gets_all_mails(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(show, "_PATIENCE", 0.01)
    session = SimpleNamespace(ssl=None, auth_data=None)
    reading, stream = pipe
    length = len(as_json(Arrival(message(b"x" * 100_000), NOW)))

    async def run() -> bytes:
        received = b""
        for _ in range(3):
            await printer.show(message(b"x" * 100_000), session, None)
        while received.count(b"\n") < 3:
            received += await asyncio.to_thread(os.read, reading, 65536)
        return received

    with Printer("json", stream) as printer:
        lines = asyncio.run(asyncio.wait_for(run(), 20)).splitlines(keepends=True)
    assert len(lines) == 3
    assert all(abs(len(line) - length) < 10 for line in lines)
    assert troubles(caplog) == []
