"""The signals that ask the process to stop: Ctrl+C, SIGTERM, and a terminal that is closed."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# Where signals cannot be blocked, as on Windows, handlers keep them here, and `wait` looks for them
# at this interval in seconds, since nothing there would wake it.
_kept: list[int] = []
_LOOK = 0.1


def named(*names: str) -> frozenset[signal.Signals]:
    """Return the signals with these *names* that this system has."""
    known = signal.Signals.__members__
    return frozenset(known[name] for name in names if name in known)


# The last one is Ctrl+Break on Windows.
_STOPPING = named("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


def end_at_once() -> None:
    """Let Ctrl+C end the process at once and without a traceback, like the other signals.

    Once there is something to lose, use `blocked`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def blocked(*more: int) -> Iterator[Collection[int]]:
    """Hold back these signals, and *more*, in this thread and those that it starts; yield them.

    None gets lost, whenever it is sent. Signals that the process was started to ignore stay
    ignored, such as SIGINT by a script's `dsmtpd &`, and SIGHUP by `nohup`. Windows holds signals
    back for the whole process, and only in the main thread.
    """
    held = {*_STOPPING, *more}
    signals = {number for number in held if signal.getsignal(number) is not signal.SIG_IGN}
    if sys.platform == "win32" or not hasattr(signal, "pthread_sigmask"):
        with _caught(signals):
            yield signals
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _caught(signals: Collection[int]) -> Iterator[None]:
    """Hold back *signals* by handlers, which can be set, and are run, only in the main thread."""
    before = {}
    ours = [number for number in signals if signal.getsignal(number) is not None]
    with suppress(ValueError):
        before = {number: signal.signal(number, _keep) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _keep:
                signal.signal(number, handler)
        for number in [number for number in _kept if number in before]:
            _kept.remove(number)
            signal.raise_signal(number)


def _keep(number: int, _: object) -> None:
    _kept.append(number)


def wait(signals: Collection[int]) -> None:
    """Wait for one of the blocked *signals*; then ignore them all.

    Some runners send a signal repeatedly, which must not disturb the end.
    """
    if hasattr(signal, "sigwait"):
        signal.sigwait(signals)
    else:
        while not _kept:
            time.sleep(_LOOK)
    ignore(signals)


def ignore(signals: Collection[int]) -> None:
    """Ignore *signals* from now on."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
