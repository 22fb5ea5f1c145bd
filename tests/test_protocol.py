from __future__ import annotations

import asyncio
import logging
import smtplib
import socket
import tracemalloc
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmtpd.options import Options
from dsmtpd.server import Listener
from tests.tools import (
    BEGIN,
    FREE,
    MAIL,
    Handler,
    begin_data,
    codes,
    connect,
    converse,
    troubles,
)


def stuffed(content: bytes) -> bytes:
    """Return *content* as a client sends it after DATA (RFC 5321, section 4.5.2)."""
    lines = content.split(b"\r\n")
    return b"\r\n".join(b"." * line.startswith(b".") + line for line in lines) + b".\r\n"


@pytest.mark.parametrize(
    ("options", "extensions"),
    [
        (
            FREE,
            {
                "size": "33554432",
                "8bitmime": "",
                "pipelining": "",
                "smtputf8": "",
                "auth": " PLAIN LOGIN",
                "help": "",
            },
        ),
        (
            Options(port=0, max_size=0, disable_smtputf8=True, disable_auth=True),
            {"size": "0", "8bitmime": "", "pipelining": "", "help": ""},
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
        assert client.mail("a@example.com", ["size=100"])[0] == 250
        client.rset()
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


def test_a_command_line_may_be_longer_than_a_real_server_must_take() -> None:
    address = f"{'a' * 900}@example.com"
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        client.ehlo()
        assert client.mail(address)[0] == 250
        assert client.rcpt(address)[0] == 250
        assert client.docmd("NOOP " + "x" * 996)[0] == 250
        assert client.docmd("NOOP " + "x" * 997)[0] == 500
        assert client.rcpt("b" * 1000)[0] == 500
        assert client.noop()[0] == 250


def test_help_tells_what_is_offered() -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        assert client.docmd("HELP EHLO") == (250, b"Syntax: EHLO hostname")
        client.ehlo()
        assert client.help("AUTH") == b"Syntax: AUTH mechanism [initial-response]"
        assert client.help("MAIL") == b"Syntax: MAIL FROM:<address> [SP <mail-parameters>]"
        assert client.help("RCPT") == b"Syntax: RCPT TO:<address> [SP <rcpt-parameters>]"
        commands = client.help().split()
        assert b"AUTH" in commands
        assert b"STARTTLS" not in commands
    with (
        Listener(Handler(), Options(port=0, disable_auth=True)) as listener,
        connect(listener.port) as client,
    ):
        assert b"AUTH" not in client.help().split()


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


@pytest.mark.parametrize("verb", [b"X", b"x-y", b"\xff", b"", b"\x1b[2J"])
def test_what_is_no_command_is_refused(verb: bytes) -> None:
    assert codes(converse([verb + b" z\r\nNOOP\r\n"], Handler())) == [220, 500, 250]


def test_what_talks_another_protocol_is_cut() -> None:
    replies = converse([b"GET / HTTP/1.1\r\n" * 5 + b"NOOP\r\n"], Handler())
    assert codes(replies) == [220, 500, 500, 500, 500, 502]
    assert replies[1] == b'500 Error: command "GET" not recognized'


def test_commands_out_of_order_are_refused() -> None:
    before = [BEGIN, b"HELO x\r\nRCPT TO:<b@x>\r\nDATA\r\n"]
    assert codes(converse(before, Handler())) == [220, 503, 503, 503, 250, 503, 503]
    within = [b"HELO x\r\nMAIL FROM:<a@x>\r\nMAIL FROM:<c@x>\r\nRCPT TO:<b@x>\r\nDATA x\r\n"]
    assert codes(converse(within, Handler())) == [220, 250, 250, 503, 250, 501]


class Choosy(Handler):
    """A handler that has a say in addresses, and the last word."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[list[str]] = []

    async def handle_MAIL(
        self, _server: object, _session: object, envelope: Any, address: str, options: list[str]
    ) -> str:
        self.options.append(options)
        envelope.mail_from = address.upper()
        return "250 As you like"

    async def handle_RCPT(
        self, _server: object, _session: object, envelope: Any, address: str, options: list[str]
    ) -> str:
        self.options.append(options)
        if address.startswith("b@"):
            return "550 Nobody"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_QUIT(self, *_: object) -> str:
        return "221 See you \udcff"


def test_the_hooks_of_a_handler_have_their_say() -> None:
    handler = Choosy()
    envelope = b"MAIL FROM:<a@x> size=3\r\nRCPT TO:<b@x>\r\nRCPT TO:<c@x> X=y Z\r\n"
    replies = converse([b"HELO x\r\n", envelope, b"DATA\r\n.\r\nQUIT\r\n"], handler)
    assert codes(replies) == [220, 250, 250, 550, 250, 354, 250, 221]
    assert (replies[2], replies[-1]) == (b"250 As you like", rb"221 See you \udcff")
    assert handler.options == [["SIZE=3"], [], ["X=y", "Z"]]
    assert (handler.envelopes[0].mail_from, handler.envelopes[0].rcpt_tos) == ("A@X", ["c@x"])


class Failing:
    """A handler that fails at the first mail, and then perhaps at telling so."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def handle_DATA(self, *_: object) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "250 OK"

    async def handle_RCPT(
        self, _server: object, _session: object, envelope: Any, address: str, _options: object
    ) -> str:
        if address == "fail@x":
            raise self.errors.pop(0)
        envelope.rcpt_tos.append(address)
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


def test_a_session_whose_failure_cannot_be_handled_ends_with_the_replies_to_its_group() -> None:
    handler = Failing(KeyError("first"), KeyError("then"))
    group = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nRCPT TO:<fail@x>\r\nRSET\r\n"
    assert codes(converse([b"HELO x\r\n" + group], handler)) == [220, 250, 250, 250]


def test_a_session_whose_failure_cannot_be_handled_ends() -> None:
    handler = Failing(KeyError("first"), KeyError("then"))
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        begin_data(client)
        client.send(b".\r\n")
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.getreply()


def say(*commands: str, parameters: dict[str, Any] | None = None) -> list[bytes]:
    """Return the replies to *commands* that follow an EHLO, each sent when the last is answered."""
    pieces = [
        f"{command}\r\n".encode("utf-8", "surrogateescape") for command in ("EHLO x", *commands)
    ]
    replies = converse(pieces, Handler(), **(parameters or {}))
    begin = next(i for i, reply in enumerate(replies) if reply.startswith(b"250 "))
    return replies[begin + 1 :]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings, without the peer."""
    assert {level for level, _ in troubles(caplog)} <= {"WARNING"}
    return [text.partition(": ")[2] for _, text in troubles(caplog)]


OFFERED = "SIZE=1000 BODY=8BITMIME SMTPUTF8 AUTH=<> body=7bit"
ADDRESSES = [
    "<@relay.example.org:a@example.com>",
    "<postmaster>",
    '<"a, <b>"@example.com>',
    "<=?utf-8?q?boss?=@example.com>",
]


@pytest.mark.parametrize("path", ADDRESSES)
def test_an_address_is_taken_as_it_was_sent(path: str, caplog: pytest.LogCaptureFixture) -> None:
    handler = Handler()
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.ehlo()
        assert client.docmd(f"MAIL FROM:{path} {OFFERED}")[0] == 250
        assert client.docmd(f"RCPT TO:{path}")[0] == 250
        client.data(MAIL)
    (envelope,) = handler.envelopes
    assert (envelope.mail_from, envelope.rcpt_tos) == (path[1:-1], [path[1:-1]])
    assert warnings(caplog) == []


LONG = f"{'l' * 150}@{'d' * 149}"


@pytest.mark.parametrize(
    ("path", "address", "faults"),
    [
        ("a@x", "a@x", "missing angle brackets"),
        (" <a@x>", "a@x", "a space after the colon"),
        ("<a@>", "a@", "a malformed address"),
        (f"<{LONG}>", LONG, "a local part of more than 64 octets, a path of more than 256 octets"),
        ("<é@x>", "é@x", "an address beyond ASCII without SMTPUTF8"),
    ],
)
def test_what_other_servers_may_refuse_is_taken_and_told_once_in_a_mail(
    path: str, address: str, faults: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    mail = f"MAIL FROM:{path}\r\nRCPT TO:{path}\r\nRCPT TO:{path}\r\nDATA\r\n.\r\n".encode()
    replies = converse([b"EHLO x\r\n" + mail + mail], handler)
    assert codes(replies)[-10:] == [250, 250, 250, 354, 250] * 2
    for envelope in handler.envelopes:
        assert (envelope.mail_from, envelope.rcpt_tos) == (address, [address, address])
    assert warnings(caplog) == [f"Servers may refuse {faults} in: MAIL FROM:{path}"] * 2


def test_parameters_that_are_not_offered_are_taken_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rcpt = "RCPT TO:<b@x> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@x"
    mail = "MAIL FROM:<a@x> SIZE=9 RET=HDRS ENVID=Qq314 X-VENDOR"
    assert codes(say(mail, rcpt, rcpt, "RCPT TO:<c@x> NOTIFY=NEVER X=1")) == [250, 250, 250, 250]
    assert warnings(caplog) == [
        f"Servers may refuse RET, ENVID, X-VENDOR in: {mail}",
        f"Servers may refuse NOTIFY, ORCPT in: {rcpt}",
        "Servers may refuse X in: RCPT TO:<c@x> NOTIFY=NEVER X=1",
    ]


@pytest.mark.parametrize(
    ("parameter", "parameters"),
    [
        ("SMTPUTF8", {"enable_SMTPUTF8": False}),
        ("AUTH=<>", {"offers_auth": False}),
        ("AUTH", {}),
        ("SIZE", {}),
        ("SIZE=-1", {}),
        ("SIZE=²", {}),
        ("SIZE=٣", {}),
        (f"SIZE={'9' * 21}", {}),
        ("BODY=BINARYMIME", {}),
        ("SMTPUTF8=yes", {}),
        ("=", {}),
    ],
)
def test_a_parameter_that_is_not_offered_in_this_form_is_taken_and_told(
    parameter: str, parameters: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    command = f"MAIL FROM:<a@x> {parameter}"
    assert codes(say(command, parameters=parameters)) == [250]
    keyword = parameter.partition("=")[0] or "="
    assert warnings(caplog) == [f"Servers may refuse {keyword} in: {command}"]


def test_smtputf8_holds_for_the_whole_envelope(caplog: pytest.LogCaptureFixture) -> None:
    say("MAIL FROM:<é@x> SMTPUTF8", "RCPT TO:<é@x>", "RSET", "MAIL FROM:<a@x>")
    assert warnings(caplog) == []
    say("MAIL FROM:<a@x> SMTPUTF8", "RSET", "MAIL FROM:<a@x>", "RCPT TO:<é@x>")
    refused = "Servers may refuse an address beyond ASCII without SMTPUTF8 in: RCPT TO:<é@x>"
    assert warnings(caplog) == [refused]


def test_a_recipient_has_none_of_the_parameters_of_mail(caplog: pytest.LogCaptureFixture) -> None:
    say("MAIL FROM:<a@x>", "RCPT TO:<b@x> SIZE=1")
    assert warnings(caplog) == ["Servers may refuse SIZE in: RCPT TO:<b@x> SIZE=1"]


def test_a_warning_names_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with Listener(Handler(), FREE) as listener, connect(listener.port) as client:
        client.ehlo()
        client.docmd("MAIL FROM:a@x")
        assert client.sock is not None
        host, port = client.sock.getsockname()
    (trouble,) = troubles(caplog)
    assert trouble[1].startswith(f"{host}:{port}: Servers may refuse ")


def test_a_size_of_20_digits_is_a_size() -> None:
    assert codes(say(f"MAIL FROM:<a@x> SIZE={'9' * 20}")) == [552]


def test_after_helo_no_parameter_is_offered(caplog: pytest.LogCaptureFixture) -> None:
    assert codes(say("HELO x", "MAIL FROM:<a@x> SIZE=1")) == [250, 250]
    assert warnings(caplog) == ["Servers may refuse SIZE in: MAIL FROM:<a@x> SIZE=1"]


def test_a_warning_cannot_drive_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    say("MAIL FROM:<a@x> \x1b[2J=\x07")
    assert warnings(caplog)[0].endswith(r"in: MAIL FROM:<a@x> \x1b[2J=\x07")


@pytest.mark.parametrize(
    "command", ["MAIL", "MAIL FROM", "MAIL FROM:", "MAIL TO:<a@x>", "MAIL <a@x>"]
)
def test_a_command_without_a_path_is_refused(command: str) -> None:
    assert say(command) == [b"501 Syntax: MAIL FROM:<address>"]
    rcpt = command.replace("TO", "F").replace("FROM", "TO").replace("MAIL", "RCPT")
    assert say("MAIL FROM:<a@x>", rcpt)[1:] == [b"501 Syntax: RCPT TO:<address>"]


def test_the_10001st_recipient_is_refused_and_the_others_get_the_mail() -> None:
    handler = Handler()
    recipients = b"RCPT TO:<b@x>\r\n" * 10_001
    octets = b"EHLO x\r\nMAIL FROM:<a@x>\r\n" + recipients + b"DATA\r\n.\r\n" + BEGIN
    replies = converse([octets], handler)
    assert codes(replies)[-10_007:] == [250, *[250] * 10_000, 452, 354, 250, 250, 250, 354]
    assert [len(envelope.rcpt_tos) for envelope in handler.envelopes] == [10_000]


def test_quit_has_no_argument() -> None:
    assert codes(say("QUIT now", "NOOP", "RSET  ", "QUIT  ")) == [501, 250, 250, 221]


def test_vrfy_promises_nothing() -> None:
    assert codes(say("VRFY", "VRFY <", "VRFY a@x")) == [501, 252, 252]


def test_a_group_of_commands_is_answered_in_order_whatever_fails_in_it() -> None:
    handler = Handler()
    group = b"MAIL FROM:<a@x>\r\nRCPT TO:\r\nMAIL FROM:<c@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"
    replies = converse(
        [b"EHLO x\r\n", group, b"Hi\r\n.\r\nRSET\r\n" + group, b".\r\nQUIT\r\n"], handler
    )
    data = [250, 501, 503, 250, 354]
    assert codes(replies)[-14:] == [*data, 250, 250, *data, 250, 221]
    assert handler.contents == [b"Hi\r\n", b""]


@pytest.mark.parametrize("command", [b"MAILX", b"RSETS a"])
def test_the_replies_to_a_group_come_whatever_ends_it(command: bytes) -> None:
    octets = b"EHLO x\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\n" + (command + b"\r\n") * 5
    assert codes(converse([octets + b"NOOP\r\n"], Handler()))[-7:] == [250, 250, *[500] * 4, 502]


def test_data_at_the_end_of_a_group_without_a_recipient_takes_no_mail() -> None:
    handler = Handler()
    group = b"MAIL FROM:<a@x>\r\nRCPT TO:\r\nDATA\r\nRSET\r\n"
    assert codes(converse([b"EHLO x\r\n" + group], handler))[-4:] == [250, 501, 503, 250]
    assert handler.contents == []


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


PLAIN = b64("\0app@example.com\0secret")
USER, PASSWORD = b64("app@example.com"), b64("secret")


@pytest.mark.parametrize(
    ("commands", "replies"),
    [
        ([f"AUTH PLAIN {PLAIN}"], []),
        (["AUTH PLAIN", PLAIN], [b"334 "]),
        ([f"auth plain  {PLAIN} "], []),
        (["AUTH LOGIN", USER, PASSWORD], [b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6"]),
        ([f"AUTH login {USER}", PASSWORD], [b"334 UGFzc3dvcmQ6"]),
        (["Auth Login", USER, "="], [b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6"]),
    ],
)
def test_any_credentials_are_taken_and_only_the_name_is_logged(
    commands: list[str], replies: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    mechanism = commands[0].split()[1].upper()
    assert say(*commands) == [*replies, b"235 2.7.0 Authentication successful"]
    assert f": app@example.com logged in by AUTH {mechanism}" in caplog.messages
    for secret in ("secret", PASSWORD, PLAIN):
        assert secret not in caplog.text


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        (["AUTH PLAIN", "*"], b"501 5.7.0"),
        (["AUTH LOGIN", "*"], b"501 5.7.0"),
        (["AUTH LOGIN", USER, "*"], b"501 5.7.0"),
        (["AUTH PLAIN secret!"], b"501 5.5.2"),
        (["AUTH PLAIN", "secret!"], b"501 5.5.2"),
        (["AUTH PLAIN", "\udcff"], b"501 5.5.2"),
        (["AUTH PLAIN \udcff"], b"501 5.5.2"),
        (["AUTH PLAIN é"], b"501 5.5.2"),
        (["AUTH LOGIN", USER, "secret!"], b"501 5.5.2"),
        ([f"AUTH PLAIN {PASSWORD}"], b"501 5.5.2"),
        ([f"AUTH PLAIN {'A' * 12_292}"], b"500 5.5.6"),
        (["AUTH LOGIN", "A" * 12_292], b"500 5.5.6"),
        (["AUTH LOGIN", USER, "A" * 3_000_000], b"500 5.5.6"),
        (["AUTH"], b"501 5.5.4"),
        ([f"AUTH PLAIN {PLAIN} {PLAIN}"], b"501 5.5.4"),
        (["AUTH CRAM-MD5"], b"504 5.5.4"),
    ],
)
def test_after_an_exchange_that_fails_the_session_goes_on(
    commands: list[str], code: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    replies = say(*commands, f"AUTH PLAIN {PLAIN}")
    assert (replies[-2][: len(code)], codes(replies)[-1]) == (code, 235)
    assert "secret" not in caplog.text
    assert PASSWORD not in caplog.text


def test_a_response_may_be_as_long_as_rfc_4954_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    name = "n" * 9000
    response = b64(f"\0{name}\0{'s' * 214}")
    assert len(response) == 12_288
    assert codes(say(f"auth plain {response}")) == [235]
    assert codes(say("AUTH PLAIN", response)) == [334, 235]
    assert caplog.messages.count(f": {name} logged in by AUTH PLAIN") == 2


def test_a_user_name_cannot_drive_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    say("AUTH LOGIN", b64("\x1b[2Jme\n"), PASSWORD)
    assert r": \x1b[2Jme\n logged in by AUTH LOGIN" in caplog.messages


def test_auth_comes_once_and_before_a_mail() -> None:
    login = f"AUTH PLAIN {PLAIN}"
    assert codes(converse([f"{login}\r\n".encode()], Handler())) == [220, 503]
    assert codes(say("MAIL FROM:<a@x>", login, "RSET", login, login)) == [250, 503, 250, 235, 503]
    assert codes(say("HELO x", login)) == [250, 235]


def test_a_client_that_leaves_within_an_exchange_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert codes(converse([b"EHLO x\r\nAUTH LOGIN\r\nc2Vj"], Handler()))[-1] == 334
    assert troubles(caplog) == []


def test_auth_that_is_disabled_is_refused_and_the_session_goes_on() -> None:
    replies = say(f"AUTH PLAIN {PLAIN}", "NOOP", parameters={"offers_auth": False})
    assert codes(replies) == [502, 250]
