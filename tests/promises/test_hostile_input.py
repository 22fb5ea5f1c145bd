from __future__ import annotations

import json
import os
import re
import sys
import time
from base64 import b64encode
from datetime import datetime, timezone
from functools import partial
from itertools import count, pairwise, product
from random import Random, SystemRandom
from typing import TYPE_CHECKING

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from dsmtpd.conversation import Control, Conversation, Mail, Offer, Reply, Report
from dsmtpd.message import Message
from dsmtpd.options import Options
from dsmtpd.path import parse
from dsmtpd.show import Arrival, as_json, as_text
from dsmtpd.text import printable
from dsmtpd.tls import Layer
from tests.test_conversation import EHLO, OFFER, STARTTLS, Sessions, begin, pull
from tests.test_tls import Client, generated, shake_hands
from tests.tools import BEGIN, envelope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The total time of the fuzz tests with `--soak`. Each test gets an equal share, which must stay
# below faulthandler_timeout.
SOAK_SECONDS = int(os.environ.get("SOAK_SECONDS", "300"))

OFFERS = [
    OFFER,
    STARTTLS,
    Offer(hostname="mx.example.org", max_size=1000, smtputf8=False, auth=False),
    Offer(hostname="mx.example.org", tls="implicit"),
]

# The longest line, without its CRLF (RFC 4954, section 4).
LINE_OCTETS = 12_288
END_OF_DATA = b"\r\n.\r\n"
REPLY = re.compile(rb"(?:[0-9]{3}-[^\r\n]{0,506}\r\n)*[0-9]{3} [^\r\n]{0,506}\r\n")

# The fragments of hostile input.

COMMANDS = [b"EHLO x", b"HELO x", b"MAIL FROM:<a@x>", b"RCPT TO:<b@x>", b"DATA", b"RSET", b"QUIT"]
COMMANDS += [b"NOOP", b"VRFY x", b"HELP", b"STARTTLS", b"AUTH PLAIN", b"AUTH LOGIN", b"*", b"XYZ"]
COMMANDS += [
    b"AUTH CRAM-MD5",
    b"AUTH OAUTHBEARER",
    b"AUTH XOAUTH2",
    b"EHLO",
    b"MAIL FROM:",
    b"RCPT",
]
COMMANDS += [b"GET / HTTP/1.1", b"PROXY TCP4", b"LHLO x", b"\x16\x03\x01", b"AUTH"]
COMMANDS += [EHLO + BEGIN[:-2]] * 8
PATHS = [b"<", b">", b'"', b"\\", b"@", b":", b",", b"[", b"]", b"[IPv6:", b"a@x", b"postmaster"]
PATHS += [b" SIZE=", b" BODY=8BITMIME", b" SMTPUTF8", b" AUTH=<>", b" =", b" =x", b"FROM:", b"TO:"]
FIELDS = [
    b"Subject:",
    b"subject :",
    b"From: a@x",
    b"From x",
    b">From ",
    b"Bcc:",
    b"a:",
    b"\xef\xbb\xbf",
]
WORDS = [b"=?", b"?=", b"?q?", b"?B?", b"?", b"=?utf-8?q?", b"=?gb2312?b?", b"=1B=0A", b"=E2=80=AE"]
WORDS += [b"=?utf-7?q?+2AA-?=", b"=?unicode-escape?q?=5Cud800?="]
CHARSETS = [
    b"utf-8",
    b"utf-16",
    b"utf-7",
    b"iso-2022-jp",
    b"hz",
    b"idna",
    b"punycode",
    b"zlib",
    b"hex",
]
CHARSETS += [b"undefined", b"mbcs", b"unicode_escape", b"raw-unicode-escape", b"rot13", b"utf-8*fr"]
CHARSETS += [b"*", b"..", b"os", b"aliases", b"\0", b"dos-0", b"cp99999", "é".encode(), b"x" * 300]
ENDS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n.\r\n",
    b"\r\n.",
    b".",
    b"\r\n..",
    b"\n.\n",
    b"\r\r\n",
    b"\r\n ",
]
ODD = [b" ", b"\t", b"\0", b"\x1b", b"\x7f", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]
ODD += [
    text.encode() for text in ("é", "\x85", "\xa0", "\u2028", "\u202e", "\ufffe", "🎉", "%s", "{}")
]
NUMBERS = [b"0", b"-1", b"9" * 30, b"1" * 5000, "٣".encode(), b"1e9", b"0x7fffffff"]
FRAGMENTS = [COMMANDS, PATHS, FIELDS, WORDS, CHARSETS, ENDS, ENDS, ENDS, ODD, NUMBERS]


def noise(chance: Random) -> bytes:
    """Return random octets."""
    return chance.randbytes(chance.randint(0, chance.choice([5, 50, 5000])))


def run(chance: Random) -> bytes:
    """Return one fragment, repeated."""
    length = chance.choice([*[10] * 8, *[100] * 4, 998, 8192, LINE_OCTETS + chance.randint(-20, 5)])
    fragment = chance.choice(chance.choice(FRAGMENTS))
    return fragment * (length // len(fragment))


def word(chance: Random) -> bytes:
    """Return an encoded word (RFC 2047) in any charset."""
    text = noise(chance)[: chance.randint(0, 60)] + fragments(chance, 3)
    coding, octets = chance.choice([(b"b", b64encode(text)), (b"q", text), (b"b", text)])
    return b"=?%b?%b?%b?=" % (chance.choice(CHARSETS), coding, octets)


def fragments(chance: Random, most: int = 40) -> bytes:
    """Return random fragments of all kinds."""
    return b"".join(chance.choice(chance.choice(FRAGMENTS)) for _ in range(chance.randint(0, most)))


def session(chance: Random) -> bytes:
    """Return commands with arguments, and mails, some of them well-formed."""
    lines = []
    for _ in range(chance.randint(1, 20)):
        rest = chance.choice([run, word, fragments, response])
        line = chance.choice(COMMANDS) + (rest(chance) if chance.random() < 0.3 else b"")
        lines.append(line + chance.choice(ENDS) if chance.random() < 0.1 else line + b"\r\n")
        if chance.random() < 0.3:
            lines.append(mail(chance))
    return b"".join(lines)


def response(chance: Random) -> bytes:
    """Return a response to a challenge."""
    parts = [b"\0", b"\1", b"user=", b"n,a=", b",", b"a@x", b" " + b"0" * 32, b"\x1b", b"\xff"]
    return b" " + b64encode(b"".join(chance.choices(parts, k=chance.randint(0, 6))))


def mail(chance: Random) -> bytes:
    """Return a mail, usually with its end."""
    lines = []
    for _ in range(chance.randint(0, 20)):
        body = chance.choice([noise, run, word, fragments])(chance)
        lines.append(chance.choice([*FIELDS, b"", b" "]) + body + chance.choice(ENDS))
    return b"".join(lines) + chance.choice([END_OF_DATA, END_OF_DATA, b""])


def path(chance: Random) -> bytes:
    """Return something like a path with parameters."""
    return b"".join(chance.choice(chance.choice([PATHS, PATHS, ODD])) for _ in range(20))


SOURCES = [noise, fragments, session, mail, path]


def damaged(chance: Random, octets: bytes) -> bytes:
    """Return *octets* with up to ten random edits."""
    rest = bytearray(octets)
    for _ in range(chance.choice([0, 0, 1, 10])):
        place = chance.randint(0, len(rest))
        rest[place : place + chance.randint(0, 3)] = noise(chance)[: chance.randint(0, 3)]
    return bytes(rest)


def pieces(chance: Random, octets: bytes) -> Iterator[bytes]:
    """Yield *octets* in pieces, cut at random."""
    cuts = chance.randint(0, chance.choice([0, 3, 50, min(1000, len(octets))]))
    places = sorted(chance.randint(0, len(octets)) for _ in range(cuts))
    for first, end in pairwise([0, *places, len(octets)]):
        yield octets[first:end]


def assert_one_line(shown: str, most: int = 16 * 1024) -> None:
    assert len(shown.splitlines()) <= 1
    assert len(shown.encode()) <= most
    assert printable(shown, most) == shown


class Server:
    """Drives a conversation as a connection does, and checks each action."""

    def __init__(self, chance: Random) -> None:
        self.conversation = Conversation(chance.choice(OFFERS))
        self.replies: list[bytes] = []
        self.is_over = False
        self._chance = chance

    def hear(self, octets: bytes) -> None:
        """Receive *octets* and perform the actions that follow, at most a few per octet."""
        unread = self.conversation.unread + len(octets)
        self.conversation.receive(bytearray(octets + b"\r\n.\r\n"), len(octets))
        self.work(4 * unread + 10)
        assert self.conversation.unread <= LINE_OCTETS + 1

    def work(self, most: int) -> None:
        for _ in range(most):
            action = self.conversation.next_action()
            if action is None:
                return
            assert not self.is_over or isinstance(action, Report)
            self.perform(action)
        raise AssertionError(f"More than {most} actions")

    def perform(self, action: object) -> None:
        match action:
            case Reply(octets):
                assert REPLY.fullmatch(octets)
                assert octets.decode().replace("\r\n", "").isprintable()
                assert len({line[:3] for line in octets.splitlines()}) == 1
                self.replies.append(octets)
            case Report(text):
                assert type(text) is str
                assert_one_line(printable(text))
            case Mail():
                reply = self._chance.choice(["250 OK", "250 OK", "451 4.3.0 Storage failed"])
                self.conversation.delivered(reply)
            case Control.BEGIN_TLS:
                self.conversation.receive(b"EHLO injected\r\n")
                self.conversation.tls_begun()
            case _:
                assert action is Control.CLOSE
                self.is_over = True

    def leave(self) -> None:
        """Disconnect the client, with or without an EOF; then nothing is left to do."""
        if self._chance.random() < 0.5:
            self.conversation.receive_eof()
            self.work(5)
            assert self.is_over
        self.conversation.lost(self._chance.choice(["", "It is cut"]))
        self.work(5)
        self.is_over = True
        assert self.conversation.unread == 0


def converse(chance: Random, octets: bytes) -> None:
    server = Server(chance)
    server.work(5)
    for piece in pieces(chance, octets):
        server.hear(piece)
    if chance.random() < 0.5:
        server.leave()
    # Whatever it was waiting for, it still answers.
    server.hear(END_OF_DATA)
    server.hear(b"*\r\nNOOP\r\n")
    assert server.is_over or server.replies[-1] == b"250 OK\r\n"


def read_path(_chance: Random, octets: bytes) -> None:
    text = octets[:LINE_OCTETS].decode("utf-8", "surrogateescape")
    for keyword, argument in (("FROM", text), ("FROM", f"FROM:{text}"), ("TO", f"to:<{text}")):
        parsed = parse(keyword, argument)
        if parsed is not None:
            assert parsed.address
            assert parsed.address == "<>" or parsed.address in argument
            assert len(parsed.options) == len(parsed.parameters)
            assert all(isinstance(fault, str) for fault in parsed.faults)


def show(chance: Random, octets: bytes) -> None:
    words = [b"", word(chance), chance.choice(WORDS)]
    content = chance.choice([b"", b"Subject: " + chance.choice(words)]) + octets
    address = octets[:LINE_OCTETS].decode("utf-8", "surrogateescape")
    addresses = [address] * chance.choice([1, 2, 3000])
    message = Message.from_envelope(("::1", 1, 0, 0), envelope(address, addresses, content))
    summary = message.summary()
    assert summary.keys() == {"peer", "mail_from", "rcpttos", "subject"}
    arrival = Arrival(message, datetime.now(timezone.utc))
    for shown in (" ".join(summary.values()), "; ".join(message.faults())):
        assert_one_line(shown)
    for shown in as_text(arrival).split("\n"):
        assert_one_line(shown, sys.maxsize)
    assert json.loads(as_json(arrival))["size"] == len(content)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("read", [converse, read_path, show])
def test_no_octets_make_the_server_fail_or_stall_or_say_anything_ill_formed(
    times: Callable[[int, int], int],
    read: Callable[[Random, bytes], None],
    source: Callable[[Random], bytes],
) -> None:
    end = time.monotonic() + times(1, SOAK_SECONDS) / (3 * len(SOURCES))
    for number in count(times(0, SystemRandom().getrandbits(40))):
        chance = Random(number)  # noqa: S311  # no secret
        try:
            read(chance, damaged(chance, source(chance)))
        except Exception as error:
            raise AssertionError(f"The seed is {number}") from error
        if time.monotonic() > end:
            break


# Split to keep each part within faulthandler_timeout.
@pytest.mark.parametrize("part", range(4))
def test_a_session_answers_as_the_model_does(times: Callable[[int, int], int], part: int) -> None:
    few_or_many = settings(
        database=None, deadline=None, max_examples=times(1, 300), stateful_step_count=30
    )
    number = part + times(0, SystemRandom().getrandbits(32))
    machine = seed(number)(partial(Sessions))
    run_state_machine_as_test(machine, settings=few_or_many)  # type: ignore[no-untyped-call]  # theirs


# All combinations of line ends around a dot.

TOKENS = [b"\r", b"\n", b"\r\n", b".", b"x"]
SMUGGLED = b"MAIL FROM:<evil@x>\r\nRCPT TO:<evil@x>\r\nDATA\r\nevil\r\n.\r\n"


def variants(most: int) -> list[bytes]:
    """Return every end of a mail that up to *most* tokens can form."""
    sequences = (product(TOKENS, repeat=length) for length in range(most + 1))
    ends = dict.fromkeys(b"".join(tokens) for tokens in (t for s in sequences for t in s))
    return [begin + end for begin in (b"", b"hi") for end in ends]


def expected(variant: bytes) -> list[tuple[str, bytes]]:
    """Return the sender and content of each mail expected from *variant* and SMUGGLED."""
    content, _, rest = (b"\r\n" + variant + SMUGGLED).partition(END_OF_DATA)
    content = (content + b"\r\n").replace(b"\r\n.", b"\r\n").removeprefix(b"\r\n")
    is_command = (b"\n" + rest).endswith(b"\n" + SMUGGLED)
    return [("a@x", content), *[("evil@x", b"evil\r\n")] * is_command]


def arrive_whole(octets: bytes) -> list[bytes]:
    return [octets]


def arrive_by_octets(octets: bytes) -> list[bytes]:
    return [octets[place : place + 1] for place in range(len(octets))]


def found(pieces: list[bytes]) -> tuple[list[tuple[str, bytes]], object]:
    """Return the sender and content of each mail in *pieces*, and the last reply."""
    conversation, actions = begin(OFFER, EHLO + BEGIN), []
    for piece in pieces:
        conversation.receive(piece)
        actions += pull(conversation)
    mails = [action for action in actions if isinstance(action, Mail)]
    return [(mail.reverse_path.address, mail.content) for mail in mails], actions[-1]


def assert_ends_as_expected(pieces: list[bytes], variant: bytes) -> None:
    assert found(pieces) == (expected(variant), Reply(b"250 OK\r\n")), variant


@pytest.mark.parametrize("arrive", [arrive_whole, arrive_by_octets])
def test_only_a_dot_between_two_crlf_ends_a_mail_and_nothing_is_smuggled(
    times: Callable[[int, int], int], arrive: Callable[[bytes], list[bytes]]
) -> None:
    for variant in variants(times(3, 5)):
        pieces = arrive(variant + SMUGGLED + b"NOOP\r\n")
        assert_ends_as_expected(pieces, variant)


class Tunnel:
    """A TLS session, in which octets arrive in records."""

    def __init__(self) -> None:
        context, trust = generated(Options(tls="implicit"))
        self._client, self._layer = Client(trust), Layer(context)
        shake_hands(self._client, self._layer, 100_000)

    def whole(self, octets: bytes) -> list[bytes]:
        """Send *octets* as one record."""
        return [self._layer.receive(self._client.encrypt(octets))]

    def records(self, octets: bytes) -> list[bytes]:
        """Send each octet as a record of its own."""
        return [self._layer.receive(self._client.encrypt(o)) for o in arrive_by_octets(octets)]

    def parts_of_records(self, octets: bytes) -> list[bytes]:
        """Send each octet as a record of its own, and the records octet by octet."""
        records = b"".join(map(self._client.encrypt, arrive_by_octets(octets)))
        return [self._layer.receive(octet) for octet in arrive_by_octets(records)]


@pytest.mark.parametrize(
    ("arrive", "few", "many"),
    [(Tunnel.whole, 3, 5), (Tunnel.records, 3, 5), (Tunnel.parts_of_records, 1, 3)],
)
def test_over_tls_nothing_else_ends_a_mail_either_and_nothing_is_smuggled(
    times: Callable[[int, int], int],
    arrive: Callable[[Tunnel, bytes], list[bytes]],
    few: int,
    many: int,
) -> None:
    tunnel = Tunnel()
    for variant in variants(times(few, many)):
        pieces = arrive(tunnel, variant + SMUGGLED + b"NOOP\r\n")
        assert_ends_as_expected(pieces, variant)
