from __future__ import annotations

import signal
import smtplib
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.tools import MAIL, PATIENCE, Daemon, begin_data, connect, mails, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


class Start(Protocol):
    def __call__(self, *arguments: str) -> Daemon: ...


def keep_sending(port: int, name: int, notify: Callable[[], object]) -> list[bytes]:
    """Send mails until the server is gone; return those that it acknowledged."""
    acknowledged: list[bytes] = []
    with suppress(OSError, smtplib.SMTPException), connect(port) as client:
        while True:
            content = b"%d-%d\r\n" % (name, len(acknowledged))
            client.sendmail("a@example.com", ["b@example.com"], content)
            acknowledged.append(content)
            notify()
    return acknowledged


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_in_the_middle_of_200_active_sessions_stores_what_is_acknowledged_and_no_more(
    start: Start, tmp_path: Path, times: Callable[[int, int], int], number: signal.Signals
) -> None:
    sessions = times(20, 200)
    daemon = start("-p", "0", "-d", str(tmp_path))
    port, acks = daemon.port(), threading.Semaphore(0)
    with ThreadPoolExecutor(sessions) as pool:
        clients = [pool.submit(keep_sending, port, name, acks.release) for name in range(sessions)]
        for _ in range(3 * sessions):
            assert acks.acquire(timeout=PATIENCE)
        code, lines = daemon.end(number)
        acknowledged = [content for client in clients for content in client.result(PATIENCE)]
    assert code == 0
    assert lines[-1].endswith(" INFO: Cleaning up")
    assert sorted(mails(tmp_path)) == sorted(acknowledged)
    assert list((tmp_path / "tmp").iterdir()) == []


def begin_handshake(port: int) -> socket.socket:
    """Return a client that stops in the middle of a handshake."""
    client = socket.create_connection(("127.0.0.1", port), PATIENCE)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = CONTEXT.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    client.sendall(outgoing.read())
    assert client.recv(1) == b"\x16"  # the answer, a record of the handshake
    return client


def test_a_signal_in_the_middle_of_200_handshakes_ends_the_server(
    start: Start, times: Callable[[int, int], int]
) -> None:
    daemon = start("-p", "0", "--tls", "implicit")
    port = daemon.port()
    with ExitStack() as clients:
        for _ in range(times(20, 200)):
            clients.enter_context(begin_handshake(port))
        code, lines = daemon.end(signal.SIGTERM)
    assert code == 0
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO: Cleaning up"]


def upload(port: int) -> smtplib.SMTP:
    """Return a client that stops in the middle of a mail."""
    client = connect(port)
    begin_data(client)
    client.send(b"x" * 100_000)
    return client


def read_nothing(port: int) -> smtplib.SMTP:
    """Return a client that has sent a mail, and then as much as it could without reading."""
    client = connect(port)
    client.sendmail("a@example.com", ["b@example.com"], MAIL)
    assert client.sock is not None
    client.sock.settimeout(0)
    with suppress(BlockingIOError):
        while True:
            client.sock.send(b"NOOP\r\n" * 10_000)
    return client


def test_a_signal_in_the_middle_of_uploads_and_of_clients_that_do_not_read_ends_the_server(
    start: Start, tmp_path: Path
) -> None:
    daemon = start("-p", "0", "-d", str(tmp_path))
    port = daemon.port()
    with ExitStack() as clients:
        uploads = [clients.enter_context(upload(port)) for _ in range(20)]
        unread = [clients.enter_context(read_nothing(port)) for _ in range(20)]
        code, _ = daemon.end(signal.SIGTERM)
        assert code == 0
        for client in uploads:
            assert client.getreply()[0] == 421
        for client in (*uploads, *unread):
            client.close()
    assert len(stored(tmp_path)) == len(unread)
