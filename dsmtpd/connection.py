"""One client's connection: its lines and our replies, in clear or encrypted, until its end."""

from __future__ import annotations

import asyncio
import copy
import logging
from typing import TYPE_CHECKING, Any, cast

import aiosmtpd.smtp

from dsmtpd import tls
from dsmtpd.message import endpoint, printable

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Self

log = logging.getLogger(__package__)

# The most that is read from a socket at once. When twice as much lies unread, the client waits.
_READ = 256 * 1024

# So many octets of replies may wait for the others of their group.
_GROUP_OCTETS = 4096

# Seconds for a handshake: a client that waits for a greeting in plain text learns of its mistake.
_HANDSHAKE = 10


class Connection(aiosmtpd.smtp.SMTP, asyncio.BufferedProtocol):
    """A quick connection, which a stopping server can end without losing a mail that it holds.

    It replaces what every connection passes through in aiosmtpd, whose commands it leaves alone.
    """

    session: aiosmtpd.smtp.Session
    envelope: aiosmtpd.smtp.Envelope
    transport: asyncio.Transport | None

    # Private names of aiosmtpd. There are no public ones for the streams (`_reader`, `_writer`),
    # a new session (`_create_session`, `_set_rset_state`) and the clock (`_timeout_cb`,
    # `_timeout_duration`, `_timeout_handle`). `_handle_client` is replaced since it matches and
    # logs each command several times, and forgets those before an end.
    _handler_coroutine: asyncio.Task[None]  # It carries out the commands; see `hang_up`.

    def __init__(self, handler: object, *, implicit_tls: bool = False, **parameters: Any) -> None:
        """Take *parameters* of aiosmtpd's `SMTP`.

        A `tls_context` among them is for `start_tls`, with which *implicit_tls* begins.
        """
        super().__init__(handler, **parameters)
        self._implicit_tls = implicit_tls
        self._input = memoryview(bytearray(_READ))
        self._replies = b""
        self._may_wait = False  # The reply may be sent with the next one.
        self._delivering = False
        self._encrypted = False  # from the beginning of the handshake
        self._mute = False  # The client has not said anything since the handshake.
        self._over = False  # We have closed the connection.
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
        return not self._encrypted

    async def push(self, status: str | bytes) -> None:
        """Send the reply *status*, after those that wait.

        It waits itself when it may, and the next command is here (RFC 2920, section 3.2).
        """
        reply = status if isinstance(status, bytes) else status.encode("utf-8", "backslashreplace")
        self._replies += reply + b"\r\n"
        if self._may_wait and b"\n" in self._unread and len(self._replies) < _GROUP_OCTETS:
            return
        # A client that does not read has to wait; at the end, nobody waits for it.
        if self._flush() and not self._ending:
            await self._writer.drain()

    def _flush(self) -> int:
        """Send the replies that wait; return how many octets are not on their way then.

        In a handshake the protocol of the transport is another, and after an end by TLS there is
        none, which asyncio before Python 3.11 stumbles over.
        """
        transport = self._writer.transport
        replies, self._replies = self._replies, b""
        if self._over or transport.get_protocol() is not self:
            return 0
        transport.write(replies)
        return transport.get_write_buffer_size()

    async def _handle_client(self) -> None:
        self._heard = self.loop.time()
        try:
            if self._implicit_tls:
                # asyncio carries this out before it reads: what comes is for the handshake.
                await self.start_tls()
            await self.push(f"220 {self.hostname} {self.__ident__}")
            while not self._ending:
                line = await self._line()
                self._mute = False
                await self._answer(line)
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
                self._flush()
                self._over = True
                self._writer.close()

    async def _answer(self, line: bytes) -> None:
        """Carry out the command in *line*; for subclasses.

        Raises `IncompleteReadError` when the client has left, and `CancelledError` when the
        connection is to end.
        """

    @property
    def _unread(self) -> bytearray:
        """What has arrived; asyncio has no public name for it."""
        return self._reader._buffer  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001

    async def _line(self) -> bytes:
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

    async def start_tls(self) -> None:
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
        except OSError as error:
            self._warn(f"The TLS handshake has failed: {tls.failure(error)}")
            # Depending on Python's version and the failure, asyncio tells us, too, or does not.
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

    def _warn(self, text: str) -> None:
        log.warning("%s: %s", self._peer, printable(text))

    @property
    def _peer(self) -> str:
        return printable(endpoint(self.session.peer))

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
        self._replies += reply.encode() + b"\r\n"
        self._flush()
        self._writer.transport.abort()
