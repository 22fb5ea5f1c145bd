from __future__ import annotations

import io
import logging
import re
from base64 import b64encode
from quopri import encodestring
from typing import TYPE_CHECKING
from unicodedata import category

import pytest

from dsmtpd._dsmtpd import DsmtpdHandler
from dsmtpd.logs import FORMAT, Formatter, StderrHandler
from tests.tools import BEGIN, converse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORGED = b"2026-01-01 00:00:00,000 INFO: 192.0.2.1:25: a@x -> b@x [forged]"

PAYLOADS = {
    "escapes": b"\x1bc\x1b7\x1bP1$r\x1b\\",
    "control sequences": b"\x1b[2J\x1b[1;1H\x9b31m\xc2\x9b2J",
    "a link": b"\x1b]8;;http://evil.example/\x07click\x1b]8;;\x1b\\",
    "bells": b"\x07" * 8000,
    "NUL": b"\0a\0\0b",
    "CR": b"a\r" + FORGED,
    "LF": b"a\n" + FORGED,
    "CRLF": b"a\r\n" + FORGED,
    "a folded line": b"a\r\n " + FORGED,
    "backspaces": b"a" + b"\x08 \x08" * 100 + b"\x7f",
    "right-to-left text": "\u202egpj.exe\u2066\u2069\u200f\u061c".encode(),
    "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg".encode(),
    "invisible characters": "\u200b\u2060\ufeff\xad\u200e\U000e0041\u3164".encode(),
    "surrogates": b"\xed\xa0\x80\xed\xb2\x8a",
    "invalid UTF-8": b"\xff\xfe\xc0\xaf\x85\xf5\x90\x80\x80\xe2\x80",
    "noncharacters": "\ufdd0\uffff\ue000\U0010ffff\u0378".encode(),
    "100 KiB": b"\x1b\xf0\x9f\x8e\x89" * 20_480,
    "encoded words": b"=?utf-8?q?=0A=1B[2J=E2=80=AE?= =?utf-16?b?CgAK?= =?utf-7?q?+AAo-?=",
    "format strings": b"%s%d%n%(peer)s%%{}{0}{peer.__class__}$x",
    "backslashes": rb"\n\x1b[31m\u202e\\" + b"\t\\\t",
    "combining marks": b"a" + "\u0301\u0489".encode() * 5000,
}


def mail(*lines: bytes) -> bytes:
    return BEGIN + b"\r\n".join(lines).replace(b"\r\n.", b"\r\n..") + b"\r\n.\r\n"


PLACES: dict[str, Callable[[bytes], bytes]] = {
    "subject": lambda p: mail(b"From: a@x", b"Subject: " + p, b"", b"x"),
    "word in base64": lambda p: mail(b"From: a@x", b"Subject: =?utf-8?b?%b?=" % b64encode(p)),
    "word in quoted-printable": lambda p: mail(
        b"From: a@x", b"Subject: =?utf-8?q?%b?=" % encodestring(p, header=True).replace(b"=\n", b"")
    ),
    "charset": lambda p: mail(b"From: a@x", b"Subject: =?%b?q?x?=" % p),
    "field name": lambda p: mail(b"From: a@x", p + b": x"),
    "malformed field": lambda p: mail(b"From: a@x", p, b"Subject: x"),
    "reverse-path": lambda p: b"MAIL FROM:<%b@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n.\r\n" % p,
    "forward-path": lambda p: b"MAIL FROM:<a@x>\r\nRCPT TO:<%b@x>\r\nDATA\r\n.\r\n" % p,
    "malformed path": lambda p: b"MAIL FROM:<a@x>\r\nRCPT TO " + p + b"\r\n",
    "EHLO": lambda p: b"EHLO " + p + b"\r\nDATA\r\n",
    "HELO": lambda p: b"HELO " + p + b"\r\nDATA\r\n",
    "parameter": lambda p: b"MAIL FROM:<a@x> " + p + b"\r\n",
    "parameter value": lambda p: b"MAIL FROM:<a@x> SIZE=" + p + b"\r\n",
    "parameter of RCPT": lambda p: b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x> X=" + p + b"\r\n",
    "PLAIN": lambda p: b"AUTH PLAIN " + b64encode(b"\0" + p + b"\0y") + b"\r\n",
    "LOGIN": lambda p: b"AUTH LOGIN\r\n" + b64encode(p) + b"\r\neA==\r\n",
    "CRAM-MD5": lambda p: b"AUTH CRAM-MD5\r\n" + b64encode(p + b" " + b"0" * 32) + b"\r\n",
    "OAUTHBEARER": lambda p: b"AUTH OAUTHBEARER " + b64encode(b"n,a=" + p + b",\1\1") + b"\r\n",
    "XOAUTH2": lambda p: b"AUTH XOAUTH2 " + b64encode(b"user=" + p + b"\1\1\1") + b"\r\n",
    "mechanism": lambda p: b"AUTH " + p + b"\r\n",
    "command": lambda p: p + b"\r\n",
    "argument of DATA": lambda p: b"DATA " + p + b"\r\n",
}

# Invisible characters that have a meaning in Persian and in emoji.
JOINERS = "\u200c\u200d"

# The peer of a socketpair has no name.
LINE = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9] [0-9:]{8},[0-9]{3} (?:INFO|WARNING): : \S.*")


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Iterator[io.StringIO]:
    """Yield what goes to stderr."""
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    handler = StderrHandler(stream)
    handler.setFormatter(Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def drained(stream: io.StringIO) -> str:
    """Return the text in *stream*, and empty it."""
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return text


def is_safe(character: str) -> bool:
    return category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} or character in JOINERS


@pytest.mark.parametrize("place", PLACES)
def test_whatever_a_client_sends_here_is_logged_in_printable_lines_and_the_session_goes_on(
    place: str, caplog: pytest.LogCaptureFixture, written: io.StringIO
) -> None:
    for name, payload in PAYLOADS.items():
        caplog.clear()
        said = b"EHLO x\r\n" + PLACES[place](payload) + b"NOOP\r\n"
        last = converse([said], DsmtpdHandler())[-1]
        assert last == b"250 OK" or last.startswith(b"421 "), name
        text = drained(written)
        lines = text.removesuffix("\n").split("\n")
        # A forged line would be a line without a record.
        assert text.splitlines() == lines, name
        assert len(lines) == len(caplog.records) > 0, name
        for line in lines:
            assert LINE.fullmatch(line), name
            assert all(map(is_safe, line)), name
            assert len(line.encode()) <= 16 * 1024, name
