from __future__ import annotations

import tracemalloc
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsmtpd.conversation import (
    Action,
    BeginTLS,
    Close,
    Conversation,
    Login,
    Mail,
    Offer,
    Reply,
    Report,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BEGIN = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"


def offer(**settings: Any) -> Offer:
    return Offer(hostname="server.test", **settings)


def pull(conversation: Conversation) -> Iterator[Action]:
    """Yield what is to be done now; each mail is delivered at once."""
    while action := conversation.next_action():
        yield action
        if isinstance(action, Mail):
            conversation.delivered("250 OK")


def talk(pieces: Iterable[bytes], **settings: Any) -> list[Action]:
    """Return what comes of *pieces*, which arrive one by one, and of the end of file after them."""
    conversation = Conversation(offer(**settings))
    actions = [*pull(conversation)]
    for piece in pieces:
        conversation.receive(piece)
        actions += pull(conversation)
    conversation.receive_eof()
    return [*actions, *pull(conversation)]


def replies(actions: Iterable[Action]) -> list[bytes]:
    octets = (action.octets for action in actions if isinstance(action, Reply))
    return b"".join(octets).splitlines()


def codes(actions: Iterable[Action]) -> list[int]:
    return [int(reply[:3]) for reply in replies(actions) if reply[3:4] == b" "]


def contents(actions: Iterable[Action]) -> list[bytes]:
    return [action.content for action in actions if isinstance(action, Mail)]


def reports(actions: Iterable[Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, Report)]


def say(*commands: str, **settings: Any) -> list[Action]:
    """Return what comes of *commands* that follow an EHLO, each sent when the last is answered."""
    lines = [f"{line}\r\n".encode("utf-8", "surrogateescape") for line in ("EHLO x", *commands)]
    actions = talk(lines, **settings)
    return actions[2:]


def joined(actions: Iterable[Action]) -> tuple[bytes, list[Action]]:
    """Return all replies as one, and what else is to be done: groups depend on what has come."""
    actions = [*actions]
    octets = b"".join(action.octets for action in actions if isinstance(action, Reply))
    return octets, [action for action in actions if not isinstance(action, Reply)]


def at_every_cut(octets: bytes, **settings: Any) -> list[Action]:
    """Return what comes of *octets*, which is the same wherever they are cut."""
    actions = talk([octets], **settings)
    ways = [[octets[:cut], octets[cut:]] for cut in range(1, len(octets))]
    for pieces in [[bytes([octet]) for octet in octets], *ways]:
        assert joined(talk(pieces, **settings)) == joined(actions)
    return actions


@pytest.mark.parametrize(
    ("settings_", "lines"),
    [
        (
            {"max_size": 1000},
            ["SIZE 1000", "8BITMIME", "PIPELINING", "SMTPUTF8", "AUTH PLAIN LOGIN", "HELP"],
        ),
        ({"smtputf8": False, "auth": False}, ["SIZE 0", "8BITMIME", "PIPELINING", "HELP"]),
        (
            {"auth": False, "tls": "starttls"},
            ["SIZE 0", "8BITMIME", "PIPELINING", "SMTPUTF8", "STARTTLS", "HELP"],
        ),
    ],
)
def test_ehlo_shows_what_is_offered(settings_: dict[str, Any], lines: list[str]) -> None:
    greeting, *answer = replies(talk([b"EHLO x\r\n"], ident="ident", **settings_))
    assert greeting == b"220 server.test ident"
    assert [line[4:].decode() for line in answer] == ["server.test", *lines]
    assert {line[:4] for line in answer} == {b"250-", b"250 "}
    assert answer[-1][:4] == b"250 "


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"HELO x\r\nNOOP\r\nNOOP x\r\nRSET\r\nQUIT\r\nNOOP\r\n", [250, 250, 250, 250, 221]),
        (b"HELO\r\nEHLO \r\nVRFY\r\nVRFY a@x\r\nVRFY <\r\n", [501, 501, 501, 252, 252]),
        (b"QUIT now\r\nRSET x\r\nSTARTTLS x\r\nRSET  \r\nQUIT  \r\n", [501, 501, 501, 250, 221]),
        (b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n", [503, 503, 503]),
        (b"HELO x\r\nRCPT TO:<b@x>\r\nDATA\r\nAUTH\r\n", [250, 503, 503, 501]),
        (b"HELO x\nMAIL FROM:<a@x>\nDATA\nMAIL FROM:<c@x>\n", [250, 250, 503, 503]),
        (b"HELO x\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA x\r\n", [250, 250, 250, 501]),
        (b"HELO x\r\nMAIL FROM:<a@x>\r\nHELO x\r\nRCPT TO:<b@x>\r\n", [250, 250, 250, 503]),
        (b"EHLO x\r\nMAIL FROM:<a@x>\r\nRSET\r\nRCPT TO:<b@x>\r\n", [250, 250, 250, 503]),
        (b"X z\r\nNOOP\r\n", [500, 250]),
        (b"x-y z\r\n\xff\r\n\r\n\x1b[2J\r\nEXPN x\r\nNOOP\r\n", [500, 500, 500, 500, 500, 250]),
        (b"GET / HTTP/1.1\r\n" * 5 + b"NOOP\r\n", [500, 500, 500, 500, 502]),
        (b"NOOP\r\nNOO", [250]),
        (b"STARTTLS\r\nAUTH PLAIN\r\n", [454, 503]),
    ],
)
def test_each_command_has_its_reply(octets: bytes, expected: list[int]) -> None:
    actions = at_every_cut(octets)
    assert codes(actions) == [220, *expected]
    assert actions[-1] == Close()
    assert actions.count(Close()) == 1


def test_what_is_not_a_command_is_named() -> None:
    assert replies(say("GET /"))[-1] == b'500 Error: command "GET" not recognized'


def test_help_lists_what_can_be_used() -> None:
    def commands(**settings: Any) -> list[bytes]:
        return replies(say("HELP", **settings))[-1].split()

    always = b"214 Commands: DATA EHLO HELO HELP MAIL NOOP QUIT RCPT RSET VRFY".split()
    assert commands(auth=False) == always
    assert {*commands()} - {*always} == {b"AUTH"}
    assert {*commands(tls="starttls")} - {*always} == {b"AUTH", b"STARTTLS"}


@pytest.mark.parametrize("octets", [1002, 300_000, 3_000_000])
def test_a_command_line_that_is_too_long_is_refused_once(octets: int) -> None:
    line = b"NOOP " + b"x" * (octets - 5) + b"\r\n"
    pieces = [line[begin : begin + 1000] for begin in range(0, len(line), 1000)]
    for way in ([line], pieces):
        assert codes(talk([*way, b"NOOP\r\n"])) == [220, 500, 250]
    assert codes(talk([b"NOOP " + b"x" * 996 + b"\r\n"])) == [220, 250]


def test_of_a_line_that_does_not_end_the_beginning_is_kept() -> None:
    conversation = Conversation(offer())
    for _ in range(100):
        conversation.receive(b"x" * 10_000)
        assert [*pull(conversation)][1:] == []
        assert conversation.unread <= 12_289


def test_without_smtputf8_a_command_beyond_ascii_is_refused_and_the_session_goes_on() -> None:
    commands = ("MAIL FROM:<é@x>", "MAIL FROM:<a@x>", "RCPT TO:<é@x>", "RCPT TO:<b@x>")
    assert codes(say(*commands, smtputf8=False)) == [500, 250, 500, 250]


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


def stuffed(content: bytes) -> bytes:
    """Return *content* as a client sends it after DATA (RFC 5321, section 4.5.2)."""
    lines = content.split(b"\r\n")
    return b"\r\n".join(b"." * line.startswith(b".") + line for line in lines) + b".\r\n"


@pytest.mark.parametrize("content", CONTENTS)
def test_the_content_is_the_same_wherever_it_is_cut(content: bytes) -> None:
    actions = at_every_cut(b"HELO x\r\n" + BEGIN + stuffed(content) + b"NOOP\r\n")
    assert contents(actions) == [content]
    assert codes(actions) == [220, 250, 250, 250, 354, 250, 250]


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
    assert contents(talk([b"HELO x\r\n", *pieces, octets])) == [content]


def test_a_buffer_may_be_used_again_as_soon_as_it_is_received() -> None:
    conversation = Conversation(offer())
    actions, buffer = [*pull(conversation)], bytearray(16)
    octets = b"HELO x\r\n" + (BEGIN + stuffed(b".a\r\n" * 20)) * 3 + b"NOOP\r\n"
    for begin in range(0, len(octets), 11):
        piece = octets[begin : begin + 11]
        buffer[: len(piece)] = piece
        conversation.receive(buffer, len(piece))
        buffer[:] = b"\r\n.\r\nQUIT\r\n" + b"!" * 4
        actions += pull(conversation)
    assert contents(actions) == [b".a\r\n" * 20] * 3
    assert codes(actions) == [220, 250, *[250, 250, 354, 250] * 3, 250]


def test_each_octet_of_a_mail_is_copied_once() -> None:
    conversation = Conversation(offer())
    conversation.receive(b"HELO x\r\n" + BEGIN)
    assert codes(pull(conversation)) == [220, 250, 250, 250, 354]
    buffer = bytearray((b"x" * 62 + b"\r\n") * 1024)
    tracemalloc.start()
    try:
        for _ in range(256):
            conversation.receive(buffer, len(buffer))
        conversation.receive(b".\r\n")
        mail = conversation.next_action()
        assert isinstance(mail, Mail)
        # The buffer grows by an eighth at a time.
        assert tracemalloc.get_traced_memory()[1] < len(mail.content) * 1.2
    finally:
        tracemalloc.stop()
    assert mail.content == bytes(buffer) * 256


@pytest.mark.parametrize("line", [b"x" * 6 + b"\r\n", b".\r\n", b"..\r\n", b"\r\n"])
def test_the_limit_counts_the_mail_without_the_stuffing(line: bytes) -> None:
    for lines in (1, 7, 1000):
        content = line * lines
        octets = stuffed(content) + b"NOOP\r\n"
        for limit, code in ((len(content), 250), (len(content) - 1, 552)):
            actions = talk([b"HELO x\r\n", BEGIN, octets[:5], octets[5:]], max_size=limit)
            assert codes(actions)[-3:] == [354, code, 250]
            assert contents(actions) == [content] * (code == 250)


def test_what_is_over_the_limit_takes_no_memory_and_the_next_mail_is_accepted() -> None:
    conversation = Conversation(offer(max_size=1_000_000))
    conversation.receive(b"HELO x\r\n" + BEGIN)
    assert codes(pull(conversation)) == [220, 250, 250, 250, 354]
    tracemalloc.start()
    try:
        for _ in range(100):
            conversation.receive(b"x" * 100_000)
            assert conversation.next_action() is None
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    conversation.receive(b"\r\n.\r\n" + BEGIN + b"hi\r\n.\r\n")
    actions = [*pull(conversation)]
    assert codes(actions) == [552, 250, 250, 354, 250]
    assert contents(actions) == [b"hi\r\n"]


def test_a_size_over_the_limit_is_refused_before_the_mail() -> None:
    limit = {"max_size": 100}
    assert codes(say("MAIL FROM:<a@x> SIZE=101", "MAIL FROM:<a@x> size=100", **limit)) == [552, 250]
    assert codes(say(f"MAIL FROM:<a@x> SIZE={'9' * 20}", **limit)) == [552]
    assert codes(say(f"MAIL FROM:<a@x> SIZE={'9' * 20}")) == [250]


@pytest.mark.parametrize(
    "path",
    [
        "<@relay.example.org:a@example.com>",
        "<postmaster>",
        '<"a, <b>"@example.com>',
        "<=?utf-8?q?boss?=@example.com>",
        "<>",
    ],
)
def test_an_address_is_accepted_as_it_was_sent(path: str) -> None:
    parameters = "SIZE=1000 BODY=8BITMIME SMTPUTF8 AUTH=<> body=7bit"
    actions = say(f"MAIL FROM:{path} {parameters}", f"RCPT TO:{path}", "DATA", ".")
    (mail,) = (action for action in actions if isinstance(action, Mail))
    addresses = [mail.reverse_path.address, *(each.address for each in mail.forward_paths)]
    assert addresses == [path[1:-1] or "<>"] * 2
    assert mail.reverse_path.options == ["SIZE=1000", "BODY=7bit", "SMTPUTF8", "AUTH=<>"]
    assert reports(actions) == []


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
def test_what_other_servers_may_refuse_is_accepted_and_reported_once_per_mail(
    path: str, address: str, faults: str
) -> None:
    mail = f"MAIL FROM:{path}\r\nRCPT TO:{path}\r\nRCPT TO:{path}\r\nDATA\r\n.\r\n".encode()
    actions = talk([b"EHLO x\r\n" + mail + mail])
    assert codes(actions)[-10:] == [250, 250, 250, 354, 250] * 2
    for action in actions:
        if isinstance(action, Mail):
            paths = (action.reverse_path, *action.forward_paths)
            assert [each.address for each in paths] == [address] * 3
    assert reports(actions) == [f"Other servers may refuse this: {faults} in MAIL FROM:{path}"] * 2


def refuse(faults: str, command: str) -> str:
    return f"Other servers may refuse this: {faults} in {command}"


def test_parameters_that_are_not_offered_are_accepted_and_reported() -> None:
    rcpt = "RCPT TO:<b@x> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@x"
    mail = "MAIL FROM:<a@x> SIZE=9 RET=HDRS ENVID=Qq314 X-VENDOR"
    last = "RCPT TO:<c@x> NOTIFY=NEVER X=1"
    actions = say(mail, rcpt, rcpt, last, "DATA", ".")
    assert codes(actions) == [250, 250, 250, 250, 354, 250]
    expected = [("RET, ENVID, X-VENDOR", mail), ("NOTIFY, ORCPT", rcpt), ("X", last)]
    assert reports(actions) == [refuse(*each) for each in expected]
    (message,) = (action for action in actions if isinstance(action, Mail))
    options = [path.options for path in message.forward_paths]
    notify = ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;b@x"]
    assert options == [notify, notify, ["NOTIFY=NEVER", "X=1"]]


@pytest.mark.parametrize(
    ("parameter", "settings_"),
    [
        ("SMTPUTF8", {"smtputf8": False}),
        ("AUTH=<>", {"auth": False}),
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
def test_a_parameter_that_is_not_offered_in_this_form_is_accepted_and_reported(
    parameter: str, settings_: dict[str, Any]
) -> None:
    command = f"MAIL FROM:<a@x> {parameter}"
    actions = say(command, **settings_)
    assert codes(actions) == [250]
    assert reports(actions) == [refuse(parameter.partition("=")[0] or "=", command)]


def test_smtputf8_holds_for_the_whole_envelope() -> None:
    assert reports(say("MAIL FROM:<é@x> SMTPUTF8", "RCPT TO:<é@x>", "RSET")) == []
    commands = ("MAIL FROM:<a@x> SMTPUTF8", "RSET", "MAIL FROM:<a@x>", "RCPT TO:<é@x>")
    fault = "an address beyond ASCII without SMTPUTF8"
    assert reports(say(*commands)) == [refuse(fault, "RCPT TO:<é@x>")]


def test_a_recipient_has_none_of_the_parameters_of_mail_and_helo_offers_none() -> None:
    rcpt = say("MAIL FROM:<a@x>", "RCPT TO:<b@x> SIZE=1")
    assert reports(rcpt) == [refuse("SIZE", "RCPT TO:<b@x> SIZE=1")]
    helo = say("HELO x", "MAIL FROM:<a@x> SIZE=1")
    assert reports(helo) == [refuse("SIZE", "MAIL FROM:<a@x> SIZE=1")]


@pytest.mark.parametrize(
    "command", ["MAIL", "MAIL FROM", "MAIL FROM:", "MAIL TO:<a@x>", "MAIL <a@x>"]
)
def test_a_command_without_a_path_is_refused(command: str) -> None:
    assert replies(say(command)) == [b"501 Syntax: MAIL FROM:<address>"]
    rcpt = command.replace("TO", "F").replace("FROM", "TO").replace("MAIL", "RCPT")
    assert replies(say("MAIL FROM:<a@x>", rcpt))[1:] == [b"501 Syntax: RCPT TO:<address>"]


def test_the_10001st_recipient_is_refused_and_the_others_get_the_mail() -> None:
    recipients = b"RCPT TO:<" + b"b" * 84 + b"@example.com>\r\n"
    octets = b"EHLO x\r\nMAIL FROM:<a@x>\r\n" + recipients * 10_001 + b"DATA\r\n.\r\n" + BEGIN
    actions = talk([octets])
    assert codes(actions)[-10_007:] == [250, *[250] * 10_000, 452, 354, 250, 250, 250, 354]
    (mail,) = (action for action in actions if isinstance(action, Mail))
    assert len(mail.forward_paths) == 10_000


@pytest.mark.parametrize("parameter", ["", f" X={'é' * 200}"])
def test_an_envelope_has_at_most_a_mebibyte_of_recipients(parameter: str) -> None:
    recipient = f"RCPT TO:<{'é' * (480 - len(parameter))}>{parameter}"
    size = len(recipient.encode()) - len("RCPT ")
    octets = b"EHLO x\r\nMAIL FROM:<a@x>\r\n" + f"{recipient}\r\n".encode() * 2000
    found = codes(talk([octets + b"RSET\r\n" + BEGIN]))
    assert found.count(452) == 2000 - 1024 * 1024 // size
    assert found[-4:] == [250, 250, 250, 354]


def test_a_group_of_commands_is_answered_in_order_whatever_fails_in_it() -> None:
    group = b"MAIL FROM:<a@x>\r\nRCPT TO:\r\nMAIL FROM:<c@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"
    octets = b"EHLO x\r\n" + group + b"Hi\r\n.\r\nRSET\r\n" + group + b".\r\nQUIT\r\n"
    actions = at_every_cut(octets)
    data = [250, 501, 503, 250, 354]
    assert codes(actions)[-14:] == [*data, 250, 250, *data, 250, 221]
    assert contents(actions) == [b"Hi\r\n", b""]
    without = b"EHLO x\r\nMAIL FROM:<a@x>\r\nRCPT TO:\r\nDATA\r\nRSET\r\n"
    assert codes(at_every_cut(without))[-4:] == [250, 501, 503, 250]


def groups(octets: bytes) -> list[bytes]:
    """Return the replies to *octets* that are sent at once."""
    actions = talk([b"EHLO x\r\n", octets])
    return [action.octets for action in actions if isinstance(action, Reply)][2:]


def test_the_replies_to_a_group_come_together() -> None:
    ok = b"250 OK\r\n"
    octets = b"MAIL FROM:<a@x>\r\nrcpt TO:<b@x>\r\nRSET\r\nNOOP\r\n" + b"rset\r\n" * 7 + b"RS"
    # NOOP is answered at once (RFC 2920, section 3.2).
    assert groups(octets) == [ok * 4, ok * 7]
    refused = b'500 Error: command "RSETX" not recognized\r\n'
    assert groups(b"RSETX\r\n" + b"RSET\r\n" * 7 + b"RS") == [refused, ok * 7]
    assert groups(b"RSET\r\nRSET\r\nQUIT\r\n") == [ok * 2 + b"221 Bye\r\n"]


def test_the_replies_to_a_long_group_come_in_parts() -> None:
    sizes = [len(group) for group in groups(b"RSET\r\n" * 2000)]
    assert sum(sizes) == 2000 * 8
    assert all(4096 <= size < 4200 for size in sizes[:-1])


@pytest.mark.parametrize("command", [b"MAILX", b"RSETS a"])
def test_the_replies_to_a_group_come_whatever_ends_it(command: bytes) -> None:
    octets = b"EHLO x\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\n" + (command + b"\r\n") * 5
    assert codes(talk([octets + b"NOOP\r\n"]))[-7:] == [250, 250, *[500] * 4, 502]


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


PLAIN = b64("\0app@example.com\0secret")
USER, PASSWORD = b64("app@example.com"), b64("secret")


@pytest.mark.parametrize(
    ("commands", "challenges"),
    [
        ([f"AUTH PLAIN {PLAIN}"], []),
        (["AUTH PLAIN", PLAIN], [b"334 "]),
        ([f"auth plain  {PLAIN} "], []),
        (["AUTH LOGIN", USER, PASSWORD], [b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6"]),
        ([f"AUTH login {USER}", PASSWORD], [b"334 UGFzc3dvcmQ6"]),
        (["Auth Login", USER, "="], [b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6"]),
    ],
)
def test_any_credentials_are_accepted_and_only_the_name_comes_out(
    commands: list[str], challenges: list[bytes]
) -> None:
    octets = "".join(f"{command}\r\n" for command in ("EHLO x", *commands, "NOOP")).encode()
    actions = at_every_cut(octets)
    assert replies(actions)[-len(challenges) - 2 : -1] == [
        *challenges,
        b"235 2.7.0 Authentication successful",
    ]
    assert Login("app@example.com", commands[0].split()[1].upper()) in actions
    for secret in ("secret", PASSWORD, PLAIN):
        assert secret not in repr(actions)


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
def test_after_an_exchange_that_fails_the_session_goes_on(commands: list[str], code: bytes) -> None:
    actions = say(*commands, f"AUTH PLAIN {PLAIN}")
    assert (replies(actions)[-2][: len(code)], codes(actions)[-1]) == (code, 235)
    assert "secret" not in repr(actions)
    assert PASSWORD not in repr(actions)


def test_a_response_may_be_as_long_as_rfc_4954_says() -> None:
    name = "n" * 9000
    response = b64(f"\0{name}\0{'s' * 214}")
    assert len(response) == 12_288
    assert Login(name, "PLAIN") in say(f"auth plain {response}")
    assert codes(say("AUTH PLAIN", response)) == [334, 235]


def test_auth_comes_once_and_before_a_mail() -> None:
    login = f"AUTH PLAIN {PLAIN}"
    assert codes(talk([f"{login}\r\n".encode()])) == [220, 503]
    assert codes(say("MAIL FROM:<a@x>", login, "RSET", login, login)) == [250, 503, 250, 235, 503]
    assert codes(say("HELO x", login)) == [250, 235]
    assert codes(say(login, "NOOP", auth=False)) == [502, 250]
    anonymous = "AUTH PLAIN " + b64("\0\0")
    assert codes(say(anonymous, login)) == [235, 503]


def test_what_was_said_in_clear_is_forgotten() -> None:
    conversation = Conversation(offer(tls="starttls"))
    conversation.receive(f"EHLO x\r\nAUTH PLAIN {PLAIN}\r\nMAIL FROM:<a@x>\r\n".encode())
    assert codes(pull(conversation)) == [220, 250, 235, 250]
    conversation.receive(b"STARTTLS\r\n")
    assert [*pull(conversation)] == [Reply(b"220 Ready to start TLS\r\n"), BeginTLS()]
    assert conversation.next_action() is None
    conversation.tls_begun()
    assert [*pull(conversation)] == []
    assert (conversation.host_name, conversation.extended, conversation.user) == ("", False, None)
    conversation.receive(b"RCPT TO:<b@x>\r\nMAIL FROM:<a@x>\r\nSTARTTLS\r\nEHLO x\r\n")
    actions = [*pull(conversation)]
    assert codes(actions) == [503, 503, 503, 250]
    assert b"STARTTLS" not in b"".join(replies(actions))
    conversation.receive(f"AUTH PLAIN {PLAIN}\r\n".encode())
    assert codes(pull(conversation)) == [235]


def test_what_is_injected_after_starttls_is_dropped() -> None:
    conversation = Conversation(offer(tls="starttls"))
    conversation.receive(b"EHLO x\r\nSTARTTLS\r\nMAIL FROM:<evil@x>\r\n")
    actions = [*pull(conversation)]
    dropped = "What was sent after STARTTLS, without waiting for the reply, is dropped"
    assert reports(actions) == [dropped]
    assert actions[-1] == BeginTLS()
    conversation.tls_begun()
    assert conversation.next_action() is None
    assert conversation.unread == 0


def test_implicit_tls_comes_before_the_greeting() -> None:
    conversation = Conversation(offer(tls="implicit"))
    assert [*pull(conversation)] == [BeginTLS()]
    conversation.tls_begun()
    conversation.receive(b"STARTTLS\r\n")
    assert codes(pull(conversation)) == [220, 503]


@pytest.mark.parametrize("octets", [b"", b"N"])
@pytest.mark.parametrize("is_lost", [True, False])
def test_a_client_that_leaves_after_the_handshake_without_a_word_is_reported(
    octets: bytes,
    is_lost: bool,  # noqa: FBT001  # a parameter of the test
) -> None:
    conversation = Conversation(offer(tls="implicit"))
    conversation.tls_begun()
    assert codes(pull(conversation)) == [220]
    if octets:
        conversation.receive(octets)
    if is_lost:
        conversation.lost()
    else:
        conversation.receive_eof()
    text = "The client left after the TLS handshake without a word; perhaps it does not trust"
    assert reports(pull(conversation)) == [f"{text} the certificate"] * (not octets)


def mail_out() -> Conversation:
    """Return a conversation whose mail is out for delivery."""
    conversation = Conversation(offer())
    conversation.receive(b"HELO x\r\n" + BEGIN + b"hi\r\n.\r\nNOOP\r\n" + BEGIN)
    actions = []
    while action := conversation.next_action():
        actions.append(action)
    assert contents(actions) == [b"hi\r\n"]
    return conversation


def test_while_a_mail_is_out_nothing_is_carried_out() -> None:
    conversation = mail_out()
    before = conversation.unread
    conversation.receive(b"hi\r\n")
    assert conversation.next_action() is None
    assert conversation.unread == before + 4
    conversation.delivered("451 4.3.0 Not now")
    assert codes(pull(conversation)) == [451, 250, 250, 250, 354]
    assert conversation.unread == 0


def test_a_421_to_a_mail_ends_the_session() -> None:
    conversation = mail_out()
    conversation.delivered("421 4.3.0 \udcff")
    assert [*pull(conversation)] == [Reply(b"421 4.3.0 \\udcff\r\n"), Close()]
    conversation.receive(b"NOOP\r\n")
    assert [*pull(conversation)] == []
    assert conversation.unread == 0


def test_after_the_end_of_file_whole_lines_are_carried_out() -> None:
    conversation = mail_out()
    conversation.receive_eof()
    assert conversation.next_action() is None
    conversation.delivered("250 OK")
    actions = [*pull(conversation)]
    assert codes(actions) == [250, 250, 250, 250, 354]
    assert actions[-1] == Close()
    assert contents(actions) == []


def test_a_session_that_is_lost_keeps_nothing_and_does_nothing() -> None:
    conversation = mail_out()
    conversation.lost()
    conversation.delivered("250 OK")
    assert conversation.next_action() is None
    assert conversation.unread == 0
    conversation.receive(b"NOOP\r\n")
    assert conversation.next_action() is None
    assert conversation.unread == 0


class Dialogue(RuleBasedStateMachine):
    """A conversation beside a model of it: what a server must know to reply."""

    def __init__(self) -> None:
        super().__init__()
        self.conversation = Conversation(offer(max_size=50))
        self.greeted = self.over = False
        self.user = False
        self.sender: str | None = None
        self.recipients: list[str] = []
        self.expected: list[int] = []
        self.found: list[int] = []
        self.mails: list[tuple[str | None, list[str], bytes]] = []
        self.arrived: list[tuple[str | None, list[str], bytes]] = []

    def send(self, octets: bytes, cut: int, *expected: int) -> None:
        for piece in (octets[:cut], octets[cut:]):
            self.conversation.receive(piece)
            for action in pull(self.conversation):
                self.found += codes([action])
                if isinstance(action, Mail):
                    paths = [path.address for path in action.forward_paths]
                    self.arrived.append((action.reverse_path.address, paths, action.content))
        self.expected += expected

    @initialize()
    def greet(self) -> None:
        self.send(b"", 0, 220)

    @rule(verb=st.sampled_from(["HELO", "EHLO"]), cut=st.integers(0, 8))
    def hello(self, verb: str, cut: int) -> None:
        self.greeted, self.sender, self.recipients = True, None, []
        self.send(f"{verb} x\r\n".encode(), cut, 250)

    @rule(name=st.sampled_from("abc"), cut=st.integers(0, 20))
    def mail(self, name: str, cut: int) -> None:
        is_first = self.greeted and self.sender is None
        if is_first:
            self.sender = name
        self.send(f"MAIL FROM:<{name}>\r\n".encode(), cut, 250 if is_first else 503)

    @rule(name=st.sampled_from("abc"), cut=st.integers(0, 20))
    def rcpt(self, name: str, cut: int) -> None:
        if self.sender is not None:
            self.recipients.append(name)
        self.send(f"RCPT TO:<{name}>\r\n".encode(), cut, 503 if self.sender is None else 250)

    @rule(cut=st.integers(0, 6))
    def rset(self, cut: int) -> None:
        self.sender, self.recipients = None, []
        self.send(b"RSET\r\n", cut, 250)

    @rule(cut=st.integers(0, 30))
    def auth(self, cut: int) -> None:
        may = self.greeted and not self.user and self.sender is None
        self.user = self.user or may
        self.send(f"AUTH PLAIN {PLAIN}\r\n".encode(), cut, 235 if may else 503)

    @precondition(lambda self: not self.recipients)
    @rule(cut=st.integers(0, 6))
    def data_out_of_order(self, cut: int) -> None:
        self.send(b"DATA\r\n", cut, 503)

    @precondition(lambda self: self.recipients)
    @rule(
        content=st.lists(st.sampled_from([b"a", b".", b"\r", b"\n", b"\r\n"]), max_size=60),
        cut=st.integers(0, 80),
    )
    def data(self, content: list[bytes], cut: int) -> None:
        octets = b"".join(content) + b"\r\n"
        fits = len(octets) <= 50
        if fits:
            self.mails.append((self.sender, self.recipients, octets))
        self.sender, self.recipients = None, []
        self.send(b"DATA\r\n" + stuffed(octets), cut, 354, 250 if fits else 552)

    @invariant()
    def they_agree(self) -> None:
        assert self.found == self.expected
        assert self.arrived == self.mails
        assert (self.conversation.user is not None) is self.user


TestDialogue = Dialogue.TestCase
TestDialogue.settings = settings(
    deadline=None, derandomize=True, database=None, max_examples=60, stateful_step_count=30
)
