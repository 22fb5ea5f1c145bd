from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import re
import smtplib
import ssl
import tracemalloc
from io import BytesIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiosmtpd.smtp import Envelope, Session

from dsmtpd import connection
from dsmtpd.failures import Rule
from dsmtpd.options import Options
from dsmtpd.server import Listener
from tests.tools import (
    BEGIN,
    FREE,
    MAIL,
    PATIENCE,
    Clock,
    Handler,
    Wire,
    begin_data,
    codes,
    connect,
    converse,
    reset,
    troubles,
    trust_all,
    turns,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE_MAIL = b"HELO x\r\n" + BEGIN + b"hi\r\n.\r\n"
ACCEPTED = [220, 250, 250, 250, 354]

# More than a connection and the system can buffer together.
MOST = 4 * 1024 * 1024

HELP = b"HELP " + b"x" * 300 + b"\r\n"


def test_commands_before_a_client_closes_its_sending_side_are_executed_and_answered() -> None:
    handler = Handler()
    replies = converse([b"HELO x\r\n" + BEGIN + b".\r\nNOOP\r\nQUI"], handler)
    assert codes(replies) == [220, 250, 250, 250, 354, 250, 250]
    assert handler.contents == [b""]


def test_a_mail_cut_short_by_eof_is_not_delivered() -> None:
    handler = Handler()
    assert codes(converse([b"HELO x\r\n" + BEGIN + b"hi\r\n."], handler))[-1] == 354
    assert handler.contents == []


def test_the_server_closes_the_connection_after_quit() -> None:
    async def run() -> list[bytes]:
        wire = Wire(Handler())
        await wire.open()
        # With two clients, the replies of a turn are sent together.
        other = Wire(Handler(), service=wire.service)
        await other.open()
        await wire.send(b"QUIT\r\nNOOP\r\n")
        assert wire.service.clients == {other.session}
        await other.replies()
        return await wire.replies()

    assert codes(asyncio.run(run())) == [220, 221]


def test_sessions_share_nothing_that_a_client_says() -> None:
    handler = Handler()
    with (
        Listener(handler, FREE) as listener,
        connect(listener.port) as one,
        connect(listener.port) as two,
    ):
        begin_data(one)
        assert two.docmd("RCPT", "TO:<c@x>")[0] == 503
        two.sendmail("c@x", ["d@x"], b"two")
        one.send(b"one\r\n.\r\n")
        assert one.getreply()[0] == 250
    envelopes = [(mail.mail_from, mail.rcpt_tos, mail.content) for mail in handler.envelopes]
    assert envelopes == [
        ("c@x", ["d@x"], b"two\r\n"),
        ("a@example.com", ["b@example.com"], b"one\r\n"),
    ]


def test_a_client_that_pipelines_many_commands_does_not_block_another() -> None:
    async def run() -> int:
        busy = Wire(Handler())
        await busy.open()
        other = Wire(Handler(), service=busy.service)
        await other.open()
        await other.loop.sock_recv(other.socket, 100)
        await busy.loop.sock_sendall(busy.socket, b"NOOP\r\n" * 20_000)
        await other.loop.sock_sendall(other.socket, b"NOOP\r\n")
        assert await other.loop.sock_recv(other.socket, 100) == b"250 OK\r\n"
        answered = busy.read().count(b"250 OK\r\n")
        await other.replies()
        assert len(await busy.replies()) + answered >= 20_000
        return answered

    assert asyncio.run(run()) < 1000


def test_a_client_with_slow_commands_does_not_block_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each command seems to take 4 ms; a turn may last 10 ms.
    ticks = itertools.count()
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: next(ticks) * 0.004))

    async def run() -> list[bytes]:
        wire = Wire(Handler())
        await wire.open()
        await wire.lines(1)
        written: list[bytes] = []
        monkeypatch.setattr(wire.transport, "write", written.append)
        await wire.send(b"RSET\r\n" * 6)
        monkeypatch.undo()
        await wire.replies()
        return written

    assert asyncio.run(run()) == [b"250 OK\r\n" * 2] * 3


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("commands", [2, 50])
def test_replies_to_pipelined_commands_are_sent_together(
    commands: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> list[bytes]:
        wire = Wire(Handler())
        wires = [wire, *(Wire(Handler(), service=wire.service) for _ in range(others))]
        for each in wires:
            await each.open()
        await wire.lines(1)
        written: list[bytes] = []
        monkeypatch.setattr(connection, "_TURN", PATIENCE)
        monkeypatch.setattr(wire.transport, "write", written.append)
        await wire.send(b"RSET\r\n" * commands + b"RS")
        monkeypatch.undo()
        for each in wires:
            await each.replies()
        return written

    assert asyncio.run(run()) == [b"250 OK\r\n" * commands]


def test_an_upload_that_breaks_off_leaves_nothing_in_memory() -> None:
    gc.disable()
    tracemalloc.start()
    try:
        with Listener(Handler(), FREE) as listener, connect(listener.port) as other:
            for _ in range(20):
                client = connect(listener.port)
                begin_data(client)
                client.send(bytes(1_000_000))
                other.noop()
                reset(client)
                other.noop()
            assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()
        gc.enable()


# Flow control.


def test_the_server_stops_reading_from_a_client_that_does_not_read() -> None:
    async def run() -> None:
        wire = Wire(Handler())
        wire.hold_little()
        await wire.open()
        count = await wire.fill(HELP * 100, MOST) // len(HELP)
        assert count * len(HELP) < MOST // 2
        assert codes(await wire.lines(1 + count)) == [220, *[214] * count]
        await wire.replies()

    asyncio.run(run())


def test_while_a_mail_is_delivered_little_more_is_read_from_its_client() -> None:
    async def run() -> None:
        gate = asyncio.Event()
        wire = Wire(Handler(lambda *_: gate.wait()))
        await wire.open()
        await wire.send(b"HELO x\r\n" + BEGIN + b".\r\n")
        sent = await wire.fill(HELP * 100, MOST)
        # The system buffers some of this, too.
        assert 64 * 1024 < sent < 800 * 1024
        gate.set()
        count = sent // len(HELP)
        replies = codes(await wire.lines(6 + count))
        assert replies == [220, 250, 250, 250, 354, 250, *[214] * count]
        await wire.replies()

    asyncio.run(run())


# Timeouts.


@pytest.fixture
def clock() -> Iterator[Clock]:
    loop = Clock()
    yield loop
    loop.close()


def test_a_slow_client_is_not_cut_off_but_a_stalled_one_is(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()

    async def run() -> list[bytes]:
        wire = Wire(handler)
        await wire.open()
        await wire.send(b"HELO x\r\n")
        for piece in (BEGIN, b"slow", b"ly\r\n", b".", b"\r\n", BEGIN, b"never"):
            clock.ahead += 299
            await wire.send(piece)
        clock.ahead += 299
        await wire.send(b"")
        assert wire.session in wire.service.clients
        clock.ahead += 2
        await wire.send(b"")
        assert wire.session not in wire.service.clients
        return await wire.replies()

    replies = clock.run_until_complete(run())
    assert codes(replies) == [220, 250, 250, 250, 354, 250, 250, 250, 354, 421]
    assert handler.contents == [b"slowly\r\n"]
    where = "in the middle of a mail from a@x for b@x, after 5 octets"
    assert troubles(caplog) == [("WARNING", f": The client has sent nothing for 300 s {where}")]


@pytest.mark.parametrize("said", [b"", b"HELO x\r\n" + BEGIN + b"half"])
def test_a_stopping_server_does_not_report_its_clients_as_lost(
    said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> list[bytes]:
        wire = Wire(Handler())
        await wire.open()
        await wire.send(said)
        await wire.service.hang_up()
        return await wire.replies()

    assert codes(asyncio.run(run()))[-1] == 421
    assert troubles(caplog) == []


@pytest.mark.parametrize(
    ("seconds", "count"), [(31, 20), (299, 1)], ids=["during the delivery", "right after it"]
)
def test_delivery_time_does_not_count_towards_the_timeout(
    clock: Clock, seconds: int, count: int
) -> None:
    async def run() -> list[bytes]:
        gate = asyncio.Event()
        wire = Wire(Handler(lambda *_: gate.wait()))
        await wire.open()
        await wire.send(b"HELO x\r\n" + BEGIN + b".\r\n")
        for _ in range(count):
            clock.ahead += seconds
            await turns(3)
        gate.set()
        await turns(3)
        clock.ahead += 299
        await turns(3)
        await wire.send(b"NOOP\r\n")
        return await wire.replies()

    assert codes(clock.run_until_complete(run())) == [220, 250, 250, 250, 354, 250, 250]


def test_a_client_that_never_reads_is_cut_off_and_reported(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        wire = Wire(Handler())
        wire.hold_little()
        await wire.open()
        await wire.fill(HELP * 100, MOST)
        clock.ahead += 301
        await turns(3)
        assert wire.session not in wire.service.clients
        wire.socket.close()

    clock.run_until_complete(run())
    assert troubles(caplog) == [("WARNING", ": The client has sent nothing for 300 s")]


# Shutdown.


def test_a_delivery_that_has_begun_is_acknowledged_before_the_server_hangs_up() -> None:
    async def run() -> list[bytes]:
        gate = asyncio.Event()
        wire = Wire(handler := Handler(lambda *_: gate.wait()))
        await wire.open()
        await wire.send(b"HELO x\r\n" + BEGIN + b".\r\n" + BEGIN + b".\r\nNOOP\r\n")
        ending = asyncio.create_task(wire.service.hang_up())
        await wire.send(b"NOOP\r\n" * 10)
        assert not ending.done()
        gate.set()
        await ending
        replies = (await wire.loop.sock_recv(wire.socket, 65536)).splitlines()
        assert await wire.loop.sock_recv(wire.socket, 65536) == b""
        wire.socket.close()
        assert len(handler.envelopes) == 1
        return replies

    replies = asyncio.run(run())
    assert codes(replies) == [220, 250, 250, 250, 354, 250, 421]
    assert replies[-1] == b"421 4.3.2 dsmtpd is stopping"


@pytest.mark.parametrize("stops_first", [False, True])
def test_the_server_waits_for_the_delivery_of_a_client_that_vanishes(*, stops_first: bool) -> None:
    async def run() -> None:
        gate = asyncio.Event()
        wire = Wire(handler := Handler(lambda *_: gate.wait()))
        await wire.open()
        await wire.send(b"HELO x\r\n" + BEGIN + b".\r\n")
        if not stops_first:
            wire.socket.close()  # with unread replies: a reset
            await turns(6)
        ending = asyncio.create_task(wire.service.hang_up())
        await turns(6)
        if stops_first:
            wire.socket.close()
            await turns(6)
        assert wire.transport.is_closing()
        assert not ending.done()
        gate.set()
        await ending
        assert wire.session not in wire.service.clients
        assert handler.contents == [b""]

    asyncio.run(run())


def test_the_server_does_not_wait_for_a_client_that_does_not_read() -> None:
    async def run() -> None:
        wire = Wire(Handler())
        wire.hold_little()
        await wire.open()
        await wire.fill(HELP * 100, MOST)
        await asyncio.wait_for(wire.service.hang_up(), PATIENCE)
        await turns(3)
        assert wire.session not in wire.service.clients
        wire.socket.close()

    asyncio.run(run())


def test_many_pipelined_commands_are_answered_before_the_server_hangs_up() -> None:
    async def run() -> bytes:
        wire = Wire(Handler())
        await wire.open()
        await wire.send(b"HELO x\r\n" + b"RSET\r\n" * 100 + b"RS")
        await wire.service.hang_up()
        received = wire.read()
        wire.socket.close()
        return received

    *replies, end = asyncio.run(run()).split(b"\r\n")
    assert end == b""
    assert codes(replies) == [220, *[250] * 101, 421]


# Failures.


def test_a_failure_in_the_middle_of_a_mail_ends_the_session_and_drops_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(BytesIO):
        def write(self, octets: object) -> int:
            if self.tell() >= 1000:
                raise MemoryError
            return super().write(octets)  # type: ignore[arg-type]  # any buffer

    monkeypatch.setattr("dsmtpd.conversation.BytesIO", Full)
    handler = Handler()
    evil = b"\r\nRSET\r\nMAIL FROM:<evil@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nevil\r\n.\r\n"

    async def run() -> list[bytes]:
        wire = Wire(handler)
        await wire.open()
        await wire.send(b"HELO x\r\n" + BEGIN + b"x" * 1000)
        await wire.send(evil * 100)
        assert wire.session not in wire.service.clients
        return await wire.replies()

    replies = asyncio.run(run())
    assert codes(replies) == [220, 250, 250, 250, 354, 421]
    assert replies[-1] == b"421 4.3.0 Internal error"
    assert handler.envelopes == []
    assert troubles(caplog) == [("ERROR", "Internal error: MemoryError()")]


def test_the_handler_receives_a_complete_aiosmtpd_session_and_envelope() -> None:
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


def test_values_that_a_client_does_not_send_stay_empty() -> None:
    sessions: list[Any] = []

    async def keep_session(_server: object, session: object, _envelope: object) -> None:
        sessions.append(session)

    handler = Handler(keep_session)
    assert codes(converse([ONE_MAIL], handler)) == [*ACCEPTED, 250]
    ((session,), (envelope,)) = sessions, handler.envelopes
    assert (session.host_name, session.extended_smtp) == ("x", False)
    assert (session.ssl, session.authenticated, session.auth_data) == (None, None, None)
    assert (envelope.mail_options, envelope.smtp_utf8, envelope.rcpt_options) == ([], False, [])


class Refusing(Handler):
    """Fails for each mail, and supplies the reply."""

    async def handle_DATA(self, *_: object) -> str:
        raise OSError(28, "No space left on device")

    async def handle_exception(self, error: Exception) -> str:
        assert isinstance(error, OSError)
        return f"452 {error.strerror}"


def test_a_failing_handler_supplies_the_reply_and_the_session_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = converse([ONE_MAIL + b"NOOP\r\n"], Refusing())
    assert codes(replies) == [*ACCEPTED, 452, 250]
    assert replies[-2] == b"452 No space left on device"
    assert troubles(caplog) == []


class FailingTwice(Refusing):
    """Fails for each mail, and again when asked for the reply."""

    async def handle_exception(self, error: Exception) -> str:
        raise KeyError("x" * 100_000) from error


async def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "handler", [FailingTwice(), Handler(fail)], ids=["fails again", "no handle_exception"]
)
def test_a_failing_handler_without_a_reply_ends_the_session_and_logs_one_line(
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
def test_a_cancelled_handler_ends_the_session_and_lets_the_server_stop(*, vanishes: bool) -> None:
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
            wire.socket.close()  # with unread replies: a reset
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


def test_a_verbose_session_is_logged_in_both_directions_with_its_peer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dsmtpd")
    with (
        Listener(Handler(), Options(port=0, tls="starttls", verbose=True)) as listener,
        smtplib.SMTP("127.0.0.1", listener.port, "client.test", timeout=PATIENCE) as client,
    ):
        assert client.sock is not None
        peer = "{}:{}".format(*client.sock.getsockname())
        client.starttls(context=trust_all())
        client.ehlo("\x1b")
        client.login("app", "secret")
        client.sendmail("a@x", ["b@x"], MAIL)
    texts = [message.removeprefix(f"{peer}: ") for message in caplog.messages]
    assert texts[0].startswith("S: 220 ")
    begin = texts.index("C: STARTTLS")
    assert texts[begin + 1] == "S: 220 Ready to start TLS"
    assert re.fullmatch(r"TLSv1\.3 with TLS_\w+", texts[begin + 2])
    assert texts[begin + 3] == r"C: ehlo \x1b"
    begin = texts.index("S: 250 HELP", begin)
    assert texts[begin + 1 : begin + 4] == [
        "C: AUTH PLAIN ***",
        "app logged in with AUTH PLAIN",
        "S: 235 2.7.0 Authentication successful",
    ]
    assert texts[-6:] == [
        "C: data",
        "S: 354 End data with <CR><LF>.<CR><LF>",
        f"C: (a mail, {len(MAIL)} octets)",
        "S: 250 OK",
        "C: QUIT",
        "S: 221 Bye",
    ]
    assert not any("secret" in text for text in texts)


def test_reading_pauses_until_a_delayed_reply_is_sent(clock: Clock) -> None:
    async def talk() -> None:
        wire = Wire(Handler(), failures=(Rule.parse("mail:delay=400:a@*:1"),))
        await wire.open()
        await wire.send(b"HELO x\r\nMAIL FROM:<a@x>\r\n")
        assert codes(wire.read().splitlines()) == [220, 250]
        count = await wire.fill(HELP * 100, MOST) // len(HELP)
        assert count * len(HELP) < MOST // 2
        clock.ahead += 399
        await turns(6)
        assert wire.read() == b""
        clock.ahead += 1
        assert codes(await wire.lines(1 + count)) == [250, *[214] * count]
        await wire.replies()

    clock.run_until_complete(talk())


def test_a_client_is_not_cut_for_the_time_that_a_delay_takes(clock: Clock) -> None:
    async def talk() -> list[bytes]:
        wire = Wire(Handler(), failures=(Rule.parse("mail:delay=250"),))
        await wire.open()
        await wire.send(b"HELO x\r\nMAIL FROM:<a@x>\r\n")
        for seconds in (250, 299):
            clock.ahead += seconds
            await turns(6)
        await wire.send(b"NOOP\r\n")
        return await wire.replies()

    assert codes(clock.run_until_complete(talk())) == [220, 250, 250, 250]


def test_earlier_replies_are_sent_before_a_connection_is_dropped() -> None:
    rule = Rule.parse("rcpt:drop")
    replies = converse(
        [b"HELO x\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nNOOP\r\n"], Handler(), failures=(rule,)
    )
    assert codes(replies) == [220, 250, 250]


def test_the_peers_address_decides_whether_it_may_connect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dsmtpd")
    rules = (Rule.parse("connect:421:192.0.2.*"), Rule.parse("connect:554:127.0.0.?:1"))
    with Listener(Handler(), Options(port=0, failures=rules)) as listener:
        with pytest.raises(smtplib.SMTPConnectError) as raised:
            connect(listener.port)
        assert raised.value.smtp_code == 554
        connect(listener.port).close()
    (text,) = caplog.messages
    assert text.endswith(
        ": connect 127.0.0.1: 554 5.0.0 Failed on demand, by the rule connect:554:127.0.0.?:1"
    )
    assert troubles(caplog) == []
