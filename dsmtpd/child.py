"""Runs a child process on POSIX, and passes signals on to it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import TYPE_CHECKING

from dsmtpd import signals

assert sys.platform != "win32"  # noqa: S101  # which has hardly any of this

import resource  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

# The exit code of a process that a signal has ended is this and the signal's number, as in shells.
_ENDED_BY = 128

# Python ignores the first two, and dsmtpd may have been started with the third ignored: commands
# expect the default.
_DEFAULT = signals.named("SIGPIPE", "SIGXFSZ", "SIGCHLD")

# Signals that a terminal sends when keys are pressed.
_TYPED = signals.named("SIGINT", "SIGQUIT")


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    blocked: Collection[int],
    files: tuple[int, int] | None,
) -> int:
    """Run *command* in *environment*; return its exit code, as shells do.

    The *blocked* signals are passed on to it, and it decides whether to end. It starts with no
    signal blocked, and with *files* as its limits of open files. Raises `OSError` when it cannot be
    run, and `RuntimeError` when there is no thread to wait for it.
    """
    # Its end comes as a signal like the others, so one wait catches them all.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    # While SIGCHLD is ignored, no end can be awaited; some systems drop it unless it is handled.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with _file_limits(files):
            process = _start(command, environment)
        ended: SimpleQueue[int] = SimpleQueue()
        try:
            Thread(target=_watch, args=(process, ended, get_ident()), daemon=True).start()
        except RuntimeError:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        return _attend(process, {*blocked, signal.SIGCHLD}, ended)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> int:
    try:
        return _spawn(command, environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        # A script whose first line names no shell.
        return _spawn(["sh", shutil.which(command[0]) or command[0], *command[1:]], environment)


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return os.posix_spawnp(command[0], [*command], environment, setsigmask=[], setsigdef=_DEFAULT)


@contextmanager
def _file_limits(limits: tuple[int, int] | None) -> Iterator[None]:
    """Start processes with these *limits* of open files; None changes nothing."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits or ours)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)


def _watch(process: int, ended: SimpleQueue[int], thread: int) -> None:
    """Wait for the end of *process*, and signal it to *thread*.

    The system's own SIGCHLD may go to a thread that does not block it, and get lost.
    """
    _, status = os.waitpid(process, 0)
    ended.put(os.waitstatus_to_exitcode(status))
    signal.pthread_kill(thread, signal.SIGCHLD)


def _attend(process: int, awaited: Collection[int], ended: SimpleQueue[int]) -> int:
    """Pass signals on to a *process* until it has *ended*; return its exit code, as shells do."""
    while True:
        number, is_typed = _wait(awaited)
        if not ended.empty():
            code = ended.get()
            return code if code >= 0 else _ENDED_BY - code
        if number != signal.SIGCHLD:
            with suppress(OSError):  # It has just ended, or runs as another user.
                # A terminal sends it to every process in its foreground group.
                has_it = is_typed and os.getpgid(process) == os.getpgrp()
                os.kill(process, 0 if has_it else number)  # 0 does nothing.


def _wait(awaited: Collection[int]) -> tuple[int, bool]:
    """Wait for a signal; return it, and whether a terminal sent it, as for Ctrl+C."""
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo(awaited)
        return info.si_signo, info.si_signo in _TYPED and info.si_code > 0  # not by a process
    number = signal.sigwait(awaited)
    return number, number in _TYPED and os.isatty(0)
