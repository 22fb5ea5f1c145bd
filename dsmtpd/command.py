"""Runs a command beside the server, passes signals on to it, and ends with it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

# The exit codes of shells for a command that is not found, and for one that cannot be run; that of
# a command which a signal has ended is this and the signal's number.
_NOT_FOUND, _NOT_RUN, _ENDED_BY = 127, 126, 128

# All that would end dsmtpd, but not the command, is passed on. The other signals cannot be blocked,
# stop a process, are only news to it, or come from its own faults.
_NOT_PASSED_ON = {
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    *(signal.SIGCONT, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH),
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
}
PASSED_ON = signal.valid_signals() - _NOT_PASSED_ON

# Python ignores the first two, and who started dsmtpd perhaps the third: no command expects that.
_DEFAULT = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD]

# What a terminal sends when keys are pressed.
_TYPED = {signal.SIGINT, signal.SIGQUIT}


class CommandError(Exception):
    """A command cannot be run; the text says which and why, *code* is the exit code for that."""

    def __init__(self, name: str, reason: object, code: int) -> None:
        """Tell the *reason*."""
        super().__init__(f"Cannot run {name}: {reason}")
        self.code = code


def run(
    command: Sequence[str],
    variables: Mapping[str, str],
    signals: Collection[int],
    files: tuple[int, int] | None = None,
) -> int:
    """Run *command* with *variables*, whose names begin with `DSMTPD_`; return its exit code.

    The blocked *signals* are passed on to it: it decides whether to end. It starts with no signal
    blocked, and with *files* as its limits of open files. Raises `CommandError`.
    """
    # Its end comes as a signal like the others, so that none of them is missed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # While it is ignored, no end can be awaited.
    try:
        with _file_limits(files):
            process = _start(command, variables)
        ended: SimpleQueue[int] = SimpleQueue()
        try:
            Thread(target=_watch, args=(process, ended, get_ident()), daemon=True).start()
        except RuntimeError as error:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise CommandError(command[0], error, _NOT_RUN) from None
        return _attend(process, {*signals, signal.SIGCHLD}, ended)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in signals:
            signal.signal(number, signal.SIG_IGN)


def _start(command: Sequence[str], variables: Mapping[str, str]) -> int:
    others = {name: value for name, value in os.environ.items() if not name.startswith("DSMTPD_")}
    environment = {**others, **variables}
    try:
        return _spawn(command, environment)
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without a first line that names its shell
            return _spawn(["sh", shutil.which(command[0]) or command[0], *command[1:]], environment)
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUN
        raise CommandError(command[0], error.strerror, code) from None


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return os.posix_spawnp(command[0], [*command], environment, setsigmask=[], setsigdef=_DEFAULT)


@contextmanager
def _file_limits(limits: tuple[int, int] | None) -> Iterator[None]:
    """Give what is started meanwhile these *limits* of open files; None changes nothing."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits or ours)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)


def _watch(process: int, ended: SimpleQueue[int], thread: int) -> None:
    """Wait for the end of *process*, and tell it to a *thread*.

    The system's own SIGCHLD may go to a thread that does not block it, and be lost.
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
                # A terminal has sent it to all processes of the group in its foreground.
                has_it = is_typed and os.getpgid(process) == os.getpgrp()
                os.kill(process, 0 if has_it else number)  # 0 does nothing.


def _wait(awaited: Collection[int]) -> tuple[int, bool]:
    """Wait for a signal; return it, and whether a terminal has sent it, as by Ctrl+C."""
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo(awaited)
        return info.si_signo, info.si_signo in _TYPED and info.si_code > 0  # not by a process
    number = signal.sigwait(awaited)
    return number, number in _TYPED and os.isatty(0)
