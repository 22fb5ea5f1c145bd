from __future__ import annotations

import io
import os
import sys

import pytest

from dsmtpd import __version__
from dsmtpd.cli import UsageError, parse_args
from dsmtpd.failures import Rule
from dsmtpd.options import Options


def test_no_arguments_mean_the_defaults() -> None:
    assert parse_args([]) == Options()


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["-p", "0"], Options(port=0)),
        (["--port=65535"], Options(port=65535)),
        (["-i", "::1"], Options(interface="::1")),
        (["--interface", "localhost"], Options(interface="localhost")),
        (["-d", "mails"], Options(directory="mails")),
        (["--directory", "a b/"], Options(directory="a b/")),
        (["-s", "0"], Options(max_size=0)),
        (["--max-size", "12345678901234567890"], Options(max_size=12345678901234567890)),
        (["--disable-smtputf8"], Options(disable_smtputf8=True)),
        (["--disable-auth"], Options(disable_auth=True)),
        (["--tls", "starttls"], Options(tls="starttls")),
        (["--tls=STARTTLS"], Options(tls="starttls")),
        (["--tls", "Implicit", "--tls-ca", "ca"], Options(tls="implicit", tls_ca="ca")),
        (
            ["--tls=implicit", "--tls-cert=cert", "--tls-key=key"],
            Options(tls="implicit", tls_cert="cert", tls_key="key"),
        ),
        (
            ["--fail", "rcpt:451", "-p0", "--fail=mail:drop:a@x"],
            Options(port=0, failures=(Rule.parse("rcpt:451"), Rule.parse("mail:drop:a@x"))),
        ),
        (["-p0", "--", "a", "-p", "--"], Options(port=0, command=("a", "-p", "--"))),
        (["-v"], Options(verbose=True)),
        (["--verbose"], Options(verbose=True)),
        (["--print", "text"], Options(printing="text")),
        (["--print=JSON"], Options(printing="json")),
        (["-p2525", "-dx", "-s1"], Options(port=2525, directory="x", max_size=1)),
    ],
)
def test_each_option_has_a_short_or_a_long_form(argv: list[str], options: Options) -> None:
    assert parse_args(argv) == options


def test_arguments_default_to_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dsmtpd", "--port", "26"])
    assert parse_args().port == 26


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_args(["--directory=~/mails"]).directory == "/home/someone/mails"
    assert parse_args(["--tls=starttls", "--tls-ca=~/ca"]).tls_ca == "/home/someone/ca"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--foo"], "Unexpected argument: '--foo'"),
        (["-x"], "Unexpected argument: '-x'"),
        (["--prot=25"], "Unexpected argument: '--prot=25'; did you mean --port?"),
        (["--directry", "x"], "Unexpected argument: '--directry'; did you mean --directory?"),
        (
            ["--tls-cerificate=x"],
            "Unexpected argument: '--tls-cerificate=x'; did you mean --tls-cert?",
        ),
        (["-p", "1", "spam"], "Unexpected argument: 'spam'"),
        (["-p", "1", "--port=2"], "Unexpected argument: '--port=2'"),
        (["spam", "-p", "1"], "Unexpected argument: 'spam'"),
        (["--no\nsuch"], r"Unexpected argument: '--no\nsuch'"),
        (["-p"], "-p requires argument"),
        (["-d", "x", "--port"], "--port requires argument"),
        (["--version=1"], "--version must not have an argument"),
        (["-p", "70000"], "--port: '70000' is not a port from 0 to 65535"),
        (["-p", "65536"], "--port: '65536' is not a port from 0 to 65535"),
        (["-p", "-1"], "--port: '-1' is not a port from 0 to 65535"),
        (["-p", "smtp"], "--port: 'smtp' is not a port from 0 to 65535"),
        (["-p", ""], "--port: '' is not a port from 0 to 65535"),
        (["-p", "1_0"], "--port: '1_0' is not a port from 0 to 65535"),
        (["-p", "٢٥"], "--port: '٢٥' is not a port from 0 to 65535"),
        (["-s", "-5"], "--max-size: '-5' is not a number of bytes, 0 or more"),
        (["-s", "1e6"], "--max-size: '1e6' is not a number of bytes, 0 or more"),
        (["-s", "9" * 21], f"--max-size: '{'9' * 21}' is not a number of bytes, 0 or more"),
        (["-d", ""], "--directory: '' is not a folder"),
        (["-i", ""], "--interface: '' is not a host"),
        (["--tls", "yes"], "--tls: 'yes' is neither starttls nor implicit"),
        (["--fail", "x:451"], "--fail x:451: 'x' is none of connect, auth, mail, rcpt, data"),
        (["-p", "1", "--"], "No command after --"),
        (["-p", "1", "--", "", "x"], "No command after --"),
        (["--fail"], "--fail requires argument"),
        (["--print", "html"], "--print: 'html' is neither text nor json"),
        (["--tls", ""], "--tls: '' is neither starttls nor implicit"),
        (["--tls"], "--tls requires argument"),
        (["--tls-cert", "x"], "--tls-cert needs --tls"),
        (["--tls-ca", "x"], "--tls-ca needs --tls"),
        (["--tls", "starttls", "--tls-key", "x"], "--tls-key needs --tls-cert"),
        (["--tls=implicit", "--tls-cert", ""], "--tls-cert: '' is not a file"),
        (["--tls=implicit", "--tls-cert=x", "--tls-key="], "--tls-key: '' is not a file"),
        (["--tls=implicit", "--tls-ca="], "--tls-ca: '' is not a file"),
        (
            ["--tls=implicit", "--tls-cert=x", "--tls-ca=x"],
            "--tls-ca makes no sense with --tls-cert",
        ),
        (["-d", "~no.such.user/x"], "--directory: '~no.such.user/x' names a user without a home"),
    ],
)
def test_bad_usage_is_reported_in_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_args(argv)
    assert str(raised.value) == f"{line} (see dsmtpd --help)"


def test_version_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_args(["--version"])
    assert raised.value.code is None
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_args([option])
    assert raised.value.code is None
    text = capsys.readouterr().out
    for short in ("-p ", "-i ", "-d ", "-s ", "-h,"):
        assert f"\n  {short}" in text
    longs = "port interface directory max-size version help disable-smtputf8 disable-auth"
    for long in f"{longs} tls tls-cert tls-key tls-ca".split():
        assert f" --{long} " in text


@pytest.mark.parametrize("buffering", [0, -1], ids=["unbuffered", "buffered"])
def test_a_failure_to_print_is_reported_in_one_line(
    buffering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb", buffering), write_through=True) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(UsageError, match=r"^Cannot print: Broken pipe$"):
            parse_args(["--help"])
