from __future__ import annotations

import os
import pty
import resource
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread, get_ident
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd._dsmtpd import main
from dsmtpd.command import CommandError, run
from tests.test_main import with_preparation
from tests.tools import stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.tools import Daemon

NONE: list[signal.Signals] = []


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_run_returns_the_exit_code_of_the_command(script: str, code: int) -> None:
    assert run(["sh", "-c", script], {}, NONE) == code


@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [("no-such", "No such file or directory", 127), ("/dev/null", "Permission denied", 126)],
)
def test_a_command_that_cannot_be_run_is_reported_as_in_a_shell(
    name: str, reason: str, code: int
) -> None:
    with pytest.raises(CommandError) as raised:
        run([name, "x"], {}, NONE)
    assert str(raised.value) == f"Cannot run {name}: {reason}"
    assert raised.value.code == code


def test_a_command_gets_its_arguments_and_additional_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "kept")
    script = 'printf "%s\\n" "$@" "$OTHER" "$PORT" >"$OUT"'
    out = tmp_path / "out"
    code = run(["sh", "-c", script, "sh", "a b", ""], {"PORT": "1", "OUT": str(out)}, NONE)
    assert (code, out.read_text()) == (0, "a b\n\nkept\n1\n")


def test_a_command_gets_no_variables_of_another_dsmtpd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSMTPD_DIRECTORY", "another")
    script = f'echo "${{DSMTPD_DIRECTORY-none}}" "$DSMTPD_PORT" >{tmp_path}/out'
    assert run(["sh", "-c", script], {"DSMTPD_PORT": "1"}, NONE) == 0
    assert (tmp_path / "out").read_text() == "none 1\n"


@pytest.mark.parametrize("is_found", [True, False])
def test_a_script_without_a_shebang_is_run_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_found: bool
) -> None:
    script = tmp_path / "script"
    script.write_text('exit "$1"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert run(["script" if is_found else str(script), "5"], {}, NONE) == 5


def test_the_exit_code_is_known_even_if_sigchld_was_ignored() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert run(["sh", "-c", "exit 7"], {}, NONE) == 7


def test_a_command_may_open_as_many_files_as_without_dsmtpd(tmp_path: Path) -> None:
    before = _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        main(["-p", "0", "--", "sh", "-c", f"ulimit -n >{tmp_path}/out"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (tmp_path / "out").read_text() == "256\n"


@pytest.mark.parametrize(("soft", "allowed"), [(256, 10_240), (256, 256), (65_536, 65_536)])
def test_if_the_system_refuses_its_own_limit_that_of_macos_is_tried(
    soft: int, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        tried.append(limits[0])
        if limits[0] > allowed:
            raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 2**63 - 1))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert main(["-p", "0", "--", "true"]) == 0
    assert tried[:2] == [2**63 - 1, max(soft, 10_240)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_a_command_inherits_no_blocked_signals_and_none_that_python_ignores(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    script = f"grep -E 'SigBlk|SigIgn' /proc/self/status >{out}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert run(["sh", "-c", script], {}, NONE) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    blocked, ignored = (int(line.split()[1], 16) for line in out.read_text().splitlines())
    assert blocked == 0
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_a_pending_signal_is_passed_on(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "macOS":
        monkeypatch.delattr(signal, "sigwaitinfo", raising=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.pthread_kill(get_ident(), signal.SIGUSR1)
        assert run(["sleep", "60"], {}, [signal.SIGUSR1]) == 128 + signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Counts SIGINTs; exits on SIGTERM with 10 plus that count.
COUNT = """
import os, signal, sys
count, numbers = 0, [signal.SIGINT, signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
os.write(1, b"ready\\n")
while signal.sigwait(numbers) == signal.SIGINT:
    count += 1
    os.write(1, b"interrupted\\n")
sys.exit(10 + count)
"""
COUNTING = ("--", sys.executable, "-c", COUNT)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU])
def test_a_command_does_not_outlive_dsmtpd(start: Callable[..., Daemon], number: int) -> None:
    daemon = start("-p", "0", "--", "sh", "-c", "echo ready; exec sleep 60")
    assert daemon.output_line() == "ready"
    code, (*_, last) = daemon.end(number)
    assert code == 128 + number
    assert last.endswith(" INFO: Cleaning up")


def test_a_signal_is_passed_on_once(start: Callable[..., Daemon]) -> None:
    daemon = start("-p", "0", *COUNTING)
    assert daemon.output_line() == "ready"
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.output_line() == "interrupted"
    code, (_, last) = daemon.end(signal.SIGTERM)
    assert code == 11
    assert last.endswith("INFO: Cleaning up")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Yield the two ends of a terminal, the one with the keys first."""
    try:
        ends = pty.openpty()
    except OSError:
        pytest.skip("this system has no pseudo-terminals")
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


def start_in_terminal(
    start: Callable[..., Daemon], inside: int, *command: str, preparation: str = "pass"
) -> Daemon:
    if shutil.which("setsid") is None:
        pytest.skip("setsid is not installed")
    run = ["setsid", "--ctty", *with_preparation(preparation)]
    daemon = start("-p", "0", *command, run=run, stdin=inside)
    assert daemon.output_line() == "ready"
    return daemon


# As on macOS.
WITHOUT = "import signal\nif hasattr(signal, 'sigwaitinfo'): del signal.sigwaitinfo"


@pytest.mark.parametrize("preparation", ["pass", WITHOUT])
def test_ctrl_c_in_a_terminal_reaches_the_command_once(
    start: Callable[..., Daemon], terminal: tuple[int, int], preparation: str
) -> None:
    keys, inside = terminal
    daemon = start_in_terminal(start, inside, *COUNTING, preparation=preparation)
    # The command must handle it before dsmtpd can pass it on.
    daemon.process.send_signal(signal.SIGSTOP)
    os.waitpid(daemon.process.pid, os.WUNTRACED)
    os.write(keys, b"\x03")
    assert daemon.output_line() == "interrupted"
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.send_signal(signal.SIGCONT)
    assert daemon.end()[0] == 11


def test_ctrl_c_reaches_a_command_in_its_own_process_group(
    start: Callable[..., Daemon], terminal: tuple[int, int]
) -> None:
    keys, inside = terminal
    command = ("--", sys.executable, "-c", f"import os; os.setpgid(0, 0)\n{COUNT}")
    daemon = start_in_terminal(start, inside, *command)
    os.write(keys, b"\x03")
    assert daemon.output_line() == "interrupted"
    assert daemon.end(signal.SIGTERM)[0] == 11


def test_closing_the_terminal_ends_the_command_too(
    start: Callable[..., Daemon], terminal: tuple[int, int]
) -> None:
    keys, inside = terminal
    daemon = start_in_terminal(start, inside, *COUNTING)
    os.close(inside)
    os.close(keys)
    assert daemon.end()[0] == 128 + signal.SIGHUP


SEND = """
import os, smtplib, ssl, sys
context = ssl.create_default_context(cafile=os.environ["DSMTPD_TLS_CA"])
with smtplib.SMTP(os.environ["DSMTPD_HOST"], int(os.environ["DSMTPD_PORT"])) as client:
    client.starttls(context=context)
    client.sendmail("a@example.com", ["b@example.com"], "Subject: Hello\\n\\nHi")
sys.exit(len(os.listdir(os.environ["DSMTPD_DIRECTORY"] + "/new")) + 2)
"""


def test_a_command_finds_the_server_and_its_mails_and_sets_the_exit_code(
    start: Callable[..., Daemon], tmp_path: Path
) -> None:
    tls = ("--tls", "starttls", "--tls-ca", str(tmp_path / "ca.pem"))
    command = ("--", sys.executable, "-c", SEND)
    daemon = start("-p", "0", "-d", str(tmp_path / "mails"), *tls, *command)
    code, lines = daemon.end()
    assert code == 3
    assert lines[-1].endswith(" INFO: Cleaning up")
    assert len(stored(tmp_path / "mails")) == 1


def test_a_missing_command_is_one_line_and_exit_code_127(start: Callable[..., Daemon]) -> None:
    code, (_, line, last) = start("-p", "0", "--", "no-such").end()
    assert code == 127
    assert line.endswith(" ERROR: Cannot run no-such: No such file or directory")
    assert last.endswith(" INFO: Cleaning up")


@pytest.mark.parametrize("interface", ["0.0.0.0", "::"])  # noqa: S104  # for a moment
def test_a_command_gets_an_address_that_it_can_reach(
    start: Callable[..., Daemon], interface: str
) -> None:
    daemon = start("-p", "0", "-i", interface, "--", "sh", "-c", 'echo "$DSMTPD_HOST"')
    assert daemon.process.stdout is not None
    assert daemon.process.stdout.read().strip() in {"127.0.0.1", "::1"}
    assert daemon.end()[0] == 0


def test_without_a_thread_no_command_keeps_running(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    spawn = os.posix_spawnp

    def start(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    def spawn_and_record(*args: Any, **kwargs: Any) -> int:
        processes.append(spawn(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(os, "posix_spawnp", spawn_and_record)
    monkeypatch.setattr(Thread, "start", start)
    with pytest.raises(CommandError, match="Cannot run sleep: can't start new thread") as raised:
        run(["sleep", "60"], {}, NONE)
    assert raised.value.code == 126
    (process,) = processes
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
