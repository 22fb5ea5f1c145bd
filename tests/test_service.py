from __future__ import annotations

import asyncio
import ssl
from contextlib import closing
from typing import Any, Literal

import pytest
from aiosmtpd.smtp import Envelope, Session

from dsmtpd.conversation import Offer
from dsmtpd.options import Options
from dsmtpd.server import Listener
from dsmtpd.service import Service
from tests.tools import BEGIN, MAIL, Handler, Wire, codes, connect, converse, troubles, turns

ONE_MAIL = b"HELO x\r\n" + BEGIN + b"hi\r\n.\r\n"
ACCEPTED = [220, 250, 250, 250, 354]


def test_the_handler_is_given_a_session_and_an_envelope_of_aiosmtpd_with_all_that_was_said() -> (
    None
):
    sessions: list[Any] = []

    async def keep_session(_server: object, session: object, _envelope: object) -> None:
        sessions.append(session)

    handler = Handler(keep_session)
    content = MAIL + b"..\xff\r\n"
    with (
        Listener(handler, Options(port=0, tls="starttls")) as listener,
        connect(listener.port) as client,
    ):
        assert client.sock is not None
        assert listener.ca is not None
        peer = client.sock.getsockname()
        client.starttls(context=ssl.create_default_context(cadata=listener.ca.decode()))
        client.login("app", "secret")
        client.command_encoding = "utf-8"
        client.docmd("MAIL FROM:<é@x> SMTPUTF8 SIZE=5")
        client.docmd("RCPT TO:<b@x> NOTIFY=NEVER")
        client.docmd("RCPT TO:<c@x>")
        assert client.data(content)[0] == 250
    ((session,), (envelope,)) = sessions, handler.envelopes
    assert (type(session), type(envelope)) == (Session, Envelope)
    assert session.peer == peer
    assert (session.host_name, session.extended_smtp) == ("client.test", True)
    assert session.ssl["cipher"][1] == "TLSv1.3"
    assert (session.authenticated, session.auth_data) == (True, "app")
    assert envelope.mail_from == "é@x"
    assert envelope.mail_options == ["SMTPUTF8", "SIZE=5"]
    assert envelope.smtp_utf8 is True
    assert envelope.rcpt_tos == ["b@x", "c@x"]
    assert envelope.rcpt_options == ["NOTIFY=NEVER"]
    assert envelope.content == envelope.original_content == content


def test_a_client_that_says_little_leaves_the_rest_of_a_session_empty() -> None:
    sessions: list[Any] = []

    async def keep_session(_server: object, session: object, _envelope: object) -> None:
        sessions.append(session)

    handler = Handler(keep_session)
    assert codes(converse([ONE_MAIL], handler)) == [*ACCEPTED, 250]
    ((session,), (envelope,)) = sessions, handler.envelopes
    assert (session.host_name, session.extended_smtp) == ("x", False)
    assert (session.ssl, session.authenticated, session.auth_data) == (None, None, None)
    assert (envelope.mail_options, envelope.smtp_utf8, envelope.rcpt_options) == ([], False, [])


class Excusing(Handler):
    """Fails at each mail, and has an excuse."""

    async def handle_DATA(self, *_: object) -> str:
        raise OSError(28, "No space left on device")

    async def handle_exception(self, error: Exception) -> str:
        assert isinstance(error, OSError)
        return f"452 {error.strerror}"


def test_a_handler_that_fails_is_asked_for_the_reply_and_the_session_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = converse([ONE_MAIL + b"NOOP\r\n"], Excusing())
    assert codes(replies) == [*ACCEPTED, 452, 250]
    assert replies[-2] == b"452 No space left on device"
    assert troubles(caplog) == []


class Failing(Excusing):
    """Fails at each mail, and at the excuse for it."""

    async def handle_exception(self, error: Exception) -> str:
        raise KeyError("x" * 100_000) from error


async def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("handler", [Failing(), Handler(fail)], ids=["another failure", "nothing"])
def test_a_handler_that_has_no_excuse_ends_the_session_and_is_reported_in_a_line(
    handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    replies = converse([ONE_MAIL + b"NOOP\r\n"], handler)
    assert codes(replies) == [*ACCEPTED, 421]
    assert replies[-1] == b"421 4.3.0 Internal error"
    ((level, text),) = troubles(caplog)
    assert level == "ERROR"
    assert text.startswith("Internal error: OSError(28, 'No space left on device'), then ")
    assert len(text) < 16 * 1024


@pytest.mark.parametrize("vanishes", [False, True])
def test_a_handler_that_is_cancelled_ends_the_session_and_lets_the_server_stop(
    *, vanishes: bool
) -> None:
    async def run() -> None:
        gate = asyncio.Event()

        async def cancel(*_: object) -> None:
            await gate.wait()
            raise asyncio.CancelledError

        handler = Handler(cancel)
        wire = Wire(handler)
        await wire.open()
        await wire.send(ONE_MAIL + b"NOOP\r\n")
        if vanishes:
            wire.socket.close()  # with replies that it has not read: a reset
            await turns(3)
        ending = asyncio.create_task(wire.service.hang_up())
        await turns(3)
        assert not ending.done()
        gate.set()
        await ending
        assert handler.envelopes == []
        if not vanishes:
            assert codes(await wire.replies())[:6] == [*ACCEPTED, 421]

    asyncio.run(run())


@pytest.mark.parametrize("tls", ["starttls", "implicit", None])
def test_there_is_no_offer_of_tls_without_a_certificate_nor_one_for_nothing(
    tls: Literal["starttls", "implicit"] | None,
) -> None:
    context = None if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offer = Offer(hostname="server.test", tls=tls)
    with (
        closing(asyncio.SelectorEventLoop()) as loop,
        pytest.raises(ValueError, match="TLS and a certificate"),
    ):
        Service(Handler(), offer, loop, context)
