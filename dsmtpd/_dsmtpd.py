"""The daemon: what happens to a mail, and the command that puts the parts together."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dsmtpd import __version__, logs
from dsmtpd.cli import UsageError, parse_args
from dsmtpd.maildir import count_mails, create_maildir, deliver, ensure_maildir, is_maildir
from dsmtpd.message import Message, endpoint, printable
from dsmtpd.options import DEFAULT_INTERFACE, DEFAULT_PORT
from dsmtpd.server import Listener, ListenError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

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


class DsmtpdHandler:
    """Shows each mail as one log line, and stores it when it has a Maildir; for any controller.

    *maildir* is made when it does not exist. Raises `OSError` when it cannot be one.
    """

    def __init__(self, maildir: str | os.PathLike[str] | None = None) -> None:
        """Make the Maildir ready, when there is one."""
        self.maildir = maildir
        if maildir is not None:
            ensure_maildir(maildir)

    async def handle_DATA(self, _server: object, session: Any, envelope: Envelope) -> str:
        """Show the mail in *envelope*, store it, and return the reply.

        `250` means that the whole mail is in the Maildir. Trouble with the storage is temporary
        (RFC 5321, section 4.2.1): the sender is to keep the mail and to try again.
        """
        message = Message.from_envelope(session.peer, envelope)
        log.info("%(peer)s: %(mail_from)s -> %(rcpttos)s [%(subject)s]", message.summary())
        if self.maildir is not None:
            try:
                await asyncio.to_thread(_store, message, self.maildir)
            except OSError as error:
                log.error("Cannot store a mail in %s", _where_and_why(self.maildir, error))
                full = error.errno in {errno.ENOSPC, errno.EDQUOT}
                return "452 4.3.1 Storage full" if full else "451 4.3.0 Storage failed"
        return "250 OK"

    async def handle_exception(self, error: Exception) -> str:
        """Log *error*, which is a fault of ours, and tell the client nothing of it."""
        log.error("Internal error: %r", error)
        return "451 4.3.0 Internal error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments *argv*, by default those of the process.

    Returns its exit code: 0 after SIGINT or SIGTERM, 1 when it cannot listen, 2 when the arguments
    cannot be carried out.
    """
    logs.configure()
    signals = _stop_signals()
    try:
        options = parse_args(argv)
        handler, mails = _open_storage(options.directory)
        with Listener(handler, options) as listener:
            _announce(options, listener.port, mails)
            signals.get()
    except (UsageError, ListenError) as error:
        log.error("%s", printable(str(error)))
        return 1 if isinstance(error, ListenError) else 2
    log.info("Cleaning up")
    return 0


def _stop_signals() -> SimpleQueue[int]:
    """Return a queue that from now on gets the signals that ask the process to stop.

    A signal that the process was started to ignore, as a script's `dsmtpd &` ignores SIGINT, stays
    ignored. `SimpleQueue.put` may interrupt itself, what no lock of `threading` may.
    """
    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _frame: signals.put(received))
    return signals


def _open_storage(directory: str | None) -> tuple[DsmtpdHandler, int]:
    """Return the handler that stores in *directory*, and how many mails are there already."""
    try:
        handler = DsmtpdHandler(directory)
        return handler, 0 if directory is None else count_mails(directory)
    except OSError as error:
        raise UsageError(f"Cannot store mails in {_where_and_why(directory, error)}") from error


def _announce(options: Options, port: int, mails: int) -> None:
    """Log that the server listens, and what it does with mails."""
    address = endpoint((options.interface, port))
    log.info(
        "Starting dsmtpd %s at %s size limit %s", __version__, address, options.max_size or None
    )
    if mails:
        log.info("Found a Maildir storage with %d mails", mails)
    if options.directory is not None:
        log.info("Storing the incoming emails into %s", options.directory)


def _store(message: Message, maildir: str | os.PathLike[str]) -> None:
    deliver(maildir, message.stored())


def _where_and_why(maildir: str | os.PathLike[str] | None, error: OSError) -> str:
    return f"{maildir}: {error.filename or maildir}: {error.strerror}"
