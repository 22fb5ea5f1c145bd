"""Listens: a context manager over an aiosmtpd controller that fails at once and knows its port."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import selectors
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from aiosmtpd.controller import UnthreadedController

from dsmtpd import __version__
from dsmtpd.protocol import SMTP

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Self

    from dsmtpd.options import Options

log = logging.getLogger(__package__)

# So many deliveries may wait for the disk at the same time.
_DELIVERIES = 32

# Seconds that the event loop waits awake.
_AWAKE = 100e-6


class ListenError(OSError):
    """The server cannot listen; the text names the interface, the port and the reason."""


class Listener:
    """An SMTP server that listens while its `with` block runs, in a thread of its own.

    *handler* has the hooks that aiosmtpd asks its handlers for, except those for EHLO, AUTH, VRFY
    and STARTTLS; *options* tell where to listen and what to offer, and *context* has what TLS
    takes, if they ask for that. Inside the block, *host* and *port* are the real ones, also for
    port 0.

    Leaving the block stops listening, lets deliveries that have begun finish, and hangs up on the
    other clients.
    """

    host: str
    port: int

    def __init__(
        self, handler: object, options: Options, context: ssl.SSLContext | None = None
    ) -> None:
        """Open nothing yet."""
        self._handler = handler
        self._options = options
        self._context = context

    def __enter__(self) -> Self:
        """Listen; raises `ListenError` as soon as the system says that this cannot be."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dsmtpd")
        try:
            self._controller = self._thread.submit(self._listen).result()
        except (OSError, UnicodeError) as error:
            self._thread.shutdown()
            where = f"{self._options.interface}, port {self._options.port}"
            raise ListenError(f"Cannot listen on {where}: {_reason(error)}") from error
        self.host, self.port = self._controller.address
        self._thread.submit(self._controller.loop.run_forever)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        loop = self._controller.loop
        try:
            asyncio.run_coroutine_threadsafe(self._controller.drain(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.submit(loop.close).result()
            self._thread.shutdown()

    def _listen(self) -> _Controller:
        controller = _Controller(self._handler, self._options, self._context)
        try:
            controller.begin()  # type: ignore[no-untyped-call]
        except BaseException:
            controller.loop.close()
            raise
        return controller


class _Selector(selectors.DefaultSelector):
    """Waits awake for a moment before it sleeps, as being woken takes longer than most commands.

    To a client whose commands wait for one another that is worth a third of its time.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, after *timeout* seconds at the latest."""
        if timeout is None or timeout > _AWAKE:
            end = time.monotonic() + _AWAKE
            while time.monotonic() < end:
                if ready := super().select(0):
                    return ready
        return super().select(timeout)


class _Controller(UnthreadedController):
    """Makes our sessions, all from the same answers to questions that are asked only once."""

    server: asyncio.Server

    def __init__(self, handler: object, options: Options, context: ssl.SSLContext | None) -> None:
        super().__init__(
            handler,
            loop=asyncio.SelectorEventLoop(_Selector()),
            hostname=options.interface,
            port=options.port,
            # Without a name aiosmtpd asks the resolver for one at every connection, which can take
            # 20 s. The system's own name needs no resolver.
            server_hostname=socket.gethostname() or "localhost",
            ident=f"dsmtpd {__version__}",
            data_size_limit=options.max_size,
            enable_SMTPUTF8=not options.disable_smtputf8,
            offers_auth=not options.disable_auth,
            tls_context=context,
            implicit_tls=options.tls == "implicit",
        )
        self.loop.set_exception_handler(self._report)
        self._reported = ""
        # Deliveries wait for the disk: the more of them do so at once, the better.
        self.loop.set_default_executor(ThreadPoolExecutor(_DELIVERIES, "delivery"))
        self._sessions: WeakSet[SMTP] = WeakSet()
        self._pattern = SMTP(self.handler, loop=self.loop, **self.SMTP_kwargs)

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of the first socket."""
        host, port = self.server.sockets[0].getsockname()[:2]
        return host, port

    def factory(self) -> SMTP:
        """Return the protocol for a new connection."""
        session = self._pattern.twin()
        self._sessions.add(session)
        return session

    async def _create_server(self) -> asyncio.Server:
        """Listen on all addresses of the interface, on one port."""
        server = await self.loop.create_server(self.factory, self.hostname, self.port)
        ports = {listening.getsockname()[1] for listening in server.sockets}
        if not ports:  # Python before 3.12.2, for IPv6 on a system that has none
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        if len(ports) > 1:
            # Port 0, and a name with several addresses: each has been given a port of its own.
            server.close()
            server = await self.loop.create_server(self.factory, self.hostname, ports.pop())
        return server

    async def drain(self) -> None:
        """Stop listening, end all sessions, and wait for the deliveries that have begun."""
        for listening in self.server.sockets:
            self.loop.remove_reader(listening.fileno())
        for _ in range(2):  # What has just been accepted takes so many turns to become a session.
            await asyncio.sleep(0)
        self.server.close()
        await asyncio.gather(*(session.hang_up() for session in self._sessions))
        # What a handler has begun, or a connection that was being accepted.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        # A client may have left while its mail was being delivered.
        await self.loop.shutdown_default_executor()

    def _report(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log in one line, and once, what asyncio would print with a traceback and again and again.

        Out of file descriptors, it would report that a hundred times a second.
        """
        report = f"{context['message']}: {context.get('exception')!r}"
        if report != self._reported:
            self._reported = report
            log.error("%s", report)


def _reason(error: OSError | UnicodeError) -> str:
    """Return in a few words why the system did not let us listen."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    if isinstance(error, UnicodeError):
        return "Malformed name"
    # When none of the addresses is ours, asyncio (since Python 3.12) forgets the error's number.
    return os.strerror(error.errno or errno.EADDRNOTAVAIL)
