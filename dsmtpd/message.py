"""What arrived, as a frozen record: the envelope, the peer and the content."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

# Only so much of the header and of a subject is read for the log: a hostile mail must not keep the
# server busy.
_HEADER_OCTETS = 1024 * 1024
_SUBJECT_OCTETS = 8 * 1024

# RFC 5321, section 4.5.3.1.6, without the CRLF.
LINE_OCTETS = 998

# RFC 5322, sections 2.2 and 3.6.8: a field, with its continuation lines. Bare line feeds count.
_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:(.*(?:\n[ \t].*)*)(?:\n|\Z)")
_FOLD = re.compile(rb"\r?\n[ \t]+")
# RFC 2047, section 2; white space between two encoded words is not shown (section 6.2).
_ENCODED_WORD = r"=\?[^?\s]+\?[bq]\?[^?]*\?="
_ENCODED_WORDS = re.compile(rf"{_ENCODED_WORD}(?:\s*{_ENCODED_WORD})*", re.IGNORECASE)


class Envelope(Protocol):
    """What this module needs of aiosmtpd's envelope."""

    mail_from: str | None
    rcpt_tos: list[str]
    content: bytes | str | None


@dataclass(frozen=True, slots=True)
class Message:
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
        for name, value in _fields(self.content):
            if name.lower() == b"subject":
                line = _FOLD.sub(b" ", value[:_SUBJECT_OCTETS]).strip(b" \t\r")
                return _decoded(line) + ("..." if len(value) > _SUBJECT_OCTETS else "")
        return ""

    def summary(self) -> dict[str, str]:
        """Return what the log line shows, each value safe for a terminal."""
        return {
            "peer": printable(endpoint(self.peer)),
            "mail_from": printable(self.mail_from),
            "rcpttos": printable(", ".join(self.rcpt_tos)),
            "subject": printable(self.subject),
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

        Other servers may refuse such a line (RFC 5321, section 4.5.3.1.6).
        """
        longest = begin = 0
        while begin < len(self.content):
            # As many lines as fit into the limit are passed over at once.
            end = self.content.rfind(b"\r\n", begin, begin + LINE_OCTETS + 2)
            if end < 0:
                end = self.content.find(b"\r\n", begin)
                end = len(self.content) if end < 0 else end
                longest = max(longest, end - begin)
            begin = end + 2
        return longest if longest > LINE_OCTETS else 0


def endpoint(address: Any) -> str:
    """Return a socket *address* as `host:port`, with an IPv6 host in brackets (RFC 3986)."""
    if not isinstance(address, tuple):
        return str(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def printable(text: str) -> str:
    r"""Return *text* with all that is no printable character escaped, as in `\x1b` or `\u202e`.

    A mail can then neither forge a line of the log nor drive the terminal that shows it.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _fields(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the raw value of each field, up to the first line that is none."""
    match = _FIELD.match(content, 0, _HEADER_OCTETS)
    while match:
        yield match[1], match[2]
        match = _FIELD.match(content, match.end(), _HEADER_OCTETS)


def _decoded(value: bytes) -> str:
    """Return a field's *value* as text.

    What is not UTF-8 is read as Latin-1, and broken encoded words stay as they were sent.
    """
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return _ENCODED_WORDS.sub(lambda words: _decoded_words(words[0]), text)


def _decoded_words(words: str) -> str:
    """Return a run of encoded *words* as text, or as it is when it is broken (RFC 2047)."""
    try:
        # A charset may be followed by a language (RFC 2231, section 5).
        return "".join(
            word.decode(str(charset).partition("*")[0], "replace")
            for word, charset in decode_header(words)
        )
    except (HeaderParseError, LookupError, ValueError):
        return words


def _encoded(value: str) -> str:
    """Return *value* as a field body of one line that decodes to exactly *value*.

    Printable ASCII stays as it is, unless it looks like an encoded word; all else is put into
    encoded words of 75 octets at the most (RFC 2047). Octets that came as no valid UTF-8 are kept
    under the charset `unknown-8bit` (RFC 1428).
    """
    if value.isascii() and value.isprintable() and "=?" not in value:
        return value
    undecodable = any("\ud800" <= character <= "\udfff" for character in value)
    charset = "unknown-8bit" if undecodable else "utf-8"
    # Ten characters are 40 octets of UTF-8 or less, and 56 of base64: a word has room for them.
    pieces = (
        value[i : i + 10].encode("utf-8", "surrogateescape") for i in range(0, len(value), 10)
    )
    return " ".join(f"=?{charset}?b?{b64encode(piece).decode()}?=" for piece in pieces)
