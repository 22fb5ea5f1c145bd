"""What the connections of a server share: the handler, the offer, TLS, the writes of a turn."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aiosmtpd.smtp import Envelope

from dsmtpd.text import printable

if TYPE_CHECKING:
    import ssl

    from aiosmtpd.smtp import Session

    from dsmtpd.conversation import Mail, Offer

log = logging.getLogger(__package__)

# The most that is read from a socket at once.
_INPUT_OCTETS = 64 * 1024


class Service:
    """What the connections of a server share.

    *handler* has a coroutine method `handle_DATA(server, session, envelope)` that returns the
    reply to a mail, as aiosmtpd defines it, and perhaps `handle_exception(error)`. *context* holds
    the certificate, if the *offer* includes TLS.

    *clients*: the open connections, which have `flush` and `hang_up`.
    *input*: the buffer for what arrives.
    """

    def __init__(
        self,
        handler: Any,
        offer: Offer,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Serve nobody yet."""
        if (offer.tls is None) is not (context is None):
            raise ValueError("TLS and a certificate go together")
        self.offer = offer
        self.loop = loop
        self.context = context
        self.clients: set[Any] = set()
        self.input = bytearray(_INPUT_OCTETS)
        self._handler = handler
        self._deliveries: set[asyncio.Task[None]] = set()
        self._outbox: list[Any] = []

    def post(self, client: Any) -> None:
        """Have *client* flush its replies: at once when it is the only one, else with the others.

        A client that is woken by each reply takes the processor from the mails of the others: worth
        22 % with ten sessions, and to write at once 11 % with one.
        """
        if len(self.clients) == 1:
            client.flush()
            return
        if not self._outbox:
            self.loop.call_soon(self._flush)
        self._outbox.append(client)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        for client in outbox:
            client.flush()

    def keep(self, delivery: asyncio.Task[None]) -> None:
        """Keep a *delivery* that has begun until it is done, whether or not its client stays."""
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def hang_up(self) -> None:
        """End all sessions, and wait for the deliveries that have begun."""
        await asyncio.gather(*(client.hang_up() for client in self.clients))
        if self._deliveries:
            await asyncio.wait(self._deliveries)

    async def deliver(self, server: Any, session: Session, mail: Mail) -> str:
        """Hand *mail* to the handler; return the reply to it."""
        envelope = Envelope()
        envelope.mail_from = mail.reverse_path.address
        envelope.mail_options = mail.reverse_path.options
        envelope.smtp_utf8 = "SMTPUTF8" in mail.reverse_path.parameters
        envelope.rcpt_tos = [path.address for path in mail.forward_paths]
        envelope.rcpt_options = [option for path in mail.forward_paths for option in path.options]
        envelope.content = envelope.original_content = mail.content
        try:
            return str(await self._handler.handle_DATA(server, session, envelope))
        except Exception as error:  # noqa: BLE001  # the handler's own, which may be any
            return await self._excuse(error)

    async def _excuse(self, error: Exception) -> str:
        """Return the reply to a mail that the handler failed at with *error*."""
        try:
            return str(await self._handler.handle_exception(error))
        except Exception as another:  # noqa: BLE001  # likewise, or there is no such method
            log.error("%s", printable(f"Internal error: {error!r}, then {another!r}"))
            return "421 4.3.0 Internal error"
