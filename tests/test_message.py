from __future__ import annotations

import email
import email.policy
from email.header import decode_header

import pytest

from dsmtpd.message import Message
from tests.tools import envelope

PEER = ("127.0.0.1", 54321)


def message(
    content: bytes | str, mail_from: str = "a@x", rcpt_tos: tuple[str, ...] = ("b@x",)
) -> Message:
    return Message.from_envelope(PEER, envelope(mail_from, rcpt_tos, content))


@pytest.mark.parametrize(
    ("field", "subject"),
    [
        (b"Subject: Welcome", "Welcome"),
        (b"SUBJECT:Welcome", "Welcome"),
        (b"Subject : Welcome \t", "Welcome"),
        (b"Subject:", ""),
        (b"To: b@x", ""),
        (b"X-Subject: no\r\nSubject: yes\r\nSubject: too late", "yes"),
        (b"Received: a\r\n\tSubject: folded\r\nSubject: real", "real"),
        (b"Subject: in\r\n three\r\n\tlines", "in three lines"),
        (b"Subject: bare\n line feed", "bare line feed"),
        (b"Subject: =?utf-8?q?caf=C3=A9?= =?utf-8?b?8J+OiQ==?= au lait", "café🎉 au lait"),
        (b"Subject: Re: =?ISO-8859-1?Q?caf=E9?=", "Re: café"),
        (b"Subject: =?utf-8?b?w6k=?=\r\n =?utf-8?q?t=C3=A9?=", "été"),
        (b"Subject: =?utf-8?b?8J+O?= =?utf-8?b?iQ==?=", "🎉"),
        (b"Subject: =?utf-8*fr?q?=C3=A9t=C3=A9?=", "été"),
        (b"Subject: C:\\users =?utf-8?q?=C3=A9?=", "C:\\users é"),
        ("Subject: raw é 🎉".encode(), "raw é 🎉"),
        (b"Subject: caf\xe9", "café"),
        (b"Subject: =?utf-8?q?=FF?= rest", "\ufffd rest"),
        (b"Subject: =?no-such?q?x?= rest", "=?no-such?q?x?= rest"),
        (b"Subject: =?hex?q?00?=", "=?hex?q?00?="),
        (b"Subject: =?undefined?q?x?=", "=?undefined?q?x?="),
        (b"Subject: =?a\x00b?q?x?=", "=?a\x00b?q?x?="),
        (b"Subject: =?utf-8?b?a?=", "=?utf-8?b?a?="),
        (b"Subject: =?utf-8?q?open", "=?utf-8?q?open"),
        (b"not a field\r\nSubject: in the body", ""),
        (b"To: b@x\r\n\r\nSubject: in the body", ""),
        (b"Subject:a:b", "a:b"),
        (b": no name\r\nSubject: in the body", ""),
        (b"X-1: a\r\nSubject: yes", "yes"),
        (b"To: b@x\r\n \r\nSubject: yes", "yes"),
        (b"Subject: in\r\n \t two", "in two"),
        (b"Subject: =?utf 8?q?=C3=A9?=", "=?utf 8?q?=C3=A9?="),
        (b"Subject: =?utf-8?x?y?=", "=?utf-8?x?y?="),
        (b"Subject: =?utf-8?q?a b?=", "a b"),
        (b"Subject: a=?utf-8?q??=b", "ab"),
        (b"Subject: =?utf-8?b?8J+O?==?utf-8?b?iQ==?=", "🎉"),
        (b"Subject: \x80\xe9", "€é"),
        (b"From app@x Thu Jan  1 00:00:00 2026\r\nFrom: app@x\r\nSubject: yes", "yes"),
        (b">From app@x\r\n>From b@x\r\nSubject: yes", "yes"),
        (b"To: b@x\r\nFrom app@x\r\nSubject: yes", "yes"),
        (b"From: a@e.x\rSubject: W\r\rHi", "W"),
        (b"Subject: in\r two\rTo: b@x", "in two"),
        (b"Subject: two\r\r\nTo: b@x", "two"),
    ],
)
def test_the_subject_is_unfolded_and_decoded(field: bytes, subject: str) -> None:
    assert message(field).subject == subject
    assert message(field + b"\r\n\r\nbody\r\n").subject == subject
    assert message(field.replace(b"\r\n", b"\n") + b"\n\nbody\n").subject == subject


def test_a_long_subject_is_cut_before_it_is_decoded() -> None:
    subject = message(b"Subject: " + b"=?utf-8?q?a?=\r\n " * 100_000 + b"\r\n").subject
    assert subject.startswith("aaaa")
    assert subject.endswith("...")
    assert len(subject) < 1000


@pytest.mark.parametrize("octets", range(8180, 8200))
def test_a_long_subject_is_cut_between_two_characters(octets: int) -> None:
    ascii_octets = octets % 4 + 1
    sent = "a" * ascii_octets + "🎉" * 5000
    subject = message(f"Subject: {sent}\r\n".encode()).subject
    assert subject.endswith("🎉...")
    assert sent.startswith(subject[:-3])


def test_a_subject_after_128_kib_of_header_is_ignored() -> None:
    field = b"X-Long: " + b"x" * 1024 + b"\r\n"
    assert message(field * 120 + b"Subject: seen\r\n").subject == "seen"
    assert message(field * 130 + b"Subject: not seen\r\n").subject == ""


def test_a_subject_after_10_000_fields_is_ignored() -> None:
    assert message(b"a:\r\n" * 9_999 + b"Subject: seen\r\n").subject == "seen"
    assert message(b"a:\r\n" * 10_000 + b"Subject: not seen\r\n").subject == ""


def test_an_empty_mail_has_no_subject() -> None:
    assert message(b"").subject == ""


def test_text_content_is_converted_back_to_its_bytes() -> None:
    assert message("Subject: é\udcff\n").content == b"Subject: \xc3\xa9\xff\n"


def test_an_empty_envelope_becomes_an_empty_mail_with_the_null_reverse_path() -> None:
    mail = Message.from_envelope(PEER, envelope(None, [], None))
    assert (mail.mail_from, mail.rcpt_tos, mail.content) == ("<>", (), b"")


def test_every_part_of_the_summary_is_printable() -> None:
    hostile = message(b"Subject: =?utf-8?q?a=1Bb=0Ac?=\r\n", "\x1b@x", ("b\u202e@x", "c@x"))
    assert message(b"")._replace(peer="/run/\x1b").summary()["peer"] == r"/run/\x1b"
    assert hostile.summary() == {
        "peer": "127.0.0.1:54321",
        "mail_from": r"\x1b@x",
        "rcpttos": r"b\u202e@x, c@x",
        "subject": r"a\x1bb\nc",
    }


def test_the_summary_lists_at_most_4_kib_of_recipients() -> None:
    few = tuple(f"user{number:03}@example.com" for number in range(178))
    assert message(b"", rcpt_tos=few).summary()["rcpttos"] == ", ".join(few)
    shown = message(b"", rcpt_tos=few * 57).summary()["rcpttos"]
    listed, _, more = shown.rpartition(" and ")
    count = len(listed.split(", "))
    assert more == f"{178 * 57 - count:,} more"
    assert 4000 < len(listed) <= 4096


@pytest.mark.parametrize("address", ["\udcff" * 980, "é" * 980, "\U000e0041" * 980])
def test_no_log_line_is_longer_than_16_kib(address: str) -> None:
    content = b"Subject: " + b"\xff\x1b" * 5000 + b"\r\n\r\n"
    summary = message(content, address, (address,) * 10_000).summary()
    assert sum(len(text.encode()) for text in summary.values()) < 15 * 1024
    assert summary["rcpttos"].endswith(" more")


def test_the_first_recipient_is_shown_even_if_it_must_be_cut() -> None:
    assert message(b"", rcpt_tos=("b" * 5000,)).summary()["rcpttos"] == "b" * 4093 + "..."


def test_the_fields_of_the_envelope_come_before_those_of_the_mail() -> None:
    content = b"X-MailFrom: c@x\r\n\r\nhi\r\n"
    head = message(content, "a@x", ("b@x", "c@x")).envelope_fields()
    assert head == b"X-Peer: ('127.0.0.1', 54321)\nX-MailFrom: a@x\nX-RcptTo: b@x, c@x\n"
    assert email.message_from_bytes(head + content)["X-MailFrom"] == "a@x"


@pytest.mark.parametrize("content", [b" , evil@x\r\n\r\nhi", b"\tfolded\r\nSubject: x\r\n"])
def test_the_mail_cannot_continue_a_field_of_the_envelope(content: bytes) -> None:
    head = message(content).envelope_fields()
    assert email.message_from_bytes(head + content)["X-RcptTo"] == "b@x"


HEAD = b"From: a@x\r\n"


def long_line(content: bytes) -> int:
    """Return the length of the line that is reported as too long, or 0."""
    faults = [fault for fault in message(content).faults() if fault.startswith("a line of ")]
    assert all(fault.endswith(" octets, which is more than 998") for fault in faults)
    return sum(int(fault.split()[3].replace(",", "")) for fault in faults)


@pytest.mark.parametrize("octets", [0, 1, 997, 998, 999, 1000, 1001, 70_000])
@pytest.mark.parametrize("before", [b"", b"\r\n", b"y" * 998 + b"\r\n", b"y" * 40 + b"\r\n"])
@pytest.mark.parametrize("after", [b"", b"\r\n", b"\r\nz" * 600])
def test_the_longest_line_is_reported_if_it_is_over_998_octets(
    octets: int, before: bytes, after: bytes
) -> None:
    content = before * 50 + b"x" * octets + after
    assert long_line(content) == (octets if octets > 998 else 0)


def test_only_the_part_of_a_line_in_the_first_mebibyte_counts() -> None:
    before = (b"x" * 510 + b"\r\n") * 2046
    assert long_line(before + b"y" * 2000) == 1024
    assert long_line(before + b"\r\n" * 13 + b"y" * 2000) == 0


def test_the_longest_of_several_long_lines_is_reported_and_a_bare_lf_ends_a_line() -> None:
    lines = [b"a" * 2000, b"b" * 5000, b"c" * 3000, b"\n" * 4000]
    assert long_line(b"\r\n".join(lines)) == 5000
    assert long_line(b"x" * 600 + b"\n" + b"x" * 600 + b"\r") == 0


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (b"From: a@x\r\nSubject: s\n\n" + b"short\n" * 200, ["202 bare LF, first in line 2"]),
        (
            HEAD + b"\r\na\n" + b"x" * 2000,
            ["1 bare LF, first in line 3", "a line of 2,000 octets, which is more than 998"],
        ),
        (b"From: a@e.x\rSubject: W\r\rHi\r\r\n", ["4 bare CR, first in line 1"]),
        (HEAD + b"\r\na\0b\0\r\n", ["2 NUL, first in line 3"]),
        (
            HEAD + b"\r\na\nb\rc\0",
            ["1 bare LF, first in line 3", "1 bare CR, first in line 4", "1 NUL, first in line 4"],
        ),
        (b"", ["the header is empty"]),
        (b"\r\nFrom: a@e.x\r\nSubject: Welcome\r\n\r\nx", ["the header is empty"]),
        (
            b"Subject: Hello\r\nyour order\r\nFrom: a@e.x\r\n\r\nx",
            ["line 2 is not a header field, so the header ends there: 'your order'"],
        ),
        (
            b"X-Long: a\r\nb without colon\r\nSubject: Welcome\r\n\r\n",
            ["line 2 is not a header field, so the header ends there: 'b without colon'"],
        ),
        (
            b" From: a@x\r\n\r\n",
            ["line 1 is not a header field, so the header ends there: ' From: a@x'"],
        ),
        (
            b"\x1b[2J" + b"x" * 100,
            [f"line 1 is not a header field, so the header ends there: '\\x1b[2J{'x' * 56}'"],
        ),
        (
            b"\xef\xbb\xbfFrom: a@e.x\r\nSubject: Welcome\r\n\r\nx",
            ["a byte order mark before the header"],
        ),
        (
            b"From app@x Thu Jan  1 00:00:00 2026\r\nFrom: app@x\r\nSubject: W\r\n\r\nHi",
            ["line 1 is a From line of an mbox file"],
        ),
        (HEAD + b">From x\r\nSubject: W\r\n\r\n", ["line 2 is a From line of an mbox file"]),
        (
            "From: a@x\r\nSubject: Café\r\n\r\né".encode(),
            ["octets beyond ASCII in the header without SMTPUTF8, first in line 2"],
        ),
        (
            HEAD + b"Subject: Caf\xe9\r\n\r\n",
            ["octets beyond ASCII in the header without SMTPUTF8, first in line 2"],
        ),
        (b"Subject: s\r\n\r\n", ["no From field"]),
        (
            HEAD * 2 + b"Subject: a\r\nsubject: b\r\nX: 1\r\nX: 2\r\n\r\n",
            ["2 From fields", "2 Subject fields"],
        ),
        (HEAD + b"message-id: <a>\r\n" * 3 + b"\r\n", ["3 Message-ID fields"]),
        (HEAD + b"Bcc: c@x\r\n\r\n", ["a Bcc field, which recipients may see"]),
        (HEAD + b"To: b@x", []),
        (HEAD + b"\r\nFrom nobody\r\n\xe9\r\n.\r\n", []),
        (b"a:\r\n" * 10_001, []),
        (b"a: " + b"x" * 500 + b"\r\n" + (b" " + b"y" * 900 + b"\r\n") * 400, []),
    ],
)
def test_each_fault_of_a_mail_is_named(content: bytes, faults: list[str]) -> None:
    assert message(content).faults() == faults


def test_with_smtputf8_the_header_may_contain_utf_8() -> None:
    def faults(subject: bytes) -> list[str]:
        content = HEAD + b"Subject: " + subject + b"\r\n\r\n"
        return message(content)._replace(smtputf8=True).faults()

    assert faults("Café".encode()) == []
    assert faults(b"Caf\xe9") == ["octets in the header that are not UTF-8"]


def test_a_crlf_across_the_end_of_the_first_mebibyte_is_no_fault() -> None:
    lines = (b"x" * 510 + b"\r\n") * 2047
    content = HEAD + b"\r\n" + lines
    content += b"y" * (1024 * 1024 - len(content) - 1) + b"\r\n" + b"\n" * 10 + b"\0"
    assert content[1024 * 1024 - 1 : 1024 * 1024 + 1] == b"\r\n"
    assert message(content).faults() == []


@pytest.mark.parametrize(
    "address",
    [
        "é@example.com",
        "用户@例え.jp",
        ", ".join(f"用户{number}@例え.jp" for number in range(40)),
        "=?utf-8?q?boss=40x?=",
        '"a\rX-Evil: 1"@x',
        "a\tb\x00@x",
        "🎉" * 25,
    ],
)
def test_an_envelope_field_is_one_line_that_decodes_to_the_address(address: str) -> None:
    head = message(b"", address).envelope_fields()
    line = head.decode("ascii").splitlines()[1]
    assert head.count(b"\n") == 3
    assert all(len(word) <= 75 for word in line.removeprefix("X-MailFrom: ").split(" "))
    parsed = email.message_from_bytes(head, policy=email.policy.compat32)
    assert decode_header(parsed["X-MailFrom"]) == [(address.encode(), "utf-8")]


def test_envelope_fields_keep_octets_that_are_not_utf_8() -> None:
    head = message(b"", "caf\udce9@x").envelope_fields()
    parsed = email.message_from_bytes(head, policy=email.policy.compat32)
    assert decode_header(parsed["X-MailFrom"]) == [(b"caf\xe9@x", "unknown-8bit")]
    assert message(b"", "\udc80" * 99).envelope_fields().count(b"=?unknown-8bit?b?gICA") == 3
    words = message(b"", "🎉" * 25 + "\udce9").envelope_fields().splitlines()[1].split(b" ")
    assert all(len(word) <= 75 for word in words)


FIELDS = [
    b"Subject: Hello",
    b"subject:Hello",
    b"Subject : Hello",
    b"Subject:",
    b"Subject: =?utf-8?q?caf=C3=A9?=",
    b"Subject: in\r\n two lines",
    b"Subject: in\r\n\ttwo lines",
    b"To: b@example.com",
    b"To: B <b@example.com>, c@example.com",
    b"Cc: c@example.com",
    b"Reply-To: d@example.com",
    b"Sender: e@example.com",
    b"Date: Thu, 1 Jan 2026 00:00:00 +0000",
    b"Message-ID: <1@example.com>",
    b"In-Reply-To: <1@example.com>",
    b"References: <1@example.com>\r\n <2@example.com>",
    b"Received: from a by b\r\nReceived: from b by c",
    b"Comments: a\r\nComments: b",
    b"Keywords: a, b\r\nKeywords: c",
    b"Resent-From: a@example.com\r\nResent-To: b@example.com",
    b"Resent-From: a@example.com\r\nResent-From: b@example.com",
    b"Return-Path: <>",
    b"MIME-Version: 1.0",
    b"Content-Type: text/plain; charset=utf-8",
    b"Content-Transfer-Encoding: 8bit",
    b"List-Unsubscribe: <https://example.com/>",
    b"DKIM-Signature: v=1; a=rsa-sha256;\r\n\tb=abc",
    b"X-Very-Long: " + b"x" * 985,
    b"X!#$%&'*+-^_`|~: y",
    b"X-From: nobody",
]


@pytest.mark.parametrize(
    "end", [b"", b"\r\n", b"\r\n\r\n", b"\r\n\r\nHi \xe9\xff\r\n.\r\nFrom x\r\n\t\r\n"]
)
@pytest.mark.parametrize("field", FIELDS)
def test_a_well_formed_mail_has_no_faults(field: bytes, end: bytes) -> None:
    assert message(b"From: a@x\r\n" + field + end).faults() == []
    assert message(field + b"\r\nFrom: a@x" + end).faults() == []
