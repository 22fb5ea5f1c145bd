"""Fixtures that several test modules share."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from dsmtpd.command import PASSED_ON
from dsmtpd.signals import named
from tests.tools import Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Programs that tests/recipes/test_readme.py runs.
collect_ignore_glob = ["recipes/*/*"]

if sys.platform == "win32":
    # These need POSIX signals, limits or commands; the others are enough for a first look.
    collect_ignore = ["clients", "promises", "recipes", "test_portability.py", "test_signals.py"]
    collect_ignore += ["test_command.py", "test_dsmtpd.py", "test_main.py", "test_server.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `make soak` uses."""
    parser.addoption(
        "--soak", action="store_true", help="break things much more often, for minutes"
    )


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Return a function that picks the first number for `make test`, the second for `make soak`."""
    soak = request.config.getoption("--soak")
    return lambda few, many: many if soak else few


@pytest.fixture
def start() -> Iterator[Callable[..., Daemon]]:
    """Yield a function that starts a `Daemon`; close each one after the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(closing(Daemon(*args, **kwargs)))


@pytest.fixture(autouse=True)
def _settings_of_main() -> Iterator[None]:
    """Start with default signal handlers, whatever the caller ignores; undo what `main` sets."""
    handlers = {number: signal.getsignal(number) for number in PASSED_ON}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in named("SIGQUIT", "SIGTERM", "SIGHUP"):
        signal.signal(number, signal.SIG_DFL)
    levels = {name: logging.getLogger(name).level for name in (None, "asyncio")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler is not None:
            signal.signal(number, handler)
