"""One client's connection: it carries a conversation over a transport, with or without TLS."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import sys
import time
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from aiosmtpd.smtp import Envelope, Session

from dsmtpd import __version__, tls
from dsmtpd.conversation import (
    Control,
    Conversation,
    Delay,
    Heard,
    Mail,
    Offer,
    Reply,
    Report,
)
from dsmtpd.failures import Failures
from dsmtpd.text import endpoint, printable

if TYPE_CHECKING:
    from dsmtpd.conversation import Action, Failure, Stage
    from dsmtpd.options import Options

log = logging.getLogger(__package__)

# How many octets are read from a socket at once, and how many may be waiting to be handled before
# the client has to wait.
_INPUT_OCTETS = 64 * 1024
_UNREAD_OCTETS = 64 * 1024

# After this many actions or seconds, the other connections have their turn. Within a turn, the
# replies to commands that came together are sent together (RFC 2920, section 3.2).
_ACTIONS = 64
_TURN = 0.01

# Windows waits for at most 512 sockets at a time, and the server needs a few itself.
_CLIENTS = 500 if sys.platform == "win32" else float("inf")

# Seconds without an octet after which a client is cut (RFC 5321, section 4.5.3.2.7).
_PATIENCE = 300

# Seconds for a handshake: a client that waits for a plain-text greeting soon learns its mistake.
_HANDSHAKE_PATIENCE = 10

_LEFT = "the client left; perhaps it speaks plain text, or does not trust the certificate"
_LATE = "it takes too long; perhaps the client speaks plain text"


class Service:
    """What connections share: the handler, the offer, TLS, and the writes of a turn.

    *handler* has a coroutine method `handle_DATA(server, session, envelope)` that returns the
    reply to a mail, as aiosmtpd defines it, and perhaps `handle_exception(error)`. *options* say
    what to offer.

    *ca*: the certificate in PEM of the CA that clients may trust, if one was generated for TLS.
    *verbose*: whether the dialogue is logged.
    *failures*: which replies are to fail.
    *clients*: the connections that are open or have a delivery in progress.
    *input*: the buffer that sockets are read into.
    """

    def __init__(self, handler: Any, options: Options) -> None:
        """Load the certificate; raises `TLSError` when there is none for TLS."""
        self.handler = handler
        self.context, self.ca = tls.certificate(options)
        self.offer = Offer(
            # The system's own name needs no resolver, which can take 20 s.
            hostname=socket.gethostname() or "localhost",
            ident=f"dsmtpd {__version__}",
            max_size=options.max_size,
            smtputf8=not options.disable_smtputf8,
            auth=not options.disable_auth,
            tls=options.tls,
        )
        self.verbose = options.verbose
        self.failures = Failures(options.failures)
        self.input = bytearray(_INPUT_OCTETS)
        self.clients: set[Connection] = set()
        self._outbox: list[Connection] = []

    def ask(self, session: Session, stage: Stage, subject: str) -> Failure | None:
        """Return how a reply to the client of *session* must fail, or None if it must not."""
        if stage == "connect":
            # Without its port; that of a Unix socket has none.
            subject = endpoint(session.peer).rpartition(":")[0].strip("[]")
        return self.failures.ask(stage, subject)

    def post(self, client: Connection) -> None:
        """Have *client* flush its replies: at once when it is the only one, else with the others.

        A client that each reply wakes takes the processor from the mails of the others: waiting is
        worth 22 % with ten sessions, and writing at once 11 % with one.
        """
        if len(self.clients) == 1:
            client.flush()
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(client)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        for client in outbox:
            client.flush()

    async def hang_up(self) -> None:
        """End all sessions, and wait for the deliveries in progress."""
        await asyncio.gather(*(client.hang_up() for client in self.clients))


class Connection(asyncio.BufferedProtocol):
    """A connection that a stopping server can end without losing a received mail."""

    def __init__(self, service: Service) -> None:
        """Wait for the connection to be made."""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._session = Session(self._loop)
        self._conversation = Conversation(
            service.offer, verbose=service.verbose, ask=partial(service.ask, self._session)
        )
        self._transport: asyncio.Transport | None = None
        self._tls: tls.Layer | None = None
        self._replies = b""  # not written yet
        self._delivery: asyncio.Task[None] | None = None
        self._turn: asyncio.Handle | None = None  # to go on in
        self._clock: asyncio.TimerHandle | None = None
        self._heard = 0.0  # when the client was last heard of
        self._is_blocked = False  # The client does not read.
        self._is_full = False  # We do not read.
        self._is_delayed = False  # A rule of --fail makes us wait.
        self._is_ending = False  # The server stops, or has failed.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        self._transport = cast("asyncio.Transport", transport)
        self._session.peer = transport.get_extra_info("peername")
        self._service.clients.add(self)
        self._heard = self._loop.time()
        self._set_clock(_PATIENCE)
        if len(self._service.clients) > _CLIENTS:
            self._report(Report("Too many clients at a time"))
            self._is_ending = True
            self._cut("421 4.3.2 Too many clients")
        self._proceed()

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002  # asyncio's
        """Return the buffer that all connections share.

        With asyncio's other protocols, each command comes in 256 KiB of fresh memory, which costs
        13 % more processor time per mail.
        """
        return self._service.input

    def buffer_updated(self, nbytes: int) -> None:
        """Handle what has come."""
        self._heard = self._loop.time()
        self._proceed(nbytes)

    def eof_received(self) -> bool:
        """Stay open to reply to what the client sent before it closed its half."""
        if self._is_shaking_hands:
            self._fail(_LEFT)
        else:
            self._conversation.receive_eof()
            self._proceed()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's
        """Forget the client, except for a delivery in progress."""
        if self._is_shaking_hands and not self._is_ending:
            self._fail(_LEFT)
        for handle in (self._clock, self._turn):
            if handle is not None:
                handle.cancel()
        # Break the cycles, so nothing lives until the next garbage collection.
        self._clock = self._turn = None
        self._is_blocked = False
        self._conversation.lost()
        self._proceed()
        self._transport = self._tls = None
        if self._delivery is None:
            self._service.clients.discard(self)

    def pause_writing(self) -> None:
        """Wait for a client that does not read."""
        self._is_blocked = True

    def resume_writing(self) -> None:
        """Go on with a client that reads again."""
        self._is_blocked = False
        self._heard = self._loop.time()
        self._proceed()

    def _proceed(self, received: int = 0) -> None:
        """Do what the conversation wants, as far as possible now.

        *received*: how many octets in the buffer are new.
        """
        try:
            if received:
                self._receive(received)
            if self._turn is None:
                self._act()
        except Exception as error:  # noqa: BLE001  # the rest of a mail must never be read as commands
            self._is_ending = True
            self._conversation.lost()  # frees the memory of a mail
            log.error("%s", printable(f"Internal error: {error!r}"))
            self._cut("421 4.3.0 Internal error")

    def _receive(self, octets: int) -> None:
        if self._tls is None:
            self._conversation.receive(self._service.input, octets)
        elif plain := self._decrypt(self._tls, bytes(self._service.input[:octets])):
            self._conversation.receive(plain)

    def _act(self) -> None:
        """Do a limited number of actions; leave the rest to another turn."""
        end = time.monotonic() + _TURN
        for _ in takewhile(lambda _: time.monotonic() < end, range(_ACTIONS)):
            if self._is_blocked or self._is_ending or self._is_delayed:
                break
            action = self._conversation.next_action()
            if action is None:
                break
            self._perform(action)
        else:
            self._turn = self._loop.call_soon(self._take_turn)
        if self._replies:
            self._service.post(self)
        has_enough = self._is_delayed or self._conversation.unread > _UNREAD_OCTETS
        if self._is_full is not has_enough:
            self._is_full = not self._is_full
            transport = cast("asyncio.Transport", self._transport)
            if self._is_full:
                transport.pause_reading()
            else:
                transport.resume_reading()

    def _take_turn(self) -> None:
        self._turn = None
        self._proceed()

    def _end_delay(self) -> None:
        self._is_delayed = False
        self._heard = self._loop.time()
        self._take_turn()

    def _perform(self, action: Action) -> None:
        if isinstance(action, Reply):
            self._replies += action.octets
            if self._service.verbose:
                for line in action.octets.decode("utf-8", "backslashreplace").splitlines():
                    self._log(logging.INFO, f"S: {line}")
        elif isinstance(action, Mail):
            self._delivery = self._loop.create_task(self._deliver(action))
        elif isinstance(action, Report):
            self._report(action)
        elif isinstance(action, Heard):
            self._log(logging.INFO, f"C: {action.text}")
        elif isinstance(action, Delay):
            self._is_delayed = True
            self._turn = self._loop.call_later(action.seconds, self._end_delay)
        elif action is Control.CUT:
            self.flush()
            self._cut()
        elif action is Control.BEGIN_TLS:
            self.flush()
            self._tls = tls.Layer(cast("ssl.SSLContext", self._service.context))
            self._set_clock(_HANDSHAKE_PATIENCE)
        else:
            self._close()

    async def _deliver(self, mail: Mail) -> None:
        """Hand *mail* to the handler, and send its reply to the client."""
        envelope = Envelope()
        envelope.mail_from = mail.reverse_path.address
        envelope.mail_options = mail.reverse_path.options
        envelope.smtp_utf8 = "SMTPUTF8" in mail.reverse_path.parameters
        envelope.rcpt_tos = [path.address for path in mail.forward_paths]
        envelope.rcpt_options = [option for path in mail.forward_paths for option in path.options]
        envelope.content = envelope.original_content = mail.content
        self._session.host_name = self._conversation.host_name
        self._session.extended_smtp = bool(self._conversation.extended)
        if self._conversation.user is not None:
            self._session.authenticated = True
            self._session.auth_data = self._conversation.user  # type: ignore[assignment]  # any
        handler = self._service.handler
        reply = "421 4.3.0 Internal error"  # also when the handler is cancelled
        try:
            reply = str(await handler.handle_DATA(self, self._session, envelope))
        except Exception as error:  # noqa: BLE001  # a handler may raise anything
            try:
                reply = str(await handler.handle_exception(error))
            except Exception as another:  # noqa: BLE001  # likewise, or the method is missing
                log.error("%s", printable(f"Internal error: {error!r}, then {another!r}"))
        finally:
            self._delivery = None
            if self._transport is None:
                self._service.clients.discard(self)
            self._heard = self._loop.time()
            self._conversation.delivered(reply)
            # Even if the server is about to hang up on the client.
            if action := self._conversation.next_action():
                self._perform(action)
            self._proceed()

    def flush(self) -> None:
        """Write the pending replies."""
        replies, self._replies = self._replies, b""
        if replies and self._tls is not None:
            self._tls.send(replies)
            replies = self._tls.outgoing()
        self._write(replies)

    def _write(self, octets: bytes) -> None:
        if octets and self._transport is not None:
            self._transport.write(octets)

    def _report(self, report: Report) -> None:
        self._log(logging.WARNING if report.warns else logging.INFO, report.text)

    def _log(self, level: int, text: str) -> None:
        log.log(level, "%s: %s", printable(endpoint(self._session.peer)), printable(text))

    @property
    def _is_shaking_hands(self) -> bool:
        return self._tls is not None and self._tls.cipher is None

    def _decrypt(self, layer: tls.Layer, octets: bytes) -> bytes:
        """Return the plain text of *octets*, which may be a handshake instead."""
        was_shaking_hands = layer.cipher is None
        try:
            plain = layer.receive(octets)
        except ssl.SSLError as error:
            self._write(layer.outgoing())
            self._fail(tls.failure(error))
            return b""
        self._write(layer.outgoing())
        if was_shaking_hands and layer.cipher is not None:
            peer, self._session = self._session.peer, Session(self._loop)
            self._session.peer = peer
            self._session.ssl = {"cipher": layer.cipher, "version": layer.version}
            if self._service.verbose:
                self._log(logging.INFO, f"{layer.version} with {layer.cipher[0]}")
            self._conversation.tls_begun()
        if layer.ended:
            self._conversation.receive_eof()
        return plain

    def _fail(self, reason: str) -> None:
        """End a connection whose TLS has failed for *reason*."""
        what = "The TLS handshake" if self._is_shaking_hands else "TLS"
        self._report(Report(f"{what} failed: {reason}"))
        self._tls = None
        self._conversation.lost()
        self._cut()

    def _close(self) -> None:
        """Close the connection once everything is sent."""
        self.flush()
        if self._tls is not None:
            self._tls.close()
            self._write(self._tls.outgoing())
        cast("asyncio.Transport", self._transport).close()

    def _cut(self, reply: str = "") -> None:
        """Send a last *reply*, if the client can read it, and end the connection."""
        if self._transport is None:
            return
        if reply and not (self._is_shaking_hands or self._transport.is_closing()):
            self._replies += reply.encode() + b"\r\n"
            self.flush()
        self._transport.abort()

    async def hang_up(self) -> None:
        """End the session with a 421 (RFC 5321, section 3.8), after a delivery in progress.

        Do not wait for a client that does not read.
        """
        self._is_ending = True
        if self._delivery is not None:
            await asyncio.wait([self._delivery])
        self._cut("421 4.3.2 dsmtpd is stopping")

    def _set_clock(self, seconds: float) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self._loop.call_later(seconds, self._check_clock)

    def _check_clock(self) -> None:
        """Cut a client that has sent nothing for too long."""
        if self._is_shaking_hands:
            self._fail(_LATE)
            return
        if self._delivery is not None or self._is_delayed:
            self._heard = self._loop.time()
        patience = self._heard + _PATIENCE - self._loop.time()
        if patience > 0:
            self._set_clock(patience)
        else:
            self._conversation.lost(f"The client has sent nothing for {_PATIENCE} s")
            self._cut("421 4.4.2 Nothing has come for too long")
