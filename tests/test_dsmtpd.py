from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import mailbox
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import call, patch

import pytest
import trustme
from aiosmtpd.controller import Controller

from dsmtpd import __version__, _dsmtpd, server
from dsmtpd._dsmtpd import DsmtpdHandler, main
from dsmtpd.maildir import ensure_maildir
from dsmtpd.server import Listener
from tests.tools import (
    FREE,
    MAIL,
    PATIENCE,
    begin_data,
    connect,
    envelope,
    on_flush,
    reset,
    send,
    stored,
)

if TYPE_CHECKING:
    import smtplib
    from collections.abc import Callable, Iterator
    from pathlib import Path

SESSION = SimpleNamespace(peer=("127.0.0.1", 1234))


def handle(handler: DsmtpdHandler, content: bytes | str = MAIL) -> str:
    mail = envelope("a@x", ["b@x", "c@x"], content)
    return asyncio.run(handler.handle_DATA(None, SESSION, mail))


@pytest.fixture
def failing_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes flushes fail with an error number, or work again with 0."""
    number = 0

    def fsync(_: int) -> None:
        if number:
            raise OSError(number, os.strerror(number), "/a/path/of/ours")

    def fail(with_number: int) -> None:
        nonlocal number
        number = with_number

    on_flush(monkeypatch, fsync)
    return fail


def test_the_historical_names_still_exist() -> None:
    names = "DsmtpdHandler create_maildir ensure_maildir is_maildir log main parse_args"
    constants = "DEFAULT_INTERFACE DEFAULT_PORT LOGGERNAME"
    assert set(_dsmtpd.__all__) == {*names.split(), *constants.split()}
    assert all(hasattr(_dsmtpd, name) for name in _dsmtpd.__all__)
    assert (_dsmtpd.LOGGERNAME, _dsmtpd.DEFAULT_INTERFACE) == ("dsmtpd", "127.0.0.1")
    assert _dsmtpd.DEFAULT_PORT == 1025
    assert _dsmtpd.log is logging.getLogger("dsmtpd")


@pytest.mark.parametrize(
    "content", [b"From: a@x\r\nSubject: hi\r\n\r\n", "From: a@x\r\nSubject: hi\r\n\r\n"]
)
def test_a_mail_is_logged_through_the_modules_own_log(content: bytes | str) -> None:
    with patch("dsmtpd._dsmtpd.log") as log:
        assert handle(DsmtpdHandler(), content) == "250 OK"
    shown = {"peer": "127.0.0.1:1234", "mail_from": "a@x", "rcpttos": "b@x, c@x", "subject": "hi"}
    template = "%(peer)s: %(mail_from)s -> %(rcpttos)s [%(subject)s]"
    assert log.mock_calls == [call.info(template, shown)]


def test_a_mail_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handle(DsmtpdHandler(), b"From: a@x\r\nSubject: =?utf-8?q?caf=C3=A9=0A?=\r\n\r\n")
    assert caplog.messages == [r"127.0.0.1:1234: a@x -> b@x, c@x [café\n]"]


def test_faults_in_a_mail_are_logged_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handle(DsmtpdHandler(), b"From: a@x\r\n\r\n" + b"x" * 998 + b"\r\n")
    assert handle(DsmtpdHandler(), b"To: a@x\r\n\r\na\n" + b"y" * 2000 + b"\r\n") == "250 OK"
    faults = ["no From field", "1 bare LF, first in line 3"]
    faults.append("a line of 2,000 octets, which is more than 998")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dsmtpd", "WARNING")
    assert caplog.messages == [
        f"127.0.0.1:1234: Other servers may refuse this mail: {'; '.join(faults)}"
    ]


def test_only_the_first_mebibyte_is_checked_for_faults(caplog: pytest.LogCaptureFixture) -> None:
    handle(DsmtpdHandler(), b"From: a@x\r\n\r\n\r\n" + b"x" * 2_000_000)
    what = "Other servers may refuse this mail in its first MiB"
    length = "a line of 1,048,561 octets, which is more than 998"
    assert caplog.messages == [f"127.0.0.1:1234: {what}: {length}"]


def test_nothing_is_stored_without_a_maildir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert handle(DsmtpdHandler()) == "250 OK"
    assert list(tmp_path.iterdir()) == []


def test_a_stored_mail_begins_with_its_envelope(tmp_path: Path) -> None:
    maildir = tmp_path / "a" / "b"
    assert handle(DsmtpdHandler(str(maildir))) == "250 OK"
    head = b"X-Peer: ('127.0.0.1', 1234)\nX-MailFrom: a@x\nX-RcptTo: b@x, c@x\n"
    assert stored(maildir) == [head + MAIL.replace(b"\r\n", b"\n")]
    (mail,) = mailbox.Maildir(maildir)
    assert mail["Subject"] == "Hello"


@contextmanager
def plain_controller(handler: DsmtpdHandler) -> Iterator[int]:
    """Serve *handler* with aiosmtpd alone; yield the port."""
    # aiosmtpd's Controller does not say which free port it chose.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        yield port
    finally:
        controller.stop()


def test_the_handler_works_with_aiosmtpds_controller(tmp_path: Path) -> None:
    with plain_controller(DsmtpdHandler(tmp_path)) as port:
        send(port)
    assert len(stored(tmp_path)) == 1


def test_with_aiosmtpds_controller_a_logged_mail_is_stored_even_if_its_client_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmtpd")
    gate, done, rename = Gate(), queue.SimpleQueue[None](), os.rename

    def rename_and_report(*paths: str) -> None:
        rename(*paths)
        done.put(None)

    on_flush(monkeypatch, lambda _: gate.pass_through())
    monkeypatch.setattr(os, "rename", rename_and_report)
    with plain_controller(DsmtpdHandler(tmp_path)) as port:
        # More clients than threads: the deliveries that wait for one could be dropped.
        clients = [connect(port) for _ in range(40)]
        for client in clients:
            begin_data(client)
            client.send(MAIL + b".\r\n")
        with connect(port) as other:
            other.noop()
            for client in clients:
                reset(client)
            other.noop()
    gate.opened.set()
    for _ in caplog.messages:
        done.get(timeout=PATIENCE)
    assert len(stored(tmp_path)) == len(caplog.messages) == 40


def test_dots_are_unstuffed_and_the_final_dot_is_not_stored(tmp_path: Path) -> None:
    with Listener(DsmtpdHandler(tmp_path), FREE) as listener:
        send(listener.port, b"\r\n.\r\n..\r\n.a\r\nend\r\n")
    (mail,) = stored(tmp_path)
    assert mail.endswith(b"X-RcptTo: b@example.com\n\n.\n..\n.a\nend\n")


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ENOSPC, "452 4.3.1 Storage full"),
        (errno.EDQUOT, "452 4.3.1 Storage full"),
        (errno.EIO, "451 4.3.0 Storage failed"),
        (errno.EACCES, "451 4.3.0 Storage failed"),
    ],
)
def test_a_storage_error_is_temporary_and_logged_in_one_line(
    tmp_path: Path,
    failing_sync: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
    number: int,
    reply: str,
) -> None:
    handler = DsmtpdHandler(tmp_path)
    failing_sync(number)
    assert handle(handler) == reply
    assert caplog.messages == [
        f"Cannot store a mail in {tmp_path}: {os.strerror(number)} (/a/path/of/ours)"
    ]
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("ERROR", None)]
    assert stored(tmp_path) == []
    failing_sync(0)
    assert handle(handler) == "250 OK"
    assert len(stored(tmp_path)) == 1


def test_a_maildir_that_became_a_file_is_a_temporary_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maildir = tmp_path / "maildir"
    handler = DsmtpdHandler(maildir)
    shutil.rmtree(maildir)
    maildir.touch()
    assert handle(handler) == "451 4.3.0 Storage failed"
    (line,) = caplog.messages
    assert line.startswith(f"Cannot store a mail in {maildir}: Not a directory ({maildir}/")
    maildir.unlink()
    assert handle(handler) == "250 OK"
    assert len(stored(maildir)) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_refuses_mails_until_there_is_room(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maildir = small_disk / "maildir"
    ballast = small_disk / "ballast"
    with Listener(DsmtpdHandler(maildir), FREE) as listener, connect(listener.port) as client:
        ballast.write_bytes(bytes(64 * 1024))
        begin_data(client)
        client.send(MAIL + (b"x" * 98 + b"\r\n") * 1000 + b".\r\n")
        assert client.getreply() == (452, b"4.3.1 Storage full")
        assert stored(maildir) == []
        ballast.unlink()
        client.sendmail("a@x", ["b@x"], MAIL)
    assert len(stored(maildir)) == 1
    (line,) = caplog.messages
    assert line == f"Cannot store a mail in {maildir}: No space left on device"


def test_the_reply_to_an_internal_error_gives_no_details(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(DsmtpdHandler):
        async def handle_DATA(self, *_: object) -> str:
            raise ZeroDivisionError("/a/path/of/ours")

    with Listener(Faulty(), FREE) as listener, connect(listener.port) as client:
        begin_data(client)
        client.send(b".\r\n")
        assert client.getreply() == (451, b"4.3.0 Internal error")
        assert client.noop()[0] == 250
    assert caplog.messages == ["Internal error: ZeroDivisionError('/a/path/of/ours')"]
    assert caplog.records[0].exc_info is None


class Gate:
    """Holds threads until it is opened."""

    def __init__(self) -> None:
        self.reached: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.reached.put(None)
        assert self.opened.wait(PATIENCE)


def test_a_slow_disk_blocks_no_other_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    on_flush(monkeypatch, lambda _: gate.pass_through())
    with (
        Listener(DsmtpdHandler(tmp_path), FREE) as listener,
        ExitStack() as clients,
        connect(listener.port) as other,
    ):
        busy = [clients.enter_context(connect(listener.port)) for _ in range(10)]
        for client in busy:
            begin_data(client)
            client.send(b".\r\n")
        for _ in busy:  # All of them wait for the disk at the same time.
            gate.reached.get(timeout=PATIENCE)
        assert other.noop()[0] == 250
        assert list((tmp_path / "new").iterdir()) == []
        gate.opened.set()
        assert [client.getreply() for client in busy] == [(250, b"OK")] * 10


def test_the_event_loop_stores_a_small_mail_only_if_the_last_write_was_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For each mail: the seconds to store it, its octets, and whether the event loop stores it.
    mails = [
        (0.2, 10, False),
        (0.0003, 10, False),
        (0.0001, 10, False),
        (0.2, 10, True),
        (0.0, 10, False),
        (0.0, 10, True),
        (0.0, 300_000, False),
        (0.0, 10, True),
    ]
    threads: list[threading.Thread] = []
    now = 0.0

    def fsync(_: int) -> None:
        nonlocal now
        now += mails[len(threads)][0]
        threads.append(threading.current_thread())

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    on_flush(monkeypatch, fsync)
    with Listener(DsmtpdHandler(tmp_path), FREE) as listener, connect(listener.port) as client:
        for _, octets, _ in mails:
            client.sendmail("a@x", ["b@x"], b"x" * octets)
    in_loop = [not thread.name.startswith("delivery") for thread in threads]
    assert in_loop == [mail[2] for mail in mails]
    assert len(stored(tmp_path)) == len(mails)


@pytest.fixture
def limit_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that limits how many delivery threads may start."""

    def limit(threads: int) -> None:
        start, started = threading.Thread.start, itertools.count()

        def start_within_limit(thread: threading.Thread) -> None:
            if thread.name.startswith("delivery") and next(started) >= threads:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_within_limit)

    return limit


def test_a_mail_is_stored_even_if_no_thread_can_start(
    tmp_path: Path, limit_threads: Callable[[int], None]
) -> None:
    limit_threads(0)
    with Listener(DsmtpdHandler(tmp_path), FREE) as listener, connect(listener.port) as client:
        for _ in range(3):
            client.sendmail("a@x", ["b@x"], MAIL)
        # The stale jobs in the pool's queue keep no mail in memory.
        tracemalloc.start()
        try:
            for _ in range(5):
                client.sendmail("a@x", ["b@x"], b"x" * 1_000_000)
            assert tracemalloc.get_traced_memory()[0] < 2_500_000
        finally:
            tracemalloc.stop()
    assert len(stored(tmp_path)) == 8


def test_a_mail_that_waits_for_a_thread_that_cannot_start_is_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_threads: Callable[[int], None]
) -> None:
    limit_threads(1)
    gate = Gate()
    on_flush(monkeypatch, lambda _: gate.pass_through())
    with (
        Listener(DsmtpdHandler(tmp_path), FREE) as listener,
        connect(listener.port) as one,
        connect(listener.port) as two,
    ):
        for client in (one, two):
            begin_data(client)
        for client in (one, two):
            client.send(b".\r\n")
        for _ in range(2):
            gate.reached.get(timeout=PATIENCE)
        gate.opened.set()
        assert [client.getreply()[0] for client in (one, two)] == [250, 250]
        # The thread skips the queued mail, which is stored already, and stores this one.
        one.sendmail("a@x", ["b@x"], b"x" * 300_000)
    assert len(stored(tmp_path)) == 3


def test_an_internal_error_in_a_thread_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fsync(_: int) -> None:
        raise ZeroDivisionError

    on_flush(monkeypatch, fsync)
    with Listener(DsmtpdHandler(tmp_path), FREE) as listener, connect(listener.port) as client:
        begin_data(client)
        client.send(MAIL + b".\r\n")
        assert client.getreply() == (451, b"4.3.0 Internal error")
    assert caplog.messages == ["Internal error: ZeroDivisionError()"]
    assert stored(tmp_path) == []


def test_a_logged_mail_is_stored_even_if_its_client_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmtpd")
    gate = Gate()
    on_flush(monkeypatch, lambda _: gate.pass_through())
    with Listener(DsmtpdHandler(tmp_path), FREE) as listener:
        # More clients than threads: some deliveries have to queue.
        clients = [connect(listener.port) for _ in range(40)]
        for client in clients:
            begin_data(client)
            client.send(MAIL + b".\r\n")
        with connect(listener.port) as other:
            other.noop()
            for client in clients:
                reset(client)
            other.noop()
        gate.opened.set()
    assert len(stored(tmp_path)) == len(caplog.messages) == 40


def test_a_delivery_completes_even_if_its_client_leaves_and_the_server_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    on_flush(monkeypatch, lambda _: gate.pass_through())
    with ExitStack() as block, ThreadPoolExecutor(1) as pool:
        listener = block.enter_context(Listener(DsmtpdHandler(tmp_path), FREE))
        idle, client = connect(listener.port), connect(listener.port)
        begin_data(client)
        client.send(b".\r\n")
        gate.reached.get(timeout=PATIENCE)
        client.close()
        leaving = pool.submit(block.close)
        assert idle.getreply()[0] == 421
        idle.close()
        # No event marks what must not happen: the server stopping without the delivery.
        assert not wait([leaving], 0.2).done
        gate.opened.set()
        leaving.result(PATIENCE)
    assert len(stored(tmp_path)) == 1


class Stopper(logging.Handler):
    """Sends a mail, and then the signal *number*, once the log says that the server listens.

    The signal waits until startup has been logged in full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = signal.SIGTERM
        self.deliver: Callable[[int], None] = send
        self.joins = True

    def emit(self, record: logging.LogRecord) -> None:
        match = re.search(r"at \S+:(\d+) size limit", record.getMessage())
        if match:
            arguments = int(match[1]), threading.current_thread()
            threading.Thread(target=self.act, args=arguments).start()

    def act(self, port: int, announcing: threading.Thread) -> None:
        try:
            self.deliver(port)
            if self.joins and announcing is not threading.main_thread():
                announcing.join(PATIENCE)
        finally:
            signal.pthread_kill(threading.main_thread().ident or 0, self.number)


@pytest.fixture
def stopper(caplog: pytest.LogCaptureFixture) -> Iterator[Stopper]:
    caplog.set_level(logging.INFO, "dsmtpd")
    handler = Stopper()
    logging.getLogger("dsmtpd").addHandler(handler)
    yield handler
    logging.getLogger("dsmtpd").removeHandler(handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_main_accepts_mails_until_a_signal(
    tmp_path: Path, stopper: Stopper, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    stopper.number = number
    maildir = tmp_path / "a\x1bb"
    ensure_maildir(maildir)
    (maildir / "cur" / "old").touch()
    assert main(["-p", "0", "-d", str(maildir)]) == 0
    starting, *middle, last = caplog.messages
    assert re.fullmatch(
        rf"Starting dsmtpd {__version__} at 127\.0\.0\.1:\d+ size limit 33554432", starting
    )
    assert [message for message in middle if "->" not in message] == [
        "Found a Maildir storage with 1 mails",
        f"Storing the incoming emails into {tmp_path}" + r"/a\x1bb",
    ]
    (mail,) = (message for message in middle if "->" in message)
    assert mail.endswith(": a@example.com -> b@example.com [Hello]")
    assert last == "Cleaning up"
    assert len(stored(maildir)) == 1


@pytest.mark.usefixtures("stopper")
def test_main_prints_mails_when_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "0", "--print", "text"]) == 0
    assert capsys.readouterr().out == "From: a@example.com\nSubject: Hello\n\nHi there.\n"


@pytest.mark.usefixtures("stopper")
def test_main_prints_the_path_of_a_stored_mail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-p", "0", "-d", str(tmp_path), "--print", "text"]) == 0
    (mail,) = (tmp_path / "new").iterdir()
    assert f"Subject: Hello\nFile: {mail}\n\nHi" in capsys.readouterr().out


@pytest.mark.usefixtures("stopper")
def test_no_count_is_logged_for_an_empty_maildir(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["-p", "0", "-d", str(tmp_path)]) == 0
    assert not any("Found" in message for message in caplog.messages)
    assert f"Storing the incoming emails into {tmp_path}" in caplog.messages


@pytest.mark.usefixtures("stopper")
def test_leftovers_of_an_interrupted_run_are_removed_at_startup(tmp_path: Path) -> None:
    ensure_maildir(tmp_path)
    left = tmp_path / "tmp" / "left"
    left.touch()
    os.utime(left, (0, 0))
    assert main(["-p", "0", "-d", str(tmp_path)]) == 0
    assert not left.exists()


@pytest.mark.usefixtures("stopper")
def test_a_failure_to_count_mails_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def scandir(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert main(["-p", "0", "-d", str(tmp_path)]) == 0
    reason = f"Permission denied ({tmp_path}/new)"
    assert f"Cannot count the mails in {tmp_path}: {reason}" in caplog.messages
    assert f"Storing the incoming emails into {tmp_path}" in caplog.messages


@pytest.mark.usefixtures("stopper")
@pytest.mark.parametrize("interface", ["0.0.0.0", "::"])  # noqa: S104  # for a moment
def test_main_warns_of_an_interface_that_other_machines_can_reach(
    interface: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["-p", "0", "-i", interface]) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["Other machines can send mails here, too: -i 127.0.0.1 keeps them out"]


@pytest.mark.usefixtures("stopper")
def test_main_logs_the_ca_to_trust(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca = tmp_path / "a\x1bca.pem"
    assert main(["-p", "0", "--tls", "starttls", "--tls-ca", str(ca)]) == 0
    shown = rf"{tmp_path}/a\x1bca.pem"
    assert f"TLS after STARTTLS, with a certificate of the CA in {shown}" in caplog.messages


@pytest.mark.usefixtures("stopper")
def test_main_logs_the_certificate_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert = tmp_path / "a\x1bcert.pem"
    trustme.CA().issue_cert("x.test").private_key_and_cert_chain_pem.write_to_path(cert)
    assert main(["-p", "0", "--tls", "starttls", "--tls-cert", str(cert)]) == 0
    shown = rf"{tmp_path}/a\x1bcert.pem"
    assert f"TLS after STARTTLS, with the certificate in {shown}" in caplog.messages


def test_an_unusable_certificate_is_exit_code_2(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert = tmp_path / "a\x1bcert.pem"
    assert main(["-p", "0", "--tls", "starttls", "--tls-cert", str(cert)]) == 2
    reason = "No such file or directory"
    assert caplog.messages == [rf"Cannot use {tmp_path}/a\x1bcert.pem: {reason}"]


@pytest.mark.usefixtures("stopper")
def test_main_stores_nothing_unless_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dsmtpd", "--port=0", "--max-size=0"])
    assert main() == 0
    assert caplog.messages[0].endswith(" size limit None")
    assert len(caplog.messages) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("stopper")
def test_startup_is_logged_even_without_a_thread_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def start_no_other(thread: threading.Thread) -> None:
        if thread.daemon and thread.name != "dsmtpd":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_no_other)
    assert main(["-p", "0", "-d", str(tmp_path)]) == 0
    assert f"Storing the incoming emails into {tmp_path}" in caplog.messages


NO_LONGER = "dsmtpd no longer waits for the disk"


def test_a_hanging_disk_does_not_keep_the_process_alive(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopper: Stopper,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    clients: list[smtplib.SMTP] = []

    def begin_delivery(port: int) -> None:
        clients.append(client := connect(port))
        begin_data(client)
        client.send(MAIL + b".\r\n")
        gate.reached.get(timeout=PATIENCE)

    def leave(code: int) -> None:
        gate.opened.set()
        for client in clients:
            client.close()
        raise SystemExit(code)

    stopper.deliver = begin_delivery
    on_flush(monkeypatch, lambda _: gate.pass_through())
    monkeypatch.setattr(server, "_END_PATIENCE", 0.2)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as raised:
        main(["-p", "0", "-d", str(tmp_path)])
    assert raised.value.code == 0
    assert caplog.messages[-2:] == [
        f"A mail could not be stored within 0.2 s: {NO_LONGER}",
        "Cleaning up",
    ]


@pytest.fixture
def _hanging_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make counting the mails hang until the process exits."""
    gate, scandir = Gate(), os.scandir

    def count(folder: Path | str) -> Iterator[os.DirEntry[str]]:
        if folder == tmp_path / "new":
            gate.pass_through()
        return scandir(folder)

    def leave(code: int) -> None:
        gate.opened.set()
        raise SystemExit(code)

    monkeypatch.setattr(os, "scandir", count)
    monkeypatch.setattr(_dsmtpd, "_PATIENCE", 0.1)
    monkeypatch.setattr(os, "_exit", leave)


@pytest.mark.usefixtures("_hanging_folder")
def test_a_hanging_folder_does_not_keep_the_process_alive(
    tmp_path: Path, stopper: Stopper, caplog: pytest.LogCaptureFixture
) -> None:
    stopper.joins = False
    with pytest.raises(SystemExit) as raised:
        main(["-p", "0", "-d", str(tmp_path)])
    assert raised.value.code == 0
    what = f"The mails in {tmp_path} could not be counted in time"
    assert caplog.messages[-2:] == [f"{what}: {NO_LONGER}", "Cleaning up"]


@pytest.mark.usefixtures("_hanging_folder")
def test_the_exit_code_of_a_command_survives_a_hanging_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["-p", "0", "-d", str(tmp_path), "--", "sh", "-c", "exit 3"])
    assert raised.value.code == 3


def test_a_command_that_cannot_be_run_is_logged_and_is_exit_code_126(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(["-p", "0", "--tls", "starttls", "--", "/dev/null"]) == 126
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["Cannot run /dev/null: Permission denied"]


def test_bad_usage_is_one_line_without_a_timestamp_and_exit_code_2(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--port", "x\n"]) == 2
    assert caplog.messages == []
    line = r"--port: 'x\n' is not a port from 0 to 65535 (see dsmtpd --help)"
    assert capsys.readouterr().err == f"dsmtpd: {line}\n"


def test_an_unusable_maildir_is_exit_code_2(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a\nfile").touch()
    assert main(["-p", "0", "-d", str(tmp_path / "a\nfile")]) == 2
    path = rf"{tmp_path}/a\nfile"
    assert caplog.messages == [f"Cannot store mails in {path}: Not a directory"]


def test_a_port_in_use_is_exit_code_1(caplog: pytest.LogCaptureFixture) -> None:
    with Listener(DsmtpdHandler(), FREE) as listener:
        assert main(["-p", str(listener.port)]) == 1
    assert caplog.messages == [
        f"Cannot listen on 127.0.0.1, port {listener.port}: Address already in use"
    ]
