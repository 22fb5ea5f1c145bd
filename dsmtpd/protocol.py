"""One client's session: aiosmtpd's, with our answer to EHLO and an orderly end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from typing import Any

import aiosmtpd.smtp


class SMTP(aiosmtpd.smtp.SMTP):
    """A session that a stopping server can end without losing a mail that it holds."""

    # RFC 5321 (section 4.5.3.1.4) asks for 512 octets at least; we take what the reader takes.
    command_size_limit = aiosmtpd.smtp.SMTP.line_length_limit
    command_size_limits = defaultdict(lambda: SMTP.command_size_limit)  # noqa: RUF012  # aiosmtpd's

    session: aiosmtpd.smtp.Session
    transport: asyncio.Transport | None
    _handler_coroutine: asyncio.Task[None]  # private; see hang_up

    def __init__(self, handler: object, **parameters: Any) -> None:
        """Take the parameters of aiosmtpd's `SMTP`."""
        super().__init__(handler, **parameters)
        self._not_delivering = asyncio.Event()
        self._not_delivering.set()

    async def push(self, status: Any) -> None:
        """Send the reply *status*, and let the other sessions have their turn.

        A client that pipelines would otherwise keep them, and the end, waiting: as long as there is
        something in its buffer, nothing in aiosmtpd's loop ever waits.
        """
        await super().push(status)
        await asyncio.sleep(0)

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

    async def hang_up(self) -> None:
        """End the session, after the answer to a delivery that has begun.

        The client is told by a 421 (RFC 5321, section 3.8). One that does not read is not
        waited for.
        """
        while not self._not_delivering.is_set():
            await self._not_delivering.wait()
        if self.transport is None:
            return
        # Private, but nothing else keeps commands that have arrived from being carried out.
        self._handler_coroutine.cancel()
        self.transport.write(b"421 4.3.2 dsmtpd is stopping\r\n")
        self.transport.abort()

    def _getaddr(self, arg: str) -> tuple[str | None, str | None]:
        # Private. The parser of the email package, which it calls, stumbles over `<` and the like
        # before Python 3.14. Without an address the answer is "malformed address".
        address: tuple[str | None, str | None] = None, None
        with suppress(AttributeError, IndexError, UnboundLocalError):
            address = super()._getaddr(arg)
        return address

    async def _call_handler_hook(self, command: str, *args: Any) -> Any:
        # Private, but the only place that encloses a delivery: the mail is whole, not yet answered.
        if command != "DATA":
            return await super()._call_handler_hook(command, *args)
        self._not_delivering.clear()
        try:
            return await super()._call_handler_hook(command, *args)
        finally:
            self._not_delivering.set()
