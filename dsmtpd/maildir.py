"""`Maildir`, a `mailbox.Maildir` whose `add` is quick, durable and byte-exact."""

from __future__ import annotations

import errno
import mailbox
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOLDERS = ("tmp", "new", "cur")

# Like other Maildir software: only the owner can read the mails, unless they open the folders.
_FOLDER_MODE = 0o700

# The rights needed, and the message if they are missing; a folder must be readable to be flushed.
_RIGHTS = (
    ("tmp", os.W_OK | os.X_OK, "Not writable"),
    ("new", os.W_OK | os.X_OK, "Not writable"),
    ("new", os.R_OK, "Not readable"),
)

# Seconds after which a file in tmp/ must be left over from an interrupted delivery (Maildir(5)).
_STALE = 36 * 3600

# What the system says about folders that it cannot flush.
_NOT_FLUSHED = {errno.EBADF, errno.EINVAL}

# Windows would write each LF as CRLF.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)

# How much of a large mail is converted for storage at a time, in octets.
_PIECE = 256 * 1024

_count = count(1)
_run = f"R{os.urandom(4).hex()}Q"


def is_maildir(path: str | os.PathLike[str]) -> bool:
    """Return whether *path* is a folder that has the three folders of a Maildir."""
    return all(Path(path, name).is_dir() for name in FOLDERS)


def ensure_maildir(path: str | os.PathLike[str]) -> None:
    """Create the Maildir *path*, with its parents, or complete it; keep what is there.

    What it creates survives a power cut. Raises `OSError`, with the file name and the reason, if
    *path* cannot be a Maildir.
    """
    folders = [Path(path, name) for name in ("", *FOLDERS)]
    try:
        missing = [folder for folder in (*folders[0].parents, *folders) if not folder.exists()]
        for folder in folders:
            folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        for parent in dict.fromkeys(folder.parent for folder in missing):
            _flush(parent)
    except FileExistsError as error:
        reason = os.strerror(errno.ENOTDIR)
        raise NotADirectoryError(errno.ENOTDIR, reason, str(error.filename)) from None
    for name, needed, reason in _RIGHTS:
        if not os.access(folder := Path(path, name), needed):
            raise PermissionError(errno.EACCES, reason, str(folder))


class Maildir(mailbox.Maildir):
    """A `mailbox.Maildir` that stores messages of bytes quickly, durably and exactly.

    Its length, and so its truth value, lists all mails, as in its base class.
    """

    # Separates a name from its flags; Windows allows no colon in file names.
    colon = "!" if os.name == "nt" else ":"

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        factory: Callable[[Any], mailbox.MaildirMessage] | None = None,
        create: bool = True,  # noqa: FBT001, FBT002  # as in the base class
    ) -> None:
        """Open the Maildir *dirname*; create or complete it, with its parents, if *create* is true.

        Raises `OSError` if it cannot be one, and `mailbox.NoSuchMailboxError` if it is missing and
        *create* is false.
        """
        folder = os.path.abspath(os.path.expanduser(dirname))  # noqa: PTH100, PTH111  # as there
        if create:
            ensure_maildir(folder)
        super().__init__(folder, factory, create=False)
        self._base = os.path.join(folder, "")  # noqa: PTH118

    def add(self, message: Any, *, head: bytes = b"") -> str:
        """Store *message* in new/ and return its key.

        In bytes, each CRLF becomes LF, and nothing else changes; *head* is stored before them. The
        file is written in tmp/, flushed to the disk and moved, as Maildir(5) demands: no reader
        sees half a mail. Then the folder is flushed, so that a power cut changes nothing any more.
        If the Maildir has disappeared, it is created again. Any number of threads and processes may
        do this at the same time. Anything else that `mailbox.Maildir` accepts is stored as usual.

        Raises `OSError` if the mail cannot be stored; nothing of it is left behind then.
        """
        if not isinstance(message, bytes):
            if head:
                raise TypeError(f"head goes with bytes, not with {type(message).__name__}")
            return super().add(message)
        try:
            return self._deliver(head, message)
        except FileNotFoundError:
            ensure_maildir(self._base)
            return self._deliver(head, message)

    def _deliver(self, head: bytes, content: bytes) -> str:
        # With functions of `os`: every mail comes this way, and `pathlib` takes twice as long.
        name = _unique_name()
        path, mail = f"{self._base}tmp/{name}", f"{self._base}new/{name}"
        descriptor = os.open(path, _NEW, 0o666)
        try:
            try:
                for piece in _pieces(head, content):
                    while piece:  # The system may write less at once.
                        piece = piece[os.write(descriptor, piece) :]  # noqa: PLW2901
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(path, mail)  # noqa: PTH104
            path = mail
            _flush(f"{self._base}new")
        except BaseException:
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108
            raise
        return name

    def path(self, key: str) -> str:
        """Return the absolute path of the file of *key*, until a reader moves it."""
        return os.path.join(self._base, "new", key)  # noqa: PTH118

    def clean(self) -> None:
        """Remove the files in tmp/ that have not been accessed for 36 hours.

        Unlike the base class, it does not fail if one is a folder or has just vanished.
        """
        tmp = f"{self._base}tmp"
        if os.path.islink(tmp):  # noqa: PTH114
            return  # The files may belong to somebody else.
        with suppress(OSError), os.scandir(tmp) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and time.time() - status.st_atime > _STALE:
                        os.unlink(entry.path)  # noqa: PTH108


@contextmanager
def create_maildir(
    path: str | os.PathLike[str],
    create: bool = True,  # noqa: FBT001, FBT002  # as in the original
) -> Iterator[Maildir]:
    """Yield the Maildir at *path*, locked; create it first if *create* is true.

    Raises `mailbox.NoSuchMailboxError` if there is none and *create* is false.
    """
    maildir = Maildir(path, create=create)
    maildir.lock()
    try:
        yield maildir
    finally:
        maildir.unlock()


def mail_files(path: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield the file of each mail in the Maildir at *path*, read or not; raises `OSError`."""
    for name in ("new", "cur"):
        with os.scandir(Path(path, name)) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file():
                    yield entry


def count_mails(path: str | os.PathLike[str]) -> int:
    """Return how many mails, read or not, the Maildir at *path* has from before this run."""
    return sum(_run not in entry.name for entry in mail_files(path))


def _flush(folder: str | os.PathLike[str]) -> None:
    """Flush the names in *folder* to the disk, if the system can do that; raises `OSError`."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders.
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FLUSHED:
            raise
    finally:
        os.close(descriptor)


def _pieces(head: bytes, content: bytes) -> Iterator[bytes]:
    """Yield *head* and *content* as they are stored, in pieces, since a mail may be large."""
    begin = 0
    while True:
        end = begin + _PIECE
        end += content[end - 1 : end + 1] == b"\r\n"
        yield head + b"\n".join(content[begin:end].split(b"\r\n"))  # faster than replace
        if end >= len(content):
            break
        head, begin = b"", end


def _unique_name() -> str:
    """Return a file name that nobody else uses, in the format of Maildirs.

    Names sort by time. The process's id is followed by a random number, because processes in two
    containers may have the same id and the same host name.
    """
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")
    return f"{seconds}.M{nanoseconds // 1000:06}P{os.getpid()}{_run}{next(_count)}.{host}"
