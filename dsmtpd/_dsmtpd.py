"""The daemon: what happens to a mail, and the command that puts the parts together."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsmtpd import __version__, logs
from dsmtpd.cli import UsageError, parse_args
from dsmtpd.maildir import count_mails, create_maildir, deliver, ensure_maildir, is_maildir
from dsmtpd.message import LINE_OCTETS, Message, endpoint, printable
from dsmtpd.options import DEFAULT_INTERFACE, DEFAULT_PORT
from dsmtpd.server import Listener, ListenError
from dsmtpd.tls import TLSError, ca_file, certificate

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from dsmtpd.message import Envelope
    from dsmtpd.options import Options

__all__ = [
    "DEFAULT_INTERFACE",
    "DEFAULT_PORT",
    "LOGGERNAME",
    "DsmtpdHandler",
    "create_maildir",
    "ensure_maildir",
    "is_maildir",
    "log",
    "main",
    "parse_args",
]

LOGGERNAME = "dsmtpd"

log = logging.getLogger(LOGGERNAME)

# A mail of so many octets is stored in the event loop, without a thread, as long as that has last
# taken less than so many seconds: memory is as quick, and hardly a disk.
_SMALL = 256 * 1024
_AT_ONCE = 200e-6


class DsmtpdHandler:
    """Shows each mail as one log line, and stores it when it has a Maildir; for any controller.

    *maildir* is made when it does not exist. Raises `OSError` when it cannot be one.
    """

    def __init__(self, maildir: str | os.PathLike[str] | None = None) -> None:
        """Make the Maildir ready, when there is one."""
        self.maildir = maildir
        self._at_once = False
        if maildir is not None:
            ensure_maildir(maildir)

    async def handle_DATA(self, server: object, session: Any, envelope: Envelope) -> str:  # noqa: ARG002
        """Show the mail in *envelope*, store it, and return the reply.

        `250` means that the whole mail is in the Maildir. Trouble with the storage is temporary
        (RFC 5321, section 4.2.1): the sender is to keep the mail and to try again.
        """
        message = Message.from_envelope(session.peer, envelope)
        _show(message)
        return "250 OK" if self.maildir is None else await self._deliver(self.maildir, message)

    async def handle_exception(self, error: Exception) -> str:
        """Log *error*, which is a fault of ours, and tell the client nothing of it."""
        log.error("Internal error: %r", error)
        return "451 4.3.0 Internal error"

    async def _deliver(self, maildir: str | os.PathLike[str], message: Message) -> str:
        """Store *message* in *maildir*, where it keeps nobody waiting; return the reply."""
        if self._at_once and len(message.content) <= _SMALL:
            return self._store(maildir, message)
        # In a thread, for a slow disk must not keep the other sessions waiting; shielded, for what
        # has been shown is to be stored even if the client does not wait for it.
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(None, self._store, maildir, message))

    def _store(self, maildir: str | os.PathLike[str], message: Message) -> str:
        """Store *message* in *maildir*; return the reply to its sender."""
        begin = time.perf_counter()
        try:
            deliver(maildir, message.envelope_fields(), message.content)
        except OSError as error:
            reason = _reason(maildir, error)
            log.error("%s", printable(f"Cannot store a mail in {maildir}: {reason}"))
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            return "452 4.3.1 Storage full" if full else "451 4.3.0 Storage failed"
        finally:
            self._at_once = time.perf_counter() - begin < _AT_ONCE
        return "250 OK"


def _show(message: Message) -> None:
    """Log *message* in one line, and what other servers may not like in another."""
    summary = message.summary()
    log.info("%(peer)s: %(mail_from)s -> %(rcpttos)s [%(subject)s]", summary)
    if longest := message.longest_line():
        line = "%s: The longest line has %d octets; servers may refuse more than %d"
        log.warning(line, summary["peer"], longest, LINE_OCTETS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments *argv*, by default those of the process.

    Returns its exit code: 0 after SIGINT or SIGTERM, 1 when it cannot listen, 2 when the arguments
    cannot be carried out. `--help` and `--version` raise `SystemExit`.
    """
    logs.configure()
    try:
        with _stop_signals() as stopping:
            options = parse_args(argv)
            with _storage(options.directory):
                handler = DsmtpdHandler(options.directory)
            shown = certificate(options)
            with (
                Listener(handler, options, shown.context) as listener,
                # Not before it listens: the clients of another dsmtpd may need the file.
                ca_file(shown.ca, options.tls_ca) as ca,
            ):
                _announce(options, listener.port, ca)
                signal.sigwait(stopping)
    except (UsageError, TLSError, ListenError) as error:
        log.error("%s", printable(str(error)))
        return 1 if isinstance(error, ListenError) else 2
    log.info("Cleaning up")
    return 0


@contextmanager
def _stop_signals() -> Iterator[set[signal.Signals]]:
    """Block the signals that ask the process to stop; lend their numbers, for `sigwait`.

    This way none gets lost, whenever and to whichever thread it is sent, and a repeated one, as
    some runners send it, cannot disturb the end. What the process was started to ignore, as a
    script's `dsmtpd &` ignores SIGINT, stays ignored. Only when the work fails are they unblocked.
    """
    stopping = {
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    try:
        yield stopping
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)
        raise


@contextmanager
def _storage(directory: str | None) -> Iterator[None]:
    """Turn what is wrong with *directory* into bad usage."""
    try:
        yield
    except OSError as error:
        reason = _reason(directory or "", error)
        raise UsageError(f"Cannot store mails in {directory}: {reason}") from error


def _announce(options: Options, port: int, ca: str | None) -> None:
    """Log that the server listens, what it shows to clients, and what it does with mails."""
    address = endpoint((options.interface, port))
    log.info(
        "Starting dsmtpd %s at %s size limit %s", __version__, address, options.max_size or None
    )
    if options.tls is not None:
        way = "by STARTTLS" if options.tls == "starttls" else "from the first byte"
        shown = (
            f"a certificate of the CA in {ca}" if ca else f"the certificate in {options.tls_cert}"
        )
        log.info("%s", printable(f"TLS {way}, with {shown}"))
    if options.directory is None:
        return
    # Not before it listens: a hundred thousand mails take as long as the start.
    with _storage(options.directory):
        mails = count_mails(options.directory)
    if mails:
        log.info("Found a Maildir storage with %d mails", mails)
    log.info("Storing the incoming emails into %s", printable(options.directory))


def _reason(maildir: str | os.PathLike[str], error: OSError) -> str:
    """Return what caused *error*, and where, unless that is *maildir* itself."""
    path = error.filename2 or error.filename or maildir
    where = "" if str(path) == str(maildir) else f" ({path})"
    return f"{error.strerror}{where}"
