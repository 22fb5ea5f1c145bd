"""Runs a command beside the server, passes signals on to it, and ends with it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

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

# Python ignores them, which no command expects.
_IGNORED = [signal.SIGPIPE, signal.SIGXFSZ]


class CommandError(Exception):
    """A command cannot be run; the text says which and why, *code* is the exit code for that."""

    def __init__(self, name: str, reason: object, code: int) -> None:
        """Tell the *reason*."""
        super().__init__(f"Cannot run {name}: {reason}")
        self.code = code


def run(command: Sequence[str], variables: Mapping[str, str], signals: Collection[int]) -> int:
    """Run *command* with more *variables* in its environment; return its exit code.

    The blocked *signals* are passed on to it: it decides whether to end.
    It starts with no signal blocked. Raises `CommandError`.
    """
    # Its end comes as a signal like the others, so that none of them is missed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
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
    words, environment = [*command], {**os.environ, **variables}
    try:
        return os.posix_spawnp(words[0], words, environment, setsigmask=[], setsigdef=_IGNORED)
    except OSError as error:
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUN
        raise CommandError(command[0], error.strerror, code) from None


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
        number, has_it = _wait(awaited)
        if not ended.empty():
            code = ended.get()
            return code if code >= 0 else _ENDED_BY - code
        if not has_it and number != signal.SIGCHLD:
            with suppress(OSError):  # It has just ended, or runs as another user.
                os.kill(process, number)


def _wait(awaited: Collection[int]) -> tuple[int, bool]:
    """Wait for a signal; return it, and whether the command has it already.

    Those that a terminal sends, as by Ctrl+C, go to all processes in its foreground.
    """
    if hasattr(signal, "sigwaitinfo"):
        info = signal.sigwaitinfo(awaited)
        return info.si_signo, info.si_code > 0  # from the kernel, not from a process
    number = signal.sigwait(awaited)
    return number, number == signal.SIGINT and os.isatty(0)
