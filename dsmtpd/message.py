"""A mail as it arrived, in a frozen record, and what other servers may refuse in it."""

from __future__ import annotations

import re
from binascii import b2a_base64
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmtpd.text import decoded, endpoint, printable, unfolded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiosmtpd.smtp import Envelope

# The log looks at no more than this: a hostile mail must not block other sessions.
CHECKED_OCTETS = 1024 * 1024
_HEADER_OCTETS = 128 * 1024
_FIELDS = 10_000
_SUBJECT_OCTETS = 8 * 1024

# The log shows at most this much of an envelope, as its lines have at most 16 KiB.
_MAIL_FROM_OCTETS = 2 * 1024
_RCPT_TOS_OCTETS = 4 * 1024

# RFC 2047, section 2: an encoded word has at most 75 characters, of which base64 gets 56.
_WORD_OCTETS = 42
# The octets of UTF-8 that begin no character (RFC 3629, section 3).
_CONTINUATIONS = range(0x80, 0xC0)

# RFC 5321, section 4.5.3.1.6, without the CRLF.
_LINE_OCTETS = 998

# At most this much is shown of a line that should be a field.
_SHOWN_OCTETS = 60

# The fields that may occur only once (RFC 5322, section 3.6).
_ONCE = {
    name.lower().encode(): name
    for name in (
        *("Date", "From", "Sender", "Reply-To", "To", "Cc", "Bcc"),
        *("Message-ID", "In-Reply-To", "References", "Subject"),
    )
}

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BARE_LF = re.compile(rb"(?<!\r)\n")
_USUAL = bytes({*range(256)}.difference(b"\0\r\n"))
_NUL = re.compile(rb"\x00")
_BARE_CR = re.compile(rb"\r(?!\n)")
_BEYOND_ASCII = re.compile(rb"[^\x00-\x7f]")

# RFC 5322, sections 2.2 and 3.6.8: a field with its continuation lines. A bare line feed or
# carriage return ends a line, too. Lines that belong in mbox files, not in a header, are skipped.
_EOL = rb"(?:\r*\n|\r)"
_MBOX = rb"(?:>?From [^\r\n]*" + _EOL + rb")*"
_BODY = rb"([^\r\n]*(?:\r*\n[ \t][^\r\n]*|\r[ \t][^\r\n]*)*)"
_FIELD = re.compile(_MBOX + rb"([!-9;-~]+)[ \t]*:" + _BODY + rb"(?:" + _EOL + rb"|\Z)")

# The last, perhaps incomplete UTF-8 character of a text that was cut.
_LAST = re.compile(rb"[\xc0-\xff][\x80-\xbf]{0,3}\Z")


class _Header(NamedTuple):
    """The contents of a header; places are indices of the mail's content.

    *names*: the names of its fields, in lower case.
    *subject*: the raw value of the first Subject.
    *mbox_lines*: the places of lines that belong in mbox files, not in a header.
    *end*: the place of the first line that is no field, or where the search stopped.
    """

    names: tuple[bytes, ...]
    subject: bytes
    mbox_lines: tuple[int, ...]
    end: int


class Message(NamedTuple):
    """One mail as it arrived.

    *peer*: the client's socket address, as Python's `socket` gives it.
    *mail_from*: the reverse-path, `<>` when it is null (RFC 5321, section 4.5.5).
    *rcpt_tos*: the recipients.
    *content*: the octets after DATA, dot-unstuffed, with the line ends as sent.
    *header*: the header in it.
    *smtputf8*: whether the header may contain UTF-8 (RFC 6531).
    """

    peer: Any
    mail_from: str
    rcpt_tos: tuple[str, ...]
    content: bytes
    header: _Header
    smtputf8: bool

    @classmethod
    def from_envelope(cls, peer: Any, envelope: Envelope) -> Message:
        """Return the message that *peer* sent in *envelope*."""
        content = envelope.content or b""
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")
        mail_from, rcpt_tos = envelope.mail_from or "<>", tuple(envelope.rcpt_tos)
        return cls(peer, mail_from, rcpt_tos, content, _header(content), envelope.smtp_utf8)

    @property
    def subject(self) -> str:
        """The first Subject, unfolded and decoded; empty when there is none."""
        raw = self.header.subject
        if len(raw) > _SUBJECT_OCTETS:
            return decoded(_LAST.sub(b"", unfolded(raw[:_SUBJECT_OCTETS]))) + "..."
        return decoded(unfolded(raw))

    def summary(self) -> dict[str, str]:
        """Return the values for the log line, each safe for a terminal."""
        return {
            "peer": printable(endpoint(self.peer)),
            "mail_from": printable(self.mail_from, _MAIL_FROM_OCTETS),
            "rcpttos": _listed(self.rcpt_tos),
            "subject": printable(self.subject, _SUBJECT_OCTETS),
        }

    def envelope_fields(self) -> bytes:
        """Return the envelope as header fields for the top of the stored mail.

        There, no field of the mail can hide them. If the mail begins with white space, an empty
        line follows them, as the white space would otherwise continue the last field.
        """
        fields = (
            ("X-Peer", str(self.peer)),
            ("X-MailFrom", self.mail_from),
            ("X-RcptTo", ", ".join(self.rcpt_tos)),
        )
        end = "\n" if self.content.startswith((b" ", b"\t")) else ""
        head = "".join(f"{name}: {_encoded(value)}\n" for name, value in fields) + end
        return head.encode("ascii")

    def faults(self) -> list[str]:
        """Return what other servers may refuse in the content, in words, with the first place.

        Only the first MiB is checked. Consequences of a reported fault are not reported.
        """
        return [*self._header_faults(), *self._line_faults()]

    def _header_faults(self) -> Iterator[str]:
        """Yield what is wrong with the header (RFC 5322, sections 2.1 and 2.2)."""
        content, header = self.content, self.header
        end = header.end
        if end >= _HEADER_OCTETS or len(header.names) >= _FIELDS:
            return  # The header was not read to its end.
        for place in header.mbox_lines:
            yield f"line {_line(content, place)} is a From line of an mbox file"
        if content.startswith(_BYTE_ORDER_MARK):
            yield "a byte order mark before the header"
        elif content[end : end + 1].strip(b"\r\n"):
            line = re.split(_EOL, content[end : end + _SHOWN_OCTETS], maxsplit=1)[0]
            what = f"line {_line(content, end)} is not a header field, so the header ends there"
            yield f"{what}: '{printable(decoded(line))}'"
        elif not header.names:
            yield "the header is empty"
        else:
            yield from self._field_faults(content[:end], header.names)

    def _field_faults(self, header: bytes, names: tuple[bytes, ...]) -> Iterator[str]:
        """Yield what is wrong with the fields of a *header* that is whole (RFC 5322, 3.6)."""
        if not header.isascii():
            if not self.smtputf8:
                what = "octets beyond ASCII in the header without SMTPUTF8"
                yield _with_place(what, _BEYOND_ASCII, header)
            elif not _is_utf8(header):
                yield "octets in the header that are not UTF-8"
        if len(names) > len(set(names)):
            numbers = ((names.count(name), shown) for name, shown in _ONCE.items())
            yield from (f"{number:,} {shown} fields" for number, shown in numbers if number > 1)
        if b"from" not in names:
            yield "no From field"
        if b"bcc" in names:
            yield "a Bcc field, which recipients may see"

    def _line_faults(self) -> Iterator[str]:
        """Yield what is wrong with the lines (RFC 5321, sections 2.3.8 and 4.5.3.1.6)."""
        content = self.content[:CHECKED_OCTETS]
        if len(self.content) > CHECKED_OCTETS and content.endswith(b"\r"):
            content = content[:-1]
        # A mail without faults leaves nothing else.
        special = content.translate(None, _USUAL)
        if special != b"\r\n" * (len(special) // 2):
            line_ends = content.count(b"\r\n")
            if number := content.count(b"\n") - line_ends:
                yield _with_place(f"{number:,} bare LF", _BARE_LF, content)
            if number := content.count(b"\r") - line_ends:
                yield _with_place(f"{number:,} bare CR", _BARE_CR, content)
            if number := content.count(b"\0"):
                yield _with_place(f"{number:,} NUL", _NUL, content)
        if longest := _longest_line(content):
            yield f"a line of {longest:,} octets, which is more than {_LINE_OCTETS}"


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


def _line(content: bytes, place: int) -> int:
    """Return the number of the line at *place*."""
    return content.count(b"\n", 0, place) + 1


def _with_place(what: str, pattern: re.Pattern[bytes], content: bytes) -> str:
    """Return *what* with the line of the first match of *pattern*; there must be one."""
    first = next(pattern.finditer(content))
    return f"{what}, first in line {_line(content, first.start())}"


def _longest_line(content: bytes) -> int:
    """Return the longest line's length without its line end, in octets, if over 998; else 0."""
    longest = begin = 0
    while begin < len(content):
        # Skip as many lines at once as fit into the limit.
        end = content.rfind(b"\n", begin, begin + _LINE_OCTETS + 2)
        if end < 0:
            end = content.find(b"\n", begin)
            end = len(content) if end < 0 else end
            longest = max(longest, len(content[begin:end].removesuffix(b"\r")))
        begin = end + 1
    return longest if longest > _LINE_OCTETS else 0


def _listed(addresses: tuple[str, ...]) -> str:
    """Return *addresses* as a list that is safe to show and not too long."""
    listed: list[str] = []
    octets = 0
    for address in addresses:
        listed.append(printable(address, _RCPT_TOS_OCTETS))
        octets += len(listed[-1].encode()) + len(", ")
        if octets > _RCPT_TOS_OCTETS and len(listed) > 1:
            more = len(addresses) - len(listed) + 1
            return f"{', '.join(listed[:-1])} and {more:,} more"
    return ", ".join(listed)


def _header(content: bytes) -> _Header:
    names: list[bytes] = []
    mbox_lines: list[int] = []
    subject, end = None, 0
    field = _FIELD.match(content, 0, _HEADER_OCTETS)
    while field and len(names) < _FIELDS:
        name = field[1].lower()
        names.append(name)
        if name == b"subject" and subject is None:
            subject = field[2]
        if field.start() < field.start(1):
            mbox_lines.append(field.start())
        end = field.end()
        field = _FIELD.match(content, end, _HEADER_OCTETS)
    return _Header(tuple(names), subject or b"", tuple(mbox_lines), end)


def _encoded(value: str) -> str:
    """Return *value* as a field body of one line that decodes to exactly *value*.

    Printable ASCII stays as it is, unless it looks like an encoded word; everything else goes into
    encoded words of at most 75 octets (RFC 2047). Octets that were not valid UTF-8 are kept under
    the charset `unknown-8bit` (RFC 1428).
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
    """Split *octets* to fit into encoded words, but never within a UTF-8 character."""
    begin = 0
    while begin < len(octets):
        end = begin + _WORD_OCTETS
        least = end - 3  # A character has at most four octets.
        while least < end < len(octets) and octets[end] in _CONTINUATIONS:
            end -= 1
        yield octets[begin:end]
        begin = end
