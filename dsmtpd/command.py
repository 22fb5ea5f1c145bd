"""Runs a command beside the server, and ends with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from dsmtpd import signals

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

# The exit codes of shells for a command that is not found, and for one that cannot be run.
_NOT_FOUND, _NOT_RUN = 127, 126

# Every signal that would end dsmtpd but not the command is passed on. The others cannot be blocked,
# stop a process, merely inform it, or come from its own faults.
PASSED_ON = signal.valid_signals() - signals.named(
    *("SIGKILL", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU"),
    *("SIGCONT", "SIGCHLD", "SIGURG", "SIGWINCH", "SIGINFO"),
    *("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"),
)


class CommandError(Exception):
    """A command cannot be run; the text says which and why, *code* is the exit code for that."""

    def __init__(self, name: str, reason: object, code: int) -> None:
        """Name the *reason*."""
        super().__init__(f"Cannot run {name}: {reason}")
        self.code = code


def run(
    command: Sequence[str],
    variables: Mapping[str, str],
    blocked: Collection[int],
    files: tuple[int, int] | None = None,
) -> int:
    """Run *command* with *variables*, whose names begin with `DSMTPD_`; return its exit code.

    The *blocked* signals are passed on to it (on Windows by the console), and ignored once it has
    ended. *files*: its limits of open files, if the system has any. Raises `CommandError`.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("DSMTPD_")}
    environment = {**others, **variables}
    try:
        if sys.platform == "win32" or not hasattr(os, "posix_spawnp"):
            return _call(command, environment)
        from dsmtpd import child  # noqa: PLC0415  # POSIX only

        return child.run(command, environment, blocked, files)
    except OSError as error:
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUN
        raise CommandError(command[0], error.strerror, code) from None
    except RuntimeError as error:
        raise CommandError(command[0], error, _NOT_RUN) from None
    finally:
        signals.ignore(blocked)


def _call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run *command* on Windows, where a console sends Ctrl+C to all its processes."""
    program = shutil.which(command[0]) or command[0]  # finds a .cmd, too
    code = subprocess.call([program, *command[1:]], env=environment)  # noqa: S603
    return code if code < 1 << 31 else code - (1 << 32)  # Python exits with signed codes only.
