"""Makes, recognises and fills Maildirs."""

from __future__ import annotations

import errno
import itertools
import mailbox
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLDERS = ("tmp", "new", "cur")

# Like other Maildir software: mails are for their owner's eyes, unless they open the folders.
_FOLDER_MODE = 0o700

_count = itertools.count(1)
_random = os.urandom(4).hex()


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
    if create:
        ensure_maildir(path)
    maildir = mailbox.Maildir(path, create=False)
    maildir.lock()
    try:
        yield maildir
    finally:
        maildir.unlock()


def count_mails(path: str | os.PathLike[str]) -> int:
    """Return how many mails the Maildir at *path* holds, read or not."""
    return sum(
        not entry.name.startswith(".") and not entry.is_dir()
        for name in ("new", "cur")
        for entry in os.scandir(Path(path, name))
    )


def deliver(path: str | os.PathLike[str], parts: Sequence[bytes]) -> Path:
    """Store the mail that *parts* make up in the Maildir at *path*; return its file in new/.

    The file is written in tmp/, flushed to the disk and moved, as Maildir(5) wants: no reader sees
    half a mail. A Maildir that has disappeared is made again. Any thread of any process may
    deliver into the same Maildir at the same time.

    Raises `OSError` when the mail cannot be stored; nothing of it is left behind then.
    """
    try:
        return _deliver(Path(path), parts)
    except FileNotFoundError:
        ensure_maildir(path)
        return _deliver(Path(path), parts)


def _deliver(path: Path, parts: Sequence[bytes]) -> Path:
    name = _unique_name()
    draft, mail = path / "tmp" / name, path / "new" / name
    try:
        with draft.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(mail)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise
    return mail


def _unique_name() -> str:
    """Return a file name that nobody else uses, in the form that Maildirs have.

    Names sort by time. A random number stands beside the process's id, because processes in two
    containers may have the same id and the same host name.
    """
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")
    return f"{seconds}.M{nanoseconds // 1000:06}P{os.getpid()}R{_random}Q{next(_count)}.{host}"
