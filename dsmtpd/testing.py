"""A server for tests, which returns the mails that have arrived as frozen records."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from email import policy
from email.parser import BytesParser
from functools import cached_property
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING, Any, cast

from dsmtpd.content import Attachment, Content
from dsmtpd.failures import Rule, RuleError
from dsmtpd.maildir import Maildir, mail_files
from dsmtpd.options import DEFAULT_MAX_SIZE, Options
from dsmtpd.server import Listener, ListenError
from dsmtpd.text import decoded, endpoint, printable
from dsmtpd.tls import TLSError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from email.message import EmailMessage
    from typing import Literal

    from aiosmtpd.smtp import Envelope
    from typing_extensions import Self

__all__ = [
    "Attachment",
    "ListenError",
    "ReceivedMessage",
    "RuleError",
    "Server",
    "TLSError",
    "messages",
]

# The `repr` of a message has at most this many octets.
_SHOWN_OCTETS = 400

# The fields at the top of a stored mail.
_ENVELOPE = re.compile(rb"X-Peer: (.*?)\r?\nX-MailFrom: (.*?)\r?\nX-RcptTo: (.*?)\r?\n")
_PEER = re.compile(r"\('([^']*)', ([0-9]+).*")

# A comma in a quoted local part does not separate recipients (RFC 5321, section 4.1.2).
_RECIPIENT = re.compile(r'(?:, )?((?:"(?:\\.|[^"\\])*"@)?(?:(?!, ).)+)')

# How often to read a Maildir again if mails are being moved in it.
_ATTEMPTS = 10


@dataclass(frozen=True)
class ReceivedMessage:
    """A mail that has arrived.

    *mail_from*: the reverse-path, `<>` when it is null (RFC 5321, section 4.5.5).
    *rcpt_tos*: the recipients.
    *peer*: the client, as `host:port`.
    *content*: the octets of the mail as sent; from a Maildir, with LF as the line end.
    """

    mail_from: str
    rcpt_tos: tuple[str, ...]
    peer: str
    content: bytes

    @cached_property
    def email(self) -> EmailMessage:
        """The mail, parsed by Python."""
        return BytesParser(policy=policy.default).parsebytes(self.content)

    @cached_property
    def _read(self) -> Content:
        return Content.from_bytes(self.content)

    @property
    def subject(self) -> str:
        """The subject, decoded; empty if there is none."""
        return self._read.subject

    @property
    def text(self) -> str:
        """The text, decoded, with LF as the line end; empty if there is none."""
        return self._read.text

    @property
    def html(self) -> str:
        """The HTML, decoded, with LF as the line end; empty if there is none."""
        return self._read.html

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """All other parts, each with its name, type and content."""
        return self._read.attachments

    @property
    def links(self) -> tuple[str, ...]:
        """The URLs in the text and the targets of links in the HTML, each once."""
        return self._read.links

    def __repr__(self) -> str:
        """Show the same as the log line of the mail."""
        shown = f"{self.mail_from} -> {', '.join(self.rcpt_tos)} [{self.subject}]"
        return f"<{printable(shown, _SHOWN_OCTETS)}>"


class Server:
    """An SMTP server on a free port of 127.0.0.1 that keeps its mails while its `with` block runs.

    *tls*: `starttls` offers STARTTLS, `implicit` speaks TLS from the first octet; both need
    trustme. *smtputf8*, *auth*: whether to offer these. *max_size*: the largest message, in octets;
    0 sets no limit. *fail*: a rule like that of `--fail`, or several.

    *host*, *port*: where it listens. *ca*: with *tls*, the certificate in PEM that clients have to
    trust, else None.

    Raises `ValueError` if *tls* or *max_size* makes no sense, `RuleError` if a rule does not, and
    `TLSError` if there is no certificate for TLS.
    """

    host: str
    port: int

    def __init__(
        self,
        *,
        tls: Literal["starttls", "implicit"] | None = None,
        smtputf8: bool = True,
        auth: bool = True,
        max_size: int = DEFAULT_MAX_SIZE,
        fail: str | Iterable[str] = (),
    ) -> None:
        """Do not listen yet."""
        if tls not in {"starttls", "implicit", None}:
            raise ValueError(f"tls: {tls!r} is neither starttls nor implicit")
        if not isinstance(max_size, int) or max_size < 0:
            raise ValueError(f"max_size: {max_size!r} is not a number of octets, 0 or more")
        options = Options(
            port=0,
            max_size=max_size,
            disable_smtputf8=not smtputf8,
            disable_auth=not auth,
            tls=tls,
        )
        self._inbox = _Inbox()
        self._listener = Listener(self._inbox, options)
        self.fail(fail)
        self.ca = None if self._listener.ca is None else self._listener.ca.decode()

    def __enter__(self) -> Self:
        """Listen; raises `ListenError` if the system does not allow that."""
        self._listener.__enter__()
        self.host, self.port = self._listener.host, self._listener.port
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._listener.__exit__(*error)

    @property
    def messages(self) -> tuple[ReceivedMessage, ...]:
        """The mails that have arrived, oldest first.

        Once the server has replied `250`, the mail is there.
        """
        return tuple(self._inbox.messages)

    def wait(self, count: int = 1, timeout: float = 10) -> tuple[ReceivedMessage, ...]:
        """Return the mails once there are at least *count*.

        Raises `TimeoutError` after *timeout* seconds; its text lists the mails that did arrive.
        """
        __tracebackhide__ = True  # pytest shows the line of the test.
        arrived = self._inbox.wait(count, timeout)
        if len(arrived) < count:
            summary = f"{len(arrived)} of {count} mails arrived within {timeout:g} s"
            raise TimeoutError("\n".join([summary, *map(repr, arrived)]))
        return arrived

    def clear(self) -> None:
        """Forget the mails that have arrived."""
        self._inbox.clear()

    def fail(self, rules: str | Iterable[str]) -> None:
        """Make replies fail by *rules* from now on, not by earlier ones; raises `RuleError`."""
        texts = [rules] if isinstance(rules, str) else rules
        self._listener.fail([Rule.parse(text) for text in texts])


class _Inbox:
    """The handler of a server: it keeps the mails that arrive."""

    def __init__(self) -> None:
        self.messages: list[ReceivedMessage] = []
        self._arrival = Condition()

    async def handle_DATA(self, server: object, session: Any, envelope: Envelope) -> str:  # noqa: ARG002
        mail_from, content = cast("str", envelope.mail_from), cast("bytes", envelope.content)
        peer, rcpt_tos = endpoint(session.peer), tuple(envelope.rcpt_tos)
        with self._arrival:
            self.messages.append(ReceivedMessage(mail_from, rcpt_tos, peer, content))
            self._arrival.notify_all()
        return "250 OK"

    def wait(self, count: int, timeout: float) -> tuple[ReceivedMessage, ...]:
        """Return the mails once there are *count*, or after *timeout* seconds."""
        with self._arrival:
            self._arrival.wait_for(lambda: len(self.messages) >= count, timeout)
            return tuple(self.messages)

    def clear(self) -> None:
        with self._arrival:
            self.messages.clear()


def messages(maildir: str | os.PathLike[str]) -> tuple[ReceivedMessage, ...]:
    """Return the mails in a *maildir*, read or not, oldest first.

    Mails that another program has stored have an empty envelope. Raises `OSError` if there is no
    such Maildir.
    """
    folder = Path(maildir).expanduser()
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):  # A mail program moves mails to cur/ and renames them.
            return _messages(folder)
    return _messages(folder)


def _messages(folder: Path) -> tuple[ReceivedMessage, ...]:
    flags = f"{Maildir.colon}2,"
    found = {file.name.partition(flags)[0]: Path(file).read_bytes() for file in mail_files(folder)}
    return tuple(_stored(octets) for _, octets in sorted(found.items()))


def _stored(octets: bytes) -> ReceivedMessage:
    """Return the mail in *octets*, with its envelope if dsmtpd has stored it."""
    match = _ENVELOPE.match(octets)
    if match is None:
        return ReceivedMessage("", (), "", octets)
    peer, mail_from, rcpt_tos = map(decoded, match.groups())
    recipients = tuple(_RECIPIENT.findall(rcpt_tos))
    return ReceivedMessage(mail_from, recipients, _PEER.sub(_endpoint, peer), octets[match.end() :])


def _endpoint(address: re.Match[str]) -> str:
    return endpoint(address.groups())
