"""Adds fixtures to pytest: `dsmtpd`, a server per test, and `dsmtpd_session`, one for all."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsmtpd.testing import Server

# The rest of the package is imported only once a fixture is used, so other tests need not wait.

_servers: WeakKeyDictionary[pytest.Session, Server] = WeakKeyDictionary()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    marker = "dsmtpd(tls=None, smtputf8=True, auth=True, max_size=33554432, fail=())"
    text = "options of the fixture dsmtpd; dsmtpd_session honours fail only."
    config.addinivalue_line("markers", f"{marker}: {text}")


@pytest.fixture
def dsmtpd(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Yield a debugging SMTP server for this test, with the options of `@pytest.mark.dsmtpd`."""
    with _server(_options(request.node)) as server:
        yield server


@pytest.fixture(scope="session")
def dsmtpd_session(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Yield a debugging SMTP server for all tests, which has no mails when a test begins."""
    with _server({}) as server:
        _servers[request.session] = server
        yield server


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Reset the server of the session."""
    if server := _servers.get(item.session):
        server.clear()
        server.fail(())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Make the server of the session fail as the test demands, if the test uses it."""
    fixtures = getattr(item, "fixturenames", ())
    if "dsmtpd_session" in fixtures:
        options = _options(item)
        with _in_one_line():
            _servers[item.session].fail(options.pop("fail", ()))
        if options and "dsmtpd" not in fixtures:
            _complain(f"dsmtpd_session honours fail only, not {', '.join(options)}")


def _options(node: pytest.Item) -> dict[str, Any]:
    """Return the options of the markers of *node*; the closest one counts."""
    markers = [*node.iter_markers("dsmtpd")]
    if any(marker.args for marker in markers):
        _complain("name the options, as in tls='starttls'")
    return {name: value for marker in reversed(markers) for name, value in marker.kwargs.items()}


@contextmanager
def _server(options: dict[str, Any]) -> Iterator[Server]:
    with warnings.catch_warnings():
        # Python 3.15 deprecates what aiosmtpd 1.4.6 imports.
        warnings.simplefilter("ignore", DeprecationWarning)
        from dsmtpd.testing import Server  # noqa: PLC0415

    known = signature(Server).parameters
    if unknown := options.keys() - known:
        _complain(f"{', '.join(unknown)} is none of {', '.join(known)}")
    with _in_one_line():
        server = Server(**options)
    with server:
        yield server


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Report mistakes in the options without a traceback."""
    from dsmtpd.testing import TLSError  # noqa: PLC0415

    try:
        yield
    except (TLSError, ValueError) as error:
        _complain(error)


def _complain(text: object) -> NoReturn:
    raise pytest.fail.Exception(f"@pytest.mark.dsmtpd: {text}", pytrace=False) from None
