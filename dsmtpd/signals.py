"""The signals that ask the process to stop: Ctrl+C, SIGTERM, and a terminal that is closed."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_at_once() -> None:
    """Have Ctrl+C end the process at once, as the other signals do, without a traceback.

    Once there is something to lose, `blocked` is the better way.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def blocked(*more: int) -> Iterator[Collection[int]]:
    """Hold the signals, and *more*, back in this thread and those that it starts; yield them.

    This way none gets lost, whenever it is sent. What the process was started to ignore stays
    ignored, as SIGINT is in a script's `dsmtpd &`, and SIGHUP after `nohup`.
    """
    held = {*_STOPPING, *more}
    signals = {number for number in held if signal.getsignal(number) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait(signals: Collection[int]) -> None:
    """Wait for one of the blocked *signals*; from then on, ignore them all.

    Some runners send a signal again and again, which must not disturb the end.
    """
    signal.sigwait(signals)
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
