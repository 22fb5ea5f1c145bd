"""dsmtpd without the names that Windows lacks, which these tests remove."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dsmtpd import signals
from dsmtpd.command import CommandError, run
from dsmtpd.maildir import Maildir
from dsmtpd.options import Options
from dsmtpd.output import Output
from dsmtpd.server import Listener, ListenError
from dsmtpd.testing import messages
from tests.test_command import SEND
from tests.test_main import with_preparation
from tests.tools import MAIL, send, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tools import Daemon

MISSING = {
    "os": ("O_DIRECTORY", "geteuid", "posix_spawnp"),
    "select": ("poll",),
    "signal": ("pthread_sigmask", "sigwait", "sigwaitinfo"),
}

WINDOWS = with_preparation(
    f"""
import importlib
for name, missing in {MISSING}.items():
    module = importlib.import_module(name)
    for attribute in missing:
        vars(module).pop(attribute, None)
"""
)


@pytest.fixture
def _windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, missing in MISSING.items():
        for attribute in missing:
            monkeypatch.delattr(importlib.import_module(name), attribute, raising=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_mails_are_stored_and_a_signal_ends_the_command(
    start: Callable[..., Daemon], tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ("-p", "0", "-d", str(tmp_path), "--print", "text", "--tls", "starttls")
    daemon = start(*arguments, run=WINDOWS)
    send(daemon.port())
    assert len(stored(tmp_path)) == 1
    code, (mail, *_, last) = daemon.end(number)
    assert code == 0
    assert "a@example.com -> b@example.com [Hello]" in mail
    assert last.endswith("INFO: Cleaning up")


def test_a_command_is_run_and_sets_the_exit_code(
    start: Callable[..., Daemon], tmp_path: Path
) -> None:
    tls = ("--tls", "starttls", "--tls-ca", str(tmp_path / "ca.pem"))
    command = ("--", sys.executable, "-c", SEND)
    daemon = start("-p", "0", "-d", str(tmp_path / "mails"), *tls, *command, run=WINDOWS)
    assert daemon.end()[0] == 3
    assert len(stored(tmp_path / "mails")) == 1


def test_ctrl_c_is_left_to_the_command(
    start: Callable[..., Daemon],
) -> None:
    inside, outside = os.pipe()
    with os.fdopen(inside), os.fdopen(outside, "w"):
        script = "echo ready; read line; exit 7"
        daemon = start("-p", "0", "--", "sh", "-c", script, run=WINDOWS, stdin=inside)
        assert daemon.output_line() == "ready"
        daemon.process.send_signal(signal.SIGINT)
    code, (*_, last) = daemon.end()
    assert code == 7
    assert last.endswith("INFO: Cleaning up")


def test_a_signal_with_a_handler_in_c_is_left_alone(start: Callable[..., Daemon]) -> None:
    # That of faulthandler, which -X dev turns on.
    run = [sys.executable, "-X", "dev", *WINDOWS[1:]]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        daemon = start("-p", str(port), "--", "true", run=run)
        reason = f"Cannot listen on 127.0.0.1, port {port}: Address already in use"
        assert daemon.failure() == (1, reason)


def test_the_reason_of_a_socket_error_is_what_windows_calls_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {errno.EADDRINUSE: "The network address is in use."}
    monkeypatch.setattr(socket, "errorTab", texts, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        listener = Listener(None, Options(port=other.getsockname()[1]))
        with pytest.raises(ListenError, match=r": The network address is in use\.$"), listener:
            pass


@pytest.mark.usefixtures("_windows")
@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [("no-such", "No such file or directory", 127), ("/dev/null", "Permission denied", 126)],
)
def test_a_command_that_cannot_be_run_is_reported_as_on_posix(
    name: str, reason: str, code: int
) -> None:
    with pytest.raises(CommandError, match=f"Cannot run {name}: {reason}") as raised:
        run([name], {}, [])
    assert raised.value.code == code


@pytest.mark.usefixtures("_windows")
def test_a_command_may_be_a_batch_file(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on Windows, where the system itself looks for .exe alone.
    monkeypatch.setattr(shutil, "which", {"npm": sys.executable}.get)
    assert run(["npm", "-c", "raise SystemExit(7)"], {}, []) == 7


@pytest.mark.usefixtures("_windows")
def test_an_exit_code_of_32_bits_is_one_that_python_can_exit_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 0xC000013A)  # after Ctrl+C
    assert run(["x"], {}, []) == 0xC000013A - (1 << 32)


@pytest.fixture
def received() -> list[int]:
    """Return the signals that the handlers of the process have received."""
    numbers: list[int] = []
    for number in signals.named("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(number, lambda received, _: numbers.append(received))
    return numbers


@pytest.mark.usefixtures("_windows")
def test_a_signal_that_nobody_waits_for_is_delivered_after_the_block(received: list[int]) -> None:
    with signals.blocked():
        signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


@pytest.mark.usefixtures("_windows")
def test_a_block_within_a_block_leaves_signals_to_the_outer_one(received: list[int]) -> None:
    with signals.blocked():
        with signals.blocked():
            signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


@pytest.mark.usefixtures("_windows")
def test_after_the_first_signal_the_next_ones_are_ignored(received: list[int]) -> None:
    with signals.blocked() as blocked:
        signal.raise_signal(signal.SIGINT)
        signals.wait(blocked)
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert received == []


@pytest.mark.usefixtures("_windows")
def test_wait_polls_for_signals(received: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with signals.blocked() as blocked:
        signals.wait(blocked)
    assert received == []


@pytest.mark.usefixtures("_windows")
def test_a_stream_is_written_to_without_polling(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as stream:
        assert Output(stream).write("x" * 1000)
    assert (tmp_path / "out").read_text() == "x" * 1000


@pytest.mark.usefixtures("_windows")
def test_outside_the_main_thread_signals_are_not_blocked(
    received: list[int],
) -> None:
    def raise_blocked() -> None:
        with signals.blocked():
            signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=raise_blocked)
    thread.start()
    thread.join()
    assert received == [signal.SIGTERM]


@pytest.mark.usefixtures("_windows")
def test_the_octets_of_a_mail_are_stored_as_they_are(tmp_path: Path) -> None:
    key = Maildir(tmp_path).add(MAIL)
    assert (tmp_path / "new" / key).read_bytes() == MAIL.replace(b"\r\n", b"\n")


def test_a_mail_that_a_reader_moves_is_returned_once_even_without_colons_in_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Maildir, "colon", "!")
    key = Maildir(tmp_path).add(MAIL)
    # As seen while a reader moves it.
    (tmp_path / "cur" / f"{key}!2,S").write_bytes(MAIL)
    assert len(messages(tmp_path)) == 1
