from __future__ import annotations

import tracemalloc
from base64 import b64decode, b64encode
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dsmtpd.conversation import (
    Control,
    Conversation,
    Delay,
    Failure,
    Heard,
    Mail,
    Offer,
    Reply,
    Report,
    Stage,
)
from dsmtpd.path import Path

OFFER = Offer(hostname="mx.example.org")
PLAINER = Offer(hostname="mx.example.org", max_size=1000, smtputf8=False, auth=False)
STARTTLS = Offer(hostname="mx.example.org", tls="starttls")
IMPLICIT = Offer(hostname="mx.example.org", tls="implicit")
GREETING = Reply(b"220 mx.example.org dsmtpd\r\n")

EHLO = b"EHLO client\r\n"
BEGIN = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"
MAIL, RCPT = "MAIL FROM:<a@x>", "RCPT TO:<b@x>"
GROUP = [250, 250, 354]


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


PLAIN = b64("\0app@example.com\0secret")
USER, PASSWORD = b64("app@example.com"), b64("secret")
LOGIN = f"AUTH PLAIN {PLAIN}"
SUCCESS = "235 2.7.0 Authentication successful"


def login(user: str, mechanism: str = "PLAIN") -> Report:
    return Report(f"{user} logged in with AUTH {mechanism}", warns=False)


class Outcome(NamedTuple):
    """What a conversation asks its caller to do after the greeting."""

    octets: bytes  # of all replies
    others: list[object]
    refusals: tuple[str, ...] = ()  # as reported

    @property
    def lines(self) -> list[str]:
        """The last line of each reply."""
        lines = self.octets.decode().removesuffix("\r\n").split("\r\n")
        return [line for line in lines if line[3:4] == " "]

    @property
    def codes(self) -> list[int]:
        """The code of each reply."""
        return [int(line[:3]) for line in self.lines]

    @property
    def mails(self) -> list[Mail]:
        return [action for action in self.others if isinstance(action, Mail)]

    @property
    def contents(self) -> list[bytes]:
        """The contents of the mails."""
        return [mail.content for mail in self.mails]

    @property
    def reports(self) -> list[str]:
        """The texts of the reports."""
        return [action.text for action in self.others if isinstance(action, Report)]


def pull(conversation: Conversation) -> list[object]:
    """Return all pending actions; deliver every mail at once."""
    actions: list[object] = []
    while (action := conversation.next_action()) is not None:
        actions.append(action)
        if isinstance(action, Mail):
            conversation.delivered("250 OK")
    return actions


def begin(offer: Offer = OFFER, *pieces: bytes) -> Conversation:
    """Return a conversation that has sent its greeting and answered *pieces*."""
    conversation = Conversation(offer)
    assert conversation.next_action() == GREETING
    for piece in pieces:
        conversation.receive(piece)
        pull(conversation)
    return conversation


def outcome(actions: list[object]) -> Outcome:
    replies = [action for action in actions if isinstance(action, Reply)]
    refusals = [a for a in actions if isinstance(a, Report) and " was refused: " in a.text]
    others = [action for action in actions if action not in (*replies, *refusals)]
    octets = b"".join(reply.octets for reply in replies)
    return Outcome(octets, others, tuple(report.text for report in refusals))


def converse(*pieces: bytes, offer: Offer = OFFER, eof: bool = False) -> Outcome:
    """Return the outcome of *pieces*, with all actions pulled after each."""
    conversation, actions = begin(offer), []
    for piece in pieces:
        conversation.receive(piece)
        actions += pull(conversation)
    if eof:
        conversation.receive_eof()
        actions += pull(conversation)
    return outcome(actions)


def say(octets: bytes | str, *, offer: Offer = OFFER, eof: bool = False) -> Outcome:
    """Return the outcome of *octets*; check that it is the same wherever they are split."""
    if isinstance(octets, str):
        octets = octets.encode("utf-8", "surrogateescape")
    whole = converse(octets, offer=offer, eof=eof)
    single = [octets[i : i + 1] for i in range(len(octets))]
    assert lasting(converse(*single, offer=offer, eof=eof)) == lasting(whole)
    # In a very long line, neighbouring places behave alike: about 200 are enough.
    for cut in range(0, len(octets), 1 + len(octets) // 200):
        pieces = octets[:cut], octets[cut:]
        assert lasting(converse(*pieces, offer=offer, eof=eof)) == lasting(whole)
    return whole


def lasting(whole: Outcome) -> Outcome:
    """Return *whole* without LF_ALONE, whose report depends on where the octets are split."""
    return whole._replace(others=[a for a in whole.others if a != Report(LF_ALONE)])


def ask(*commands: str, offer: Offer = OFFER) -> Outcome:
    """Return the outcome of *commands* after an EHLO, without the reply to the EHLO."""
    whole = say("".join(f"{command}\r\n" for command in ("EHLO x", *commands)), offer=offer)
    return whole._replace(octets=whole.octets.partition(b"\r\n250 HELP\r\n")[2])


LF_ALONE = (
    "The client ends lines with LF alone, without CR, which does not end its mail from a@x for b@x"
)
OFFERED = "AUTH PLAIN LOGIN OAUTHBEARER XOAUTH2"


def test_a_session_begins_with_the_greeting() -> None:
    conversation = Conversation(Offer(hostname="h", ident="it is me"))
    assert pull(conversation) == [Reply(b"220 h it is me\r\n")]
    assert (conversation.host_name, conversation.extended, conversation.user) == ("", None, None)


@pytest.mark.parametrize(
    ("offer", "size", "extensions"),
    [
        (OFFER, 0, ["SMTPUTF8", OFFERED]),
        (PLAINER, 1000, []),
        (STARTTLS, 0, ["SMTPUTF8", "STARTTLS", OFFERED]),
    ],
)
def test_ehlo_and_help_list_what_the_server_offers(
    offer: Offer, size: int, extensions: list[str]
) -> None:
    lines = ["mx.example.org", f"SIZE {size}", "8BITMIME", "PIPELINING", *extensions]
    verbs = ["DATA", "EHLO", "HELO", "HELP", "MAIL", "NOOP", "QUIT", "RCPT", "RSET", "VRFY"]
    verbs += {line.split()[0] for line in extensions} - {"SMTPUTF8"}
    replies = [*(f"250-{line}" for line in lines), "250 HELP"]
    replies += [f"214 Commands: {' '.join(sorted(verbs))}"] * 2
    whole = say("EHLO x\r\nHELP\r\nhelp MAIL\r\n", offer=offer)
    assert whole.octets.decode().splitlines() == replies


@pytest.mark.parametrize(
    ("reply", "commands"),
    [
        ("250 OK", ["NOOP", "nOOp é \udcff", "NOOP\r\r", "RSET  "]),
        ("250 mx.example.org", ["HELO y"]),
        ("252 Cannot VRFY user, but will accept mail for it", ["VRFY <"]),
        ("502 5.5.1 STARTTLS is not offered", ["STARTTLS"]),
        ("500 5.5.2 Error: command not recognized", ["X", "x y", "x" * 990]),
        ("500 Error: bad syntax", ["", "x-y z", "NOOP\tx", " NOOP", "\udcff", "é", "\x1b[2J"]),
        ("501 Syntax: DATA", ["DATA x"]),
        ("501 Syntax: MAIL FROM:<address>", ["MAIL", "MAIL FROM:", "MAIL TO:<a@x>", "MAIL <a@x>"]),
        ("501 Syntax: QUIT", ["QUIT now"]),
        ("501 Syntax: RSET", ["RSET x"]),
        ("501 Syntax: STARTTLS", ["STARTTLS x"]),
        ("501 Syntax: VRFY <address>", ["VRFY"]),
        ("501 5.5.4 Syntax: AUTH mechanism [initial-response]", ["AUTH", "AUTH PLAIN x y"]),
        ("503 Error: need MAIL command", [RCPT, "RCPT"]),
        ("503 Error: need RCPT command", ["DATA"]),
        ("504 5.5.4 Unrecognized authentication mechanism", ["AUTH GSSAPI"]),
    ],
)
def test_after_any_reply_to_a_command_the_session_goes_on(reply: str, commands: list[str]) -> None:
    assert ask(*commands, "NOOP").lines == [*[reply] * len(commands), "250 OK"]


@pytest.mark.parametrize(
    ("commands", "codes"),
    [
        ([MAIL, MAIL, RCPT, RCPT], [250, 503, 250, 250]),
        ([MAIL, "RCPT", "RCPT TO:", "RCPT TO:<b@x>"], [250, 501, 501, 250]),
        ([MAIL, "DATA", RCPT, "DATA", ".", RCPT, "DATA"], [250, 503, *GROUP[1:], 250, 503, 503]),
        ([MAIL, RCPT, "DATA x", "DATA", "."], [250, 250, 501, 354, 250]),
        ([MAIL, "RSET", RCPT, "DATA"], [250, 250, 503, 503]),
        ([MAIL, "EHLO y", RCPT], [250, 250, 503]),
        ([MAIL, "HELO y", RCPT], [250, 250, 503]),
        ([MAIL, RCPT, "RSET", MAIL, "DATA"], [250, 250, 250, 250, 503]),
        ([LOGIN, LOGIN], [235, 503]),
        ([f"AUTH PLAIN {b64(chr(0) * 2)}", LOGIN], [235, 503]),
        ([MAIL, LOGIN, "RSET", LOGIN], [250, 503, 250, 235]),
        (["HELO x", LOGIN, "EHLO x", LOGIN], [250, 235, 250, 503]),
        ([LOGIN, MAIL, RCPT, "DATA", ".", LOGIN], [235, *GROUP, 250, 503]),
    ],
)
def test_commands_out_of_order_are_refused(commands: list[str], codes: list[int]) -> None:
    assert ask(*commands).codes == codes


def test_before_helo_a_client_cannot_log_in_or_send() -> None:
    assert say(f"{MAIL}\r\n{RCPT}\r\nDATA\r\nAUTH PLAIN\r\n").lines == [
        "503 Error: send HELO first",
        "503 Error: need MAIL command",
        "503 Error: need RCPT command",
        "503 Error: send EHLO first",
    ]


def test_the_last_helo_or_ehlo_sets_the_host_name() -> None:
    conversation = begin(OFFER, b"EHLO [192.0.2.1]\r\n")
    assert (conversation.host_name, conversation.extended) == ("[192.0.2.1]", True)
    conversation.receive(b"HELO  caf\xe9 \r\n")
    assert outcome(pull(conversation)).lines == ["250 mx.example.org"]
    assert (conversation.host_name, conversation.extended) == ("caf\udce9", False)


def test_a_lone_surrogate_in_a_reply_is_escaped() -> None:
    conversation = begin(OFFER, EHLO + BEGIN)
    conversation.receive(b".\r\n")
    assert isinstance(conversation.next_action(), Mail)
    conversation.delivered("250 OK \udcff é")
    assert pull(conversation) == [Reply("250 OK \\udcff é\r\n".encode())]


def test_quit_closes_the_session_and_drops_what_follows() -> None:
    assert say("QUIT\r\nNOOP\r\n") == Outcome(b"221 Bye\r\n", [Control.CLOSE])
    assert say("quit  \nNOOP\r\n") == Outcome(b"221 Bye\r\n", [Control.CLOSE])


def test_the_fifth_unknown_command_closes_the_session() -> None:
    whole = say("X\r\n\r\nNOOP\r\n" + "Host: x\r\nX\r\n" * 4 + "NOOP\r\n")
    assert whole.codes == [500, 500, 250, 500, 500, 500, 500, 500, 500, 500, 421]
    assert whole.lines[-1] == "421 4.7.0 Too many unrecognized commands"
    assert whole.others == [Control.CLOSE]


def test_each_mail_resets_the_count_of_unknown_commands() -> None:
    mail = [MAIL, RCPT, "DATA", "."]
    whole = ask(*["XCLIENT x", "XCLIENT y", *mail] * 5)
    assert whole.codes == [500, 500, *GROUP, 250] * 5


@pytest.mark.parametrize("command", ["MAIL FROM:<é@x>", "RCPT TO:<é@x>", "NOOP \udcff", "EHLO é"])
def test_without_smtputf8_only_ascii_is_accepted(command: str) -> None:
    whole = ask(MAIL, command, RCPT, offer=PLAINER)
    assert whole.lines == ["250 OK", "500 Error: strict ASCII mode", "250 OK"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_command_line_may_have_12288_octets(line_end: str) -> None:
    lines = ["NOOP " + "x" * 12_283, "NOOP " + "x" * 12_284, "x" * 20_000, MAIL]
    whole = say(EHLO.decode() + "".join(line + line_end for line in lines))
    refused = "500 5.5.6 The line is too long"
    assert whole.lines[1:] == ["250 OK", refused, refused, "250 OK"]
    assert say("é" * 6145 + line_end).lines == [refused]


def test_a_command_over_512_octets_is_accepted_and_reported() -> None:
    command = "MAIL FROM:<a@x> SIZE=" + "9" * 20 + " SMTPUTF8"
    for octets in (510, 511, 1028):
        whole = ask(f"NOOP {'x' * (octets - 5)}", command)
        assert whole.codes == [250, 250]
        text = f"Other servers may refuse this: a line of {octets + 2:,} octets"
        assert whole.reports == [text] * (octets > 510)


def test_a_line_of_3_megabytes_is_refused_once_and_uses_no_memory() -> None:
    conversation, piece = begin(), b"x" * 10_000
    tracemalloc.start()
    try:
        for _ in range(300):
            conversation.receive(piece)
            assert conversation.next_action() is None
            assert conversation.unread < 20_000
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    conversation.receive(b"x\r\nNOOP\r\n")
    assert outcome(pull(conversation)).lines == ["500 5.5.6 The line is too long", "250 OK"]


@pytest.mark.parametrize(
    "path",
    ["<@relay.example.org:a@example.com>", '<"a, <b>"@x>', "<用户@x>"],
)
def test_an_envelope_is_delivered_as_it_was_sent(path: str) -> None:
    parameters = {"SIZE": "9" * 20, "BODY": "7bit", "SMTPUTF8": "", "AUTH": "<>"}
    words = " ".join(f"{keyword}={value}" for keyword, value in parameters.items())
    commands = [f"mail from:{path} {words.lower()}", f"Rcpt to:{path}"]
    address = path[1:-1] or "<>"
    paths = (Path(address, {}, []), Path("b@x", {}, []))
    mail = Mail(Path(address, parameters, []), paths, b"Hi\r\n")
    assert ask(*commands, RCPT, "DATA", "Hi", ".").others == [mail]


LONG = f"{'l' * 150}@{'d' * 50}.{'d' * 50}.{'d' * 47}"


@pytest.mark.parametrize(
    ("path", "faults"),
    [
        ("a@x", "missing angle brackets"),
        (" <a@x>", "a space after the colon"),
        ("<a@>", "a malformed address"),
        (f"<{LONG}>", "a local part of more than 64 octets, a path of more than 256 octets"),
        ("<é@x>", "an address beyond ASCII without SMTPUTF8"),
        ("é@x", "missing angle brackets, an address beyond ASCII without SMTPUTF8"),
    ],
)
def test_a_path_that_others_may_refuse_is_accepted_and_reported(path: str, faults: str) -> None:
    commands = [f"MAIL FROM:{path}", f"RCPT TO:{path}", f"RCPT TO:{path}"]
    whole = ask(*commands, "DATA", ".")
    assert whole.codes == [250, 250, 250, 354, 250]
    assert whole.reports == [f"Other servers may refuse this: {faults} in {c}" for c in commands]


SIZE = f"SIZE={'9' * 21}"


@pytest.mark.parametrize(
    ("offer", "parameters"),
    [
        (OFFER, ["AUTH", "SIZE", "SIZE=²", "SIZE=٣", "BODY=BINARYMIME", "BODY", "SMTPUTF8=yes"]),
        (OFFER, ["X-VENDOR=a=b", "="]),
        (PLAINER, ["AUTH=<>", "SIZE=-1", SIZE]),
    ],
)
def test_a_parameter_that_is_not_offered_in_this_form_is_accepted_and_reported(
    offer: Offer, parameters: list[str]
) -> None:
    for parameter in parameters:
        command = f"MAIL FROM:<a@x> {parameter}"
        keyword = parameter.partition("=")[0] or "="
        whole = ask(command, offer=offer)
        assert whole.codes == [250]
        assert whole.reports == [f"Other servers may refuse this: {keyword} in {command}"]


def test_each_unoffered_parameter_is_reported_and_helo_offers_none() -> None:
    mail = "MAIL FROM:<a@x> SIZE=9 RET=HDRS ENVID=Q"
    rcpts = ["RCPT TO:<b@x> NOTIFY=NEVER ENVID=Q", "RCPT TO:<c@x> NOTIFY=SUCCESS SIZE=1 BODY=7BIT"]
    helo = ask("HELO x", "MAIL FROM:<a@x> SIZE=1").reports
    assert helo == ["Other servers may refuse this: SIZE in MAIL FROM:<a@x> SIZE=1"]
    whole = ask(mail, *rcpts, rcpts[1], "DATA", ".")
    keywords = [list(path.parameters) for path in whole.mails[0].forward_paths]
    assert keywords == [["NOTIFY", "ENVID"], *[["NOTIFY", "SIZE", "BODY"]] * 2]
    assert whole.reports == [
        f"Other servers may refuse this: RET, ENVID in {mail}",
        f"Other servers may refuse this: NOTIFY, ENVID in {rcpts[0]}",
        *[f"Other servers may refuse this: NOTIFY, SIZE, BODY in {rcpts[1]}"] * 2,
    ]


def test_smtputf8_applies_to_the_whole_envelope_and_ends_with_it() -> None:
    assert ask("MAIL FROM:<é@x> SMTPUTF8", "RCPT TO:<é@x>", "RSET", MAIL, RCPT).reports == []
    fault = "Other servers may refuse this: an address beyond ASCII without SMTPUTF8 in RCPT"
    whole = ask("MAIL FROM:<a@x> SMTPUTF8", "RSET", MAIL, "RCPT TO:<é@x>")
    assert whole.reports == [f"{fault} TO:<é@x>"]


@pytest.mark.parametrize(
    ("size", "codes"),
    [("1000", [250, 503]), ("1001", [552, 250]), ("9" * 20, [552, 250]), ("9" * 21, [250, 503])],
)
def test_a_size_over_the_limit_is_refused_at_once(size: str, codes: list[int]) -> None:
    assert ask(f"MAIL FROM:<a@x> SIZE={size}", MAIL, offer=PLAINER).codes == codes


def test_the_10001st_recipient_is_refused_and_the_others_get_the_mail() -> None:
    recipients = b"RCPT TO:<%s@x>\r\n" % (b"b" * 73) * 10_001  # 80 octets, without the command
    group = b"MAIL FROM:<a@x>\r\n" + recipients + b"DATA\r\n.\r\n"
    whole = converse(EHLO + group + BEGIN)
    assert whole.codes == [250, 250, *[250] * 10_000, 452, 354, 250, *GROUP]
    assert "452 4.5.3 Too many recipients" in whole.lines
    assert [len(mail.forward_paths) for mail in whole.mails] == [10_000]


def test_recipients_over_a_mebibyte_in_total_are_refused() -> None:
    longest = b"RCPT TO:<b@x> X=%s\r\n" % "é".encode().ljust(501, b"x")
    assert len(longest) == len("RCPT \r\n") + 512
    for recipient, code in ((longest, 250), (longest.replace(b"=", b"=="), 452)):
        whole = converse(EHLO + BEGIN[:17] + longest * 2047 + recipient + longest)
        assert whole.codes == [250, 250, *[250] * 2047, code, 452]
    # Refused recipients count too: they use no memory, but time.
    whole = converse(EHLO + BEGIN[:17] + longest.replace(b":", b";") * 2048 + longest)
    assert whole.codes == [250, 250, *[501] * 2048, 452]


def test_a_login_by_token_or_digest_reports_only_the_name() -> None:
    whole = ask("AUTH XOAUTH2 dXNlcj1hQHgBYXV0aD1CZWFyZXIgdG9rAQE=")
    assert (whole.lines, whole.others) == ([SUCCESS], [login("a@x", "XOAUTH2")])
    whole = ask("AUTH CRAM-MD5", b64("tim b913a602c7eda7a495b4e6e7334d3890"))
    assert (whole.codes, whole.others) == ([334, 235], [login("tim", "CRAM-MD5")])


def assert_keeps_secrets(whole: Outcome) -> None:
    for secret in ("secret", PASSWORD, PLAIN):
        assert secret not in repr(whole)
        assert secret.upper() not in repr(whole)


@pytest.mark.parametrize(
    ("commands", "replies"),
    [
        ([LOGIN], []),
        (["AUTH PLAIN", PLAIN], ["334 "]),
        ([f"auth plain  {PLAIN} "], []),
        (["AUTH LOGIN", USER, PASSWORD], ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6"]),
        ([f"AUTH login {USER}", PASSWORD], ["334 UGFzc3dvcmQ6"]),
        (["Auth Login", USER, "="], ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6"]),
        (["AUTH LOGIN", USER, ""], ["334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6"]),
    ],
)
def test_any_credentials_are_accepted_and_only_the_name_is_logged(
    commands: list[str], replies: list[str]
) -> None:
    whole = ask(*commands, "NOOP")
    assert whole.lines == [*replies, SUCCESS, "250 OK"]
    assert whole.others == [login("app@example.com", commands[0].split()[1].upper())]
    assert_keeps_secrets(whole)
    octets = "".join(f"{command}\r\n" for command in commands).encode()
    assert begin(OFFER, EHLO, octets).user == "app@example.com"


@pytest.mark.parametrize(
    ("reply", "exchanges"),
    [
        ("501 5.7.0 Authentication cancelled", ["PLAIN,*", "PLAIN *", f"LOGIN,{USER},*"]),
        ("501 5.5.2 Cannot decode base64", ["PLAIN secret!", "PLAIN,secret!", "PLAIN é"]),
        ("501 5.5.2 Cannot decode base64", ["PLAIN,\udcff", "PLAIN \udcff", "LOGIN,QUIT now"]),
        ("501 5.5.2 Cannot decode base64", [f"LOGIN,{USER},secret!"]),
        ("501 5.5.2 PLAIN needs three values", [f"PLAIN {PASSWORD}", "PLAIN =", "PLAIN,"]),
        ("501 5.5.2 LOGIN needs a name without NUL", [f"LOGIN {PLAIN},="]),
    ],
)
def test_after_a_failed_exchange_the_client_may_try_again(reply: str, exchanges: list[str]) -> None:
    for exchange in exchanges:
        whole = ask(*f"AUTH {exchange}".split(","), LOGIN)
        assert whole.lines[-2:] == [reply, SUCCESS]
        assert whole.others == [login("app@example.com")]
        assert_keeps_secrets(whole)


def test_an_auth_line_may_have_12288_octets() -> None:
    longest = b64("\0" + "n" * 9000 + "\0" + "s" * 214)
    assert len(longest) == 12_288
    assert ask("AUTH PLAIN", longest).others == [login("n" * 9000)]
    command = f"auth plain {b64('admin' + chr(0) + 'n' * 9000 + chr(0) + 's' * 199)}"
    assert len(command) == 12_287
    assert ask(command).others == [login("n" * 9000)]


@pytest.mark.parametrize("octets", [12_289, 12_292, 100_000])
def test_a_longer_auth_line_is_refused_and_the_session_goes_on(octets: int) -> None:
    too_long = b"A" * octets + b"\r\n"
    for cut in (0, 5, 12_289):
        pieces = too_long[:cut], too_long[cut:]
        whole = converse(EHLO, b"AUTH LOGIN\r\n", *pieces, b"NOOP\r\n")
        assert whole.codes == [250, 334, 500, 250]
        assert whole.lines[2] == "500 5.5.6 Authentication Exchange line is too long"
    assert converse(EHLO, b"AUTH PLAIN " + too_long).lines[1].startswith("500 5.5.6 ")


def test_disabled_auth_is_refused_and_the_session_goes_on() -> None:
    whole = ask(LOGIN, "NOOP", offer=PLAINER)
    refusal = "AUTH PLAIN was refused: 502 5.5.1 AUTH is disabled"
    assert whole == Outcome(b"502 5.5.1 AUTH is disabled\r\n250 OK\r\n", [], (refusal,))


def test_a_login_is_reported_before_it_is_answered() -> None:
    conversation = begin(OFFER, EHLO)
    conversation.receive(f"AUTH PLAIN {PLAIN}\r\n".encode())
    assert conversation.next_action() == login("app@example.com")
    assert conversation.next_action() == Reply(f"{SUCCESS}\r\n".encode())


MUTE = "The client left after the TLS handshake without a word"
MUTE += "; perhaps it does not trust the certificate"


def test_starttls_discards_what_the_client_said_in_clear_text() -> None:
    conversation = begin(STARTTLS, EHLO, f"AUTH PLAIN {PLAIN}\r\n".encode(), BEGIN[:17])
    conversation.receive(b"STARTTLS\r\n")
    assert pull(conversation) == [Reply(b"220 Ready to start TLS\r\n"), Control.BEGIN_TLS]
    assert conversation.host_name == "client"
    conversation.tls_begun()
    assert pull(conversation) == []
    assert (conversation.host_name, conversation.extended, conversation.user) == ("", None, None)
    conversation.receive(b"RCPT TO:<b@x>\r\n" + BEGIN[:17] + EHLO + b"AUTH LOGIN\r\n*\r\n")
    whole = outcome(pull(conversation))
    assert whole.codes == [503, 503, 250, 334, 501]
    assert b"STARTTLS" not in whole.octets
    conversation.receive(b"STARTTLS x\r\nSTARTTLS\r\nHELP\r\n")
    whole = outcome(pull(conversation))
    assert whole.lines[:2] == ["501 Syntax: STARTTLS", "503 5.5.1 TLS is active already"]
    assert b"STARTTLS" not in whole.octets.rpartition(b"214 ")[2]


@pytest.mark.parametrize("injected", [EHLO + BEGIN + b"evil\r\n.\r\n", b"E"])
def test_clear_text_after_starttls_is_dropped_and_reported(injected: bytes) -> None:
    conversation = begin(STARTTLS)
    conversation.receive(b"RSET\r\nSTARTTLS\r\n" + injected)
    text = "Dropped what was sent after STARTTLS without waiting for the reply"
    whole = outcome(pull(conversation))
    octets = b"250 OK\r\n220 Ready to start TLS\r\n"
    assert whole == Outcome(octets, [Report(text), Control.BEGIN_TLS])
    assert conversation.unread == 0
    conversation.tls_begun()
    conversation.receive(EHLO)
    assert outcome(pull(conversation)).codes == [250]


def test_implicit_tls_comes_before_the_greeting() -> None:
    conversation = Conversation(IMPLICIT)
    assert pull(conversation) == [Control.BEGIN_TLS]
    conversation.tls_begun()
    assert pull(conversation) == [GREETING]
    conversation.receive(EHLO + b"STARTTLS\r\nHELP\r\n")
    whole = outcome(pull(conversation))
    assert whole.codes == [250, 503, 214]
    assert b"STARTTLS" not in whole.octets


@pytest.mark.parametrize("offer", [STARTTLS, IMPLICIT])
@pytest.mark.parametrize(
    ("octets", "eof", "actions"),
    [
        (b"", True, [Report(MUTE), Control.CLOSE]),
        (b"", False, [Report(MUTE)]),
        (b"N", True, [Control.CLOSE]),
        (b"N", False, []),
    ],
)
def test_only_a_client_that_says_nothing_after_the_handshake_is_reported(
    offer: Offer, octets: bytes, actions: list[object], *, eof: bool
) -> None:
    conversation = Conversation(offer)
    pull(conversation)
    if offer is STARTTLS:
        conversation.receive(b"STARTTLS\r\n")
        pull(conversation)
    conversation.tls_begun()
    pull(conversation)
    if octets:
        conversation.receive(octets)
    (conversation.receive_eof if eof else conversation.lost)()
    assert pull(conversation) == actions
    conversation.lost()
    assert pull(conversation) == []


CONTENTS = [b"", b"\r\n", b"\r\n\r\n", b".\r\n", b"..\r\n", b".\r\n.\r\n", b"\x00\xff\r\n"]
CONTENTS += [b"Subject: x\r\n\r\n.hidden\r\n..\r\nend\r\n"]
# A dot ends a mail only between two CRLF.
CONTENTS += [b"a\n.\nb\r\n", b"a\r.\rb\r\n", b"a\n.\r\nb\r\n", b"a\r.\r\nb\r\n", b"a\r\n.\nb\r\n"]
CONTENTS += [b"a\r\n.\rb\r\n", b"a\r\n.\r\r\nb\r\n", b"a\r\n.\n\r\nb\r\n", b"\r\r\n.\r\n"]
CONTENTS += [b"a\n.\nMAIL FROM:<evil@x>\r\n", b"\n.\r\n"]


def stuffed(content: bytes) -> bytes:
    """Return *content* as a client sends it after DATA (RFC 5321, section 4.5.2)."""
    lines = content.split(b"\r\n")
    return b"\r\n".join(b"." * line.startswith(b".") + line for line in lines) + b".\r\n"


@pytest.mark.parametrize("content", CONTENTS)
def test_the_content_is_the_same_wherever_it_is_split(content: bytes) -> None:
    whole = say(EHLO + BEGIN + stuffed(content) + b"NOOP\r\n", offer=PLAINER)
    assert whole.codes == [250, *GROUP, 250, 250]
    assert whole.contents == [content]


def test_only_a_dot_between_two_crlf_ends_a_mail() -> None:
    for before in (b"\n", b"\r", b"\r\n\r", b"\n\r", b" "):
        for after in (b"\n", b"\r", b"\n\r", b"\r\r\n", b" \r\n", b"\r\n"):
            assert say(EHLO + BEGIN + b"a" + before + b"." + after).contents == []
    for after in (b"\n", b"\r", b"\n\r", b"\r\r\n", b" \r\n", b"a"):
        whole = say(EHLO + BEGIN + b"." + after + b"b\r\n.\r\n")
        assert whole.contents == [after + b"b\r\n"]


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
    assert converse(EHLO, *pieces, octets).contents == [content]


def test_a_buffer_may_change_after_it_is_received() -> None:
    content = b"".join(b".%d\r\n" % number for number in range(3000))
    octets, conversation, actions = EHLO + BEGIN + stuffed(content) + BEGIN, begin(), []
    rest = b"\r\n.\r\n" * 60
    buffer = bytearray(rest)
    for first in range(0, len(octets), 100):
        piece = octets[first : first + 100]
        buffer[: len(piece)] = piece
        conversation.receive(buffer, len(piece))
        buffer[:] = rest
        actions += pull(conversation)
    whole = outcome(actions)
    assert whole.codes == [250, *GROUP, 250, *GROUP]
    assert whole.contents == [content]


@pytest.mark.parametrize("octets", [998, 999, 5000, 70_000, 3_000_000])
def test_a_line_may_be_as_long_as_the_mail(octets: int) -> None:
    content = b"." + b"x" * (octets - 1) + b"\r\n"
    sent = EHLO + BEGIN + stuffed(content)
    for pieces in ([sent], [sent[:500], sent[500:]]):
        assert converse(*pieces).contents == [content]


@pytest.mark.parametrize("line", [b"x" * 6 + b"\r\n", b".\r\n", b"..\r\n", b"\r\n"])
@pytest.mark.parametrize("lines", [1, 7, 10_000])
def test_the_size_limit_does_not_count_dot_stuffing(line: bytes, lines: int) -> None:
    content = line * lines
    for limit, code in ((len(content), 250), (len(content) - 1, 552)):
        offer = Offer(hostname="mx.example.org", max_size=limit)
        octets = EHLO + BEGIN + stuffed(content) + b"NOOP\r\n"
        whole = say(octets, offer=offer) if lines < 10 else converse(octets, offer=offer)
        assert whole.codes == [250, *GROUP, code, 250]
        assert whole.contents == [content] * (code == 250)


def test_a_mail_over_the_limit_is_refused_and_the_next_one_accepted() -> None:
    offer = Offer(hostname="mx.example.org", max_size=10)
    mails = BEGIN + b"too large to be accepted\r\n.\r\n" + BEGIN + b"small\r\n.\r\n"
    whole = say(EHLO + mails, offer=offer)
    group = ["250 OK", "250 OK", "354 End data with <CR><LF>.<CR><LF>"]
    assert whole.lines[1:] == [*group, "552 Error: Too much mail data", *group, "250 OK"]
    assert whole.contents == [b"small\r\n"]


def test_octets_over_the_limit_use_no_memory() -> None:
    conversation = begin(Offer(hostname="mx.example.org", max_size=1_000_000), EHLO, BEGIN)
    chunk = (b"x" * 98 + b"\r\n") * 10_000
    tracemalloc.start()
    try:
        for _ in range(101):
            conversation.receive(chunk)
        assert conversation.unread == 0
        current, peak = tracemalloc.get_traced_memory()
        assert (current < 10_000, peak < 2_500_000) == (True, True)
    finally:
        tracemalloc.stop()
    conversation.receive(b".\r\n")
    assert outcome(pull(conversation)).codes == [552]


def deliver(rest: bytes = b"") -> Conversation:
    """Return a conversation whose mail is being delivered; *rest* follows the mail."""
    conversation = begin(OFFER, EHLO, BEGIN)
    conversation.receive(b".\r\n" + rest)
    assert isinstance(conversation.next_action(), Mail)
    return conversation


def test_commands_wait_while_a_mail_is_being_delivered() -> None:
    conversation = deliver(b"NOOP\r\n")
    assert (conversation.next_action(), conversation.unread) == (None, 6)
    conversation.receive(b"QUIT\r\nQUIT\r\n", 6)
    assert (conversation.next_action(), conversation.unread) == (None, 12)
    conversation.delivered("451 4.3.0 Disk full")
    replies = [b"451 4.3.0 Disk full\r\n", b"250 OK\r\n", b"221 Bye\r\n"]
    assert pull(conversation) == [*map(Reply, replies), Control.CLOSE]
    assert conversation.unread == 0


def test_a_421_from_the_delivery_closes_the_session() -> None:
    conversation = deliver(b"NOOP\r\n")
    conversation.delivered("421 4.3.2 Stopping")
    assert pull(conversation) == [Reply(b"421 4.3.2 Stopping\r\n"), Control.CLOSE]
    assert conversation.unread == 0


def test_a_delivery_is_answered_once_and_not_after_the_client_is_lost() -> None:
    conversation = deliver(b"NOOP\r\n")
    conversation.lost()
    conversation.delivered("250 OK")
    assert pull(conversation) == []
    conversation = deliver()
    conversation.delivered("250 OK")
    conversation.delivered("421 Twice")
    assert pull(conversation) == [Reply(b"250 OK\r\n")]


@pytest.mark.parametrize("pieces", [[], [EHLO], [EHLO, BEGIN], [EHLO, b"AUTH LOGIN\r\n"]])
@pytest.mark.parametrize("octets", [b"NOOP\r\n", b"NO", b"a\r\n.\r\n", b"c2Vj"])
def test_after_the_client_is_lost_nothing_is_executed_or_kept(
    pieces: list[bytes], octets: bytes
) -> None:
    conversation = begin(OFFER, *pieces) if pieces else Conversation(OFFER)
    conversation.receive(octets)
    conversation.lost()
    # An unfinished mail is reported.
    assert len(pull(conversation)) == (BEGIN in pieces and b"\n.\r\n" not in octets)
    for _ in range(2):
        assert (conversation.next_action(), conversation.unread) == (None, 0)
        conversation.receive(b".\r\nNOOP\r\n")
        conversation.receive_eof()


def test_input_after_quit_is_ignored() -> None:
    conversation = begin(OFFER)
    conversation.receive(b"QUIT\r\n")
    assert pull(conversation) == [Reply(b"221 Bye\r\n"), Control.CLOSE]
    conversation.receive(b"NOOP\r\n")
    conversation.receive_eof()
    conversation.lost()
    assert (pull(conversation), conversation.unread) == ([], 0)


@pytest.mark.parametrize(
    ("octets", "codes", "contents"),
    [
        (b"", [], []),
        (b"NOOP\r\nRSET\r\nNOOP", [250, 250], []),
        (b"RSET\r\nRSET\r\nQUIT\r\n", [250, 250, 221], []),
        (b"AUTH LOGIN\r\nc2VjcmV0", [334], []),
        (BEGIN, GROUP, []),
        (BEGIN + b"a\r\n.", GROUP, []),
        (BEGIN + b"a\r\n.\r\nNOOP\r\n", [*GROUP, 250, 250], [b"a\r\n"]),
    ],
)
def test_complete_lines_before_eof_are_executed(
    octets: bytes, codes: list[int], contents: list[bytes]
) -> None:
    whole = say(EHLO + octets, eof=True)
    assert whole.codes == [250, *codes]
    assert whole.contents == contents
    assert whole.others[-1] == Control.CLOSE
    assert len(whole.reports) == (codes == GROUP)  # for an unfinished mail


def test_a_client_may_send_eof_while_its_mail_is_being_delivered() -> None:
    conversation = deliver(b"VRFY x\r\nNOOP")
    conversation.receive_eof()
    assert conversation.next_action() is None
    conversation.delivered("250 OK")
    whole = outcome(pull(conversation))
    assert (whole.codes, whole.others) == ([250, 252], [Control.CLOSE])


LINES = ["EHLO", "NOOP x", "RSET", "VRFY x", "HELP", "X", "", "STARTTLS", "QUIT", "*", USER]
LINES += [*["EHLO a", "HELO b", "AUTH LOGIN", "DATA", MAIL, RCPT, "RCPT TO:<c@x>"] * 2]
LINES += [f"AUTH LOGIN\r\n{USER}\r\n{PASSWORD}", *[f"{MAIL}\r\n{RCPT}\r\nDATA"] * 4]
LIMIT = 8
REPLIES = {"NOOP": 250, "VRFY": 252, "HELP": 214, "STARTTLS": 502, "QUIT": 221}
REPLIES |= {"AUTH": 334, "DATA": 354, "MAIL": 250, "RCPT": 250}


class Model:
    """The state that decides the replies to LINES, however they arrive."""

    def __init__(self) -> None:
        self.name, self.unknown = "", 0
        self.extended: bool | None = None
        self.user: str | None = None
        self.names: list[str] | None = None  # the responses in the current AUTH exchange
        self.envelope: tuple[str, list[str]] = "", []

    def answer(self, line: str) -> int:
        """Return the code of the reply to *line*."""
        if self.names is not None:
            return self.respond(self.names, line)
        verb, _, argument = line.partition(" ")
        if not self.allows(verb):
            return 503
        if verb in ("EHLO", "HELO"):
            self.name, self.extended = argument, verb == "EHLO"
        if verb in ("EHLO", "HELO", "RSET"):
            self.envelope = "", []
            return 250
        if verb == "MAIL":
            self.envelope = "a@x", []
        elif verb == "RCPT":
            self.envelope[1].append(argument[4:-1])
        elif verb == "AUTH":
            self.names = []
        self.unknown += verb.isalpha() and verb not in REPLIES
        return REPLIES.get(verb, 421 if verb and self.unknown == 5 else 500)

    def allows(self, verb: str) -> bool:
        """Return whether *verb* is allowed now."""
        sender, recipients = self.envelope
        greeted = self.extended is not None
        needs = {"MAIL": greeted and not sender, "RCPT": sender, "DATA": recipients}
        needs["AUTH"] = greeted and self.user is None and not sender
        return bool(needs.get(verb, True))

    def respond(self, names: list[str], line: str) -> int:
        """Return the code of the reply to *line*, a response in an AUTH exchange."""
        self.names = None
        try:
            names.append(b64decode(line, validate=True).decode(errors="backslashreplace"))
        except ValueError:
            return 501
        if len(names) == 1:
            self.names = names
            return 334
        self.user = names[0] or "(no name)"
        return 235


class Sessions(RuleBasedStateMachine):
    """Compares a session with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.conversation = begin(Offer(hostname="mx.example.org", max_size=LIMIT))
        self.model = Model()
        self.is_over = False

    @rule(
        lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=6),
        parts=st.lists(st.sampled_from([b"\r\n", b".", b"a", b"abc"]), max_size=6),
        cuts=st.lists(st.integers(0, 100), max_size=3),
    )
    def say(self, lines: list[str], parts: list[bytes], cuts: list[int]) -> None:
        octets, codes, mails = b"", [], []
        content = b"".join(parts) + b"\r\n"
        for line in "\r\n".join(lines).split("\r\n"):
            octets += line.encode() + b"\r\n"
            if self.is_over:
                continue
            codes.append(self.model.answer(line))
            if codes[-1] == 354:
                octets += stuffed(content)
                codes.append(250 if len(content) <= LIMIT else 552)
                if codes[-1] == 250:
                    mails.append((*self.model.envelope, content))
                    self.model.unknown = 0
                self.model.envelope = "", []
            self.is_over = codes[-1] in (221, 421)
        whole = self.outcome(octets, cuts)
        assert whole.codes == codes
        assert mails == [
            (mail.reverse_path.address, [path.address for path in mail.forward_paths], mail.content)
            for mail in whole.mails
        ]
        assert whole.others.count(Control.CLOSE) == bool({221, 421}.intersection(codes))
        known = (self.conversation.host_name, self.conversation.extended, self.conversation.user)
        assert known == (self.model.name, self.model.extended, self.model.user)

    def outcome(self, octets: bytes, cuts: list[int]) -> Outcome:
        actions = []
        for first, end in pairwise([0, *sorted(cuts), len(octets)]):
            self.conversation.receive(octets[first:end])
            actions += pull(self.conversation)
        return outcome(actions)


Sessions.TestCase.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=20, stateful_step_count=30
)
test_a_session_answers_as_the_model_does = Sessions.TestCase


@pytest.mark.parametrize("octets", [12_276, 12_277, 12_278, 12_279, 20_000])
def test_a_long_auth_command_has_the_same_reply_however_it_is_split(octets: int) -> None:
    code = 501 if octets < 12_278 else 500
    assert say(EHLO + b"AUTH PLAIN " + b"A" * octets + b"\r\nNOOP\r\n").codes == [250, code, 250]


def test_input_between_the_starttls_reply_and_the_handshake_is_dropped() -> None:
    conversation = begin(STARTTLS)
    conversation.receive(b"STARTTLS\r\n")
    assert conversation.next_action() == Reply(b"220 Ready to start TLS\r\n")
    conversation.receive(b"EHLO evil\r\n")
    assert conversation.next_action() == Control.BEGIN_TLS
    conversation.receive(b"EHLO evil\r\n")
    conversation.tls_begun()
    assert conversation.next_action() is None
    assert conversation.unread == 0


def test_a_non_ascii_space_is_not_a_separator() -> None:
    assert say(EHLO + b"AUTH PLAIN \xc2\xa0\r\n").codes == [250, 501]


def test_each_octet_of_a_mail_is_copied_once() -> None:
    conversation = begin(OFFER, EHLO + BEGIN)
    buffer = bytearray((b"x" * 62 + b"\r\n") * 1024)
    tracemalloc.start()
    try:
        for _ in range(512):
            conversation.receive(buffer, len(buffer))
        conversation.receive(b".\r\n")
        mail = conversation.next_action()
        assert isinstance(mail, Mail)
        assert tracemalloc.get_traced_memory()[1] < len(mail.content) * 1.2
    finally:
        tracemalloc.stop()
    assert mail.content == bytes(buffer) * 512


# Reports of refusals and lost clients.


@pytest.mark.parametrize(
    ("command", "report"),
    [
        (f"{RCPT} \x1b", f"{RCPT} \x1b was refused: 503 Error: need MAIL command"),
        ("MAIL é\udcff", "MAIL é\udcff was refused: 501 Syntax: MAIL FROM:<address>"),
        ("STARTTLS", "STARTTLS was refused: 502 5.5.1 STARTTLS is not offered"),
        ("xclient secret", "XCLIENT was refused: 500 5.5.2 Error: command not recognized"),
        ("x" * 12, f"{'X' * 12} was refused: 500 5.5.2 Error: command not recognized"),
        ("x" * 13, "A line of 13 octets was refused: 500 5.5.2 Error: command not recognized"),
        ("x-y secret", "A line of 10 octets was refused: 500 Error: bad syntax"),
        ("AUTH", "AUTH was refused: 501 5.5.4 Syntax: AUTH mechanism [initial-response]"),
        (
            "auth gssapi secret",
            "AUTH gssapi was refused: 504 5.5.4 Unrecognized authentication mechanism",
        ),
        (f"AUTH {'x' * 21}", "AUTH was refused: 504 5.5.4 Unrecognized authentication mechanism"),
        ("AUTH sécret", "AUTH was refused: 504 5.5.4 Unrecognized authentication mechanism"),
        ("AUTH PLAIN secret", "AUTH PLAIN was refused: 501 5.5.2 PLAIN needs three values"),
        ("AUTH PLAIN !", "AUTH PLAIN was refused: 501 5.5.2 Cannot decode base64"),
        (
            "NOOP " + "x" * 12_284,
            "A line of more than 12,288 octets was refused: 500 5.5.6 The line is too long",
        ),
    ],
)
def test_each_refusal_is_reported(command: str, report: str) -> None:
    whole = ask(command)
    assert whole.refusals == (report,)
    assert whole.others == []
    assert "secret" not in repr(whole)


@pytest.mark.parametrize("offer", [OFFER, PLAINER])
@pytest.mark.parametrize("secret", ["c2VjcmV0", "secret!", "hunter two"])
def test_a_possible_password_is_reported_only_by_its_length(offer: Offer, secret: str) -> None:
    commands = ["AUTH LOGIN !", secret, f"{secret}s", "RSET", "X"]
    *_, first, second, last = ask(*commands, offer=offer).refusals
    assert first.startswith(f"A line of {len(secret)} octets was refused: 500 ")
    assert second.startswith(f"A line of {len(secret) + 1} octets was refused: 500 ")
    assert last.startswith("X was refused: 500 ")


@pytest.mark.parametrize("refused", [["AUTH PLAIN " + "A" * 12_288], [LOGIN, "AUTH LOGIN"]])
def test_a_password_after_a_refused_auth_is_not_shown(refused: list[str]) -> None:
    whole = ask(*refused, "YXBw", "RSET", "X")
    assert whole.refusals[-2].startswith("A line of 4 octets was refused: 500 ")
    assert whole.refusals[-1].startswith("X was refused: 500 ")


def test_an_unknown_command_after_a_login_is_shown() -> None:
    assert ask(LOGIN, "XCLIENT x").refusals[0].startswith("XCLIENT was refused: 500 ")


def test_a_refused_response_is_not_shown() -> None:
    whole = ask("AUTH LOGIN", USER, "secret!", "AUTH PLAIN", "secret")
    assert whole.refusals == (
        "A response to AUTH LOGIN was refused: 501 5.5.2 Cannot decode base64",
        "A response to AUTH PLAIN was refused: 501 5.5.2 PLAIN needs three values",
    )
    assert "secret" not in repr(whole)


def test_a_mail_that_is_too_large_is_reported() -> None:
    whole = ask(
        MAIL + " SIZE=1001", MAIL, RCPT, "RCPT TO:<c@x>", "DATA", "x" * 999, ".", offer=PLAINER
    )
    assert whole.refusals == (
        f"{MAIL} SIZE=1001 was refused: 552 Error: message size exceeds fixed maximum message size",
        "The mail from a@x for b@x and 1 more was refused: 552 Error: Too much mail data",
    )


def test_the_smtputf8_parameter_is_refused_when_disabled() -> None:
    whole = ask(f"{MAIL} SMTPUTF8", MAIL, offer=PLAINER)
    assert whole.lines == ["555 5.5.4 SMTPUTF8 is disabled", "250 OK"]
    assert whole.refusals == (f"{MAIL} SMTPUTF8 was refused: {whole.lines[0]}",)


@pytest.mark.parametrize("eof", [False, True])
def test_a_mail_that_breaks_off_is_reported(*, eof: bool) -> None:
    conversation = begin(OFFER, EHLO + BEGIN + b"..half")
    if eof:
        conversation.receive_eof()
    else:
        conversation.lost()
    text = "The client left in the middle of a mail from a@x for b@x, after 6 octets"
    assert pull(conversation) == [Report(text), *[Control.CLOSE] * eof]


@pytest.mark.parametrize(
    ("said", "reports"),
    [
        (b"", []),
        (EHLO, []),
        (EHLO + BEGIN[:-6], []),
        (EHLO + BEGIN + b"hi\r\n.\r\n", []),
        (EHLO + b"NOOP\r\nRSET\r\n", []),
    ],
)
def test_a_client_that_leaves_between_mails_is_not_reported(
    said: bytes, reports: list[Report]
) -> None:
    conversation = begin(OFFER, said)
    conversation.lost()
    assert pull(conversation) == reports


def test_a_client_that_is_cut_off_is_reported_with_the_reason() -> None:
    conversation = begin(OFFER, EHLO + BEGIN)
    conversation.lost("It sleeps")
    text = "It sleeps in the middle of a mail from a@x for b@x, after 0 octets"
    assert pull(conversation) == [Report(text)]
    conversation = begin(OFFER, EHLO)
    conversation.lost("It sleeps")
    assert pull(conversation) == [Report("It sleeps")]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"hi\n.\n"],
        [b"hi\n", b".", b"\n"],
        [b"Subject: x\n\nhi\n.\nQUIT\n"],
        [b".\n"],
        [b".", b"\n", b"more\n.\n"],
        [b"hi\r\n.\n"],
        [b"x" * 70_000 + b"\n.\n"],
    ],
)
def test_a_mail_that_ends_with_lf_alone_is_reported_once_and_stays_open(
    pieces: list[bytes],
) -> None:
    whole = converse(EHLO + BEGIN, *pieces)
    assert whole.others == [Report(LF_ALONE)]
    assert whole.codes[-1] == 354


def test_a_dot_between_bare_lfs_within_a_mail_is_not_reported() -> None:
    assert converse(EHLO + BEGIN + b"a\n.\nb\r\n.\r\n").others[:-1] == []
    assert converse(EHLO + BEGIN, b"a\r\nb\n.\nc\r\n", b".\r\n").others[:-1] == []


@pytest.mark.parametrize(
    ("said", "stranger"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS: start dsmtpd with --tls implicit"),
        (b"POST / HTTP/1.1\r\n", "HTTP"),
        (b"GET /?EHLO HTTP/1.0\n", "HTTP"),
        (b"PRI * HTTP/2.0\r\n", "HTTP"),
        (b"PROXY TCP4 127.0.0.1 127.0.0.1 5 6\r\n", "the PROXY protocol"),
        (b"PROXY UNKNOWN\r\n", "the PROXY protocol"),
        (b"LHLO x\r\n", "LMTP"),
        (b"lhlo\r\n", "LMTP"),
    ],
)
def test_a_client_that_does_not_speak_smtp_is_reported_and_disconnected(
    said: bytes, stranger: str
) -> None:
    whole = say(said + EHLO + BEGIN + b"evil\r\n.\r\n")
    assert whole == (b"", [Report(f"The client speaks {stranger}"), Control.CLOSE], ())
    later = converse(EHLO, said + b"\r\nNOOP\r\n")
    assert (later.codes[-1], later.others) == (250, [])


def test_version_2_of_the_proxy_protocol_is_recognised_by_its_first_octets() -> None:
    said = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12)
    report = Report("The client speaks the PROXY protocol")
    assert converse(said + EHLO) == (b"", [report, Control.CLOSE], ())
    assert converse(said[:2], said[2:]).codes == [500, 500, 500, 221]


def test_a_client_causes_at_most_20_warnings_before_its_next_mail() -> None:
    mail = f"{MAIL}\r\n{RCPT}\r\nDATA\r\n.\r\n".encode()
    last = Report("Further warnings are not shown until the next mail of this client")
    for fault in (b"x-y\r\n", b"RCPT TO:a@x\r\n"):
        whole = converse(EHLO + b"MAIL FROM:<a@x>\r\n" + fault * 30)
        reports = [*whole.refusals, *whole.others]
        assert (len(reports), reports[-1]) == (21, last)
        whole = converse(EHLO + fault * 30 + b"RSET\r\n" + mail + fault)
        assert len([*whole.refusals, *whole.others]) == 23


@pytest.mark.parametrize("verb", ["HELO", "EHLO"])
def test_a_greeting_without_a_name_is_accepted_and_reported(verb: str) -> None:
    whole = say(f"{verb}\r\n{verb}  \r\n{MAIL}\r\n{RCPT}\r\n")
    assert whole.codes == [250] * 4
    assert whole.reports == [f"Other servers may refuse this: {verb} without a name"] * 2


# Verbose sessions.


def heard(octets: str) -> list[str]:
    """Return what a verbose session reports about *octets*, however they are split."""
    found = []
    for size in (1, 7, 10_000):
        conversation = Conversation(OFFER, verbose=True)
        actions = pull(conversation)
        for begin in range(0, len(octets), size):
            conversation.receive(octets[begin : begin + size].encode())
            actions += pull(conversation)
        found.append([action.text for action in actions if isinstance(action, Heard)])
    assert found[0] == found[1] == found[2]
    return found[0]


def test_a_verbose_session_reports_what_the_client_says_before_replying() -> None:
    conversation = Conversation(OFFER, verbose=True)
    conversation.receive(EHLO + BEGIN + b"..\r\n.\r\nBREW tea\r\n")
    actions = pull(conversation)
    assert [a.text if isinstance(a, Heard) else type(a).__name__ for a in actions] == [
        *("Reply", "EHLO client", "Reply"),
        *("MAIL FROM:<a@x>", "Reply", "RCPT TO:<b@x>", "Reply", "DATA", "Reply"),
        *("(a mail, 4 octets)", "Mail", "Reply", "BREW ***", "Report", "Reply"),
    ]


@pytest.mark.parametrize(
    ("said", "texts"),
    [
        ("AUTH PLAIN AGEAc2VjcmV0\r\n", ["AUTH PLAIN ***"]),
        ("auth login YQ==\r\nc2VjcmV0\r\n", ["AUTH login ***", "***"]),
        (
            "AUTH PLAIN\r\nc2VjcmV0\r\nc2VjcmV0 x\r\n",
            ["AUTH PLAIN", "***", "A line of 10 octets"],
        ),
        ("AUTH c2VjcmV0= x\r\n", ["AUTH ***"]),
        ("AUTH XSECRET\r\nSECRET\r\n", ["AUTH XSECRET", "A line of 6 octets"]),
        ("PASS secret\r\n", ["PASS ***"]),
        ("NOOP x  y \r\nRSET\r\n", ["NOOP x  y ", "RSET"]),
    ],
)
def test_a_verbose_session_masks_possible_passwords(said: str, texts: list[str]) -> None:
    assert heard(f"EHLO x\r\n{said}")[1:] == texts


def test_a_verbose_session_reports_the_size_of_a_mail_that_is_too_large() -> None:
    offer = Offer(hostname="mx.example.org", max_size=3)
    conversation = Conversation(offer, verbose=True)
    conversation.receive(EHLO + BEGIN + b"abcdef\r\n.\r\n")
    texts = [action.text for action in pull(conversation) if isinstance(action, (Heard, Report))]
    assert texts[-2:] == [
        "(a mail, 8 octets)",
        "The mail from a@x for b@x was refused: 552 Error: Too much mail data",
    ]


# Replies that fail on demand.


def session(failure: Failure, *, stage: Stage, offer: Offer = OFFER) -> Conversation:
    """Return a conversation whose replies at *stage* fail."""
    return Conversation(offer, ask=lambda at, _: failure if at == stage else None)


STEPS = [
    b"EHLO x\r\n",
    f"{LOGIN}\r\n".encode(),
    b"MAIL FROM:<a@x>\r\n",
    b"RCPT TO:<b@x>\r\n",
    b"DATA\r\nhi\r\n.\r\n",
    b"NOOP\r\n",
]


def run(conversation: Conversation) -> list[object]:
    actions = pull(conversation)
    for step in STEPS:
        conversation.receive(step)
        actions += pull(conversation)
    return [a for a in actions if not isinstance(a, Report) or a.text == "why"]


def short(actions: list[object]) -> list[object]:
    return [int(a.octets[:3]) if isinstance(a, Reply) else a for a in actions]


def test_before_each_reply_that_can_fail_ask_is_called_once() -> None:
    asked: list[tuple[Stage, str]] = []
    conversation = Conversation(OFFER, ask=lambda *question: asked.append(question))
    assert [a for a in short(run(conversation)) if not isinstance(a, Mail)] == [
        *(220, 250, 235, 250, 250, 354, 250, 250)
    ]
    assert asked == [
        ("connect", ""),
        ("auth", "app@example.com"),
        ("mail", "a@x"),
        ("rcpt", "b@x"),
        ("data", "a@x"),
    ]


WHY = Report("why", warns=False)


@pytest.mark.parametrize(
    ("stage", "replies"),
    [
        ("connect", [WHY, 451, Control.CLOSE]),
        ("auth", [220, 250, WHY, 451, 250, 250, 354, "mail", 250, 250]),
        ("mail", [220, 250, 235, WHY, 451, 503, 503, 500, 500, 250]),
        ("rcpt", [220, 250, 235, 250, WHY, 451, 503, 500, 500, 250]),
        ("data", [220, 250, 235, 250, 250, 354, WHY, 451, 250]),
    ],
)
def test_a_reply_fails_with_the_given_code_and_the_session_goes_on(
    stage: Stage, replies: list[object]
) -> None:
    conversation = session(Failure("why", "451 4.0.0 no"), stage=stage)
    found = short(run(conversation))
    assert ["mail" if isinstance(a, Mail) else a for a in found] == replies
    assert conversation.user == (None if stage in {"auth", "connect"} else "app@example.com")


@pytest.mark.parametrize("stage", ["connect", "auth", "mail", "rcpt", "data"])
def test_a_421_ends_the_session_and_a_drop_cuts_it(stage: Stage) -> None:
    conversation = session(Failure("why", "421 4.0.0 no"), stage=stage)
    assert short(run(conversation))[-3:] == [WHY, 421, Control.CLOSE]
    conversation = session(Failure("why", drop=True), stage=stage)
    assert short(run(conversation))[-2:] == [WHY, Control.CUT]


def test_a_drop_after_the_handshake_is_not_blamed_on_the_client() -> None:
    conversation = session(Failure("why", drop=True), stage="connect", offer=IMPLICIT)
    assert pull(conversation) == [Control.BEGIN_TLS]
    conversation.tls_begun()
    assert pull(conversation) == [WHY, Control.CUT]


@pytest.mark.parametrize("stage", ["connect", "auth", "mail", "rcpt", "data"])
def test_a_delay_comes_before_the_reply(stage: Stage) -> None:
    conversation = session(Failure("why", delay=3), stage=stage)
    found = short(run(conversation))
    place = found.index(Delay(3))
    assert found[place - 1] == WHY
    assert isinstance(found[place + 1], Mail if stage == "data" else int)
    assert [a for a in found if isinstance(a, int)] == [220, 250, 235, 250, 250, 354, 250, 250]
