from __future__ import annotations

import errno
import mailbox
import os
import re
import shutil
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dsmtpd.maildir import count_mails, create_maildir, deliver, ensure_maildir, is_maildir
from tests.tools import PATIENCE, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def maildir(tmp_path: Path) -> Path:
    path = tmp_path / "maildir"
    ensure_maildir(path)
    return path


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_with_the_three_folders_is_a_maildir(tmp_path: Path) -> None:
    assert not is_maildir(tmp_path)
    for name in ("tmp", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "cur").touch()
    assert not is_maildir(tmp_path)
    (tmp_path / "cur").unlink()
    (tmp_path / "cur").mkdir()
    assert is_maildir(tmp_path)
    assert is_maildir(str(tmp_path))


def test_a_file_or_nothing_is_no_maildir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_maildir(tmp_path / "file")
    assert not is_maildir(tmp_path / "nothing")


def test_a_maildir_is_made_with_its_parents_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    ensure_maildir(str(path))
    assert is_maildir(path)
    assert [mode(folder) for folder in (path, *sorted(path.iterdir()))] == [0o700] * 4


def test_a_maildir_is_completed_and_what_is_in_it_is_kept(maildir: Path) -> None:
    (maildir / "cur" / "mail").write_bytes(b"kept")
    (maildir / "notes.txt").write_bytes(b"kept")
    (maildir / "tmp").rmdir()
    maildir.chmod(0o755)
    ensure_maildir(maildir)
    assert is_maildir(maildir)
    assert (maildir / "cur" / "mail").read_bytes() == b"kept"
    assert (maildir / "notes.txt").read_bytes() == b"kept"
    assert mode(maildir) == 0o755


@pytest.mark.parametrize("place", ["file", "file/below", "link", "maildir/new"])
def test_what_is_no_folder_cannot_be_a_maildir(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "maildir").mkdir()
    (tmp_path / "maildir" / "new").touch()
    with pytest.raises(NotADirectoryError) as raised:
        ensure_maildir(tmp_path / place)
    assert raised.value.filename.startswith(str(tmp_path / place))


@pytest.mark.parametrize("name", ["tmp", "new"])
def test_a_folder_that_cannot_be_written_to_is_named(
    maildir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere; test_main has the system refuse it.
    monkeypatch.setattr(os, "access", lambda path, _mode: path != maildir / name)
    with pytest.raises(PermissionError, match="Not writable") as raised:
        ensure_maildir(maildir)
    assert raised.value.filename == str(maildir / name)


def test_a_lent_maildir_is_a_mailbox(tmp_path: Path) -> None:
    with create_maildir(tmp_path / "a" / "b") as lent:
        assert isinstance(lent, mailbox.Maildir)
        lent.add(b"Subject: x\n\n")
        assert len(lent) == 1
    assert is_maildir(tmp_path / "a" / "b")


def test_a_missing_maildir_is_not_made_when_that_is_not_wanted(tmp_path: Path) -> None:
    with (
        pytest.raises(mailbox.NoSuchMailboxError),
        create_maildir(tmp_path / "none", create=False),
    ):
        pytest.fail("there is nothing to lend")
    assert list(tmp_path.iterdir()) == []


def test_new_and_read_mails_are_counted_and_nothing_else(maildir: Path) -> None:
    assert count_mails(maildir) == 0
    for name in ("new/1", "new/2", "cur/3:2,S", "tmp/4", "new/.hidden", "5"):
        (maildir / name).touch()
    (maildir / "new" / "folder").mkdir()
    assert count_mails(maildir) == 3


def test_mails_of_this_run_are_not_counted(maildir: Path) -> None:
    deliver(maildir, b"", b"x")
    (mail,) = (maildir / "new").iterdir()
    assert count_mails(maildir) == 0
    mail.rename(maildir / "cur" / f"{mail.name}:2,S")
    assert count_mails(maildir) == 0


def test_a_delivered_mail_is_in_new_with_all_its_bytes(maildir: Path) -> None:
    path = deliver(maildir, b"X: y\r\n", b"\n\x00\xffbody")
    assert Path(path).parent == maildir / "new"
    assert stored(maildir) == [b"X: y\r\n\n\x00\xffbody"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no header at all",
        b"Subject:  odd \r\n\t \r\n   folding\r\n\r\n",
        b"\r\nonly a body\r\n",
        b"Subject: no blank line\r\nbody\r\n",
        b"Subject: caf\xe9\r\n\r\n\xff\xfe\x00\r\n",
        b'Content-Type: multipart/signed; boundary="a b"\r\n\r\n--a b\r\nunclosed \t\r\n',
        b"bare\nline feeds\rand\r\rreturns\r\r\n",
        b"From a@x Mon Jan  1 00:00:00 2026\r\nSubject: mbox\r\n\r\n",
    ],
)
def test_only_the_line_ends_of_the_content_change(maildir: Path, content: bytes) -> None:
    deliver(maildir, b"head\n", content)
    assert stored(maildir) == [b"head\n" + content.replace(b"\r\n", b"\n")]


def test_the_maildir_may_be_the_current_folder_and_any_kind_of_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mails").mkdir()
    (entry,) = os.scandir()
    for path in ("", ".", entry, "mails/", str(tmp_path)):
        ensure_maildir(path)
        deliver(path, b"", b"x")
    assert stored(tmp_path) == [b"x"] * 3
    assert stored(tmp_path / "mails") == [b"x"] * 2


@pytest.mark.parametrize("middle", [b"\r\n", b"\r\r\n", b"\r\n\n", b"\r\n\r\n", b"\n\r", b"xxxx"])
@pytest.mark.parametrize("shift", range(5))
def test_a_mail_that_is_written_in_several_pieces_is_whole(
    maildir: Path, middle: bytes, shift: int
) -> None:
    # Pieces of 256 KiB: the middle lies across the end of one.
    content = b"x" * (256 * 1024 - shift) + middle + b"y" * 300_000
    deliver(maildir, b"head\n", content)
    assert stored(maildir) == [b"head\n" + content.replace(b"\r\n", b"\n")]


def test_a_mail_is_whole_even_if_the_system_takes_it_bit_by_bit(
    maildir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    deliver(maildir, b"head", b"content")
    assert stored(maildir) == [b"headcontent"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_the_mode_of_a_mail_follows_the_umask(
    maildir: Path, umask: Callable[[int], int], mask: int, expected: int
) -> None:
    umask(mask)
    assert mode(Path(deliver(maildir, b"", b"x"))) == expected


def test_names_sort_by_time_and_have_the_form_that_mail_readers_know(maildir: Path) -> None:
    names = [Path(deliver(maildir, b"", b"x")).name for _ in range(20)]
    assert names == sorted(names)
    assert all(re.fullmatch(r"\d+\.M\d{6}P\d+R[0-9a-f]{8}Q\d+\.[^/:]+", name) for name in names)
    assert len(mailbox.Maildir(maildir, create=False)) == 20


def test_a_name_tells_time_process_and_host_and_is_unique_all_the_same(
    maildir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_005_999)
    monkeypatch.setattr(socket, "gethostname", lambda: "a/b:c")
    names = {Path(deliver(maildir, b"", b"x")).name for _ in range(2)}
    assert len(names) == 2
    form = rf"1700000000\.M000005P{os.getpid()}R[0-9a-f]{{8}}Q\d+\.a\\057b\\072c"
    assert all(re.fullmatch(form, name) for name in names)


def test_a_mail_is_flushed_to_the_disk_before_it_is_in_new(
    maildir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[Path]]] = []

    def fsync(fd: int) -> None:
        seen.append((os.fstat(fd).st_size, list((maildir / "new").iterdir())))

    monkeypatch.setattr(os, "fsync", fsync)
    deliver(maildir, b"head", b"body")
    assert seen == [(8, [])]


@pytest.mark.parametrize("gone", [".", "tmp", "new"])
def test_a_maildir_that_was_removed_is_made_again(maildir: Path, gone: str) -> None:
    shutil.rmtree(maildir / gone)
    deliver(maildir, b"", b"x")
    assert is_maildir(maildir)
    assert stored(maildir) == [b"x"]


def test_a_maildir_that_is_removed_during_a_delivery_is_made_again(
    maildir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removals = iter([maildir])

    def fsync(_: int) -> None:
        for path in removals:
            shutil.rmtree(path)

    monkeypatch.setattr(os, "fsync", fsync)
    deliver(maildir, b"", b"x")
    assert stored(maildir) == [b"x"]


def test_a_failed_delivery_leaves_nothing_behind(
    maildir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fsync(fd: int) -> None:
        tries.append(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            deliver(maildir, b"", b"x")
    assert len(tries) == 1
    assert stored(maildir) == []
    deliver(maildir, b"", b"y")
    assert stored(maildir) == [b"y"]


def test_the_first_of_two_failures_is_told(maildir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EIO))
    monkeypatch.setattr(os, "unlink", lambda _: fail(errno.EROFS))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        deliver(maildir, b"", b"x")


def test_threads_deliver_into_one_maildir_at_the_same_time(maildir: Path) -> None:
    together = threading.Barrier(8)

    def work(worker: int) -> None:
        together.wait(PATIENCE)
        for number in range(25):
            deliver(maildir, b"", b"%d %d" % (worker, number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(stored(maildir)) == sorted(
        b"%d %d" % (worker, number) for worker in range(8) for number in range(25)
    )
