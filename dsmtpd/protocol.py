"""One client's session: aiosmtpd's, with the path that every mail takes made short."""

from __future__ import annotations

import asyncio
import copy
import io
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiosmtpd.smtp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from typing_extensions import Self

    Command = Callable[[str | None], Awaitable[None]]

# The most that is read from a socket at once. When twice as much lies unread, the client waits.
_READ = 256 * 1024

# RFC 5321, section 4.1.1.4: a dot alone on its line. Where a bare CR or LF may end that line, mails
# can be smuggled in (CVE-2024-27305).
_END_OF_DATA = b"\r\n.\r\n"

# As many as aiosmtpd takes. What sends more is no SMTP client.
_UNKNOWN_COMMANDS = 5

# `<local@domain>`, both made of plain atoms. What begins with `=?` may be an encoded word, and a
# parameter that begins with `(` is a comment: they are for the full parser.
_ATOM = r"[\w!#$%&'*+/=?^`{|}~-]+"
_DOT_ATOM = rf"(?!=\?){_ATOM}(?:\.{_ATOM})*"
_PLAIN_PATH = re.compile(rf"<({_DOT_ATOM}@{_DOT_ATOM})> *([!-'*-~].*)?")


class _CommandError(Exception):
    """A command cannot be carried out; the text is the reply."""


class SMTP(aiosmtpd.smtp.SMTP, asyncio.BufferedProtocol):
    """A quick session, which a stopping server can end without losing a mail that it holds.

    It replaces what every connection or every mail passes through in aiosmtpd. Of aiosmtpd's
    parameters it heeds those that `server` gives it.
    """

    # RFC 5321 (section 4.5.3.1.4) asks for 512 octets at least.
    command_size_limit = 1001

    session: aiosmtpd.smtp.Session
    envelope: aiosmtpd.smtp.Envelope
    transport: asyncio.Transport | None

    # Private names of aiosmtpd. There are no public ones for the streams (`_reader`, `_writer`),
    # the hooks of the handler (`_handle_hooks`, `_call_handler_hook`), the end of a transaction
    # (`_set_rset_state`, `_set_post_data_state`) and the clock (`_timeout_cb`, `_timeout_duration`,
    # `_timeout_handle`). `_handle_client` is replaced since it matches and logs each command
    # several times, and forgets those before an end; `_getaddr` and `_getparams` for the reasons
    # given there.
    _handler_coroutine: asyncio.Task[None]  # It carries out the commands; see `hang_up`.

    def __init__(self, handler: object, **parameters: Any) -> None:
        """Take *parameters* of aiosmtpd's `SMTP`; *handler* needs a `handle_DATA`."""
        super().__init__(handler, **parameters)
        self._encoding = (
            ("utf-8", "surrogateescape") if self.enable_SMTPUTF8 else ("ascii", "strict")
        )
        self._input = memoryview(bytearray(_READ))
        self._hooked = not self._handle_hooks.keys().isdisjoint({"MAIL", "RCPT"})
        self._unknown_commands = 0
        self._delivering = self._ending = False

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
        return self._writer.get_extra_info("sslcontext") is None

    async def push(self, status: str | bytes) -> None:
        """Send the reply *status*."""
        reply = status if isinstance(status, bytes) else status.encode("utf-8", "backslashreplace")
        transport = self._writer.transport
        transport.write(reply + b"\r\n")
        # A client that does not read has to wait; at the end, nobody waits for it.
        if transport.get_write_buffer_size() and not self._ending:
            await self._writer.drain()

    async def _handle_client(self) -> None:
        self._heard = self.loop.time()
        await self.push(f"220 {self.hostname} {self.__ident__}")
        try:
            while not self._ending and self._unknown_commands < _UNKNOWN_COMMANDS:
                await self._answer(await self._command_line())
                if self._unread:
                    await asyncio.sleep(0)  # The other sessions are to have their turn.
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            # The client has said its last, or the connection has ended. A task that ends cancelled
            # would keep what has come of a mail, by its traceback.
            pass
        finally:
            if not self._ending:
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
        try:
            method, argument = self._command(line)
            await method(argument)
        except _CommandError as error:
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
        if len(line) > self.command_size_limit:
            raise _CommandError("500 Command line too long")
        verb, _, argument = line.partition(b" ")
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
        lines = [f"250-{self.hostname}", f"250-SIZE {self.data_size_limit}", "250-8BITMIME"]
        if self.enable_SMTPUTF8:
            lines.append("250-SMTPUTF8")
        await self.push("\r\n".join([*lines, "250 HELP"]))

    @aiosmtpd.smtp.syntax("MAIL FROM: <address>", extended=" [SP <mail-parameters>]")
    async def smtp_MAIL(self, arg: str | None) -> None:
        """Take the reverse-path (RFC 5321, section 4.1.1.2)."""
        if not self.envelope.mail_from and (address := self._plain("FROM", arg)):
            self.envelope.mail_from = address
            await self.push("250 OK")
        else:
            await super().smtp_MAIL(arg)

    @aiosmtpd.smtp.syntax("RCPT TO: <address>", extended=" [SP <mail-parameters>]")
    async def smtp_RCPT(self, arg: str | None) -> None:
        """Take a recipient (RFC 5321, section 4.1.1.3)."""
        if self.envelope.mail_from and (address := self._plain("TO", arg)):
            self.envelope.rcpt_tos.append(address)
            await self.push("250 OK")
        else:
            await super().smtp_RCPT(arg)

    def _plain(self, keyword: str, arg: str | None) -> str | None:
        """Return the address in *arg* if it is plain and aiosmtpd would do no more than take it."""
        if arg is None or not self.session.host_name or self._hooked:
            return None
        word, _, path = arg.partition(":")
        plain = _PLAIN_PATH.fullmatch(path.lstrip(" ")) if word.upper() == keyword else None
        return plain[1] if plain and not plain[2] else None

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
        self._writer.write(f"{reply}\r\n".encode())
        self._writer.transport.abort()

    def _getaddr(self, arg: str) -> tuple[str | None, str | None]:
        # Private. The parser of the email package, which it calls, takes 0.1 ms, and stumbles over
        # `<` and the like before Python 3.14. Without an address the reply is "malformed address".
        if plain := _PLAIN_PATH.fullmatch(arg):
            return plain[1], plain[2] or ""
        address: tuple[str | None, str | None] = None, None
        with suppress(AttributeError, IndexError, RecursionError, UnboundLocalError):
            address = super()._getaddr(arg)
        return address

    def _getparams(self, params: Sequence[str]) -> dict[str, str | bool] | None:
        # Private. It takes what Unicode calls a digit for one: `SIZE=²`.
        return super()._getparams(params) if "".join(params).isascii() else None
