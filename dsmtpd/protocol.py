"""What the commands do: aiosmtpd's, made quick, and patient with what real clients say."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import sys
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import aiosmtpd.smtp

from dsmtpd import auth
from dsmtpd.connection import Connection
from dsmtpd.message import printable
from dsmtpd.path import Path, parse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Command = Callable[[str | None], Awaitable[None]]

log = logging.getLogger(__package__)

# RFC 5321, section 4.1.1.4: a dot alone on its line. Where a bare CR or LF may end that line, mails
# can be smuggled in (CVE-2024-27305).
_END_OF_DATA = b"\r\n.\r\n"

# As many as aiosmtpd takes. What sends more is no SMTP client.
_UNKNOWN_COMMANDS = 5

# RFC 5321 (section 4.5.3.1.4) asks for 512 octets at least.
_COMMAND_OCTETS = 1001

# RFC 5321, section 4.5.3.1.10, asks for 100 at least.
_RECIPIENTS = 10_000

# The replies to these may wait for those to the commands behind them (RFC 2920, section 3.2).
_GROUPED = {b"MAIL", b"RCPT", b"RSET"}

# The values of the parameters of MAIL (RFC 1870, 6152, 6531 and 4954).
_SIZE = re.compile(r"[0-9]{1,20}")
_BODY = re.compile("7BIT|8BITMIME", re.IGNORECASE)
_NONE = re.compile("")
_MAILBOX = re.compile(".+")


class _CommandError(Exception):
    """A command cannot be carried out; the text is the reply."""


class SMTP(Connection):
    """A session that takes what it can understand, and tells what other servers may refuse.

    It replaces what every mail passes through in aiosmtpd, and what refuses real clients. Of
    aiosmtpd's parameters it heeds those that `server` gives it.
    """

    # Private names of aiosmtpd. There are no public ones for the hooks of the handler
    # (`_call_handler_hook`, `_handle_hooks`) and the end of a transaction (`_set_rset_state`,
    # `_set_post_data_state`).

    def __init__(self, handler: object, *, offers_auth: bool = True, **parameters: Any) -> None:
        """Take *parameters* of `Connection`; *handler* needs a `handle_DATA`.

        *offers_auth* takes any credentials. A `tls_context` offers STARTTLS, unless the connection
        begins with TLS.
        """
        super().__init__(handler, **parameters)
        self.offers_auth = offers_auth
        self._encoding = (
            ("utf-8", "surrogateescape") if self.enable_SMTPUTF8 else ("ascii", "strict")
        )
        self._parameters = {"SIZE": _SIZE, "BODY": _BODY}
        if self.enable_SMTPUTF8:
            self._parameters["SMTPUTF8"] = _NONE
        if offers_auth:
            self._parameters["AUTH"] = _MAILBOX
        self._unknown_commands = 0

    async def _answer(self, line: bytes) -> None:
        """Carry out the command in *line* (RFC 5321, section 4.1.1), or refuse it."""
        try:
            method, argument = self._command(line)
            await method(argument)
        except (_CommandError, auth.AuthError) as error:
            status = str(error)
        except Exception as error:
            if isinstance(error, asyncio.IncompleteReadError) and self._reader.at_eof():
                raise
            # A hook's, which is not to end the session.
            status = await self.handle_exception(error)
        else:
            return
        # Not above, where the traceback of another error would show what the client has sent.
        await self.push(status)
        if self._unknown_commands == _UNKNOWN_COMMANDS:
            raise asyncio.CancelledError

    def _command(self, line: bytes) -> tuple[Command, str | None]:
        """Return what carries out the command in *line*, and its argument.

        Raises `_CommandError` when there is no such command.
        """
        verb, _, argument = line.partition(b" ")
        self._may_wait = verb.upper() in _GROUPED
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
        await self.start_tls()

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
        return await self._line()

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
        status: Any = aiosmtpd.smtp.MISSING
        if "MAIL" in self._handle_hooks:
            status = await self._call_handler_hook("MAIL", path.address, path.options)
        if status is aiosmtpd.smtp.MISSING:
            self.envelope.mail_from = path.address
            if path.parameters:
                self.envelope.mail_options.extend(path.options)
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
        status: Any = aiosmtpd.smtp.MISSING
        if "RCPT" in self._handle_hooks:
            status = await self._call_handler_hook("RCPT", path.address, path.options)
        if status is aiosmtpd.smtp.MISSING:
            self.envelope.rcpt_tos.append(path.address)
            if path.parameters:
                self.envelope.rcpt_options.extend(path.options)
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
        if not path.parameters and not path.faults and path.address.isascii():
            return path  # as most are
        faults = [*path.faults]
        for keyword, value in path.parameters.items():
            pattern = offered.get(keyword) if self.session.extended_smtp else None
            if pattern is None or not pattern.fullmatch(value):
                faults.append(keyword or "=")
        if not (path.address.isascii() or "SMTPUTF8" in path.parameters or self.envelope.smtp_utf8):
            faults.append("an address beyond ASCII without SMTPUTF8")
        if news := [fault for fault in faults if fault not in self._reported]:
            self._reported.update(news)
            self._warn(f"Servers may refuse {', '.join(news)} in: {command[:4]} {argument}")
        return path

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
