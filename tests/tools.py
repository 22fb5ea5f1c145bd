"""Tools that the tests share: clients, Maildir readers, and the command as a process."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import select
import shutil
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from aiosmtpd.smtp import Envelope

from dsmtpd.connection import Connection, Service
from dsmtpd.options import Options

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence


# Far longer than anything here needs: a test fails instead of hanging.
PATIENCE = 20.0

MAIL = b"From: a@example.com\r\nSubject: Hello\r\n\r\nHi there.\r\n"

# Python 3.15 deprecates what aiosmtpd 1.4.6 imports.
WARNINGS = ("-W", "error", "-W", "ignore::DeprecationWarning:aiosmtpd.proxy_protocol")

FREE = Options(port=0)

Way = Literal["starttls", "implicit"]

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

RUN = (sys.executable, "-X", "dev", *WARNINGS, "-m", "dsmtpd")


def connect(port: int, host: str = "127.0.0.1") -> smtplib.SMTP:
    """Return a connected client that does not look up its own host name."""
    return smtplib.SMTP(host, port, local_hostname="client.test", timeout=PATIENCE)


def send(port: int, content: bytes = MAIL, host: str = "127.0.0.1") -> None:
    with connect(port, host) as client:
        client.sendmail("a@example.com", ["b@example.com"], content)


def require(*needs: str | Path) -> None:
    """Skip the test if one of the commands or paths is missing; in CI, fail it."""
    for need in needs:
        if shutil.which(need) is None and not Path(need).exists():
            if os.environ.get("CI"):
                pytest.fail(f"{need} is not installed")
            pytest.skip(f"{need} is not installed")


def trust_all() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def begin_data(client: smtplib.SMTP) -> None:
    """Send the commands up to and including DATA."""
    client.ehlo()
    client.mail("a@example.com")
    client.rcpt("b@example.com")
    assert client.docmd("DATA")[0] == 354


def reset(client: smtplib.SMTP) -> None:
    """Reset the connection of *client*: with a linger time of 0, close() does that."""
    assert client.sock is not None
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()
    client.close()


def on_flush(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Call *act* with the descriptor instead of flushing a file to disk."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        (act if is_file else flush)(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def troubles(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level and text of each record logged as a warning or worse.

    From asyncio, only errors count, as in `logs.configure`.
    """
    least = {"asyncio": logging.ERROR}
    records = [
        record
        for record in caplog.records
        if record.levelno >= least.get(record.name, logging.WARNING)
    ]
    assert all(record.exc_info is None for record in records)
    return [(record.levelname, record.getMessage()) for record in records]


def stored(maildir: str | os.PathLike[str]) -> list[bytes]:
    """Return the mails in new/, oldest first; check that tmp/ is empty."""
    assert list(Path(maildir, "tmp").iterdir()) == []
    return [path.read_bytes() for path in sorted(Path(maildir, "new").iterdir())]


def mails(maildir: str | os.PathLike[str]) -> list[bytes]:
    """Return the mails to b@example.com in new/ as they were sent, oldest first."""
    files = sorted(Path(maildir, "new").iterdir())
    contents = [file.read_bytes().partition(b"\nX-RcptTo: b@example.com\n")[2] for file in files]
    return [content.replace(b"\n", b"\r\n") for content in contents]


def envelope(
    mail_from: str | None, rcpt_tos: Iterable[str], content: bytes | str | None
) -> Envelope:
    """Return an envelope as aiosmtpd passes it to a handler."""
    result = Envelope()
    result.mail_from, result.rcpt_tos, result.content = mail_from, list(rcpt_tos), content
    return result


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time can be moved forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


async def turns(count: int) -> None:
    """Run *count* iterations of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)


class Wire:
    """A client in the event loop of its session: a test knows when each step is done."""

    def __init__(
        self,
        handler: object,
        *,
        service: Service | None = None,
        **options: Any,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = service or Service(handler, Options(**options))
        self.session = Connection(self.service)
        self.socket, self._other = socket.socketpair()
        self.socket.setblocking(False)  # noqa: FBT003  # positional-only

    async def open(self) -> None:
        accepting = self.loop.connect_accepted_socket(lambda: self.session, self._other)
        self.transport, _ = await accepting

    def hold_little(self) -> None:
        """Shrink the system's buffer for replies that the client has not read."""
        self._other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    async def send(self, octets: bytes) -> None:
        """Send *octets*; return when the session has read them and done what it can at once."""
        await self.loop.sock_sendall(self.socket, octets)
        await turns(6)

    def read(self) -> bytes:
        """Return what has arrived so far."""
        received = b""
        with suppress(BlockingIOError):
            while octets := self.socket.recv(65536):
                received += octets
        return received

    async def lines(self, count: int) -> list[bytes]:
        """Return the next *count* lines; the session must not send more for now."""
        received, missing = [], count
        while missing > 0:
            octets = await asyncio.wait_for(self.loop.sock_recv(self.socket, 65536), PATIENCE)
            assert octets
            received.append(octets)
            missing -= octets.count(b"\n")
        return b"".join(received).splitlines()

    async def fill(self, octets: bytes, most: int) -> int:
        """Send *octets* repeatedly until the session stops reading; return how many were sent.

        Stop soon after *most* octets.
        """
        sent, idle = 0, 0
        while sent < most and idle < 1000:
            try:
                sent += self.socket.send(octets[sent % len(octets) :])
                idle = 0
            except BlockingIOError:
                idle += 1
            await asyncio.sleep(0)
        return sent

    async def replies(self) -> list[bytes]:
        """Close the sending side, and return all further replies."""
        self.socket.shutdown(socket.SHUT_WR)
        received = b""
        while octets := await asyncio.wait_for(self.loop.sock_recv(self.socket, 65536), PATIENCE):
            received += octets
        self.socket.close()
        return received.splitlines()


class Handler:
    """Keeps each envelope after *deliver* is done with it."""

    def __init__(self, deliver: Callable[[Any, Any, Any], Awaitable[object]] | None = None) -> None:
        self.envelopes: list[Any] = []
        self._deliver = deliver

    @property
    def contents(self) -> list[bytes]:
        return [envelope.content for envelope in self.envelopes]

    async def handle_DATA(self, server: object, session: object, envelope: Any) -> str:
        if self._deliver is not None:
            await self._deliver(server, session, envelope)
        self.envelopes.append(envelope)
        return "250 OK"


class Gate:
    """Holds each delivery until the test lets it end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    async def __call__(self, *_: object) -> None:
        self.begun.set()
        assert await asyncio.to_thread(self.may_end.wait, PATIENCE)


def converse(pieces: Iterable[bytes], handler: object, **parameters: Any) -> list[bytes]:
    """Return the replies to *pieces*, which the session reads one by one."""

    async def run() -> list[bytes]:
        wire = Wire(handler, **parameters)
        await wire.open()
        for piece in pieces:
            await wire.send(piece)
        return await wire.replies()

    return asyncio.run(run())


def codes(replies: Iterable[bytes]) -> list[int]:
    return [int(reply[:3]) for reply in replies]


BEGIN = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"


class Daemon:
    """The command, running as a process: what it logs, and how it ends."""

    def __init__(
        self,
        *arguments: str,
        run: Sequence[str] = RUN,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log_lines: int | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        """Start it; with *log_lines*, close the pipe of its log after that many lines."""
        self.arguments = arguments
        environment = dict(os.environ)
        # Users do not set this, and it would hide the effects of buffering at exit.
        environment.pop("PYTHONUNBUFFERED", None)
        self.process = subprocess.Popen(
            [*run, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, **(env or {})},
            cwd=cwd,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(log_lines,), daemon=True)
        self._reader.start()

    def _read(self, log_lines: int | None) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in islice(log, log_lines):
                self._lines.put(line.rstrip("\n"))

    def line(self) -> str:
        """Wait for the next line of its log, and return it."""
        return self._lines.get(timeout=PATIENCE)

    def output_line(self) -> str:
        """Wait for the next line on its stdout, and return it, or what has come of it in time."""
        assert self.process.stdout is not None
        line, stdout = b"", self.process.stdout.fileno()
        while not line.endswith(b"\n") and select.select([stdout], [], [], PATIENCE)[0]:
            # Octet by octet, so that what follows stays in the pipe.
            if not (octet := os.read(stdout, 1)):
                break
            line += octet
        return line.decode().rstrip("\n")

    def port(self) -> int:
        """Return the port that it listens on, after reading all lines logged at the start."""
        match = re.search(r"INFO: Starting dsmtpd \S+ at \S+:(\d+) size limit", line := self.line())
        assert match, line
        if "--tls" in self.arguments:
            assert "INFO: TLS " in self.line()
        if "-d" in self.arguments:
            assert "INFO: Storing the incoming emails into " in self.line()
        return int(match[1])

    def end(self, signal: int | None = None) -> tuple[int, list[str]]:
        """Send *signal*; return the exit code and the log lines not read yet."""
        if signal is not None:
            self.process.send_signal(signal)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code, [self._lines.get() for _ in range(self._lines.qsize())]

    def failure(self) -> tuple[int, str]:
        """Wait until it gives up; return the exit code and the text of its one log line."""
        code, (line,) = self.end()
        return code, line.partition(" ERROR: ")[2]

    def close(self) -> None:
        """Kill the process, whatever the test did."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
