"""Makes, recognises and fills Maildirs."""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mailbox
    from collections.abc import Iterator

FOLDERS = ("tmp", "new", "cur")

# Like other Maildir software: mails are for their owner's eyes, unless they open the folders.
_FOLDER_MODE = 0o700

# Of a large mail, so much is turned into its stored form at once.
_PIECE = 256 * 1024

_count = count(1)
_run = f"R{os.urandom(4).hex()}Q"


def is_maildir(path: str | os.PathLike[str]) -> bool:
    """Tell whether *path* is a folder that has the three folders of a Maildir."""
    return all(Path(path, name).is_dir() for name in FOLDERS)


def ensure_maildir(path: str | os.PathLike[str]) -> None:
    """Make *path* a Maildir that mails can be stored in, with its parents; keep what is there.

    Raises `OSError`, with the file name and the reason, when it cannot be one.
    """
    for folder in (Path(path), *(Path(path, name) for name in FOLDERS)):
        _ensure_folder(folder)
    for folder in (Path(path, "tmp"), Path(path, "new")):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Not writable", str(folder))


def _ensure_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


@contextmanager
def create_maildir(
    path: str | os.PathLike[str],
    create: bool = True,  # noqa: FBT001, FBT002  # as people call it
) -> Iterator[mailbox.Maildir]:
    """Lend the Maildir at *path*, locked; make it first when *create* is true.

    Raises `mailbox.NoSuchMailboxError` when there is none and it is not to be made.
    """
    import mailbox  # noqa: PLC0415  # it would delay every start, and only this needs it

    if create:
        ensure_maildir(path)
    maildir = mailbox.Maildir(path, create=False)
    maildir.lock()
    try:
        yield maildir
    finally:
        maildir.unlock()


def count_mails(path: str | os.PathLike[str]) -> int:
    """Return how many mails the Maildir at *path* holds, read or not, that are not of this run."""
    return sum(
        not entry.name.startswith(".") and _run not in entry.name and not entry.is_dir()
        for name in ("new", "cur")
        for entry in os.scandir(Path(path, name))
    )


def deliver(path: str | os.PathLike[str], head: bytes, content: bytes) -> str:
    """Store *head* and *content* as one mail in the Maildir at *path*; return its file in new/.

    The CRLF of *content* become LF, and nothing else changes. The file is written in tmp/, flushed
    to the disk and moved, as Maildir(5) wants: no reader sees half a mail. A Maildir that has
    disappeared is made again. Any thread of any process may deliver into the same Maildir at the
    same time.

    Raises `OSError` when the mail cannot be stored; nothing of it is left behind then.
    """
    try:
        return _deliver(path, head, content)
    except FileNotFoundError:
        ensure_maildir(path)
        return _deliver(path, head, content)


def _deliver(path: str | os.PathLike[str], head: bytes, content: bytes) -> str:
    # By the functions of `os`: all mails go this way, and those of `pathlib` make it twice as long.
    base, name = os.path.join(path, ""), _unique_name()  # noqa: PTH118
    draft, mail = f"{base}tmp/{name}", f"{base}new/{name}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            for piece in _pieces(head, content):
                _write(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(draft, mail)  # noqa: PTH104
    except OSError:
        with suppress(OSError):
            os.unlink(draft)  # noqa: PTH108
        raise
    return mail


def _pieces(head: bytes, content: bytes) -> Iterator[bytes]:
    """Yield what is to be stored, in pieces, since a mail may be large."""
    begin = 0
    while True:
        end = begin + _PIECE
        end += content[end - 1 : end + 1] == b"\r\n"
        yield head + b"\n".join(content[begin:end].split(b"\r\n"))  # quicker than replace
        if end >= len(content):
            break
        head, begin = b"", end


def _write(descriptor: int, piece: bytes) -> None:
    """Write all of *piece*; the system may take less at once."""
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _unique_name() -> str:
    """Return a file name that nobody else uses, in the form that Maildirs have.

    Names sort by time. A random number stands beside the process's id, because processes in two
    containers may have the same id and the same host name.
    """
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")
    return f"{seconds}.M{nanoseconds // 1000:06}P{os.getpid()}{_run}{next(_count)}.{host}"
