from __future__ import annotations

import asyncio
import re
import resource
import signal
import smtplib
import ssl
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest

from tests.tools import MAIL, PATIENCE, RUN, WARNINGS, Daemon, mails, trust_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

pytestmark = [
    pytest.mark.usefixtures("_many_files"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc"),
]

# Without Python's development mode, which costs time and memory.
PLAIN = (sys.executable, *WARNINGS, "-m", "dsmtpd")

BEGIN = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"

KIB_PER_MIB = 1024

T = TypeVar("T")


class Start(Protocol):
    def __call__(self, *arguments: str, **settings: Any) -> Daemon: ...


class Times(Protocol):
    def __call__(self, few: int, many: int, /) -> int: ...


@pytest.fixture
def _many_files(times: Times) -> Iterator[None]:
    """Allow enough open files for the sockets of all clients."""
    needed = times(1024, 4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this needs {needed} file descriptors, and the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def maildir() -> Iterator[Path]:
    """Yield a folder, in memory if possible, so that the speed of the disk does not matter."""
    shm = Path("/dev/shm")  # noqa: S108  # the folder in it has a unique name
    with TemporaryDirectory(prefix="dsmtpd-", dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


class Client:
    """A client that sends any octets, and waits for one-line replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def hear(self, count: int) -> list[bytes]:
        """Return the codes of *count* replies."""
        return [(await self.reader.readline())[:3] for _ in range(count)]

    async def say(self, octets: bytes, count: int) -> list[bytes]:
        """Send *octets*; return the codes of the *count* replies."""
        self._writer.write(octets)
        await asyncio.wait_for(self._writer.drain(), PATIENCE)
        return await asyncio.wait_for(self.hear(count), PATIENCE)

    async def send(self, content: bytes) -> bytes:
        """Send a mail; return the code of its reply."""
        assert await self.say(BEGIN, 3) == [b"250", b"250", b"354"]
        (code,) = await self.say(content + b".\r\n", 1)
        return code

    async def quit(self) -> None:
        """Send QUIT, and wait until the server closes the connection."""
        assert await self.say(b"QUIT\r\n", 1) == [b"221"]
        assert await asyncio.wait_for(self.reader.read(), PATIENCE) == b""

    async def close(self) -> None:
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


@asynccontextmanager
async def connected(port: int, count: int) -> AsyncIterator[list[Client]]:
    """Yield *count* clients that have connected in this order and read no greeting yet."""
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(count):
            opening = asyncio.open_connection("127.0.0.1", port)
            clients.append(Client(*await asyncio.wait_for(opening, PATIENCE)))
            stack.push_async_callback(clients[-1].close)
        yield clients


def carry_out(scenario: Coroutine[Any, Any, T]) -> T:
    """Run clients without asyncio's debug mode, which makes them ten times slower."""
    return asyncio.run(scenario, debug=False)


async def be_greeted(clients: list[Client]) -> None:
    """Have all *clients* say HELO; wait for the greetings and the replies."""
    greetings = await asyncio.gather(*(client.say(b"HELO x\r\n", 2) for client in clients))
    assert greetings == [[b"220", b"250"]] * len(clients)


@asynccontextmanager
async def greeted(port: int, count: int) -> AsyncIterator[list[Client]]:
    async with connected(port, count) as clients:
        await be_greeted(clients)
        yield clients


async def send_all(client: Client, contents: list[bytes]) -> None:
    for content in contents:
        assert await client.send(content) == b"250"


def contents(session: int, count: int) -> list[bytes]:
    """Return *count* mails, small and larger, that only this *session* sends."""
    chance = Random(session)  # noqa: S311  # no secret
    bodies = [chance.randbytes(chance.choice([5, 2000])).hex("\n", 35) for _ in range(count)]
    texts = (f"Subject: {session}-{number}\n\n{body}\n" for number, body in enumerate(bodies))
    return [text.replace("\n", "\r\n").encode() for text in texts]


def memory(daemon: Daemon, field: str = "VmRSS") -> int:
    """Return the memory of the process in KiB: current (VmRSS) or peak (VmHWM)."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii")
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib)


def errors(daemon: Daemon) -> list[str]:
    """End *daemon* cleanly; return the errors that it has logged."""
    code, lines = daemon.end(signal.SIGTERM)
    assert code == 0
    assert lines[-1].endswith(" INFO: Cleaning up")
    assert all(re.match(r"\S+ \S+ (INFO|WARNING|ERROR): ", line) for line in lines)
    return [line.partition(" ERROR: ")[2] for line in lines if " ERROR: " in line]


def test_a_thousand_sessions_at_the_same_time_have_each_mail_stored_intact_and_once(
    start: Start, maildir: Path, times: Times
) -> None:
    daemon = start("-p", "0", "-d", str(maildir), run=PLAIN)
    port = daemon.port()
    sent = [contents(session, 5) for session in range(times(100, 1000))]

    async def run() -> None:
        async with greeted(port, len(sent)) as clients:
            await asyncio.gather(*map(send_all, clients, sent))

    carry_out(run())
    assert sorted(mails(maildir)) == sorted(chain.from_iterable(sent))
    assert errors(daemon) == []


def test_two_thousand_idle_clients_are_served_and_do_not_hinder_one_that_sends_mails(
    start: Start, maildir: Path, times: Times
) -> None:
    daemon = start("-p", "0", "-d", str(maildir), run=PLAIN)
    port = daemon.port()
    sent = contents(0, times(50, 500))

    async def run() -> None:
        async with greeted(port, times(200, 2000)) as idle, greeted(port, 1) as (client,):
            await send_all(client, sent)
            await asyncio.gather(*(client.quit() for client in idle))

    carry_out(run())
    assert sorted(mails(maildir)) == sorted(sent)
    assert errors(daemon) == []


def client_hello() -> bytes:
    """Return the first octets of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        incoming, outgoing, server_hostname="localhost"
    )
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


# At each place, this many clients send octet by octet, and as many stop halfway.
SLOW = 20

SLOW_MAIL = MAIL + b"x" * 900 + b"\r\n"

# Where a client is slow: what it says first, what it says slowly, and how the answer begins.
PLACES = [
    (b"", b"NOOP " + b"x" * 900 + b"\r\n", b"250"),
    (b"AUTH PLAIN\r\n", b64encode(b"\0a\0" + b"x" * 300) + b"\r\n", b"235"),
    (b"STARTTLS\r\n", client_hello(), b"\x16\x03\x03"),
    (BEGIN, SLOW_MAIL + b".\r\n", b"250"),
]


class SlowClient:
    """A client that says one thing slowly."""

    def __init__(self, client: Client, place: tuple[bytes, bytes, bytes]) -> None:
        self._client = client
        self._before, self._octets, self._answer = place

    async def begin(self) -> None:
        """Bring the session to the point where the client is slow."""
        await self._client.say(self._before, self._before.count(b"\n"))

    async def go_on(self, count: int = 1) -> None:
        """Send *count* octets."""
        octets, self._octets = self._octets[:count], self._octets[count:]
        await self._client.say(octets, 0)

    async def stop_halfway(self) -> None:
        await self.go_on(len(self._octets) // 2)

    async def end(self) -> None:
        """Send the rest, and check the answer."""
        await self.go_on(len(self._octets))
        answer = self._client.reader.readexactly(len(self._answer))
        assert await asyncio.wait_for(answer, PATIENCE) == self._answer


async def send_meanwhile(slow: list[SlowClient], port: int, content: bytes) -> None:
    """Send *content* from another client while the *slow* ones send an octet each."""
    going = asyncio.gather(*(client.go_on() for client in slow))
    async with greeted(port, 1) as (client,):
        assert await client.send(content) == b"250"
    await going


def test_clients_that_send_octet_by_octet_or_stop_halfway_are_waited_for_and_hinder_nobody(
    start: Start, maildir: Path, times: Times
) -> None:
    daemon = start("-p", "0", "-d", str(maildir), "--tls", "starttls")
    port = daemon.port()
    # Few enough to finish within the 10 s that the server allows for a handshake.
    sent = contents(0, times(10, 50))

    async def run() -> None:
        async with greeted(port, 2 * SLOW * len(PLACES)) as clients:
            both = [SlowClient(*each) for each in zip(clients, PLACES * 2 * SLOW, strict=True)]
            slow, halfway = both[: len(both) // 2], both[len(both) // 2 :]
            await asyncio.gather(*(client.begin() for client in both))
            await asyncio.gather(*(client.stop_halfway() for client in halfway))
            for content in sent:
                await send_meanwhile(slow, port, content)
            await asyncio.gather(*(client.end() for client in slow))

    carry_out(run())
    assert sorted(mails(maildir)) == sorted([*sent, *[SLOW_MAIL] * SLOW])
    assert errors(daemon) == []


def descriptors(daemon: Daemon) -> int:
    return sum(1 for _ in Path(f"/proc/{daemon.process.pid}/fd").iterdir())


FILES = 64
NO_MORE = "socket.accept() out of system resource: OSError(24, 'Too many open files')"
FEW_FILES = ("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh", *RUN)


def test_out_of_descriptors_connected_clients_are_served_and_then_the_waiting_ones(
    start: Start, times: Times
) -> None:
    daemon = start("-p", "0", run=FEW_FILES)
    port = daemon.port()
    places, rounds = FILES - descriptors(daemon), times(2, 5)

    async def run() -> None:
        async with connected(port, rounds * places) as clients:
            for begin in range(0, len(clients), places):
                inside = clients[begin : begin + places]
                await be_greeted(inside)
                await asyncio.gather(*(send_all(client, [MAIL] * 3) for client in inside))
                await asyncio.gather(*(client.quit() for client in inside))

    carry_out(run())
    assert errors(daemon) == [NO_MORE]


# Large enough to be stored by threads, which compete for the last descriptor.
THREADED = (b"x" * 998 + b"\r\n") * 300


async def send_at_once(clients: list[Client], number: int) -> dict[bytes, bytes]:
    """Have each client send a mail; return the mails with the codes of their replies."""
    sent = [mail + THREADED for mail in contents(number, len(clients))]
    return dict(zip(sent, await asyncio.gather(*map(Client.send, clients, sent)), strict=True))


def test_without_a_free_descriptor_a_mail_is_stored_or_refused_in_one_line_and_never_half_stored(
    start: Start, maildir: Path, times: Times
) -> None:
    daemon = start("-p", "0", "-d", str(maildir), run=FEW_FILES)
    port = daemon.port()

    async def run() -> dict[bytes, bytes]:
        async with greeted(port, FILES - descriptors(daemon)) as clients:
            answers = await send_at_once(clients, 0)
            assert set(answers.values()) == {b"451"}
            await clients.pop().quit()
            for number in range(1, times(4, 30)):
                answers.update(await send_at_once(clients, number))
            return answers

    answers = carry_out(run())
    assert set(answers.values()) == {b"250", b"451"}
    assert sorted(mails(maildir)) == sorted(mail for mail in answers if answers[mail] == b"250")
    assert list((maildir / "tmp").iterdir()) == []
    # At its limit, the server logs that it can accept no more connections.
    first, *others = errors(daemon)
    assert first == NO_MORE
    line = f"Cannot store a mail in {maildir}: Too many open files ({maildir}/"
    assert [other[: len(line)] for other in others] == [line] * [*answers.values()].count(b"451")


LARGE_MIB = 30


def mebibytes(number: int) -> Iterator[bytes]:
    """Yield the mail with this *number* in pieces of a MiB, in lines of 128 octets."""
    chance = Random(number)  # noqa: S311  # no secret
    for _ in range(LARGE_MIB):
        yield chance.randbytes(8192 * 63).hex("\n", 63).replace("\n", "\r\n").encode() + b"\r\n"


async def upload(client: Client, number: int) -> str:
    """Send a mail without its end; return the hash of the content to be stored."""
    assert await client.say(BEGIN, 3) == [b"250", b"250", b"354"]
    digest = sha256()
    for piece in mebibytes(number):
        await client.say(piece, 0)
        digest.update(piece.replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def stored_hash(file: Path) -> str:
    return sha256(file.read_bytes().partition(b"\nX-RcptTo: b@example.com\n")[2]).hexdigest()


def test_concurrent_large_mails_need_little_more_memory_than_their_size_and_arrive_whole(
    start: Start, maildir: Path, times: Times
) -> None:
    daemon = start("-p", "0", "-d", str(maildir), run=PLAIN)
    port, count = daemon.port(), times(3, 20)

    async def run() -> list[str]:
        async with greeted(port, count) as clients:
            hashes = await asyncio.gather(*map(upload, clients, range(count)))
            answers = await asyncio.gather(*(client.say(b".\r\n", 1) for client in clients))
            assert answers == [[b"250"]] * count
            return hashes

    hashes = carry_out(run())
    assert memory(daemon, "VmHWM") < KIB_PER_MIB * (64 + 1.2 * count * LARGE_MIB)
    assert sorted(map(stored_hash, (maildir / "new").iterdir())) == sorted(hashes)
    assert errors(daemon) == []


async def pour(client: Client, count: int) -> None:
    """Send *count* mails without waiting for each reply."""
    batch = 25
    for _ in range(count // batch):
        codes = await client.say((BEGIN + MAIL + b".\r\n") * batch, 4 * batch)
        assert codes == [b"250", b"250", b"354", b"250"] * batch


def test_the_memory_does_not_grow_with_the_number_of_mails(
    start: Start, maildir: Path, times: Times
) -> None:
    daemon = start("-p", "0", "-d", str(maildir), run=PLAIN)
    port, warm_up, count = daemon.port(), times(500, 4000), times(1000, 60_000)

    async def run() -> int:
        async with greeted(port, 4) as clients:
            await asyncio.gather(*(pour(client, warm_up // 4) for client in clients))
            before = memory(daemon)
            await asyncio.gather(*(pour(client, (count - warm_up) // 4) for client in clients))
            return memory(daemon) - before

    assert carry_out(run()) < 2 * KIB_PER_MIB
    assert mails(maildir) == [MAIL] * count
    assert errors(daemon) == []


TRUST_ALL = trust_all()


def open_session(port: int) -> smtplib.SMTP_SSL:
    """Return a client that has sent a mail of 300 KB over TLS, and stays connected."""
    client = smtplib.SMTP_SSL("127.0.0.1", port, "client.test", timeout=PATIENCE, context=TRUST_ALL)
    client.sendmail("a@example.com", ["b@example.com"], MAIL + (b"x" * 998 + b"\r\n") * 300)
    return client


def close_session(client: smtplib.SMTP_SSL) -> None:
    """Send QUIT, and wait until the server closes the connection."""
    assert client.docmd("QUIT")[0] == 221
    assert client.sock is not None
    assert client.sock.recv(1) == b""


def hold_sessions(daemon: Daemon, port: int, count: int) -> tuple[int, int]:
    """Return the memory during *count* TLS sessions, and after them, in KiB."""
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        clients = [
            stack.enter_context(closing(each)) for each in pool.map(open_session, [port] * count)
        ]
        during = memory(daemon)
        list(pool.map(close_session, clients))
    return during, memory(daemon)


def test_a_tls_session_takes_less_than_100_kib_and_leaves_nothing_behind(
    start: Start, times: Times
) -> None:
    daemon = start("-p", "0", "--tls", "implicit", run=PLAIN)
    port, few, many = daemon.port(), 8, times(60, 1000)
    before, _ = hold_sessions(daemon, port, few)
    (during, after), _, last = [hold_sessions(daemon, port, many) for _ in range(3)]
    assert during - before < 100 * (many - few)
    # The allocator returns little memory to the system, but the next sessions reuse it.
    assert max(last) - min(during, after) < 2 * KIB_PER_MIB
    assert errors(daemon) == []
