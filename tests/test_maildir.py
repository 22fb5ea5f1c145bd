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
from typing import TYPE_CHECKING

import pytest

from dsmtpd.maildir import Maildir, count_mails, create_maildir, ensure_maildir, is_maildir
from tests.tools import PATIENCE, on_flush, posix, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "maildir"


@pytest.fixture
def maildir(path: Path) -> Maildir:
    return Maildir(path)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_with_tmp_new_and_cur_is_a_maildir(tmp_path: Path) -> None:
    assert not is_maildir(tmp_path)
    for name in ("tmp", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "cur").touch()
    assert not is_maildir(tmp_path)
    (tmp_path / "cur").unlink()
    (tmp_path / "cur").mkdir()
    assert is_maildir(tmp_path)
    assert is_maildir(str(tmp_path))


def test_a_file_or_a_missing_folder_is_not_a_maildir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not is_maildir(tmp_path / "file")
    assert not is_maildir(tmp_path / "nothing")


def test_a_maildir_is_created_with_its_parents_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    ensure_maildir(str(path))
    assert is_maildir(path)
    assert [mode(folder) for folder in (path, *sorted(path.iterdir()))] == [0o700] * 4


def test_an_incomplete_maildir_is_completed_and_keeps_its_files(path: Path) -> None:
    ensure_maildir(path)
    (path / "cur" / "mail").write_bytes(b"kept")
    (path / "notes.txt").write_bytes(b"kept")
    (path / "tmp").rmdir()
    path.chmod(0o755)
    ensure_maildir(path)
    assert is_maildir(path)
    assert (path / "cur" / "mail").read_bytes() == b"kept"
    assert (path / "notes.txt").read_bytes() == b"kept"
    assert mode(path) == 0o755


@pytest.mark.parametrize("place", ["file", "file/below", "link", "maildir/new"])
def test_a_path_that_is_not_a_folder_cannot_become_a_maildir(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "maildir").mkdir()
    (tmp_path / "maildir" / "new").touch()
    with pytest.raises(NotADirectoryError) as raised:
        ensure_maildir(tmp_path / place)
    assert raised.value.filename.startswith(str(tmp_path / place))


@pytest.mark.parametrize(
    ("name", "lacking", "reason"),
    [
        ("tmp", os.W_OK, "Not writable"),
        ("tmp", os.X_OK, "Not writable"),
        ("new", os.W_OK, "Not writable"),
        ("new", os.X_OK, "Not writable"),
        ("new", os.R_OK, "Not readable"),
    ],
)
def test_the_error_names_the_unusable_folder(
    path: Path, name: str, lacking: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may do anything; test_main tests a real refusal.
    def access(folder: Path, wanted: int) -> bool:
        return folder != path / name or not wanted & lacking

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(PermissionError, match=reason) as raised:
        Maildir(path)
    assert raised.value.filename == str(path / name)


def test_create_maildir_yields_our_maildir_and_locks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(mailbox.Maildir, "lock", lambda _: events.append("locked"))
    monkeypatch.setattr(mailbox.Maildir, "unlock", lambda _: events.append("unlocked"))
    with create_maildir(tmp_path / "a" / "b") as maildir:
        assert isinstance(maildir, Maildir)
        maildir.add(b"Subject: x\n\n")
        events.append(f"{len(maildir)} mail")
    assert events == ["locked", "1 mail", "unlocked"]
    assert is_maildir(tmp_path / "a" / "b")


def test_create_maildir_unlocks_it_even_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(mailbox.Maildir, "unlock", lambda _: events.append("unlocked"))
    with pytest.raises(KeyError), create_maildir(tmp_path) as maildir:
        maildir.get_bytes("no such key")
    assert events == ["unlocked"]


def test_an_existing_file_is_never_overwritten(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_005_999)
    *before, number, after = re.split(r"(?<=Q)(\d+)", maildir.add(b"x"))
    taken = path / "tmp" / f"{''.join(before)}{int(number) + 1}{after}"
    taken.write_bytes(b"another's")
    with pytest.raises(FileExistsError):
        maildir.add(b"y")
    assert taken.read_bytes() == b"another's"


def test_create_maildir_with_create_false_does_not_create_it(tmp_path: Path) -> None:
    with (
        pytest.raises(mailbox.NoSuchMailboxError),
        create_maildir(tmp_path / "none", create=False),
    ):
        pytest.fail("there is nothing to yield")
    assert list(tmp_path.iterdir()) == []


def test_new_and_read_mails_are_counted_and_nothing_else(path: Path) -> None:
    ensure_maildir(path)
    assert count_mails(path) == 0
    for name in ("new/1", "new/2", "cur/3:2,S", "tmp/4", "new/.hidden", "5"):
        (path / name).touch()
    (path / "new" / "folder").mkdir()
    assert count_mails(path) == 3


def test_mails_of_this_run_are_not_counted(maildir: Maildir, path: Path) -> None:
    maildir.add(b"x")
    (mail,) = (path / "new").iterdir()
    assert count_mails(path) == 0
    mail.rename(path / "cur" / f"{mail.name}:2,S")
    assert count_mails(path) == 0


def test_a_mail_is_in_new_with_all_its_bytes(maildir: Maildir, path: Path) -> None:
    key = maildir.add(b"\n\x00\xffbody", head=b"X: y\r\n")
    assert (path / "new" / key).exists()
    assert stored(path) == [b"X: y\r\n\n\x00\xffbody"]


def test_all_other_methods_work_as_in_mailbox(maildir: Maildir, path: Path) -> None:
    key = maildir.add(b"Subject: bytes\r\n\r\nHi\r\n")
    text = maildir.add("Subject: text\n\nHi\n")
    message = mailbox.MaildirMessage(maildir[key])
    message.set_flags("S")
    maildir[key] = message
    maildir.add(message)
    assert sorted(str(mail["Subject"]) for mail in maildir) == ["bytes", "bytes", "text"]
    assert maildir.get_message(key).get_flags() == "S"
    assert maildir.get_bytes(text) == b"Subject: text\n\nHi\n"
    maildir.remove(text)
    assert len(maildir) == 2
    maildir.add_folder("old").add(b"Subject: old\n\n")
    assert maildir.list_folders() == ["old"]
    assert is_maildir(path / ".old")


def test_a_head_goes_with_bytes_only(maildir: Maildir, path: Path) -> None:
    with pytest.raises(TypeError, match="head goes with bytes, not with str"):
        maildir.add("Subject: text\n\n", head=b"X: y\n")
    assert stored(path) == []


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Maildir("~/mails").add(b"x")
    assert stored(tmp_path / "mails") == [b"x"]


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
def test_only_the_line_endings_of_the_content_change(
    maildir: Maildir, path: Path, content: bytes
) -> None:
    maildir.add(content, head=b"head\n")
    assert stored(path) == [b"head\n" + content.replace(b"\r\n", b"\n")]


def test_any_kind_of_path_works_even_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mails").mkdir()
    (entry,) = os.scandir()
    for path in ("", ".", entry, "mails/", str(tmp_path)):
        Maildir(path).add(b"x")
    assert stored(tmp_path) == [b"x"] * 3
    assert stored(tmp_path / "mails") == [b"x"] * 2


@pytest.mark.parametrize("middle", [b"\r\n", b"\r\r\n", b"\r\n\n", b"\r\n\r\n", b"\n\r", b"xxxx"])
@pytest.mark.parametrize("shift", range(5))
def test_a_mail_that_is_written_in_several_pieces_is_complete(
    maildir: Maildir, path: Path, middle: bytes, shift: int
) -> None:
    # It is written in pieces of 256 KiB: the middle straddles two of them.
    content = b"x" * (256 * 1024 - shift) + middle + b"y" * 300_000
    maildir.add(content, head=b"head\n")
    assert stored(path) == [b"head\n" + content.replace(b"\r\n", b"\n")]


def test_a_mail_is_complete_even_after_short_writes(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    maildir.add(b"content", head=b"head")
    assert stored(path) == [b"headcontent"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_the_mode_of_a_mail_follows_the_umask(
    maildir: Maildir, path: Path, umask: Callable[[int], int], mask: int, expected: int
) -> None:
    umask(mask)
    assert mode(path / "new" / maildir.add(b"x")) == expected


def test_names_sort_by_time_and_have_the_form_that_mail_readers_expect(
    maildir: Maildir, path: Path
) -> None:
    names = [maildir.add(b"x") for _ in range(20)]
    assert names == sorted(names)
    assert all(re.fullmatch(r"\d+\.M\d{6}P\d+R[0-9a-f]{8}Q\d+\.[^/:]+", name) for name in names)
    assert len(mailbox.Maildir(path, create=False)) == 20


def test_names_contain_time_process_and_host_and_differ_even_at_the_same_time(
    maildir: Maildir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_005_999)
    monkeypatch.setattr(socket, "gethostname", lambda: "a/b:c")
    names = {maildir.add(b"x") for _ in range(2)}
    assert len(names) == 2
    form = rf"1700000000\.M000005P{os.getpid()}R[0-9a-f]{{8}}Q\d+\.a\\057b\\072c"
    assert all(re.fullmatch(form, name) for name in names)


def test_a_mail_is_flushed_to_disk_before_it_appears_in_new(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[Path]]] = []

    def fsync(fd: int) -> None:
        seen.append((os.fstat(fd).st_size, list((path / "new").iterdir())))

    on_flush(monkeypatch, fsync)
    maildir.add(b"body", head=b"head")
    assert seen == [(8, [])]


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Record the path of each flushed folder, and the names in it at that time."""
    seen: list[tuple[str, list[str]]] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folder = os.readlink(f"/dev/fd/{descriptor}")  # noqa: PTH115
            seen.append((folder, sorted(os.listdir(folder))))  # noqa: PTH208

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


linux_only = pytest.mark.skipif(
    not os.path.islink("/dev/stdin"),  # noqa: PTH114
    reason="this system does not show the path of a descriptor",
)


@posix
@linux_only
def test_the_name_of_a_mail_is_flushed_too(
    maildir: Maildir, path: Path, flushes: list[tuple[str, list[str]]]
) -> None:
    flushes.clear()
    names = []
    for _ in range(3):
        names.append(maildir.add(b"x"))
        assert flushes.pop() == (str(path / "new"), names)
    assert flushes == []


@posix
@linux_only
def test_the_folders_of_a_new_maildir_are_flushed_and_no_others(
    tmp_path: Path, flushes: list[tuple[str, list[str]]]
) -> None:
    ensure_maildir(tmp_path / "a" / "b")
    assert sorted(flushes) == [
        (str(tmp_path), ["a"]),
        (str(tmp_path / "a"), ["b"]),
        (str(tmp_path / "a" / "b"), ["cur", "new", "tmp"]),
    ]
    flushes.clear()
    ensure_maildir(tmp_path / "a" / "b")
    assert flushes == []


def test_a_system_that_cannot_flush_folders_still_stores_mails(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    maildir.add(b"x")
    assert stored(path) == [b"x"]


@posix
def test_a_mail_whose_name_cannot_be_flushed_is_not_stored(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            maildir.add(b"x")
    assert stored(path) == []
    maildir.add(b"y")
    assert stored(path) == [b"y"]


@pytest.fixture
def aged() -> Callable[[Path, float], Path]:
    """Return a function that creates a file, written just now but last accessed hours ago."""

    def create(file: Path, hours: float) -> Path:
        file.touch()
        os.utime(file, (time.time() - hours * 3600, time.time()))
        return file

    return create


def test_leftovers_of_interrupted_deliveries_are_removed_after_36_hours(
    maildir: Maildir, path: Path, aged: Callable[[Path, float], Path]
) -> None:
    old, recent = aged(path / "tmp" / "old", 36.01), aged(path / "tmp" / "recent", 35.99)
    maildir.clean()
    assert (old.exists(), recent.exists()) == (False, True)


def test_only_files_directly_in_tmp_are_removed(
    maildir: Maildir, path: Path, tmp_path: Path, aged: Callable[[Path, float], Path]
) -> None:
    (path / "tmp" / "folder").mkdir()
    kept = [
        aged(path / name, 100)
        for name in ("new/x", "cur/x", "x", "tmp/folder/x", "../x", "tmp/folder")
    ]
    link = path / "tmp" / "link"
    link.symlink_to(tmp_path / "x")
    os.utime(link, (0, 0), follow_symlinks=False)
    maildir.clean()
    assert all(file.exists() for file in (*kept, link))


def test_a_tmp_that_links_to_another_folder_is_left_alone(
    maildir: Maildir, path: Path, tmp_path: Path, aged: Callable[[Path, float], Path]
) -> None:
    (tmp_path / "another").mkdir()
    (path / "tmp").rmdir()
    (path / "tmp").symlink_to(tmp_path / "another")
    file = aged(path / "tmp" / "x", 100)
    maildir.clean()
    assert file.exists()


def test_a_file_that_cannot_be_removed_does_not_stop_the_cleaning(
    maildir: Maildir,
    path: Path,
    aged: Callable[[Path, float], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlink = os.unlink
    failures = iter([FileNotFoundError, PermissionError])

    def fail_at_first(file: str) -> None:
        for failure in failures:
            raise failure
        unlink(file)

    for name in ("a", "b", "c"):
        aged(path / "tmp" / name, 100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail_at_first)
        maildir.clean()
    assert len(list((path / "tmp").iterdir())) == 2
    shutil.rmtree(path / "tmp")
    maildir.clean()


@pytest.mark.parametrize("gone", [".", "tmp", "new"])
def test_a_removed_maildir_is_created_again(maildir: Maildir, path: Path, gone: str) -> None:
    shutil.rmtree(path / gone)
    maildir.add(b"x")
    assert is_maildir(path)
    assert stored(path) == [b"x"]


def test_a_maildir_that_is_removed_during_a_delivery_is_created_again(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removals = iter([path])

    def fsync(_: int) -> None:
        for folder in removals:
            shutil.rmtree(folder)

    on_flush(monkeypatch, fsync)
    maildir.add(b"x")
    assert stored(path) == [b"x"]


def test_a_failed_delivery_leaves_nothing_behind(
    maildir: Maildir, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fsync(fd: int) -> None:
        tries.append(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        on_flush(patch, fsync)
        with pytest.raises(OSError, match="No space left"):
            maildir.add(b"x")
    assert len(tries) == 1
    assert stored(path) == []
    maildir.add(b"y")
    assert stored(path) == [b"y"]


def test_the_first_of_two_errors_is_raised(
    maildir: Maildir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    on_flush(monkeypatch, lambda _: fail(errno.EIO))
    monkeypatch.setattr(os, "unlink", lambda _: fail(errno.EROFS))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        maildir.add(b"x")


def test_threads_deliver_into_one_maildir_at_the_same_time(maildir: Maildir, path: Path) -> None:
    together = threading.Barrier(8)

    def work(worker: int) -> None:
        together.wait(PATIENCE)
        for number in range(25):
            maildir.add(b"%d %d" % (worker, number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(stored(path)) == sorted(
        b"%d %d" % (worker, number) for worker in range(8) for number in range(25)
    )
