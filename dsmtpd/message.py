"""What arrived, as a frozen record: the envelope, the peer and the content."""

from __future__ import annotations

import re
from binascii import b2a_base64
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmtpd.text import decoded, endpoint, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiosmtpd.smtp import Envelope

# Only so much is looked at for the log: a hostile mail must not block other sessions.
CHECKED_OCTETS = 1024 * 1024
_HEADER_OCTETS = 256 * 1024
_FIELDS = 10_000
_SUBJECT_OCTETS = 8 * 1024

# So much of an envelope is shown: a line of the log has at most 16 KiB.
_MAIL_FROM_OCTETS = 2 * 1024
_RCPT_TOS_OCTETS = 4 * 1024

# RFC 2047, section 2: an encoded word has at most 75 characters, of which base64 gets 56.
_WORD_OCTETS = 42
# The octets of UTF-8 that begin no character (RFC 3629, section 3).
_CONTINUATIONS = range(0x80, 0xC0)

# RFC 5321, section 4.5.3.1.6, without the CRLF.
LINE_OCTETS = 998

# RFC 5322, sections 2.2 and 3.6.8: a field, with its continuation lines. Bare line feeds and bare
# carriage returns count; a line of an mbox file, which no header has, is passed over.
_EOL = rb"(?:\r*\n|\r)"
_MBOX = rb"(?:>?From [^\r\n]*" + _EOL + rb")*"
_BODY = rb"([^\r\n]*(?:" + _EOL + rb"[ \t][^\r\n]*)*)"
_FIELD = re.compile(_MBOX + rb"([!-9;-~]+)[ \t]*:" + _BODY + rb"(?:" + _EOL + rb"|\Z)")
_FOLD = re.compile(_EOL + rb"[ \t]+")

# The last character of UTF-8 in a text that is cut.
_LAST = re.compile(rb"[\xc0-\xff][\x80-\xbf]{0,3}\Z")


class Message(NamedTuple):
    """One mail as it came in.

    *peer*: the client's socket address, as Python's `socket` gives it.
    *mail_from*: the reverse-path, `<>` when it is null (RFC 5321, section 4.5.5).
    *rcpt_tos*: the recipients.
    *content*: the octets after DATA, dot-unstuffed, with the line ends that were sent.
    """

    peer: Any
    mail_from: str
    rcpt_tos: tuple[str, ...]
    content: bytes

    @classmethod
    def from_envelope(cls, peer: Any, envelope: Envelope) -> Message:
        """Return the message that *peer* sent in *envelope*."""
        content = envelope.content or b""
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")
        return cls(peer, envelope.mail_from or "<>", tuple(envelope.rcpt_tos), content)

    @property
    def subject(self) -> str:
        """The first Subject, unfolded and decoded; empty when there is none."""
        for name, value in islice(_fields(self.content), _FIELDS):
            if name.lower() == b"subject":
                if len(value) > _SUBJECT_OCTETS:
                    return decoded(_LAST.sub(b"", _unfolded(value[:_SUBJECT_OCTETS]))) + "..."
                return decoded(_unfolded(value))
        return ""

    def summary(self) -> dict[str, str]:
        """Return what the log line shows, each value safe for a terminal."""
        return {
            "peer": printable(endpoint(self.peer)),
            "mail_from": printable(self.mail_from, _MAIL_FROM_OCTETS),
            "rcpttos": _listed(self.rcpt_tos),
            "subject": printable(self.subject, _SUBJECT_OCTETS),
        }

    def envelope_fields(self) -> bytes:
        """Return the envelope as header fields, to stand at the top of the stored mail.

        There no field of the mail can hide them. Where the mail begins with white space, they end
        with an empty line: its beginning would continue the last of them.
        """
        fields = (
            ("X-Peer", str(self.peer)),
            ("X-MailFrom", self.mail_from),
            ("X-RcptTo", ", ".join(self.rcpt_tos)),
        )
        end = "\n" if self.content.startswith((b" ", b"\t")) else ""
        head = "".join(f"{name}: {_encoded(value)}\n" for name, value in fields) + end
        return head.encode("ascii")

    def longest_line(self) -> int:
        """Return the octets of the longest line, without its CRLF, if that is over 998; else 0.

        Other servers may refuse such a line (RFC 5321, section 4.5.3.1.6). Only the first MiB of a
        mail is looked at.
        """
        size = min(len(self.content), CHECKED_OCTETS)
        longest = begin = 0
        while begin < size:
            # As many lines as fit into the limit are passed over at once.
            end = self.content.rfind(b"\r\n", begin, begin + LINE_OCTETS + 2)
            if end < 0:
                end = self.content.find(b"\r\n", begin, size)
                end = size if end < 0 else end
                longest = max(longest, end - begin)
            begin = end + 2
        return longest if longest > LINE_OCTETS else 0


def _listed(addresses: tuple[str, ...]) -> str:
    """Return *addresses* as a list that is safe to show, as far as that is not too long."""
    listed: list[str] = []
    octets = 0
    for address in addresses:
        listed.append(printable(address, _RCPT_TOS_OCTETS))
        octets += len(listed[-1].encode()) + len(", ")
        if octets > _RCPT_TOS_OCTETS and len(listed) > 1:
            more = len(addresses) - len(listed) + 1
            return f"{', '.join(listed[:-1])} and {more:,} more"
    return ", ".join(listed)


def _fields(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the raw value of each field, up to the first line that is none."""
    match = _FIELD.match(content, 0, _HEADER_OCTETS)
    while match:
        yield match[1], match[2]
        match = _FIELD.match(content, match.end(), _HEADER_OCTETS)


def _unfolded(value: bytes) -> bytes:
    return _FOLD.sub(b" ", value).strip(b" \t\r")


def _encoded(value: str) -> str:
    """Return *value* as a field body of one line that decodes to exactly *value*.

    Printable ASCII stays as it is, unless it looks like an encoded word; all else is put into
    encoded words of 75 octets at the most (RFC 2047). Octets that came as no valid UTF-8 are kept
    under the charset `unknown-8bit` (RFC 1428).
    """
    if value.isascii() and value.isprintable() and "=?" not in value:
        return value
    try:
        octets, charset = value.encode(), "utf-8"
    except UnicodeEncodeError:
        octets, charset = value.encode("utf-8", "surrogateescape"), "unknown-8bit"
    base64 = partial(b2a_base64, newline=False)
    return " ".join(f"=?{charset}?b?{base64(part).decode()}?=" for part in _parts(octets))


def _parts(octets: bytes) -> Iterator[bytes]:
    """Yield *octets* in parts that fit into an encoded word, and that cut no character of UTF-8."""
    begin = 0
    while begin < len(octets):
        end = begin + _WORD_OCTETS
        least = end - 3  # A character has four octets at the most.
        while least < end < len(octets) and octets[end] in _CONTINUATIONS:
            end -= 1
        yield octets[begin:end]
        begin = end
