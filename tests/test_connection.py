from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd.protocol import SMTP
from dsmtpd.server import Listener
from tests.tools import (
    BEGIN,
    FREE,
    Clock,
    Handler,
    Wire,
    begin_data,
    codes,
    connect,
    converse,
    reset,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


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


class EndingAtData:
    """A handler that has the session end as soon as it has taken a mail."""

    async def handle_DATA(self, server: SMTP, *_: object) -> str:
        self.ending = asyncio.create_task(server.hang_up())
        return "250 OK"


def test_a_mail_that_has_been_taken_is_acknowledged_before_the_session_ends() -> None:
    with Listener(EndingAtData(), FREE) as listener:
        client = connect(listener.port)
        begin_data(client)
        client.send(b".\r\n")
        assert client.getreply() == (250, b"OK")
        assert client.getreply()[0] == 421
        client.close()


def test_a_session_without_a_client_can_be_hung_up() -> None:
    async def hang_up() -> None:
        await SMTP(Handler(), hostname="x.test", loop=asyncio.get_running_loop()).hang_up()

    asyncio.run(hang_up())


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


def test_what_a_client_sends_before_it_closes_its_half_is_carried_out_and_answered() -> None:
    handler = Handler()
    replies = converse([b"HELO x\r\n" + BEGIN + b".\r\nNOOP\r\nQUI"], handler)
    assert codes(replies) == [220, 250, 250, 250, 354, 250, 250]
    assert handler.contents == [b""]


def test_a_mail_without_its_end_is_none() -> None:
    handler = Handler()
    assert codes(converse([b"HELO x\r\n" + BEGIN + b"hi\r\n."], handler))[-1] == 354
    assert handler.contents == []


@pytest.mark.parametrize("octets", [1002, 300_000, 3_000_000])
def test_a_command_line_that_is_too_long_is_refused_once(octets: int) -> None:
    replies = converse([b"NOOP " + b"x" * (octets - 5) + b"\r\nNOOP\r\n"], Handler())
    assert codes(replies) == [220, 500, 250]


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


class Slow(Handler):
    """A handler that takes ten minutes for a mail."""

    async def handle_DATA(self, server: object, session: object, envelope: Any) -> str:
        await asyncio.sleep(600)
        return await super().handle_DATA(server, session, envelope)


@pytest.fixture
def clock() -> Iterator[Clock]:
    loop = Clock()
    yield loop
    loop.close()


def test_a_client_that_makes_progress_is_not_cut_and_one_that_stalls_is(clock: Clock) -> None:
    handler = Handler()

    async def run() -> list[bytes]:
        wire = Wire(handler)
        await wire.open()
        await wire.send(b"HELO x\r\n")
        for piece in (BEGIN, b"slow", b"ly\r\n", b".", b"\r\n", BEGIN, b"never"):
            clock.ahead += 299
            await wire.send(piece)
        clock.ahead += 299
        await asyncio.sleep(0)
        assert wire.session.transport is not None
        clock.ahead += 2
        return await wire.replies()

    replies = clock.run_until_complete(run())
    assert codes(replies) == [220, 250, 250, 250, 354, 250, 250, 250, 354, 421]
    assert handler.contents == [b"slowly\r\n"]


def test_a_client_is_not_cut_while_it_waits_for_a_delivery(clock: Clock) -> None:
    handler = Slow()

    async def run() -> list[bytes]:
        wire = Wire(handler)
        await wire.open()
        await wire.send(b"HELO x\r\n" + BEGIN + b".\r\n")
        for _ in range(20):
            clock.ahead += 31
            await asyncio.sleep(0)
        return await wire.replies()

    assert codes(clock.run_until_complete(run()))[-2:] == [354, 250]
    assert len(handler.contents) == 1


def packets(group: bytes, count: int) -> list[bytes]:
    """Return what a client receives at once, *count* times, that sends a *group* of commands."""

    async def run() -> list[bytes]:
        wire = Wire(Handler())
        await wire.open()
        await wire.send(b"EHLO x\r\n")
        await wire.loop.sock_recv(wire.socket, 65536)
        await wire.loop.sock_sendall(wire.socket, group)
        received = [await wire.loop.sock_recv(wire.socket, 65536) for _ in range(count)]
        await wire.replies()
        return received

    return asyncio.run(run())


def test_the_replies_to_a_group_come_together() -> None:
    group = b"MAIL FROM:<a@x>\r\nrcpt TO:<b@x>\r\nRSET\r\nNOOP\r\n" + b"rset\r\n" * 7 + b"RS"
    # NOOP is answered at once (RFC 2920, section 3.2).
    assert packets(group, 2) == [b"250 OK\r\n" * 4, b"250 OK\r\n" * 7]


def test_a_reply_to_no_command_of_a_group_does_not_wait() -> None:
    refused = b'500 Error: command "RSETX" not recognized\r\n'
    assert packets(b"RSETX\r\n" + b"RSET\r\n" * 7 + b"RS", 2) == [refused, b"250 OK\r\n" * 7]


def test_the_replies_to_a_long_group_come_in_parts() -> None:
    for packet in packets(b"RSET\r\n" * 2000, 3):
        assert 4000 < len(packet) < 5000


def test_the_replies_of_a_group_come_before_the_end() -> None:
    async def run() -> bytes:
        wire = Wire(Handler())
        await wire.open()
        await wire.send(b"HELO x\r\n")
        await wire.loop.sock_recv(wire.socket, 65536)
        await wire.send(b"RSET\r\n" * 100)
        await wire.session.hang_up()
        received = await wire.loop.sock_recv(wire.socket, 65536)
        wire.socket.close()
        return received

    *replies, last, end = asyncio.run(run()).split(b"\r\n")
    assert (last[:3], end) == (b"421", b"")
    assert 0 < len(replies) < 100
    assert set(replies) == {b"250 OK"}


class Chatty:
    """A handler that has much to say to each NOOP."""

    noops = 0

    async def handle_NOOP(self, *_: object) -> str:
        self.noops += 1
        return "250 " + "x" * 100_000


def test_a_client_that_does_not_read_is_waited_for() -> None:
    handler = Chatty()

    async def run() -> None:
        wire = Wire(handler)
        await wire.open()
        await wire.send(b"NOOP\r\n" * 200)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert handler.noops < 100
        assert len(await wire.replies()) == 201

    asyncio.run(run())
