"""The SMTP dialogue of one session, without I/O: octets in; replies, mails and reports out."""

from __future__ import annotations

import re
from base64 import b64encode
from collections import deque
from enum import Enum, auto
from io import BytesIO
from sys import maxsize
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from dsmtpd import auth
from dsmtpd.path import Path, parse

if TYPE_CHECKING:
    from collections.abc import Callable

# RFC 5321, section 4.1.1.4: a dot alone on its line. If a bare CR or LF could end that line, mails
# could be smuggled in (CVE-2024-27305). Its dot may also be stuffing (section 4.5.2).
_END_OF_DATA = b"\r\n.\r\n"
_DOT = _END_OF_DATA[:3]

# As in aiosmtpd: a client that sends more does not speak SMTP.
_UNKNOWN_COMMANDS = 5

# Without the CRLF. Other servers may refuse more than 512 octets (RFC 5321, section 4.5.3.1.4).
_LINE_OCTETS = auth.LINE_OCTETS
_USUAL_OCTETS = 512 - len(b"\r\n")

# RFC 5321, section 4.5.3.1.10, demands at least 100; and the octets of all of them together.
_RECIPIENTS = 10_000
_ENVELOPE_OCTETS = 1024 * 1024

# A mail over 1 MiB gets a buffer of 33 MiB, which takes no memory until it is written to. A growing
# buffer is moved by malloc: the process then takes 64 instead of 46 MiB for a mail of 20 MB.
_SMALL = 1024 * 1024
_ROOM = 33 * _SMALL

# Commands that have no argument, and those that need one.
_BARE = {b"DATA", b"QUIT", b"RSET", b"STARTTLS"}
_ARGUMENTS = {b"VRFY": "<address>"}

# How many warnings a connection may cause until its next mail, and up to which length a warning
# shows an unknown command.
_WARNINGS = 20
_SHOWN_LETTERS = 12

_MASK = "***"

# Other protocols that a client may speak, by its first octets (RFC 8446, section 5.1; RFC 9112,
# section 3; the PROXY protocol, sections 2.1 and 2.2; RFC 2033, section 4.1).
_STRANGER = re.compile(
    rb"(?P<TLS>\x16\x03)|(?P<HTTP>[A-Z]+ \S+ HTTP/[0-9])"
    rb"|(?P<PROXY>PROXY (?:TCP[46]|UNKNOWN)|\r\n\r\n\0\r\nQUIT\n)|(?P<LMTP>(?i:LHLO)\s)"
)
_STRANGERS = {
    "TLS": "TLS: start dsmtpd with --tls implicit",
    "HTTP": "HTTP",
    "PROXY": "the PROXY protocol",
    "LMTP": "LMTP",
}

# RFC 4422, section 3.1.
_MECHANISM = re.compile("[A-Za-z0-9_-]{1,20}")

# RFC 1870, section 4.
_SIZE = re.compile(r"[0-9]{1,20}")


class Offer(NamedTuple):
    """What a server offers to its clients, and how much it accepts.

    *hostname* and *ident* make up the greeting. *max_size* is the largest message in octets; 0 sets
    no limit (RFC 1870, section 3). *smtputf8* accepts non-ASCII addresses (RFC 6531), *auth* any
    credentials (RFC 4954). *tls*: `starttls` offers STARTTLS (RFC 3207), `implicit` begins with
    TLS (RFC 8314, section 3.3).
    """

    hostname: str
    ident: str = "dsmtpd"
    max_size: int = 0
    smtputf8: bool = True
    auth: bool = True
    tls: Literal["starttls", "implicit"] | None = None


class Reply(NamedTuple):
    """Send these *octets*: the reply to a command."""

    octets: bytes


class Mail(NamedTuple):
    """Deliver this mail, and pass the reply to it to `Conversation.delivered`.

    *content*: what came after DATA, with the stuffed dots removed and the line ends as sent.
    """

    reverse_path: Path
    forward_paths: tuple[Path, ...]
    content: bytes


class Report(NamedTuple):
    """Log this *text*, which may contain any character; it is a warning if it *warns*."""

    text: str
    warns: bool = True


class Delay(NamedTuple):
    """Wait this many *seconds* before the next action."""

    seconds: float


class Heard(NamedTuple):
    """Log this *text*: what the client said, except for anything that may be a password."""

    text: str


class Control(Enum):
    """Begin TLS, close the connection once everything is sent, or cut it at once.

    To begin TLS means to shake hands and then call `Conversation.tls_begun`; whatever arrives from
    now on is encrypted.
    """

    BEGIN_TLS = auto()
    CLOSE = auto()
    CUT = auto()


Action = Reply | Mail | Report | Delay | Heard | Control

Stage = Literal["connect", "auth", "mail", "rcpt", "data"]


class Failure(NamedTuple):
    """How a reply must fail: by another *reply*, by a *drop* of the connection, or by a *delay*.

    *text*: what to report. *delay*: in seconds.
    """

    text: str
    reply: str = ""
    drop: bool = False
    delay: float = 0


class State(Enum):
    """What a session is waiting for."""

    COMMAND = auto()
    RESPONSE = auto()  # to a challenge of AUTH
    DATA = auto()
    DELIVERY = auto()
    HANDSHAKE = auto()
    OVER = auto()


# In Python 3.11, looking up a member of an Enum takes as long as half a command.
_COMMAND, _RESPONSE, _DATA, _DELIVERY, _HANDSHAKE, _OVER = State


class _Refusal(Exception):  # noqa: N818  # not an error, but a reply
    """A command is refused; the text is the reply."""


class _Transaction:
    """A mail that has begun (RFC 5321, section 3.3)."""

    def __init__(self, path: Path, limit: int) -> None:
        self.reverse_path = path
        self.forward_paths: list[Path] = []
        self.octets = 0  # of all forward-paths and their parameters
        self.content = _Content(limit)

    def __str__(self) -> str:
        addresses = [path.address for path in self.forward_paths]
        more = f" and {len(addresses) - 1:,} more" if len(addresses) > 1 else ""
        return f"from {self.reverse_path.address} for {addresses[0]}{more}"


class _Content:
    """What follows DATA: finds its end, removes the stuffing, and drops a mail over the limit.

    The limit applies to the mail itself (RFC 1870, section 4): neither the stuffing nor the end of
    data counts. Each octet is copied once.
    """

    def __init__(self, limit: int) -> None:
        """Accept up to *limit* octets, or any number if that is 0."""
        self.is_too_large = False
        self.arrived = 0  # in octets, including the stuffing and the end
        self.seems_endless = False  # The client seems to end the mail with LF, dot, LF.
        self._last = b"\n"  # three octets
        self._limit = limit or maxsize
        self._bound = min(self._limit, _SMALL)
        self._octets = BytesIO()
        # How many octets of the end of data came last, including the CRLF of DATA itself.
        self._matched = len(b"\r\n")

    @property
    def is_complete(self) -> bool:
        """Whether the end of data has come."""
        return self._matched == len(_END_OF_DATA)

    def feed(self, octets: bytes | bytearray, first: int, end: int) -> int:
        """Read *octets* between two indices; return the index after the last octet of the mail."""
        self.arrived += end - first
        self._last = (self._last + octets[max(first, end - 3) : end])[-3:]
        if self._last == b"\n.\n" or (
            octets.find(b"\r\n", first, end) < 0 <= octets.find(b"\n.\n", first, end)
        ):
            self.seems_endless = True
        begin = self._match_on(octets, first, end) if self._matched else first
        if self.is_complete or begin == end:
            return begin
        # Searching for one dot is 20 times as fast, and base64 has none: worth 26 % with 20 MB.
        dot = octets.find(b".", begin, end)
        dot = octets.find(_DOT, max(begin, dot - 2), end) if dot >= 0 else dot
        stop = octets.find(_END_OF_DATA, dot, end) if dot >= 0 else dot
        if stop >= 0:
            self._matched = len(_END_OF_DATA)
            self._write_lines(octets, begin, stop + 2, dot)
            return stop + len(_END_OF_DATA)
        suffixes = (n for n in (4, 3, 2, 1) if octets.endswith(_END_OF_DATA[:n], first, end))
        self._matched = next(suffixes, 0)
        # A dot and what follows it may still turn out to be the end.
        self._write_lines(octets, begin, end - max(0, self._matched - 2), dot)
        return end

    def _write_lines(self, octets: bytes | bytearray, begin: int, end: int, dot: int) -> None:
        """Write *octets* between two indices, without the stuffing if there is a *dot*."""
        if dot < 0:
            self._write(memoryview(octets)[begin:end])
        else:
            self._write(octets[begin:end].replace(_DOT, b"\r\n"))

    def _match_on(self, octets: bytes | bytearray, begin: int, end: int) -> int:
        """Decide whether the previous octets were stuffing or the end of data.

        Their line end is in the mail already. Return the index in *octets* where to go on.
        """
        matched = self._matched
        joint = _END_OF_DATA[:matched] + octets[begin : min(end, begin + 5 - matched)]
        if _END_OF_DATA.startswith(joint):
            self._matched = len(joint)
            self._write(joint[matched:2])
            return begin + len(joint) - matched
        if joint.startswith(_DOT):
            self._write(joint[matched:2] + joint[3:matched])
            begin += max(0, len(_DOT) - matched)
        return begin

    def _write(self, octets: bytes | bytearray | memoryview) -> None:
        if not self.is_too_large:
            self._octets.write(octets)
            if self._octets.tell() > self._bound:
                self._outgrow(self._octets)

    def _outgrow(self, octets: BytesIO) -> None:
        """Drop a mail that is over the limit, or get a large buffer for it."""
        if octets.tell() > self._limit:
            self.is_too_large = True
            self._octets = BytesIO()
        else:
            self._octets = BytesIO(bytes(_ROOM))
            self._octets.write(octets.getbuffer())
            self._bound = self._limit

    def octets(self) -> bytes:
        """Return the mail."""
        self._octets.truncate()
        return self._octets.getvalue()


class Conversation:
    """One session, as the server sees it (RFC 5321).

    Pass it what arrives by `receive`, and call `next_action` until that returns None; to make it
    wait, do not call. Nothing that a client sends makes it raise.

    *host_name*: what the client calls itself; empty before HELO or EHLO.
    *extended*: whether it said EHLO; None before that.
    *user*: the name that has logged in, or None.
    """

    def __init__(
        self,
        offer: Offer,
        *,
        verbose: bool = False,
        ask: Callable[[Stage, str], Failure | None] | None = None,
    ) -> None:
        """Begin with the greeting, or with TLS if that is implicit.

        *verbose*: also report what the client says. *ask*: called before each reply that can fail,
        with its subject: nothing, the user, the reverse-path or the recipient.
        """
        self._offer = offer
        self._ask = ask
        self._verbose = verbose
        self._encoding = ("utf-8", "surrogateescape") if offer.smtputf8 else ("ascii", "strict")
        self._actions: deque[Action] = deque()
        self._buffer, self._begin = b"", 0  # what has arrived, and where the unread part begins
        self._ended = False  # The client has closed its half.
        self._encrypted = False
        self._mute = False  # The client has said nothing since the handshake.
        self._has_greeted = False
        self._warnings = self._unknown_commands = 0  # since the last mail
        self._forget()
        if offer.tls == "implicit":
            self._state = _HANDSHAKE
            self._actions.append(Control.BEGIN_TLS)

    def _forget(self) -> None:
        """Forget the client, as before its first word and after STARTTLS."""
        self._state = _COMMAND
        self._is_new = True  # The client has said nothing yet.
        self._verb = b""  # the last known command, unless it was an AUTH that succeeded
        self.host_name = ""
        self.extended: bool | None = None
        self.user: str | None = None
        self._exchange: auth.Exchange | None = None
        self._mechanism = ""
        self._transaction: _Transaction | None = None
        self._arriving: _Transaction | None = None  # after DATA

    def _greet(self) -> None:
        self._has_greeted = True
        if not self._fails("connect"):
            self._answer(f"220 {self._offer.hostname} {self._offer.ident}")
        elif self._state is not _OVER:
            self._close()

    def _fails(self, stage: Stage, subject: str = "") -> bool:
        """Ask whether the reply about *subject* must fail; if so, report that, and do it."""
        failure = self._ask(stage, subject) if self._ask else None
        if failure is None:
            return False
        self._actions.append(Report(failure.text, warns=False))
        if failure.drop:
            self._mute = False
            self._end()
            self._actions.append(Control.CUT)
        elif not failure.reply:
            self._actions.append(Delay(failure.delay))
            return False
        else:
            self._answer(failure.reply)
            if failure.reply.startswith("421"):
                self._close()
        return True

    @property
    def unread(self) -> int:
        """How many octets have arrived but are not handled yet."""
        return len(self._buffer) - self._begin

    def receive(self, octets: bytes | bytearray, end: int | None = None) -> None:
        """Receive *octets* of the client, up to the index *end*; they may be split anywhere.

        The buffer may change afterwards.
        """
        self._mute = False
        end = len(octets) if end is None else end
        begin = 0
        if self._arriving is not None:
            begin = self._read_content(self._arriving, octets, 0, end)
        elif self._state is _OVER or self._state is _HANDSHAKE:
            return  # What comes in clear before the handshake must not count as encrypted after it.
        self._buffer, self._begin = self._buffer[self._begin :] + octets[begin:end], 0

    def receive_eof(self) -> None:
        """Note that the client sends nothing more; it may still read."""
        self._ended = True

    def lost(self, reason: str = "") -> None:
        """Note that the connection is gone, for a *reason*: only reports remain to be done."""
        self._actions = deque(action for action in self._actions if isinstance(action, Report))
        self._end(reason)

    def _close(self) -> None:
        self._end()
        self._actions.append(Control.CLOSE)

    def _end(self, reason: str = "") -> None:
        if self._mute:
            text = "The client left after the TLS handshake without a word"
            self._warn(f"{text}; perhaps it does not trust the certificate")
        if self._arriving is not None:
            where = f"in the middle of a mail {self._arriving}"
            arrived = f"after {self._arriving.content.arrived:,} octets"
            reason = f"{reason or 'The client left'} {where}, {arrived}"
        if reason:
            self._warn(reason)
        self._mute = False
        self._state = _OVER
        self._buffer, self._begin = b"", 0
        self._transaction = self._arriving = self._exchange = None

    def tls_begun(self) -> None:
        """Note that the handshake is done; forget what came in clear (RFC 3207, section 4.2)."""
        self._forget()
        self._encrypted = self._mute = True
        if self._offer.tls == "implicit":
            self._greet()

    def delivered(self, reply: str) -> None:
        """Send the *reply* to the mail that was being delivered; 421 ends the session."""
        if self._state is _DELIVERY:
            self._state = _COMMAND
            self._warnings = self._unknown_commands = 0
            self._answer(reply)
            if reply.startswith("421"):
                self._close()

    def next_action(self) -> Action | None:
        """Return the next action, or None until more octets, the delivery or TLS is there."""
        while not self._actions:
            if not self._has_greeted and self._state is _COMMAND:
                self._greet()
                continue
            if self._state is _COMMAND or self._state is _RESPONSE:
                if self._is_new and (stranger := _STRANGER.match(self._buffer)):
                    self._warn(f"The client speaks {_STRANGERS[str(stranger.lastgroup)]}")
                    self._close()
                    continue
                end = self._buffer.find(b"\n", self._begin)
                if end >= 0:
                    line = self._buffer[self._begin : end].rstrip(b"\r\n")
                    self._begin = end + 1
                    self._read(line)
                    continue
                if self.unread > _LINE_OCTETS:
                    # The beginning is enough to refuse the line.
                    beginning = self._begin + _LINE_OCTETS + 1
                    self._buffer, self._begin = self._buffer[self._begin : beginning], 0
            elif self._state is not _DATA:
                return None
            if not self._ended:
                return None
            self._close()
        return self._actions.popleft()

    def _read(self, line: bytes) -> None:
        """Carry out a *line* and answer it."""
        self._is_new = False
        exchange = self._exchange
        if self._verbose:
            self._actions.append(Heard(self._masked(line)))
        try:
            if exchange is None:
                self._carry_out(line)
            else:
                self._respond(exchange, line)
        except (_Refusal, auth.AuthError) as refusal:
            said = f"A response to AUTH {self._mechanism}" if exchange else self._quoted(line)
            self._refuse(said, str(refusal))
            if self._unknown_commands >= _UNKNOWN_COMMANDS:
                self._close()

    def _quoted(self, line: bytes) -> str:
        """Return what a refused *line* says, except for anything that may be a password.

        Clients send passwords after a refused response, or instead of a command.
        """
        if len(line) > _LINE_OCTETS:
            return f"A line of more than {_LINE_OCTETS:,} octets"
        verb, _, argument = line.partition(b" ")
        verb = verb.upper()
        if verb == b"AUTH":
            name = argument.strip().partition(b" ")[0].decode("utf-8", "replace")
            return f"AUTH {name}" if _MECHANISM.fullmatch(name) else "AUTH"
        if verb in self._COMMANDS:
            return line.decode("utf-8", "surrogateescape")
        if self._verb == b"AUTH" or not verb.isalpha() or len(verb) > _SHOWN_LETTERS:
            return f"A line of {len(line):,} octets"
        return verb.decode()

    def _masked(self, line: bytes) -> str:
        """Return what a *line* says, with a mask for anything that may be a password."""
        if self._exchange is not None:
            return _MASK
        quoted, verb = self._quoted(line), line.partition(b" ")[0].upper()
        is_cut = len(line.split()) > len(quoted.split())
        hides = verb == b"AUTH" or verb not in self._COMMANDS
        return f"{quoted} {_MASK}" if hides and is_cut else quoted

    def _refuse(self, said: str, reply: str) -> None:
        self._warn(f"{said} was refused: {reply}")
        self._answer(reply)

    def _warn(self, text: str) -> None:
        """Report *text*, unless there were too many reports since the last mail."""
        self._warnings += 1
        if self._warnings == _WARNINGS + 1:
            text = "Further warnings are not shown until the next mail of this client"
        if self._warnings <= _WARNINGS + 1:
            self._actions.append(Report(text))

    def _carry_out(self, line: bytes) -> None:
        """Carry out a command and answer it (RFC 5321, section 4.1.1)."""
        verb, _, argument = line.partition(b" ")
        verb = verb.upper()
        command = self._COMMANDS.get(verb)
        if command is not None:
            self._verb = verb
        if len(line) > _LINE_OCTETS:
            raise _Refusal("500 5.5.6 The line is too long")
        if command is None:
            raise self._unknown(verb)
        if len(line) > _USUAL_OCTETS and verb != b"AUTH":
            self._warn(f"Other servers may refuse this: a line of {len(line) + 2:,} octets")
        try:
            text = argument.strip().decode(*self._encoding)
        except UnicodeDecodeError:
            raise _Refusal("500 Error: strict ASCII mode") from None
        if verb in (_BARE if text else _ARGUMENTS):
            raise _Refusal(f"501 Syntax: {verb.decode()} {_ARGUMENTS.get(verb, '')}".rstrip())
        command(self, text)

    def _answer(self, reply: str) -> None:
        self._actions.append(Reply(f"{reply}\r\n".encode("utf-8", "backslashreplace")))

    def _unknown(self, verb: bytes) -> _Refusal:
        """Return the refusal of an unknown command; too many of them end the session."""
        if not verb.isalpha():
            return _Refusal("500 Error: bad syntax")
        self._unknown_commands += 1
        if self._unknown_commands < _UNKNOWN_COMMANDS:
            return _Refusal("500 5.5.2 Error: command not recognized")
        return _Refusal("421 4.7.0 Too many unrecognized commands")

    def _greeted(self, verb: str, host_name: str, *, extended: bool) -> None:
        self._transaction, self.host_name, self.extended = None, host_name, extended
        if not host_name:
            self._warn(f"Other servers may refuse this: {verb} without a name")

    def _helo(self, host_name: str) -> None:
        """Begin a session without extensions (RFC 5321, section 4.1.1.1)."""
        self._greeted("HELO", host_name, extended=False)
        self._answer(f"250 {self._offer.hostname}")

    def _ehlo(self, host_name: str) -> None:
        """Begin a session, and offer the extensions (RFC 5321, section 4.1.1.1)."""
        self._greeted("EHLO", host_name, extended=True)
        # SIZE 0 means that there is no limit (RFC 1870, section 4).
        extensions = [f"SIZE {self._offer.max_size}", "8BITMIME", "PIPELINING"]
        if self._offer.smtputf8:
            extensions.append("SMTPUTF8")
        if self._can_begin_tls:
            extensions.append("STARTTLS")
        if self._offer.auth:
            extensions.append(f"AUTH {' '.join(auth.OFFERED)}")
        lines = [self._offer.hostname, *extensions]
        self._answer("\r\n".join([*(f"250-{line}" for line in lines), "250 HELP"]))

    @property
    def _can_begin_tls(self) -> bool:
        return self._offer.tls == "starttls" and not self._encrypted

    def _starttls(self, _argument: str) -> None:
        """Begin TLS (RFC 3207)."""
        if self._encrypted:
            raise _Refusal("503 5.5.1 TLS is active already")
        if not self._can_begin_tls:
            raise _Refusal("502 5.5.1 STARTTLS is not offered")
        if self.unread:
            # Otherwise, injected commands could pass as encrypted ones (CVE-2021-33515).
            self._warn("Dropped what was sent after STARTTLS without waiting for the reply")
            self._buffer, self._begin = b"", 0
        self._answer("220 Ready to start TLS")
        self._state = _HANDSHAKE
        self._actions.append(Control.BEGIN_TLS)

    def _auth(self, argument: str) -> None:
        """Accept any credentials (RFC 4954, section 4)."""
        if not self._offer.auth:
            raise _Refusal("502 5.5.1 AUTH is disabled")
        if self.extended is None:
            raise _Refusal("503 Error: send EHLO first")
        if self.user is not None or self._transaction:
            raise _Refusal("503 5.5.1 Error: AUTH comes once, and before MAIL")
        name, _, initial = argument.partition(" ")
        initial = initial.strip(" ")
        if not name or " " in initial:
            raise _Refusal("501 5.5.4 Syntax: AUTH mechanism [initial-response]")
        mechanism = auth.MECHANISMS.get(name.upper())
        if mechanism is None:
            raise _Refusal("504 5.5.4 Unrecognized authentication mechanism")
        self._mechanism, exchange = name.upper(), mechanism()
        challenge = next(exchange)
        response = initial.encode("utf-8", "surrogateescape")
        if response:
            self._respond(exchange, response)
        else:
            self._challenge(exchange, challenge)

    def _challenge(self, exchange: auth.Exchange, challenge: bytes) -> None:
        self._state, self._exchange = _RESPONSE, exchange
        self._answer(f"334 {b64encode(challenge).decode()}")

    def _respond(self, exchange: auth.Exchange, response: bytes) -> None:
        """Continue an AUTH exchange; the password is neither kept nor reported."""
        self._state, self._exchange = _COMMAND, None
        try:
            self._challenge(exchange, exchange.send(auth.decode(response)))
        except StopIteration as done:
            user = str(done.value)
            if self._fails("auth", user):
                return
            self.user, self._verb = user, b""
            text = f"{self.user} logged in with AUTH {self._mechanism}"
            self._actions.append(Report(text, warns=False))
            self._answer("235 2.7.0 Authentication successful")

    def _mail(self, argument: str) -> None:
        """Begin a mail (RFC 5321, section 4.1.1.2)."""
        if self.extended is None:
            raise _Refusal("503 Error: send HELO first")
        if self._transaction:
            raise _Refusal("503 Error: nested MAIL command")
        path = parse("FROM", argument)
        if path is None:
            raise _Refusal("501 Syntax: MAIL FROM:<address>")
        if "SMTPUTF8" in path.parameters and not self._offer.smtputf8:
            raise _Refusal("555 5.5.4 SMTPUTF8 is disabled")
        transaction = _Transaction(path, self._offer.max_size)
        self._report("MAIL", argument, path, transaction)
        size = path.parameters.get("SIZE", "")
        if self._offer.max_size and _SIZE.fullmatch(size) and int(size) > self._offer.max_size:
            raise _Refusal("552 Error: message size exceeds fixed maximum message size")
        if not self._fails("mail", path.address):
            self._transaction = transaction
            self._answer("250 OK")

    def _rcpt(self, argument: str) -> None:
        """Accept a recipient (RFC 5321, section 4.1.1.3)."""
        transaction = self._transaction
        if transaction is None:
            raise _Refusal("503 Error: need MAIL command")
        transaction.octets += len(argument.encode("utf-8", "surrogateescape"))
        if len(transaction.forward_paths) >= _RECIPIENTS or transaction.octets > _ENVELOPE_OCTETS:
            raise _Refusal("452 4.5.3 Too many recipients")
        path = parse("TO", argument)
        if path is None:
            raise _Refusal("501 Syntax: RCPT TO:<address>")
        self._report("RCPT", argument, path, transaction)
        if not self._fails("rcpt", path.address):
            transaction.forward_paths.append(path)
            self._answer("250 OK")

    def _report(self, verb: str, argument: str, path: Path, transaction: _Transaction) -> None:
        """Report what other servers may refuse in a command."""
        if not path.parameters and not path.faults and path.address.isascii():
            return  # like most of them
        faults = [*path.faults]
        for keyword, value in path.parameters.items():
            if not (verb == "MAIL" and self.extended and self._offers(keyword, value)):
                faults.append(keyword or "=")
        parameters = transaction.reverse_path.parameters
        if not path.address.isascii() and "SMTPUTF8" not in parameters:
            faults.append("an address beyond ASCII without SMTPUTF8")
        if faults:
            text = f"Other servers may refuse this: {', '.join(faults)} in {verb} {argument}"
            self._warn(text)

    def _offers(self, keyword: str, value: str) -> bool:
        """Return whether a parameter of MAIL is offered, and may have this *value*."""
        offered = {
            "SIZE": bool(_SIZE.fullmatch(value)),
            "BODY": value.upper() in {"7BIT", "8BITMIME"},  # RFC 6152, section 2
            "SMTPUTF8": not value,  # RFC 6531, section 3.4
            "AUTH": self._offer.auth and value != "",  # RFC 4954, section 5
        }
        return offered.get(keyword, False)

    def _data(self, _argument: str) -> None:
        """Accept the mail that follows (RFC 5321, section 4.1.1.4)."""
        if self._transaction is None or not self._transaction.forward_paths:
            raise _Refusal("503 Error: need RCPT command")
        self._answer("354 End data with <CR><LF>.<CR><LF>")
        self._state = _DATA
        self._arriving, self._transaction = self._transaction, None
        if self.unread:
            end = len(self._buffer)
            self._begin = self._read_content(self._arriving, self._buffer, self._begin, end)

    def _read_content(
        self, transaction: _Transaction, octets: bytes | bytearray, begin: int, end: int
    ) -> int:
        """Read more of a mail; return the index after its last octet in *octets*."""
        content = transaction.content
        seemed_endless = content.seems_endless
        begin = content.feed(octets, begin, end)
        if content.is_complete:
            self._arriving = None
            if self._verbose:
                size = content.arrived - (end - begin) - len(b".\r\n")
                self._actions.append(Heard(f"(a mail, {size:,} octets)"))
            if content.is_too_large:
                self._state = _COMMAND
                self._refuse(f"The mail {transaction}", "552 Error: Too much mail data")
            elif not self._has_failed(transaction):
                self._state = _DELIVERY
                paths = tuple(transaction.forward_paths)
                self._actions.append(Mail(transaction.reverse_path, paths, content.octets()))
        elif content.seems_endless and not seemed_endless:
            text = "The client ends lines with LF alone, without CR, which does not end its mail"
            self._warn(f"{text} {transaction}")
        return begin

    def _has_failed(self, transaction: _Transaction) -> bool:
        self._state = _COMMAND
        return self._fails("data", transaction.reverse_path.address)

    def _rset(self, _argument: str) -> None:
        """Forget the mail that has begun (RFC 5321, section 4.1.1.5)."""
        self._transaction = None
        self._answer("250 OK")

    def _noop(self, _argument: str) -> None:
        """Do nothing (RFC 5321, section 4.1.1.9)."""
        self._answer("250 OK")

    def _quit(self, _argument: str) -> None:
        """End the session (RFC 5321, section 4.1.1.10)."""
        self._answer("221 Bye")
        self._close()

    def _vrfy(self, _address: str) -> None:
        """Reveal nothing about an address (RFC 5321, section 7.3)."""
        self._answer("252 Cannot VRFY user, but will accept mail for it")

    def _help(self, _topic: str) -> None:
        """List the available commands (RFC 5321, section 4.1.1.8)."""
        usable = {b"AUTH": self._offer.auth, b"STARTTLS": self._can_begin_tls}
        verbs = sorted(verb.decode() for verb in self._COMMANDS if usable.get(verb, True))
        self._answer(f"214 Commands: {' '.join(verbs)}")

    _COMMANDS: ClassVar[dict[bytes, Callable[[Conversation, str], None]]] = {
        b"AUTH": _auth,
        b"DATA": _data,
        b"EHLO": _ehlo,
        b"HELO": _helo,
        b"HELP": _help,
        b"MAIL": _mail,
        b"NOOP": _noop,
        b"QUIT": _quit,
        b"RCPT": _rcpt,
        b"RSET": _rset,
        b"STARTTLS": _starttls,
        b"VRFY": _vrfy,
    }
