from __future__ import annotations

import errno
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd._dsmtpd import DsmtpdHandler
from dsmtpd.server import Listener
from tests.tools import FREE, begin_data, connect, mails, stored, troubles

if TYPE_CHECKING:
    import smtplib
    from collections.abc import Callable

FDS = Path("/proc/self/fd")

FULL, FAILED = b"452 4.3.1 Storage full", b"451 4.3.0 Storage failed"

# A missing Maildir is created again.
REPLIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EIO: FAILED,
    errno.EACCES: FAILED,
    errno.EROFS: FAILED,
    errno.EMFILE: FAILED,
    errno.ENOENT: b"250 OK",
}

SMALL = b"From: a@x\r\nSubject: small\r\n\r\n"
LARGE = SMALL + (b"x" * 98 + b"\r\n") * 9_000  # written in four pieces

CALLS = ("open", "write", "half a write", "fsync", "close", "rename")
FOLDER_CALLS = ("folder open", "folder fsync", "folder close")


class Fault:
    """Makes a system call in *maildir* fail with the errno *number*, at its *time*-th use."""

    def __init__(self, call: str, maildir: Path, number: int, time: int) -> None:
        self.name = call.rsplit(maxsplit=1)[-1]
        self._prefix, self._suffix = f"{maildir}/", "/new" if call.startswith("folder") else ""
        self._half, self._number, self._left = call.startswith("half"), number, time
        self._call: Callable[..., Any] = getattr(os, self.name)

    def __call__(self, target: Any, *arguments: Any) -> Any:
        if self._is_meant(target):
            self._left -= 1
            if self._half and self._left == 0:
                return self._call(target, arguments[0][: len(arguments[0]) // 2])
            if self._left == -self._half:
                if self.name == "close":  # Even a close that fails closes the descriptor.
                    self._call(target)
                raise OSError(self._number, os.strerror(self._number))
        return self._call(target, *arguments)

    def _is_meant(self, target: Any) -> bool:
        path = target if isinstance(target, str) else str((FDS / str(target)).readlink())
        return path.startswith(self._prefix) and path.endswith("/new") is bool(self._suffix)


def descriptors() -> list[str]:
    return sorted(link.name for link in FDS.iterdir())


def replies(client: smtplib.SMTP, content: bytes, count: int) -> list[bytes]:
    """Send *content* *count* times; return the replies."""
    found = []
    for _ in range(count):
        begin_data(client)
        client.send(content + b".\r\n")
        found.append(b"%d %b" % client.getreply())
    return found


@pytest.mark.skipif(not FDS.is_dir(), reason="this system has no /proc")
@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("call", [*CALLS, *FOLDER_CALLS])
def test_a_storage_fault_refuses_one_mail_in_one_line_and_leaves_nothing_behind(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    times: Callable[[int, int], int],
    call: str,
    content: bytes,
) -> None:
    maildir = tmp_path / "maildir"
    with Listener(DsmtpdHandler(maildir), FREE) as listener, connect(listener.port) as client:
        client.ehlo()
        before = descriptors()
        for number, time in product(REPLIES, range(1, times(1, 3) + 1)):
            caplog.clear()
            fault = Fault(call, maildir, number, time)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, fault.name, fault)
                answers = replies(client, content, 4)
            assert sorted(answers) == [b"250 OK"] * 3 + [REPLIES[number]]
            refused = 4 - answers.count(b"250 OK")
            line = f"Cannot store a mail in {maildir}: {os.strerror(number)}"
            assert troubles(caplog) == [("ERROR", line)] * refused
            assert len(stored(maildir)) == mails(maildir).count(content) == 4 - refused
            assert descriptors() == before
            for mail in (maildir / "new").iterdir():
                mail.unlink()
