from __future__ import annotations

import asyncio
import gc
import smtplib
import socket
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiosmtpd.smtp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsmtpd.options import Options
from dsmtpd.protocol import SMTP
from dsmtpd.server import Listener
from tests.tools import FREE, MAIL, PATIENCE, begin_data, connect, reset, troubles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Handler:
    """Keeps the envelopes that arrive."""

    def __init__(self) -> None:
        self.envelopes: list[Any] = []

    @property
    def contents(self) -> list[bytes]:
        return [envelope.content for envelope in self.envelopes]

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:
        self.envelopes.append(envelope)
        return "250 OK"


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time can be moved forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class Wire:
    """A client that talks to a session in the same loop, so that each step is seen to be done."""

    def __init__(self, handler: object, **parameters: Any) -> None:
        self.loop = asyncio.get_running_loop()
        settings = {"hostname": "server.test", "ident": "test", "enable_SMTPUTF8": True}
        self.session = SMTP(handler, loop=self.loop, **settings, **parameters).twin()
        self.socket, self._other = socket.socketpair()
        self.socket.setblocking(False)  # noqa: FBT003  # its only form

    async def open(self) -> None:
        await self.loop.connect_accepted_socket(lambda: self.session, self._other)

    async def send(self, octets: bytes) -> None:
        """Return when the session has read *octets*, and done what it can do at once."""
        await self.loop.sock_sendall(self.socket, octets)
        for _ in range(6):
            await asyncio.sleep(0)

    async def replies(self) -> list[bytes]:
        """Return all replies, after a word that there is nothing more to send."""
        self.socket.shutdown(socket.SHUT_WR)
        received = b""
        while octets := await asyncio.wait_for(self.loop.sock_recv(self.socket, 65536), PATIENCE):
            received += octets
        self.socket.close()
        return received.splitlines()


def converse(pieces: Iterable[bytes], handler: object, **parameters: Any) -> list[bytes]:
    """Return the replies to *pieces*, which the session reads one by one."""

    async def run() -> list[bytes]:
        wire = Wire(handler, **parameters)
        await wire.open()
        for piece in pieces:
            await wire.send(piece)
        return await wire.replies()

    return asyncio.run(run())


def codes(replies: Iterable[bytes]) -> list[int]:
    return [int(reply[:3]) for reply in replies]


def stuffed(content: bytes) -> bytes:
    """Return *content* as a client sends it after DATA (RFC 5321, section 4.5.2)."""
    lines = content.split(b"\r\n")
    return b"\r\n".join(b"." * line.startswith(b".") + line for line in lines) + b".\r\n"


BEGIN = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"


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


@pytest.mark.parametrize("address", ["<", "a@", "<@[\t", "<@a:>", "(" * 980])
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


def test_a_size_that_is_no_number_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    octets = "EHLO x\r\nMAIL FROM:<a@x> SIZE=²\r\n".encode()
    assert codes(converse([octets], Handler()))[-1] == 501
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


def test_a_command_that_is_none_does_not_end_the_session() -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        assert client.docmd("\x1b[2J")[0] == 500
        assert client.noop()[0] == 250
        with pytest.raises(smtplib.SMTPNotSupportedError):
            client.starttls()


CONTENTS = [
    b"",
    b"\r\n",
    b"\r\n\r\n",
    b".\r\n",
    b"..\r\n",
    b".\r\n.\r\n",
    b"Subject: x\r\n\r\n.hidden\r\n..\r\nend\r\n",
    # None of these ends the mail: it is no line of its own without a CRLF on both sides.
    b"a\n.\nb\r\n",
    b"a\r.\rb\r\n",
    b"a\n.\r\nb\r\n",
    b"a\r.\r\nb\r\n",
    b"a\r\n.\nb\r\n",
    b"a\r\n.\rb\r\n",
    b"a\r\n.\r\r\nb\r\n",
    b"\n.\r\n",
    b"\r\r\n.\r\n",
    b"\x00\xff\r\n",
]


@pytest.mark.parametrize("content", CONTENTS)
def test_the_content_is_the_same_wherever_the_reads_are_cut(content: bytes) -> None:
    octets = BEGIN + stuffed(content) + b"NOOP\r\n"
    cuts = range(len(BEGIN) - 7, len(octets))
    ways = [[octets], [bytes([octet]) for octet in octets]]
    for pieces in [*ways, *([octets[:cut], octets[cut:]] for cut in cuts)]:
        handler = Handler()
        replies = converse([b"HELO x\r\n", *pieces], handler)
        assert handler.contents == [content]
        assert codes(replies) == [220, 250, 250, 250, 354, 250, 250]


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from([b"\r\n", b".", b"\r", b"\n", b"a", b"x" * 1001]), max_size=30),
    st.lists(st.integers(1, 40), max_size=8),
)
def test_any_content_arrives_whole_in_any_pieces(parts: list[bytes], cuts: list[int]) -> None:
    content = b"".join(parts) + b"\r\n"
    octets, pieces = BEGIN + stuffed(content), []
    for cut in cuts:
        pieces.append(octets[:cut])
        octets = octets[cut:]
    handler = Handler()
    converse([b"HELO x\r\n", *filter(None, pieces), octets], handler)
    assert handler.contents == [content]


def test_a_mail_of_many_reads_arrives_whole() -> None:
    handler = Handler()
    content = b"".join(b".%d\r\n" % number for number in range(300_000))
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.sendmail("a@x", ["b@x"], content)
        client.sendmail("a@x", ["b@x"], content)
    assert handler.contents == [content, content]


@pytest.mark.parametrize("octets", [998, 999, 5000, 70_000, 3_000_000])
def test_a_line_may_be_as_long_as_the_mail(octets: int) -> None:
    handler = Handler()
    content = b"." + b"x" * (octets - 1) + b"\r\n"
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.sendmail("a@x", ["b@x"], content)
    assert handler.contents == [content]


@pytest.mark.parametrize("line", [b"x" * 6 + b"\r\n", b".\r\n", b"..\r\n", b"\r\n"])
def test_the_limit_counts_the_mail_without_the_stuffing(line: bytes) -> None:
    for lines in (1, 7, 100_000):
        content = line * lines
        for limit, code in ((len(content), 250), (len(content) - 1, 552)):
            handler = Handler()
            pieces = [b"HELO x\r\n", BEGIN, stuffed(content) + b"NOOP\r\n"]
            replies = converse(pieces, handler, data_size_limit=limit)
            assert codes(replies)[-3:] == [354, code, 250]
            assert handler.contents == [content] * (code == 250)


def test_what_is_over_the_limit_takes_no_memory() -> None:
    with (
        Listener(Handler(), Options(port=0, max_size=1_000_000)) as listener,
        connect(listener.port) as client,
    ):
        begin_data(client)
        chunk = (b"x" * 98 + b"\r\n") * 10_000
        tracemalloc.start()
        try:
            for _ in range(100):
                client.send(chunk)
            client.send(b".\r\n")
            assert client.getreply()[0] == 552
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()
        assert client.noop()[0] == 250


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


@pytest.mark.parametrize("verb", [b"X", b"x-y", b"\xff", b"", b"\x1b[2J"])
def test_what_is_no_command_is_refused(verb: bytes) -> None:
    assert codes(converse([verb + b" z\r\nNOOP\r\n"], Handler())) == [220, 500, 250]


def test_what_talks_another_protocol_is_cut() -> None:
    replies = converse([b"GET / HTTP/1.1\r\n" * 5 + b"NOOP\r\n"], Handler())
    assert codes(replies) == [220, 500, 500, 500, 500, 502]
    assert replies[1] == b'500 Error: command "GET" not recognized'


@pytest.mark.parametrize("octets", [1002, 300_000, 3_000_000])
def test_a_command_line_that_is_too_long_is_refused_once(octets: int) -> None:
    replies = converse([b"NOOP " + b"x" * (octets - 5) + b"\r\nNOOP\r\n"], Handler())
    assert codes(replies) == [220, 500, 250]


def test_commands_out_of_order_are_refused() -> None:
    before = [BEGIN, b"HELO x\r\nRCPT TO:<b@x>\r\nDATA\r\n"]
    assert codes(converse(before, Handler())) == [220, 503, 503, 503, 250, 503, 503]
    within = [b"HELO x\r\nMAIL FROM:<a@x>\r\nMAIL FROM:<c@x>\r\nRCPT TO:<b@x>\r\nDATA x\r\n"]
    assert codes(converse(within, Handler())) == [220, 250, 250, 503, 250, 501]


class Choosy(Handler):
    """A handler that has a say in addresses."""

    async def handle_MAIL(
        self, _server: object, _session: object, envelope: Any, address: str, _options: list[str]
    ) -> str:
        envelope.mail_from = address.upper()
        return "250 As you like"

    async def handle_RCPT(
        self, _server: object, _session: object, envelope: Any, address: str, _options: list[str]
    ) -> str:
        if address.startswith("b@"):
            return "550 Nobody"
        envelope.rcpt_tos.append(address)
        return "250 OK"


def test_the_hooks_of_a_handler_have_their_say() -> None:
    handler = Choosy()
    commands = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nRCPT TO:<c@x>\r\nDATA\r\n.\r\n"
    replies = converse([b"HELO x\r\n", commands], handler)
    assert codes(replies) == [220, 250, 250, 550, 250, 354, 250]
    assert (handler.envelopes[0].mail_from, handler.envelopes[0].rcpt_tos) == ("A@X", ["c@x"])


class Failing:
    """A handler that fails at the first mail, and then perhaps at telling so."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def handle_DATA(self, *_: object) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "250 OK"

    async def handle_exception(self, error: Exception) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return f"451 {error!r}"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), ConnectionResetError(), asyncio.IncompleteReadError(b"", 1)]
)
def test_after_a_mail_that_the_handler_fails_at_the_next_one_is_taken(error: Exception) -> None:
    handler = Failing(error)
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.helo()
        for code in (451, 250):
            client.mail("a@x")
            client.rcpt("b@x")
            assert client.data(MAIL)[0] == code


def test_a_session_whose_failure_cannot_be_handled_ends() -> None:
    handler = Failing(KeyError("first"), KeyError("then"))
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        begin_data(client)
        client.send(b".\r\n")
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.getreply()


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


ADDRESSES = [
    "<a@example.com>",
    "<a@example.com> SIZE=1000",
    "<a@example.com>  BODY=8BITMIME  SMTPUTF8 ",
    "<a@example.com>SIZE=1000",
    "<a@example.com> (comment) SIZE=1000",
    "<a@example.com> \u00a0SIZE=1000",
    "<bounce+user=example.org@lists.example.com>",
    "<!#$%&'*+-/=?^_`{|}~@example.com>",
    "<first.last@sub.example.com>",
    "<.a@example.com>",
    "<a.@example.com>",
    "<a..b@example.com>",
    "<a@.example.com>",
    "<a@example..com>",
    "<a@example.com.>",
    "<用户@例え.jp>",
    "<é@example.com>",
    "<caf\udce9@example.com>",
    "<=?utf-8?q?boss?=@example.com>",
    "<a@=?utf-8?q?example?=>",
    "<x=?utf-8?q?boss?=@example.com>",
    "<a@example.com",
    "a@example.com",
    "a@example.com>",
    "<a>",
    "<a@>",
    "<@example.com>",
    "<a@b@example.com>",
    "<a@[127.0.0.1]>",
    '<"a b"@example.com>',
    '<"a"@example.com>',
    "<a(comment)@example.com>",
    "< a@example.com >",
    "<@relay.example.org:a@example.com>",
    "<a\x01@example.com>",
    "<a@exa\x7fmple.com>",
    "<>",
    "<> SIZE=1000",
    "<",
    "",
    " ",
    "<a@example.com>\r",
    "<a@example.com>\x0bSIZE=1000",
    "Name <a@example.com>",
    "<a_b@example_c.com>",
    "<a\u0301@example.com>",
    "<\u0661@example.com>",
    f"<{'a' * 300}@{'b' * 300}.com>",
]


def full(address: str) -> tuple[str | None, str | None]:
    """Return what aiosmtpd's own parser makes of *address*."""
    with suppress(AttributeError, IndexError, UnboundLocalError):
        return aiosmtpd.smtp.SMTP._getaddr(PARSER, address)  # noqa: SLF001  # the reference
    return None, None


def ours(address: str) -> tuple[str | None, str | None]:
    return PARSER._getaddr(address)  # noqa: SLF001  # no reply tells all that it returns


LOOP = asyncio.new_event_loop()
LOOP.close()  # Nothing here waits for anything.
PARSER = SMTP(Handler(), hostname="server.test", loop=LOOP)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_what_the_full_parser_says(address: str) -> None:
    assert ours(address) == full(address)


class Indifferent(Handler):
    """A handler with a hook, so that aiosmtpd carries MAIL and RCPT out, that changes nothing."""

    async def handle_MAIL(self, *_: object) -> object:
        return aiosmtpd.smtp.MISSING

    handle_RCPT = handle_MAIL


@pytest.mark.parametrize(
    "path",
    [
        "<a@x>",
        " <a@x>",
        "  <a@x> ",
        "\t<a@x>",
        "<a@x> SIZE=9",
        "<a@x>SIZE=9",
        "<>",
        "a@x",
        "<a@x",
        "",
    ],
)
@pytest.mark.parametrize("keyword", ["FROM:", "from:", "From:", "FROM", "TO:", "to:", "To:", ""])
def test_a_path_is_taken_as_aiosmtpd_takes_it(keyword: str, path: str) -> None:
    commands = f"MAIL {keyword}{path}\r\nRSET\r\nMAIL FROM:<c@x>\r\nRCPT {keyword}{path}\r\n"
    octets = f"EHLO x\r\n{commands}RCPT TO:<d@x>\r\nDATA\r\n.\r\n".encode()
    ours, theirs = Handler(), Indifferent()
    assert converse([octets], ours) == converse([octets], theirs)
    assert ours.envelopes[0].rcpt_tos == theirs.envelopes[0].rcpt_tos


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(["<", ">", "@", ".", " ", "=?utf-8?q?", "?=", "(", ")", '"', "a", "é", "="])
        | st.text(max_size=2),
        max_size=14,
    ).map("".join)
    | st.from_regex(r"<[^<>@]{1,6}@[^<>@]{1,6}> ?.{0,6}", fullmatch=True)
)
@example("<a@b>")
def test_any_address_is_what_the_full_parser_says(address: str) -> None:
    assert ours(address) == full(address)
