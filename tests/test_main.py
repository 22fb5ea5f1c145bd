"""The real command, in its own process, with real clients."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import pytest

import dsmtpd
from dsmtpd import __version__
from dsmtpd.maildir import ensure_maildir
from tests.tools import (
    MAIL,
    PATIENCE,
    RUN,
    WARNINGS,
    Daemon,
    begin_data,
    connect,
    send,
    stored,
    trust_all,
)

# How long shutdown may take after the signal.
END_SECONDS = 2.0

# A user without other processes, even when tests run in parallel.
USER = 54_321 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


class Start(Protocol):
    def __call__(self, *arguments: str, **settings: Any) -> Daemon: ...


def without(capability: str) -> list[str]:
    """Return a command prefix that drops *capability* from root; empty for other users."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    return ["setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}"]


def with_tasks(count: int) -> list[str]:
    """Return a command prefix that allows at most *count* threads."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "prlimit"))):
        pytest.skip("this needs root, setpriv and prlimit")
    # The limit does not apply to root.
    caps = "+dac_override,+dac_read_search"
    user = ("setpriv", f"--reuid={USER}", f"--inh-caps={caps}", f"--ambient-caps={caps}")
    return [*user, "prlimit", f"--nproc={count}"]


def test_the_module_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = str(Path(dsmtpd.__file__).with_name("__main__.py"))
    monkeypatch.setattr("sys.argv", ["dsmtpd", "--version"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(module, run_name="__main__")
    assert not raised.value.code
    assert capsys.readouterr().out == f"{__version__}\n"


def test_the_installed_script_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["dsmtpd", "--frobnicate"])
    (script,) = entry_points(group="console_scripts", name="dsmtpd")
    assert script.load()() == 2
    assert "--frobnicate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "number"),
    [
        (RUN, signal.SIGTERM),
        (RUN, signal.SIGINT),
        (RUN, signal.SIGHUP),
        ([str(Path(sysconfig.get_path("scripts"), "dsmtpd"))], signal.SIGTERM),
    ],
)
def test_a_mail_is_logged_and_stored_until_a_signal_ends_the_command(
    start: Start, tmp_path: Path, run: list[str], number: signal.Signals
) -> None:
    maildir = tmp_path / "a" / "b"
    daemon = start("-p", "0", "-d", str(maildir), run=run)
    send(daemon.port())
    code, lines = daemon.end(number)
    assert code == 0
    mail, last = [line.split(" ", 2)[2] for line in lines]
    assert mail.startswith("INFO: 127.0.0.1:")
    assert mail.endswith(": a@example.com -> b@example.com [Hello]")
    assert last == "INFO: Cleaning up"
    assert len(stored(maildir)) == 1


def test_without_a_maildir_no_folder_is_touched(start: Start, tmp_path: Path) -> None:
    daemon = start("--port=0", cwd=tmp_path)
    send(daemon.port())
    code, lines = daemon.end(signal.SIGTERM)
    assert (code, len(lines)) == (0, 2)
    assert list(tmp_path.iterdir()) == []


def test_an_accepted_mail_is_printed_on_stdout(start: Start, tmp_path: Path) -> None:
    daemon = start("-p", "0", "-d", str(tmp_path), "--print", "json", "--tls", "implicit")
    context = trust_all()
    with smtplib.SMTP_SSL("127.0.0.1", daemon.port(), "client.test", context=context) as client:
        client.login("app", "secret")
        client.sendmail("a@example.com", ["b@example.com"], MAIL)
        record = json.loads(daemon.output_line())
    assert (record["subject"], record["text"]) == ("Hello", "Hi there.\n")
    assert (record["tls"], record["auth_user"]) == ("TLSv1.3", "app")
    assert Path(record["file"]).read_bytes() == stored(tmp_path)[0]
    assert daemon.end(signal.SIGTERM)[0] == 0
    assert daemon.output_line() == ""


def test_a_closed_stdout_stops_only_the_printing(start: Start, tmp_path: Path) -> None:
    run = ["sh", "-c", 'exec "$@" >&-', "sh", *RUN]
    daemon = start("-p", "0", "-d", str(tmp_path), "--print", "text", run=run)
    assert "WARNING: Mails are no longer printed: Bad file descriptor" in daemon.line()
    port = daemon.port()
    for _ in range(2):
        send(port)
    assert len(stored(tmp_path)) == 2
    code, lines = daemon.end(signal.SIGTERM)
    assert (code, len(lines)) == (0, 3)


def test_a_full_stdout_pipe_does_not_delay_shutdown(start: Start) -> None:
    daemon = start("-p", "0", "--print", "text")
    send(daemon.port(), MAIL + b"x" * 200_000)
    begin = time.monotonic()
    code, lines = daemon.end(signal.SIGTERM)
    assert time.monotonic() - begin < END_SECONDS
    assert code == 0
    assert "WARNING: Mails are no longer printed: Nobody reads them" in lines[-2]
    assert lines[-1].endswith("INFO: Cleaning up")


def test_ipv6_is_shown_in_brackets(start: Start) -> None:
    daemon = start("-p", "0", "-i", "::1")
    send(daemon.port(), host="::1")
    _, (mail, _) = daemon.end(signal.SIGTERM)
    assert " INFO: [::1]:" in mail


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["-d", "/dev/null"],
            "Cannot store mails in /dev/null: Not a directory",
        ),
        (
            ["-d", "/dev/null/x"],
            "Cannot store mails in /dev/null/x: Not a directory",
        ),
        (
            ["-d", "/proc/no/such"],
            "Cannot store mails in /proc/no/such: No such file or directory (/proc/no)",
        ),
        (
            ["--tls", "starttls", "--tls-cert", "/no.such.pem"],
            "Cannot use /no.such.pem: No such file or directory",
        ),
    ],
)
def test_an_unusable_path_is_one_line_and_exit_code_2(
    start: Start, arguments: list[str], line: str
) -> None:
    # Listening first would report the bad interface instead.
    assert start("-i", "no.such.interface.invalid", *arguments).failure() == (2, line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--frobnicate"], "Unexpected argument: '--frobnicate'"),
        (["--port"], "--port requires argument"),
        (["--port=70000"], "--port: '70000' is not a port from 0 to 65535"),
        (["-s", "-5"], "--max-size: '-5' is not a number of bytes, 0 or more"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    start: Start, arguments: list[str], line: str
) -> None:
    assert start(*arguments).end() == (2, [f"dsmtpd: {line} (see dsmtpd --help)"])


@pytest.mark.parametrize(
    ("way", "words"), [("starttls", "after STARTTLS"), ("implicit", "from the first byte")]
)
def test_the_log_names_the_ca_to_trust(start: Start, way: str, words: str) -> None:
    daemon = start("-p", "0", "--tls", way)
    assert " INFO: Starting dsmtpd " in daemon.line()
    line, ca = daemon.line().rsplit(" ", 1)
    assert line.endswith(f" INFO: TLS {words}, with a certificate of the CA in")
    assert ssl.create_default_context(cafile=ca).cert_store_stats()["x509_ca"] == 1
    assert daemon.end(signal.SIGTERM)[0] == 0
    assert not Path(ca).exists()


def test_a_failed_start_keeps_the_ca_of_another_server(start: Start, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    port = start("-p", "0", "--tls", "starttls", "--tls-ca", str(ca)).port()
    content = ca.read_bytes()
    code, _ = start("-p", str(port), "--tls", "starttls", "--tls-ca", str(ca)).failure()
    assert (code, ca.read_bytes()) == (1, content)


def test_an_unwritable_ca_file_is_one_line_and_exit_code_2(start: Start) -> None:
    line = "Cannot write the CA to /no/ca.pem: No such file or directory"
    assert start("-p", "0", "--tls", "implicit", "--tls-ca", "/no/ca.pem").failure() == (2, line)


def test_disabled_auth_is_not_offered(start: Start) -> None:
    with connect(start("-p", "0", "--disable-auth").port()) as client:
        client.ehlo()
        assert not client.has_extn("auth")
        assert client.docmd("AUTH PLAIN")[0] == 502


def test_an_unwritable_maildir_is_one_line_and_exit_code_2(start: Start, tmp_path: Path) -> None:
    ensure_maildir(tmp_path)
    (tmp_path / "new").chmod(0o500)
    run = [*without("dac_override"), *RUN]
    line = f"Cannot store mails in {tmp_path}: Not writable ({tmp_path}/new)"
    assert start("-p", "0", "-d", str(tmp_path), run=run).failure() == (2, line)


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        ("192.0.2.254", "Cannot assign requested address"),
        ("a..b", "Malformed name"),
    ],
)
def test_an_unavailable_interface_is_one_line_and_exit_code_1(
    start: Start, interface: str, reason: str
) -> None:
    line = f"Cannot listen on {interface}, port 0: {reason}"
    assert start("-p", "0", "-i", interface).failure() == (1, line)


def test_a_port_in_use_is_one_line_and_exit_code_1(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = f"Cannot listen on 127.0.0.1, port {port}: Address already in use"
        assert start("-p", str(port)).failure() == (1, line)


def test_a_privileged_port_is_one_line_and_exit_code_1(start: Start) -> None:
    first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not first.exists() or int(first.read_text()) <= 25:
        pytest.skip("port 25 is not privileged here")
    run = [*without("net_bind_service"), *RUN]
    line = "Cannot listen on 127.0.0.1, port 25: Permission denied"
    assert start("-p", "25", run=run).failure() == (1, line)


@pytest.mark.parametrize("state", ["idle", "in DATA"])
def test_connected_clients_do_not_delay_shutdown(start: Start, tmp_path: Path, state: str) -> None:
    daemon = start("-p", "0", "-d", str(tmp_path / "maildir"))
    port = daemon.port()
    clients = [connect(port) for _ in range(5)]
    for client in clients:
        if state == "in DATA":
            begin_data(client)
            client.send(b"Subject: never finished\r\n")
    begin = time.monotonic()
    code, lines = daemon.end(signal.SIGTERM)
    assert time.monotonic() - begin < END_SECONDS
    assert code == 0
    assert lines[-1].endswith("INFO: Cleaning up")
    assert stored(tmp_path / "maildir") == []
    for client in clients:
        assert client.getreply()[0] == 421
        client.close()


def with_preparation(code: str) -> list[str]:
    """Return the command, which runs *code* first."""
    start = "from dsmtpd.__main__ import main; sys.exit(main())"
    return [sys.executable, *WARNINGS, "-c", f"import os, signal, sys\n{code}\n{start}"]


# Sends the process a signal at its Nth import after dsmtpd.signals; N is *left*.
INTERRUPT = """
class Interrupter:
    left = {left}
    def find_spec(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), {number:d})
import dsmtpd.signals
sys.meta_path.insert(0, Interrupter())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("left", [2, 20, 60, 120, 180])
def test_a_signal_during_startup_kills_the_process_without_a_traceback(
    start: Start, tmp_path: Path, number: signal.Signals, left: int
) -> None:
    run = with_preparation(INTERRUPT.format(left=left, number=number))
    arguments = ["-p", "0", "-d", str(tmp_path), "--tls", "starttls"]
    assert start(*arguments, run=run).end() == (-number, [])


NO_LONGER = "dsmtpd no longer waits for the disk"

# A system call that prints that it has begun, and never returns.
HANG = """
def hang(*_, **__):
    print("hangs", flush=True)
    signal.sigwait([signal.SIGUSR1])
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("socket.getaddrinfo", signal.SIGINT),
        ("socket.getaddrinfo", signal.SIGTERM),
        ("socket.getaddrinfo", signal.SIGHUP),
        ("os.access", signal.SIGINT),
        ("os.scandir", signal.SIGTERM),
    ],
)
def test_a_signal_kills_the_process_even_while_a_lookup_or_a_folder_hangs(
    start: Start, tmp_path: Path, call: str, number: signal.Signals
) -> None:
    slow = with_preparation(f"import socket, dsmtpd._dsmtpd\n{HANG}\n{call} = hang")
    daemon = start("-i", "slow.test", "-p", "0", "-d", str(tmp_path / "maildir"), run=slow)
    assert daemon.output_line() == "hangs"
    assert daemon.end(number) == (-number, [])


def test_a_signal_ends_the_command_even_while_mails_are_counted(
    start: Start, tmp_path: Path
) -> None:
    # The folder hangs as soon as the port is open.
    slow = "def slow(*arguments):\n    os.scandir = hang\n    listen(*arguments)"
    patch = "listen, socket.socket.listen = socket.socket.listen, slow"
    run = with_preparation(f"import socket, dsmtpd._dsmtpd\n{HANG}\n{slow}\n{patch}")
    daemon = start("-p", "0", "-d", str(tmp_path), run=run)
    assert " INFO: Starting dsmtpd " in daemon.line()
    assert daemon.output_line() == "hangs"
    code, lines = daemon.end(signal.SIGTERM)
    assert code == 0
    assert [line.split(" ", 2)[2] for line in lines] == [
        f"ERROR: The mails in {tmp_path} could not be counted in time: {NO_LONGER}",
        "INFO: Cleaning up",
    ]


def test_an_ignored_sighup_stays_ignored(start: Start) -> None:
    daemon = start("-p", "0", run=with_preparation("signal.signal(signal.SIGHUP, signal.SIG_IGN)"))
    port = daemon.port()
    daemon.process.send_signal(signal.SIGHUP)
    send(port)
    code, lines = daemon.end(signal.SIGTERM)
    assert (code, len(lines)) == (0, 2)


def test_the_soft_limit_on_open_files_does_not_limit_clients(start: Start) -> None:
    limit = ["sh", "-c", 'ulimit -Sn 50 && ulimit -Hn 200 && exec "$@"', "sh"]
    daemon = start("-p", "0", run=[*limit, *RUN])
    port = daemon.port()
    clients = [connect(port) for _ in range(100)]
    assert daemon.end(signal.SIGTERM)[0] == 0
    for client in clients:
        client.close()


def test_a_full_log_pipe_does_not_delay_shutdown(tmp_path: Path) -> None:
    # Not a `Daemon`: that would read the log.
    command = [*RUN, "-p", "0", "-d", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as process:
        log = process.stderr
        assert log is not None
        port = int(log.readline().split(b":")[-1].split()[0])
        assert b" INFO: Storing the incoming emails into " in log.readline()
        acknowledged = 0
        with connect(port) as client:
            assert client.sock is not None
            client.sock.settimeout(1)
            # Replies stop once the pipe is full.
            with suppress(smtplib.SMTPServerDisconnected):
                while True:
                    client.sendmail("a@x", ["b@x"], b"Subject: " + b"x" * 2000)
                    acknowledged += 1
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - begin < END_SECONDS
    assert 0 < acknowledged <= len(stored(tmp_path)) <= acknowledged + 1


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_hanging_disk_does_not_delay_shutdown_for_ever(
    start: Start, tmp_path: Path, *, in_loop: bool
) -> None:
    # The event loop stores a second mail, because the first was stored at once.
    settings = "time.perf_counter = lambda: 0\nserver._END_PATIENCE = 0.5"
    hang = f"{HANG}\nmails = iter([False] * {in_loop:d})\n{settings}"
    flush = "lambda number: stat.S_ISREG(os.fstat(number).st_mode) and next(mails, True) and hang()"
    run = with_preparation(
        f"import stat, time\nfrom dsmtpd import server\n{hang}\nos.fsync = {flush}"
    )
    daemon = start("-p", "0", "-d", str(tmp_path), run=run)
    port = daemon.port()
    if in_loop:
        send(port)
    with connect(port) as client:
        begin_data(client)
        client.send(MAIL + b".\r\n")
        assert daemon.output_line() == "hangs"
        code, lines = daemon.end(signal.SIGTERM)
        client.close()
    assert code == 0
    assert [line.split(" ", 2)[2] for line in lines[-2:]] == [
        f"ERROR: A mail could not be stored within 0.5 s: {NO_LONGER}",
        "INFO: Cleaning up",
    ]
    assert len(list((tmp_path / "new").iterdir())) == in_loop


def test_repeated_signals_do_not_disturb_shutdown(start: Start) -> None:
    daemon = start("-p", "0")
    daemon.port()
    deadline = time.monotonic() + PATIENCE
    while daemon.process.poll() is None and time.monotonic() < deadline:
        daemon.process.send_signal(signal.SIGTERM)
    assert daemon.end()[0] == 0


def test_a_full_log_disk_does_not_change_the_exit_code(start: Start) -> None:
    code, lines = start("--no-such", run=["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *RUN]).end()
    assert (code, lines) == (2, [])


def test_a_background_job_survives_sigint_and_ends_on_sigterm(start: Start) -> None:
    # The background jobs of a script ignore SIGINT.
    shell = ["sh", "-c", '"$@" & echo $!; wait $!', "sh"]
    daemon = start("-p", "0", run=[*shell, *RUN])
    port = daemon.port()
    process = int(daemon.output_line())
    os.kill(process, signal.SIGINT)
    send(port)
    os.kill(process, signal.SIGTERM)
    code, lines = daemon.end()
    assert code == 0
    assert lines[-1].endswith("INFO: Cleaning up")


def test_a_closed_stderr_loses_no_mail_and_stops_nothing(start: Start, tmp_path: Path) -> None:
    daemon = start("-p", "0", "-d", str(tmp_path), log_lines=2)
    port = daemon.port()
    for _ in range(3):
        send(port)
    assert len(stored(tmp_path)) == 3
    assert daemon.end(signal.SIGTERM) == (0, [])


def test_at_the_thread_limit_mails_are_stored_and_shutdown_is_clean(
    start: Start,
) -> None:
    run = [*with_tasks(2), *RUN]
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is private to root
        os.chown(folder, USER, -1)
        daemon = start("-p", "0", "-d", folder, run=run)
        with connect(daemon.port()) as client:
            for _ in range(3):
                client.sendmail("a@x", ["b@x"], MAIL)
        assert len(stored(folder)) == 3
    code, (*mails, last) = daemon.end(signal.SIGTERM)
    assert (code, len(mails)) == (0, 3)
    assert last.endswith("INFO: Cleaning up")


def test_a_start_without_a_thread_is_one_line_and_exit_code_1(start: Start) -> None:
    line = "Cannot listen on 127.0.0.1, port 0: can't start new thread"
    assert start("-p", "0", run=[*with_tasks(1), *RUN]).failure() == (1, line)


def test_several_processes_deliver_into_one_maildir(start: Start, tmp_path: Path) -> None:
    daemons = [start("-p", "0", "-d", str(tmp_path)) for _ in range(3)]
    ports = [daemon.port() for daemon in daemons]
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(send, ports * 20))
    assert len(stored(tmp_path)) == 60


def test_an_ascii_locale_loses_no_mail_and_stops_nothing(start: Start, tmp_path: Path) -> None:
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
    }
    maildir = tmp_path / "é"
    daemon = start("-p", "0", "-d", str(maildir), env=ascii_only)
    send(daemon.port(), "Subject: 🎉\r\n\r\né\r\n".encode())
    code, lines = daemon.end(signal.SIGTERM)
    assert code == 0
    assert lines[0].endswith(r"a@example.com -> b@example.com [\U0001f389]")
    assert len(stored(maildir)) == 1
    assert "🎉".encode() in stored(maildir)[0]
