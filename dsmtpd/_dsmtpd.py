"""The daemon: what happens to a mail, and the command that puts the pieces together."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from dsmtpd import __version__, command, logs, signals
from dsmtpd.cli import UsageError, parse_args
from dsmtpd.command import CommandError
from dsmtpd.maildir import Maildir, count_mails, create_maildir, ensure_maildir, is_maildir
from dsmtpd.message import CHECKED_OCTETS, Message
from dsmtpd.options import DEFAULT_INTERFACE, DEFAULT_PORT
from dsmtpd.server import Listener, ListenError, StopError
from dsmtpd.text import endpoint, printable
from dsmtpd.tls import TLSError, ca_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aiosmtpd.smtp import Envelope

    from dsmtpd.options import Options
    from dsmtpd.show import Printer

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

# Messages up to this size, in octets, are written in the event loop, as long as the last write was
# faster than this, in seconds: memory is, and hardly any disk.
_SMALL = 256 * 1024
_AT_ONCE = 200e-6

# How many files macOS really lets a process open when it reports no limit (its OPEN_MAX).
_OPEN_MAX = 10_240

# How many deliveries may wait for the disk at the same time.
_DELIVERIES = 32

# Seconds to wait at the end for the count of the mails.
_PATIENCE = 1


class _StorageError(Exception):
    """Mails cannot be stored; the text names the folder and the reason."""


class _NotStoredError(Exception):
    """A mail was not stored; the text is the reply to its sender."""


class DsmtpdHandler:
    """Logs each mail as one line, and stores it if there is a Maildir; for any controller.

    *maildir*: the path of a Maildir, which is created if it does not exist; None stores nothing.
    *printer*: prints each accepted mail; None prints nothing.
    Raises `OSError` when *maildir* cannot be a Maildir.
    """

    def __init__(
        self, maildir: str | os.PathLike[str] | None = None, printer: Printer | None = None
    ) -> None:
        """Open the Maildir, if there is one."""
        self._printer = printer
        self.maildir = None if maildir is None else Maildir(maildir)
        self._path = "" if maildir is None else maildir
        self._at_once = False
        self._workers = ThreadPoolExecutor(_DELIVERIES, "delivery")

    async def handle_DATA(self, server: object, session: Any, envelope: Envelope) -> str:  # noqa: ARG002
        """Log the mail in *envelope*, store it, and return the reply.

        `250` means that the whole mail is in the Maildir. Storage errors are temporary (RFC 5321,
        section 4.2.1): the sender should keep the mail and try again.
        """
        message = Message.from_envelope(session.peer, envelope)
        _show(message)
        file = None
        if self.maildir is not None:
            try:
                file = await self._deliver(self.maildir, message)
            except _NotStoredError as failure:
                return str(failure)
        if self._printer is not None:
            await self._printer.show(message, session, file)
        return "250 OK"

    async def handle_exception(self, error: Exception) -> str:
        """Log *error*, which is our own fault, without details for the client."""
        log.error("%s", printable(f"Internal error: {error!r}"))
        return "451 4.3.0 Internal error"

    async def _deliver(self, maildir: Maildir, message: Message) -> str:
        """Store *message* in *maildir* without blocking other sessions; return the file's path.

        Raises `_NotStoredError`.
        """
        head = message.envelope_fields()
        if self._at_once and len(head) + len(message.content) <= _SMALL:
            return self._store(maildir, head, message.content)
        # In a thread, since a slow disk must not block the other sessions; shielded, since a mail
        # that was logged is stored even if the client does not wait for it.
        job = _Job(partial(self._store, maildir, head, message.content))
        try:
            self._workers.submit(job.run)
        except RuntimeError:
            # The system grants no more threads. The pool has queued the job nevertheless.
            job.run()
        return await asyncio.shield(asyncio.wrap_future(job.result))

    def _store(self, maildir: Maildir, head: bytes, content: bytes) -> str:
        """Store *head* and *content* in *maildir*; return the path of the file."""
        begin = time.perf_counter()
        try:
            return maildir.path(maildir.add(content, head=head))
        except OSError as error:
            reason = _reason(self._path, error)
            log.error("%s", printable(f"Cannot store a mail in {self._path}: {reason}"))
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            reply = "452 4.3.1 Storage full" if full else "451 4.3.0 Storage failed"
            raise _NotStoredError(reply) from None
        finally:
            self._at_once = time.perf_counter() - begin < _AT_ONCE


class _Job:
    """Work that is done once, by whoever runs it first, and that then frees its mail."""

    def __init__(self, work: Callable[[], str]) -> None:
        self.result: Future[str] = Future()
        self._work = deque([work])

    def run(self) -> None:
        """Do the work, unless somebody has begun it."""
        with suppress(IndexError):
            work = self._work.pop()  # succeeds in only one thread
            try:
                self.result.set_result(work())
            except Exception as error:  # noqa: BLE001  # for whoever waits for the result
                self.result.set_exception(error)


def _show(message: Message) -> None:
    """Log *message* in one line, and what other servers may refuse in another."""
    summary = message.summary()
    log.info("%(peer)s: %(mail_from)s -> %(rcpttos)s [%(subject)s]", summary)
    if faults := message.faults():
        where = " in its first MiB" if len(message.content) > CHECKED_OCTETS else ""
        line = "%s: Other servers may refuse this mail%s: %s"
        log.warning(line, summary["peer"], where, "; ".join(faults))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments *argv*, by default those of the process.

    Returns its exit code: 0 after SIGINT, SIGTERM or SIGHUP, 1 when it cannot listen, 2 for
    arguments that it cannot carry out, else that of the command after `--`. At the end, the process
    ignores these signals. `--help` and `--version` raise `SystemExit`.
    """
    logs.configure()
    try:
        code = _serve(parse_args(argv))
    except UsageError as error:
        with suppress(OSError):
            print(f"dsmtpd: {printable(str(error))}", file=sys.stderr)  # noqa: T201
        return 2
    except (_StorageError, TLSError, ListenError) as error:
        log.error("%s", printable(str(error)))
        return 1 if isinstance(error, ListenError) else 2
    except CommandError as error:
        log.error("%s", printable(str(error)))
        code = error.code
    log.info("Cleaning up")
    return code


def _serve(options: Options) -> int:
    """Serve clients until a signal comes or the command ends; return the exit code.

    Whatever may take long, such as a slow folder or a resolver, comes first, while a signal still
    ends the process at once.
    """
    files = _raise_file_limit()
    printer = _printer(options)
    with _storage(options.directory):
        handler = DsmtpdHandler(options.directory, printer)
        if handler.maildir is not None:
            handler.maildir.clean()
    listener = Listener(handler, options)
    code = 0
    try:
        with (
            signals.blocked(*(command.PASSED_ON if options.command else ())) as held,
            printer or nullcontext(),
            listener,
            # Only once it listens: until then, the file may belong to another running dsmtpd.
            ca_file(listener.ca, options.tls_ca) as ca,
        ):
            announcing = _begin(partial(_announce, options, listener, ca))
            if options.command:
                code = command.run(options.command, _variables(options, listener, ca), held, files)
            else:
                signals.wait(held)
            logs.hurry()
        _join(announcing, options)
    except StopError as error:
        log.error("%s", printable(f"{error}: dsmtpd no longer waits for the disk"))
        log.info("Cleaning up")
        os._exit(code)  # Python would wait for the threads.
    return code


def _join(announcing: Thread | None, options: Options) -> None:
    if announcing is not None:
        announcing.join(_PATIENCE)
        if announcing.is_alive():
            raise StopError(f"The mails in {options.directory} could not be counted in time")


def _variables(options: Options, listener: Listener, ca: str | None) -> dict[str, str]:
    """Return the variables through which a command finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.host, listener.host)  # noqa: S104
    variables = {"DSMTPD_HOST": host, "DSMTPD_PORT": str(listener.port)}
    if options.directory is not None:
        variables["DSMTPD_DIRECTORY"] = os.path.abspath(options.directory)  # noqa: PTH100
    if ca is not None:
        variables["DSMTPD_TLS_CA"] = os.path.abspath(ca)  # noqa: PTH100
    return variables


def _printer(options: Options) -> Printer | None:
    if options.printing is None:
        return None
    from dsmtpd.show import Printer  # noqa: PLC0415  # slow to import

    return Printer(options.printing, sys.stdout)


def _begin(work: Callable[[], None]) -> Thread | None:
    """Begin *work* in a thread, and return the thread; if the system grants none, do it now."""
    thread = Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        work()
        return None
    return thread


def _raise_file_limit() -> tuple[int, int] | None:
    """Raise the limit of open files as far as the system allows; each client needs one.

    Return the previous limits; Windows has none.
    """
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415

    before = soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (most, max(soft, _OPEN_MAX)):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
            break
    return before


@contextmanager
def _storage(directory: str | None) -> Iterator[None]:
    """Turn an `OSError` about *directory* into an error that names it."""
    try:
        yield
    except OSError as error:
        reason = _reason(directory or "", error)
        raise _StorageError(f"Cannot store mails in {directory}: {reason}") from error


def _announce(options: Options, listener: Listener, ca: str | None) -> None:
    """Log that the server listens, which certificate it uses, and where it stores mails."""
    address = endpoint((options.interface, listener.port))
    log.info(
        "Starting dsmtpd %s at %s size limit %s", __version__, address, options.max_size or None
    )
    if options.tls is not None:
        way = "after STARTTLS" if options.tls == "starttls" else "from the first byte"
        shown = (
            f"a certificate of the CA in {ca}" if ca else f"the certificate in {options.tls_cert}"
        )
        log.info("%s", printable(f"TLS {way}, with {shown}"))
    if not listener.is_local:
        log.warning("Other machines can send mails here, too: -i 127.0.0.1 keeps them out")
    if options.directory is None:
        return
    try:
        # Only once it listens: counting a hundred thousand mails takes as long as the start.
        if mails := count_mails(options.directory):
            log.info("Found a Maildir storage with %d mails", mails)
    except OSError as error:
        reason = _reason(options.directory, error)
        log.warning("%s", printable(f"Cannot count the mails in {options.directory}: {reason}"))
    log.info("Storing the incoming emails into %s", printable(options.directory))


def _reason(maildir: str | os.PathLike[str], error: OSError) -> str:
    """Return the cause of *error*, with its path unless that is *maildir* itself."""
    path = error.filename2 or error.filename or maildir
    is_maildir_itself = os.path.abspath(path) == os.path.abspath(maildir)  # noqa: PTH100
    where = "" if is_maildir_itself else f" ({path})"
    return f"{error.strerror}{where}"
