from __future__ import annotations

import asyncio
import smtplib
import socket
from typing import Any

import pytest

from dsmtpd.options import Options
from dsmtpd.protocol import SMTP
from dsmtpd.server import Listener
from tests.tools import FREE, MAIL, connect, troubles


class Handler:
    """Keeps the envelopes that arrive."""

    def __init__(self) -> None:
        self.envelopes: list[Any] = []

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:
        self.envelopes.append(envelope)
        return "250 OK"


@pytest.mark.parametrize(
    ("options", "extensions"),
    [
        (FREE, {"size": "33554432", "8bitmime": "", "smtputf8": "", "help": ""}),
        (
            Options(port=0, max_size=0, disable_smtputf8=True),
            {"size": "0", "8bitmime": "", "help": ""},
        ),
    ],
)
def test_ehlo_offers_what_the_options_say(options: Options, extensions: dict[str, str]) -> None:
    with Listener(Handler(), options) as listener, connect(listener.port) as client:
        code, answer = client.ehlo()
        assert (code, answer.splitlines()[0]) == (250, socket.gethostname().encode())
        assert client.esmtp_features == extensions


def test_ehlo_wants_a_name_and_ends_a_transaction() -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        assert client.docmd("EHLO") == (501, b"Syntax: EHLO hostname")
        client.ehlo()
        client.mail("a@example.com")
        client.ehlo()
        assert client.rcpt("b@example.com")[0] == 503


def test_a_mail_over_the_limit_is_refused_and_the_next_one_taken() -> None:
    handler = Handler()
    with (
        Listener(handler, Options(port=0, max_size=100)) as listener,
        connect(listener.port) as client,
    ):
        client.ehlo()
        assert client.mail("a@example.com", ["size=101"])[0] == 552
        client.mail("a@example.com")
        client.rcpt("b@example.com")
        assert client.data(b"x" * 99 + b"\r\n")[0] == 552
        client.sendmail("a@example.com", ["b@example.com"], MAIL)
    assert [envelope.content for envelope in handler.envelopes] == [MAIL]


def test_without_a_limit_any_size_is_taken() -> None:
    handler = Handler()
    content = (b"x" * 990 + b"\r\n") * (40 * 1024)
    with (
        Listener(handler, Options(port=0, max_size=0)) as listener,
        connect(listener.port) as client,
    ):
        client.sendmail("a@example.com", ["b@example.com"], content)
    assert [envelope.content for envelope in handler.envelopes] == [content]


@pytest.mark.parametrize("command", ["MAIL FROM:<é@example.com>", "RCPT TO:<é@example.com>"])
def test_without_smtputf8_a_non_ascii_address_is_refused_and_the_session_goes_on(
    command: str,
) -> None:
    handler = Handler()
    with (
        Listener(handler, Options(port=0, disable_smtputf8=True)) as listener,
        connect(listener.port) as client,
    ):
        client.command_encoding = "utf-8"
        client.ehlo()
        client.mail("a@example.com")
        assert client.docmd(command)[0] == 500
        client.rset()
        client.sendmail("a@example.com", ["b@example.com"], MAIL)
    assert len(handler.envelopes) == 1


def test_with_smtputf8_a_non_ascii_address_is_taken_with_and_without_the_parameter() -> None:
    handler = Handler()
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.sendmail("é@example.com", ["用户@例え.jp"], MAIL, mail_options=["SMTPUTF8"])
        client.command_encoding = "utf-8"
        client.sendmail("é@example.com", ["用户@例え.jp"], MAIL)
    for envelope in handler.envelopes:
        assert (envelope.mail_from, envelope.rcpt_tos) == ("é@example.com", ["用户@例え.jp"])
    assert len(handler.envelopes) == 2


def test_the_null_reverse_path_is_kept() -> None:
    handler = Handler()
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.sendmail("", ["b@example.com"], MAIL)
    assert handler.envelopes[0].mail_from == "<>"


@pytest.mark.parametrize("address", ["<", "a@", "<@[\t", "<@a:>"])
def test_a_malformed_address_is_refused_and_the_session_goes_on(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        client.ehlo()
        assert client.docmd(f"MAIL FROM:{address}") == (553, b"5.1.3 Error: malformed address")
        client.mail("a@example.com")
        assert client.docmd(f"RCPT TO:{address}") == (553, b"5.1.3 Error: malformed address")
        assert client.rcpt("b@example.com")[0] == 250
    assert troubles(caplog) == []


def test_a_command_line_may_be_longer_than_a_real_server_must_take() -> None:
    address = f"{'a' * 900}@example.com"
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        client.ehlo()
        assert client.mail(address)[0] == 250
        assert client.rcpt(address)[0] == 250
        assert client.docmd("NOOP " + "x" * 994)[0] == 250
        assert client.rcpt("b" * 1000)[0] == 500
        assert client.noop()[0] == 250


def test_help_knows_ehlo() -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        assert client.docmd("HELP EHLO") == (250, b"Syntax: EHLO hostname")


class Ending:
    """A handler that, at the NOOP of another session, ends the session whose NOOP came first."""

    def __init__(self) -> None:
        self.first: SMTP | None = None
        self.noops = 0

    async def handle_NOOP(self, server: SMTP, *_: object) -> str:
        self.noops += 1
        if self.first is None:
            self.first = server
        else:
            self.first.data_received(b"NOOP\r\n")
            await self.first.hang_up()
        return "250 OK"


def test_a_session_that_is_hung_up_carries_out_nothing_more() -> None:
    handler = Ending()
    with Listener(handler, FREE) as listener, connect(listener.port) as other:
        first = connect(listener.port)
        first.noop()
        other.noop()
        assert first.getreply()[0] == 421
        assert handler.noops == 2
        first.close()


def test_a_session_without_a_client_can_be_hung_up() -> None:
    async def hang_up() -> None:
        await SMTP(Handler(), hostname="x.test", loop=asyncio.get_running_loop()).hang_up()

    asyncio.run(hang_up())


def test_a_command_that_is_none_does_not_end_the_session() -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        assert client.docmd("\x1b[2J")[0] == 500
        assert client.noop()[0] == 250
        with pytest.raises(smtplib.SMTPNotSupportedError):
            client.starttls()
