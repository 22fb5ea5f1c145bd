from __future__ import annotations

import inspect
import subprocess
import sys
from typing import TYPE_CHECKING

import trustme  # noqa: F401  # it cannot be imported twice

from dsmtpd.testing import Server

if TYPE_CHECKING:
    import pytest

SEND = """
import smtplib
import pytest

def send(server):
    with smtplib.SMTP(server.host, server.port) as client:
        client.sendmail("a@x", ["b@x"], "Subject: Hello\\n\\nHi")

"""

STRICT = ("--strict-markers", "-W", "error", "-p", "no:cacheprovider")


RULE_ERROR = "rcpt:200: '200' is neither a code from 400 to 599, nor drop or delay=SECONDS"


def outcomes(pytester: pytest.Pytester, tests: str, *arguments: str) -> dict[str, int]:
    pytester.makepyfile(SEND + tests)
    return run(pytester, *arguments).parseoutcomes()


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*STRICT, *arguments)


def test_each_test_has_its_own_server_without_any_configuration(
    pytester: pytest.Pytester,
) -> None:
    tests = """
ports = set()

@pytest.mark.parametrize("_", range(2))
def test_it(dsmtpd, _):
    ports.add(dsmtpd.port)
    send(dsmtpd)
    assert [message.subject for message in dsmtpd.messages] == ["Hello"]

def test_servers_have_stopped():
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            smtplib.SMTP("127.0.0.1", port)
"""
    assert outcomes(pytester, tests) == {"passed": 3}


def test_the_session_server_keeps_its_port_but_no_mails_of_other_tests(
    pytester: pytest.Pytester,
) -> None:
    tests = """
ports = set()

@pytest.fixture(scope="session")
def application(dsmtpd_session):
    return dsmtpd_session.port

@pytest.mark.parametrize("_", range(2))
def test_it(application, dsmtpd_session, _):
    ports.add(application)
    assert dsmtpd_session.messages == ()
    send(dsmtpd_session)
    assert len(dsmtpd_session.messages) == len(ports) == 1
"""
    assert outcomes(pytester, tests) == {"passed": 2}


def test_the_marker_sets_the_options_and_the_closest_one_wins(pytester: pytest.Pytester) -> None:
    tests = """
pytestmark = pytest.mark.dsmtpd(auth=False, max_size=1000)

def features(server):
    with smtplib.SMTP(server.host, server.port) as client:
        client.ehlo()
        return client.esmtp_features

@pytest.mark.dsmtpd(tls="starttls", max_size=2000, smtputf8=False)
def test_it(dsmtpd):
    assert features(dsmtpd).items() >= {"starttls": "", "size": "2000"}.items()
    assert not features(dsmtpd).keys() & {"auth", "smtputf8"}

def test_others(dsmtpd):
    assert features(dsmtpd)["size"] == "1000"
    assert "starttls" not in features(dsmtpd)
"""
    assert outcomes(pytester, tests) == {"passed": 2}


def test_the_rules_of_a_marker_apply_only_to_its_test(pytester: pytest.Pytester) -> None:
    tests = """
def fails(server):
    try:
        send(server)
    except smtplib.SMTPException:
        return True
    return False

@pytest.mark.dsmtpd(fail=["rcpt:451:*:1"])
def test_one(dsmtpd):
    assert [fails(dsmtpd), fails(dsmtpd)] == [True, False]

@pytest.mark.parametrize("_", range(2))
@pytest.mark.dsmtpd(fail="rcpt:451:*:1")
def test_session(dsmtpd_session, _):
    assert [fails(dsmtpd_session), fails(dsmtpd_session)] == [True, False]

@pytest.mark.dsmtpd(fail="data:451", tls="starttls")
def test_both(dsmtpd, dsmtpd_session):
    assert fails(dsmtpd) and fails(dsmtpd_session)

def test_none(dsmtpd_session):
    assert not fails(dsmtpd_session)
"""
    assert outcomes(pytester, tests) == {"passed": 5}


def test_rules_of_a_test_do_not_reach_the_fixtures_of_the_next(pytester: pytest.Pytester) -> None:
    tests = """
@pytest.fixture
def welcome(dsmtpd_session):
    send(dsmtpd_session)

@pytest.mark.dsmtpd(fail="rcpt:451")
def test_refused(dsmtpd_session):
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        send(dsmtpd_session)

def test_welcomed(welcome, dsmtpd_session):
    assert len(dsmtpd_session.messages) == 1
"""
    assert outcomes(pytester, tests) == {"passed": 2}


def test_an_error_in_the_marker_is_one_line(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
import pytest

@pytest.mark.dsmtpd("starttls")
def test_positional(dsmtpd): pass

@pytest.mark.dsmtpd(tsl="starttls")
def test_name(dsmtpd): pass

@pytest.mark.dsmtpd(tls="ssl")
def test_value(dsmtpd): pass

@pytest.mark.dsmtpd(fail="rcpt:200")
def test_rule(dsmtpd): pass

@pytest.mark.dsmtpd(fail="rcpt:200")
def test_rule_of_session(dsmtpd_session): pass

@pytest.mark.dsmtpd(auth=False)
def test_session(dsmtpd_session): pass

@pytest.mark.skip
@pytest.mark.dsmtpd(fail="rcpt:200")
def test_skipped(dsmtpd, dsmtpd_session): pass

def test_another(dsmtpd_session): pass
""")
    result = run(pytester)
    assert result.parseoutcomes() == {"errors": 4, "failed": 2, "passed": 1, "skipped": 1}
    lines = [line for line in result.outlines if "dsmtpd" in line and "::" not in line]
    assert [line for line in lines if not line.startswith("___")][-6:] == [
        "@pytest.mark.dsmtpd: name the options, as in tls='starttls'",
        "@pytest.mark.dsmtpd: tsl is none of tls, smtputf8, auth, max_size, fail",
        "@pytest.mark.dsmtpd: tls: 'ssl' is neither starttls nor implicit",
        f"@pytest.mark.dsmtpd: {RULE_ERROR}",
        f"@pytest.mark.dsmtpd: {RULE_ERROR}",
        "@pytest.mark.dsmtpd: dsmtpd_session honours fail only, not auth",
    ]
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*During handling*")


def test_a_failing_assert_shows_the_messages(pytester: pytest.Pytester) -> None:
    tests = "def test_it(dsmtpd):\n    send(dsmtpd)\n    assert dsmtpd.messages == ()\n"
    pytester.makepyfile(SEND + tests)
    result = run(pytester)
    result.stdout.fnmatch_lines(["*assert (<a@x -> b@x [[]Hello[]]>,) == ()"])


def test_each_xdist_worker_has_its_own_servers(pytester: pytest.Pytester) -> None:
    tests = """
@pytest.mark.parametrize("_", range(10))
def test_it(dsmtpd, dsmtpd_session, _):
    send(dsmtpd)
    send(dsmtpd_session)
    assert len(dsmtpd.messages) == len(dsmtpd_session.messages) == 1
"""
    pytester.makepyfile(SEND + tests)
    result = pytester.runpytest_subprocess(*STRICT, "-n", "2")
    assert result.parseoutcomes() == {"passed": 10}


def test_the_marker_is_listed_with_the_options_of_the_server(pytester: pytest.Pytester) -> None:
    parameters = inspect.signature(Server).parameters.values()
    options = ", ".join(f"{option.name}={option.default!r}" for option in parameters)
    result = run(pytester, "--markers")
    result.stdout.fnmatch_lines([f"@pytest.mark.dsmtpd({options}): *"])


def test_loading_the_plugin_imports_nothing_else() -> None:
    script = """
import sys, pytest
known = {*sys.modules}
import dsmtpd.pytest_plugin
print(*{*sys.modules} - known)
"""
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert set(found.stdout.split()) == {"dsmtpd", "dsmtpd.pytest_plugin"}
