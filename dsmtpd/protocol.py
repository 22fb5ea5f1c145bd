"""One client's session: aiosmtpd's, made quick, and patient with what real clients say."""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import re
import sys
from base64 import b64encode
from typing import TYPE_CHECKING, Any, cast

import aiosmtpd.smtp

from dsmtpd import auth, tls
from dsmtpd.message import endpoint, printable
from dsmtpd.path import Path, parse

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping

    from typing_extensions import Self

    Command = Callable[[str | None], Awaitable[None]]

log = logging.getLogger(__package__)

# The most that is read from a socket at once. When twice as much lies unread, the client waits.
_READ = 256 * 1024

# RFC 5321, section 4.1.1.4: a dot alone on its line. Where a bare CR or LF may end that line, mails
# can be smuggled in (CVE-2024-27305).
_END_OF_DATA = b"\r\n.\r\n"

# As many as aiosmtpd takes. What sends more is no SMTP client.
_UNKNOWN_COMMANDS = 5

# RFC 5321 (section 4.5.3.1.4) asks for 512 octets at least.
_COMMAND_OCTETS = 1001

# RFC 5321, section 4.5.3.1.10, asks for 100 at least.
_RECIPIENTS = 10_000

# Seconds for a handshake: a client that waits for a greeting in plain text learns of its mistake.
_HANDSHAKE = 10

# The replies to these may wait for those to the commands behind them (RFC 2920, section 3.2).
_GROUPED = {b"MAIL", b"RCPT", b"RSET"}
_GROUP_OCTETS = 4096

# The values of the parameters of MAIL (RFC 1870, 6152, 6531 and 4954).
_SIZE = re.compile(r"[0-9]{1,20}")
_BODY = re.compile("7BIT|8BITMIME", re.IGNORECASE)
_NONE = re.compile("")
_MAILBOX = re.compile(".+")


class _CommandError(Exception):
    """A command cannot be carried out; the text is the reply."""


class SMTP(aiosmtpd.smtp.SMTP, asyncio.BufferedProtocol):
    """A quick session, which a stopping server can end without losing a mail that it holds.

    It replaces what every connection or every mail passes through in aiosmtpd. Of aiosmtpd's
    parameters it heeds those that `server` gives it.
    """

    session: aiosmtpd.smtp.Session
    envelope: aiosmtpd.smtp.Envelope
    transport: asyncio.Transport | None

    # Private names of aiosmtpd. There are no public ones for the streams (`_reader`, `_writer`),
    # the hooks of the handler (`_call_handler_hook`), the end of a transaction (`_set_rset_state`,
    # `_set_post_data_state`), a new session (`_create_session`) and the clock (`_timeout_cb`,
    # `_timeout_duration`, `_timeout_handle`). `_handle_client` is replaced since it matches and
    # logs each command several times, and forgets those before an end.
    _handler_coroutine: asyncio.Task[None]  # It carries out the commands; see `hang_up`.

    def __init__(
        self,
        handler: object,
        *,
        offers_auth: bool = True,
        implicit_tls: bool = False,
        **parameters: Any,
    ) -> None:
        """Take *parameters* of aiosmtpd's `SMTP`; *handler* needs a `handle_DATA`.

        With a `tls_context` among the *parameters*, STARTTLS is offered (RFC 3207), unless the
        connection is to begin with TLS, *implicit_tls*. *offers_auth* takes any credentials.
        """
        super().__init__(handler, **parameters)
        self.offers_auth = offers_auth
        self._implicit_tls = implicit_tls
        self._encoding = (
            ("utf-8", "surrogateescape") if self.enable_SMTPUTF8 else ("ascii", "strict")
        )
        self._parameters = {"SIZE": _SIZE, "BODY": _BODY}
        if self.enable_SMTPUTF8:
            self._parameters["SMTPUTF8"] = _NONE
        if offers_auth:
            self._parameters["AUTH"] = _MAILBOX
        self._input = memoryview(bytearray(_READ))
        self._replies = b""
        self._unknown_commands = 0
        self._encrypted = False  # from the beginning of the handshake
        self._mute = False  # The client has not said anything since the handshake.
        self._grouped = False  # The reply to the command may wait.
        self._delivering = False
        self._over = False  # Nobody reads replies any more.
        self._ending = False  # The server stops.

    def twin(self) -> Self:
        """Return a session like this one for another client.

        To make one anew takes longer than a mail: aiosmtpd looks for commands and hooks by
        `inspect`.
        """
        twin = copy.copy(self)
        # Only the streams are a connection's own; the rest comes with `connection_made`.
        reader = asyncio.StreamReader(_READ, self.loop)
        connected = twin._cb_client_connected  # noqa: SLF001  # aiosmtpd's way to get at the streams
        asyncio.StreamReaderProtocol.__init__(twin, reader, connected, self.loop)
        return twin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the session."""
        if self._implicit_tls:
            # What comes is not for us, but for the handshake that the session begins with.
            cast("asyncio.Transport", transport).pause_reading()
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """End the session, which may have ended already with its handshake; see `_start_tls`."""
        if self.transport is not None:
            super().connection_lost(error)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's
        """Lend the buffer that the sessions of a loop share.

        To a protocol without one, asyncio hands each command in 256 KiB of fresh memory.
        """
        return self._input

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has arrived."""
        self._heard = self.loop.time()
        self._reader.feed_data(self._input[:nbytes])

    def eof_received(self) -> bool:
        """Stay open for the replies to what the client sent before its end; TLS cannot do that."""
        self._reader.feed_eof()
        self._over = self._encrypted
        return not self._over

    async def push(self, status: str | bytes) -> None:
        """Send the reply *status*, after those that wait.

        It waits itself when it may, and the next command is here (RFC 2920, section 3.2).
        """
        reply = status if isinstance(status, bytes) else status.encode("utf-8", "backslashreplace")
        self._replies += reply + b"\r\n"
        if self._over:
            return
        if self._grouped and b"\n" in self._unread and len(self._replies) < _GROUP_OCTETS:
            return
        transport = self._writer.transport
        transport.write(self._replies)
        self._replies = b""
        # A client that does not read has to wait; at the end, nobody waits for it.
        if transport.get_write_buffer_size() and not self._ending:
            await self._writer.drain()

    async def _handle_client(self) -> None:
        self._heard = self.loop.time()
        try:
            if self._implicit_tls:
                await self._start_tls()
            await self.push(f"220 {self.hostname} {self.__ident__}")
            while not self._ending and self._unknown_commands < _UNKNOWN_COMMANDS:
                await self._answer(await self._command_line())
                if self._unread:
                    await asyncio.sleep(0)  # The other sessions are to have their turn.
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            # The client has said its last, or the connection has ended. A task that ends cancelled
            # would keep what has come of a mail, by its traceback.
            if self._mute and not self._ending:
                self._warn(
                    "The client has left after the TLS handshake without a word; perhaps it does"
                    " not trust the certificate"
                )
        finally:
            if not self._ending:
                self._over = True
                self._writer.close()

    @property
    def _unread(self) -> bytearray:
        """What has arrived; asyncio has no public name for it."""
        return self._reader._buffer  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001

    async def _command_line(self) -> bytes:
        """Return the next line without its end, or only the beginning of one that is too long."""
        line = chunk = await self._chunk(b"\n")
        while not chunk.endswith(b"\n"):
            chunk = await self._chunk(b"\n")
        return line.rstrip(b"\r\n")

    async def _chunk(self, end: bytes) -> bytes:
        """Return what comes up to *end*, or a part of it when that is much."""
        try:
            return await self._reader.readuntil(end)
        except asyncio.LimitOverrunError as overrun:
            return await self._reader.read(overrun.consumed)

    async def _answer(self, line: bytes) -> None:
        """Carry out the command in *line* (RFC 5321, section 4.1.1), or refuse it."""
        self._mute = False
        self._grouped = line[:4].upper() in _GROUPED
        try:
            method, argument = self._command(line)
            await method(argument)
        except (_CommandError, auth.AuthError) as error:
            await self.push(str(error))
        except Exception as error:
            if isinstance(error, asyncio.IncompleteReadError) and self._reader.at_eof():
                raise
            # A hook's, which is not to end the session.
            await self.push(await self.handle_exception(error))

    def _command(self, line: bytes) -> tuple[Command, str | None]:
        """Return what carries out the command in *line*, and its argument.

        Raises `_CommandError` when there is no such command.
        """
        verb, _, argument = line.partition(b" ")
        if len(line) > _COMMAND_OCTETS and verb.upper() != b"AUTH":
            raise _CommandError("500 Command line too long")
        if not verb.isalpha():
            raise _CommandError("500 Error: bad syntax")
        command = getattr(self, f"smtp_{verb.decode().upper()}", None)
        if command is None:
            self._unknown_commands += 1
            if self._unknown_commands < _UNKNOWN_COMMANDS:
                raise _CommandError(f'500 Error: command "{verb.decode()}" not recognized')
            raise _CommandError("502 5.5.1 Too many unrecognized commands, goodbye.")
        try:
            return command, argument.strip().decode(*self._encoding) or None
        except UnicodeDecodeError:
            raise _CommandError("500 Error: strict ASCII mode") from None

    @aiosmtpd.smtp.syntax("EHLO hostname")
    async def smtp_EHLO(self, hostname: str | None) -> None:
        """Offer our extensions, in one answer (RFC 5321, section 4.1.1.1).

        aiosmtpd has no word for the absence of a limit, which is `SIZE 0` (RFC 1870, section 4).
        """
        if not hostname:
            await self.push("501 Syntax: EHLO hostname")
            return
        # Private, but nothing else ends a transaction, as EHLO does (RFC 5321, section 4.1.4).
        self._set_rset_state()  # type: ignore[no-untyped-call]  # aiosmtpd's
        self.session.extended_smtp = True
        self.session.host_name = hostname
        extensions = [f"SIZE {self.data_size_limit}", "8BITMIME", "PIPELINING"]
        if self.enable_SMTPUTF8:
            extensions.append("SMTPUTF8")
        if self.offers_starttls:
            extensions.append("STARTTLS")
        if self.offers_auth:
            extensions.append(f"AUTH {' '.join(auth.MECHANISMS)}")
        lines = [self.hostname, *extensions]
        await self.push("\r\n".join([*(f"250-{line}" for line in lines), "250 HELP"]))

    @property
    def offers_starttls(self) -> bool:
        """Whether the session can be encrypted, and is not yet."""
        return self.tls_context is not None and not self._encrypted

    @aiosmtpd.smtp.syntax("QUIT")
    async def smtp_QUIT(self, argument: str | None) -> None:
        """End the session (RFC 5321, section 4.1.1.10).

        aiosmtpd closes the transport here, too; closed twice, asyncio's for TLS falls apart.
        """
        if argument:
            raise _CommandError("501 Syntax: QUIT")
        status = await self._call_handler_hook("QUIT")
        await self.push("221 Bye" if status is aiosmtpd.smtp.MISSING else status)
        raise asyncio.CancelledError

    @aiosmtpd.smtp.syntax("STARTTLS", when="offers_starttls")
    async def smtp_STARTTLS(self, argument: str | None) -> None:
        """Begin TLS (RFC 3207).

        aiosmtpd does this with the private parts of asyncio, and logs a failure with a traceback.
        """
        if argument:
            raise _CommandError("501 Syntax: STARTTLS")
        if self._encrypted:
            raise _CommandError("503 5.5.1 TLS is active already")
        if self.tls_context is None:
            raise _CommandError("454 4.7.0 TLS not available")
        await self.push("220 Ready to start TLS")
        await self._start_tls()

    async def _start_tls(self) -> None:
        """Speak TLS from here on; forget what has been said in clear (RFC 3207, section 4.2)."""
        if self._unread:
            # Here commands can be injected that seem to have come encrypted (CVE-2021-33515).
            self._warn("What was sent behind STARTTLS, without waiting for the reply, is dropped")
            self._unread.clear()
        self._encrypted = True
        try:
            transport: Any = await self.loop.start_tls(
                cast("asyncio.Transport", self.transport),
                self,
                cast("ssl.SSLContext", self.tls_context),
                server_side=True,
                ssl_handshake_timeout=_HANDSHAKE,
            )
        except (OSError, asyncio.CancelledError) as error:
            if isinstance(error, OSError):
                self._warn(f"The TLS handshake has failed: {tls.failure(error)}")
            # Depending on Python's version and the failure, asyncio does not tell us.
            self.connection_lost(None)
            raise asyncio.CancelledError from None
        peer = self.session.peer
        self._set_rset_state()  # type: ignore[no-untyped-call]  # aiosmtpd's
        self.session = self._create_session()
        self.session.peer = peer
        self._mute = True
        self.session.ssl = {"cipher": transport.get_extra_info("cipher")}
        self.transport = transport
        # As aiosmtpd does: before Python 3.11 there is no public way.
        for stream in (self._reader, self._writer):
            setattr(stream, "_transport", transport)  # noqa: B010  # which the types do not know

    @aiosmtpd.smtp.syntax("AUTH mechanism", extended=" [initial-response]", when="offers_auth")
    async def smtp_AUTH(self, argument: str | None) -> None:
        """Take any credentials (RFC 4954, section 4).

        aiosmtpd knows mechanisms in capitals only, and wants no AUTH inside of implicit TLS.
        """
        if not self.offers_auth:
            raise _CommandError("502 5.5.1 AUTH is disabled")
        if not self.session.host_name:
            raise _CommandError("503 Error: send EHLO first")
        if self.session.authenticated or self.envelope.mail_from:
            raise _CommandError("503 5.5.1 Error: AUTH comes once, and before MAIL")
        name, _, initial = (argument or "").partition(" ")
        if not name or " " in initial.strip():
            raise _CommandError("501 5.5.4 Syntax: AUTH mechanism [initial-response]")
        mechanism = auth.MECHANISMS.get(name.upper())
        if mechanism is None:
            raise _CommandError("504 5.5.4 Unrecognized authentication mechanism")
        user = await self._log_in(mechanism(), initial.strip())
        self.session.authenticated = True
        log.info("%s: %s logged in by AUTH %s", self._peer, printable(user), name.upper())
        await self.push("235 2.7.0 Authentication successful")

    async def _log_in(self, exchange: auth.Exchange, initial: str) -> str:
        """Return who logs in by *exchange*, perhaps with an *initial* response.

        Nothing keeps the password, and nothing logs it.
        """
        response = initial.encode("utf-8", "surrogateescape")
        challenge = next(exchange)
        try:
            while True:
                response = response or await self._respond(challenge)
                challenge, response = exchange.send(auth.decode(response)), b""
        except StopIteration as done:
            return str(done.value)

    async def _respond(self, challenge: bytes) -> bytes:
        """Send a *challenge* of AUTH, and return the response (RFC 4954, section 4)."""
        await self.push(b"334 " + b64encode(challenge))
        return await self._command_line()

    @aiosmtpd.smtp.syntax("VRFY <address>")
    async def smtp_VRFY(self, argument: str | None) -> None:
        """Promise nothing about an address (RFC 5321, section 7.3)."""
        if not argument:
            raise _CommandError("501 Syntax: VRFY <address>")
        await self.push("252 Cannot VRFY user, but will take a mail to it")

    @aiosmtpd.smtp.syntax("MAIL FROM:<address>", extended=" [SP <mail-parameters>]")
    async def smtp_MAIL(self, argument: str | None) -> None:
        """Begin a mail with its reverse-path (RFC 5321, section 4.1.1.2).

        aiosmtpd refuses parameters that are not offered, and its parser, that of the email package,
        changes addresses and takes 0.1 ms for each.
        """
        if not self.session.host_name:
            raise _CommandError("503 Error: send HELO first")
        if self.envelope.mail_from:
            raise _CommandError("503 Error: nested MAIL command")
        self._reported: set[str] = set()
        path = self._path("MAIL FROM", argument, self._parameters)
        size = path.parameters.get("SIZE", "")
        if self.data_size_limit and _SIZE.fullmatch(size) and int(size) > self.data_size_limit:
            raise _CommandError("552 Error: message size exceeds fixed maximum message size")
        self.envelope.smtp_utf8 = "SMTPUTF8" in path.parameters
        status = await self._call_handler_hook("MAIL", path.address, path.options)
        if status is aiosmtpd.smtp.MISSING:
            self.envelope.mail_from = path.address
            status = "250 OK"
        await self.push(status)

    @aiosmtpd.smtp.syntax("RCPT TO:<address>", extended=" [SP <rcpt-parameters>]")
    async def smtp_RCPT(self, argument: str | None) -> None:
        """Take a recipient (RFC 5321, section 4.1.1.3)."""
        if not self.envelope.mail_from:
            raise _CommandError("503 Error: need MAIL command")
        if len(self.envelope.rcpt_tos) >= _RECIPIENTS:
            raise _CommandError("452 4.5.3 Too many recipients")
        path = self._path("RCPT TO", argument, {})
        status = await self._call_handler_hook("RCPT", path.address, path.options)
        if status is aiosmtpd.smtp.MISSING:
            self.envelope.rcpt_tos.append(path.address)
            status = "250 OK"
        await self.push(status)

    def _path(
        self, command: str, argument: str | None, offered: Mapping[str, re.Pattern[str]]
    ) -> Path:
        """Return the path in the *argument* of *command*, as in `MAIL FROM`.

        Log what other servers may refuse, everything once in a transaction. *offered* are the
        parameters that clients may use after EHLO.
        """
        path = parse(command[5:], argument or "")
        if path is None:
            raise _CommandError(f"501 Syntax: {command}:<address>")
        faults = path.faults
        for keyword, value in path.parameters.items():
            pattern = offered.get(keyword) if self.session.extended_smtp else None
            if pattern is None or not pattern.fullmatch(value):
                faults.append(keyword or "=")
        if not (path.address.isascii() or "SMTPUTF8" in path.parameters or self.envelope.smtp_utf8):
            faults.append("an address beyond ASCII without SMTPUTF8")
        if faults and (news := [fault for fault in faults if fault not in self._reported]):
            self._reported.update(news)
            self._warn(f"Servers may refuse {', '.join(news)} in: {command[:4]} {argument}")
        return path

    def _warn(self, text: str) -> None:
        log.warning("%s: %s", self._peer, printable(text))

    @property
    def _peer(self) -> str:
        return printable(endpoint(self.session.peer))

    @aiosmtpd.smtp.syntax("DATA")
    async def smtp_DATA(self, argument: str | None) -> None:
        """Take a mail and hand it to the handler (RFC 5321, section 4.1.1.4)."""
        if not self.envelope.rcpt_tos:
            await self.push("503 Error: need RCPT command")
        elif argument:
            await self.push("501 Syntax: DATA")
        else:
            await self.push("354 End data with <CR><LF>.<CR><LF>")
            try:
                status = await self._delivered(await self._content())
            finally:
                self._set_post_data_state()  # type: ignore[no-untyped-call]  # aiosmtpd's
            await self.push(status)

    async def _delivered(self, content: bytes | None) -> Any:
        """Hand a mail to the handler, unless it is too large; return the reply to it."""
        if content is None:
            return "552 Error: Too much mail data"
        self.envelope.content = self.envelope.original_content = content
        self._delivering = True
        try:
            status = await self._call_handler_hook("DATA")
            # Mails that have come together are replied to together: a client that is woken for each
            # reply takes the processor from the mails of the others.
            await asyncio.sleep(0)
        finally:
            self._delivering = False
            self._heard = self.loop.time()
        return status

    async def _content(self) -> bytes | None:
        """Return the mail that comes, or None when it is over the size limit and thrown away.

        It is dot-unstuffed (RFC 5321, section 4.5.2). What counts is the mail itself (RFC 1870,
        section 4): not the line end in front of it, not the end of data, and not the stuffing,
        which makes it longer by a third at the most.
        """
        limit = self.data_size_limit or sys.maxsize
        most = limit + limit // 3 + len(_END_OF_DATA)
        received, size, chunk = io.BytesIO(), 0, b""  # which grows without being copied
        # The end of the command's line may be the beginning of the end of data.
        self._unread[:0] = b"\r\n"
        while not chunk.endswith(_END_OF_DATA):
            chunk = await self._chunk(_END_OF_DATA)
            received.write(chunk if size else chunk[2:])
            size += len(chunk)
            if size > most:
                received = io.BytesIO()
        if size > most:
            return None
        received.truncate(received.tell() - len(b".\r\n"))
        content = received.getvalue().removeprefix(b".").replace(b"\r\n.", b"\r\n")
        return content if len(content) <= limit else None

    async def hang_up(self) -> None:
        """End the session, after the reply to a delivery that has begun.

        The client is told by a 421 (RFC 5321, section 3.8). One that does not read is not
        waited for.
        """
        self._ending = True
        if self._delivering:
            await asyncio.wait([self._handler_coroutine])
        if self.transport is not None:
            # Private, but nothing else keeps commands that have arrived from being carried out.
            self._handler_coroutine.cancel()
            self._cut("421 4.3.2 dsmtpd is stopping")

    def _timeout_cb(self) -> None:
        """Cut a client that has sent nothing for too long (RFC 5321, section 4.5.3.2.7).

        aiosmtpd sets a timer anew for each command, which takes as long as the command does.
        """
        if self._delivering:
            self._heard = self.loop.time()
        patience = self._heard + self._timeout_duration - self.loop.time()
        if patience > 0:
            self._timeout_handle = self.loop.call_later(patience, self._timeout_cb)
        else:
            self._cut("421 4.4.2 Nothing has come for too long")

    def _cut(self, reply: str) -> None:
        """Send a last *reply*, if the client reads it, and end the connection."""
        transport = self._writer.transport
        # Not after the last reply, and not into a handshake, during which the protocol is another.
        if not self._over and transport.get_protocol() is self:
            transport.write(self._replies + reply.encode() + b"\r\n")
        transport.abort()
