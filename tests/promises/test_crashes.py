from __future__ import annotations

import os
import random
import shutil
import smtplib
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tools import PATIENCE, Daemon, connect, mails

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SESSIONS = 4


class Load:
    """Clients that send distinct mails until the server is gone."""

    def __init__(self, port: int, *, sizes: tuple[int, ...]) -> None:
        self.sent: list[bytes] = []
        self.acknowledged: list[bytes] = []
        self._port, self._sizes = port, sizes
        self._acks = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(SESSIONS)
        self._clients = [self._pool.submit(self._send, number) for number in range(SESSIONS)]

    def _send(self, number: int) -> None:
        with suppress(OSError, smtplib.SMTPException), connect(self._port) as client:
            for count in range(100_000):
                size = self._sizes[count % len(self._sizes)]
                content = b"Subject: %d-%d\r\n\r\n%b\r\n" % (number, count, b"x" * size)
                self.sent.append(content)
                client.sendmail("a@example.com", ["b@example.com"], content)
                self.acknowledged.append(content)
                self._acks.release()

    def wait(self, count: int) -> None:
        """Wait until *count* more mails are acknowledged."""
        for _ in range(count):
            assert self._acks.acquire(timeout=PATIENCE)

    def end(self) -> None:
        """Wait until every client has noticed that the server is gone."""
        for client in self._clients:
            client.result(PATIENCE)
        self._pool.shutdown()


def kill(maildir: Path, seed: int) -> None:
    """Kill a server under load at a moment that *seed* picks, and check what it has stored."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    with closing(Daemon("-p", "0", "-d", str(maildir))) as daemon:
        load = Load(daemon.port(), sizes=(10, 3000, 400_000))
        load.wait(chance.randint(1, 30))
        time.sleep(chance.uniform(0, 0.005))
        daemon.process.kill()
        load.end()
    found = mails(maildir)
    assert set(load.acknowledged) <= set(found), seed
    assert len(set(found)) == len(found), seed
    assert set(found) <= set(load.sent), seed
    # A new server starts, whatever is in tmp/.
    with closing(Daemon("-p", "0", "-d", str(maildir))) as daemon:
        assert " Starting " in daemon.line()
    shutil.rmtree(maildir)


@pytest.mark.parametrize("part", range(4))  # each ends within faulthandler_timeout
def test_kill_9_loses_or_duplicates_no_acknowledged_mail_and_leaves_no_half_one_in_new(
    tmp_path: Path, times: Callable[[int, int], int], part: int
) -> None:
    seeds = range(part * 50, part * 50 + times(1, 50))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda seed: kill(tmp_path / str(seed), seed), seeds))


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount the file system in *image* at *folder*."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Create a disk image with an empty ext4 file system."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "mount"))):
        pytest.skip("this needs root, mkfs.ext4 and mount")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    try:
        with mounted(image, tmp_path / "disk"):
            pass
    except subprocess.CalledProcessError:
        pytest.skip("this machine allows no loop devices")
    return image


@pytest.mark.parametrize("before", [0, 3])
def test_a_power_cut_right_after_a_250_loses_no_mail(
    image: Path, tmp_path: Path, times: Callable[[int, int], int], before: int
) -> None:
    copy, sent = tmp_path / "copy", [b"%d\r\n" % number for number in range(before + 1)]
    with mounted(image, tmp_path / "disk") as disk:
        for cut in range(times(1, 20)):
            # A new Maildir in a new parent each time.
            maildir = Path(str(cut), "maildir")
            daemon = Daemon("-p", "0", "-d", str(disk / maildir))
            with closing(daemon), connect(daemon.port()) as client:
                for content in sent:
                    client.sendmail("a@example.com", ["b@example.com"], content)
                shutil.copyfile(image, copy)
            with mounted(copy, tmp_path / "after") as after:
                assert mails(after / maildir) == sent
