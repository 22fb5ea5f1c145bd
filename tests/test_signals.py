from __future__ import annotations

import signal
import threading

import pytest

from dsmtpd import signals

STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def mask() -> set[int | signal.Signals]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_at_first_every_signal_has_its_default_action() -> None:
    signals.end_at_once()
    assert {signal.getsignal(number) for number in STOPPING} == {signal.SIG_DFL}


def test_an_ignored_sigint_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.end_at_once()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", STOPPING)
def test_a_blocked_signal_is_not_lost(number: signal.Signals) -> None:
    with signals.blocked() as blocked:
        assert blocked == STOPPING == mask()
        signal.raise_signal(number)
        signals.wait(blocked)
    assert mask() == set()


def test_new_threads_block_the_signals_too() -> None:
    masks = []
    with signals.blocked():
        thread = threading.Thread(target=lambda: masks.append(mask()))
        thread.start()
        thread.join()
    assert masks == [STOPPING]


def test_after_the_first_signal_the_next_ones_are_ignored() -> None:
    with signals.blocked() as blocked:
        signal.raise_signal(signal.SIGTERM)
        signals.wait(blocked)
        # Checked first, because a signal that is not ignored would end the tests.
        assert {signal.getsignal(number) for number in STOPPING} == {signal.SIG_IGN}
        for number in STOPPING:
            signal.raise_signal(number)
    assert signal.sigpending() == set()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_was_ignored_at_startup_stays_ignored(
    number: signal.Signals,
) -> None:
    signal.signal(number, signal.SIG_IGN)
    with signals.blocked() as blocked:
        assert blocked == STOPPING - {number} == mask()
