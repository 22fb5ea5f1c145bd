"""Measures the speed and the memory of dsmtpd beside those of other servers that swallow mails.

README.rst beside this file tells what is measured, and how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import operator
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsmtpd import _dsmtpd
from dsmtpd._dsmtpd import DsmtpdHandler

if TYPE_CHECKING:
    from dsmtpd.maildir import Maildir
    from dsmtpd.message import Message

HERE = Path(__file__).resolve().parent

# In seconds, and far more than anything here takes: what hangs becomes a failure in a table.
PATIENCE = 120.0

# smtp-sink and smtp-source are installed where only root's PATH leads.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])

HAS_PROC = Path("/proc/self/stat").exists()

# Below those that systems give to clients. Of two clients, the one that tries a free port again and
# again may be given this very port for its own end, and is connected to itself.
_ports = iter(range(20_000, 32_768))

WARM_UP_MAILS, WARM_UP_OCTETS = 300, 20_000_000
MOST_MAILS, MOST_OCTETS = 20_000, 1_000_000_000

# With a thousand sessions, each end needs more than the usual 1,024, or smtp-sink's 256.
DESCRIPTORS = 4096

NEW, PLAIN, OLD = "dsmtpd", "dsmtpd-nostore", "dsmtpd-1.2.1"
STOCK, SINK, DISCARD = "aiosmtpd", "smtp-sink", "aiosmtpd.handlers.Sink"
NODE_MODULE = HERE / ".cache" / "node_modules" / "smtp-server"
NODE_SERVER = f"""\
const {{{{SMTPServer}}}} = require({json.dumps(str(NODE_MODULE))})
const onData = (stream, session, done) => stream.on("end", done).resume()
new SMTPServer({{{{authOptional: true, disabledCommands: ["STARTTLS"], onData}}}})
    .listen({{port}}, "127.0.0.1")
"""
OLD_PYTHON = HERE / ".cache" / f"{OLD}-python{platform.python_version()}" / "bin" / "python"

SLOW_DISK = """\
import os, time

def slow(flush):
    def wait(descriptor):
        time.sleep({seconds})
        return flush(descriptor)
    return wait

for name in {{"fsync", "fdatasync"}} & set(dir(os)):
    setattr(os, name, slow(getattr(os, name)))
"""

T = TypeVar("T")
Talk = Callable[[bytes], Awaitable[None]]
Connect = Callable[[], AbstractAsyncContextManager[Talk]]


class BenchError(Exception):
    """Something that cannot be measured; the text tells why."""


@dataclass(frozen=True)
class Contender:
    """A server, whose medians are compared with those of *reference*.

    Its command has places for {port}, {web}, which is another port, and {maildir}. One that
    *fails_at_large_mails* gets none of 20 MB.
    """

    name: str
    reference: str
    command: tuple[str, ...]
    fails_at_large_mails: bool = False


LISTENING = ("-i", "127.0.0.1", "-p", "{port}")
STORING = (*LISTENING, "-d", "{maildir}")
LOCAL, WEB = "127.0.0.1:{port}", "127.0.0.1:{web}"
MAILHOG_WEB = ("-ui-bind-addr", WEB, "-api-bind-addr", WEB)
MAILDEV = ("--smtp", "{port}", "--ip", "127.0.0.1", "--web", "{web}", "--web-ip", "127.0.0.1")
# When root starts it, smtp-sink wants to be told whom to become.
USER = ("-u", "nobody") if os.geteuid() == 0 else ()

FAKESMTPD = str(Path(sys.executable).with_name("fakesmtpd"))
FAKE = (FAKESMTPD, "-b", "127.0.0.1", "-p", "{port}", "-o", "{maildir}.mbox")

CONTENDERS = (
    Contender(NEW, OLD, (sys.executable, "-m", "dsmtpd", *STORING)),
    Contender(OLD, "", (str(OLD_PYTHON), "-m", "dsmtpd", *STORING)),
    Contender(PLAIN, SINK, (sys.executable, "-m", "dsmtpd", *LISTENING)),
    Contender(STOCK, SINK, (sys.executable, "-m", STOCK, "-n", "-l", LOCAL, "-c", DISCARD)),
    Contender("fakesmtpd", OLD, FAKE, fails_at_large_mails=True),
    Contender("smtp-server", SINK, ("node", "-e", NODE_SERVER)),
    Contender(SINK, "", ("smtp-sink", *USER, "-m", str(DESCRIPTORS), LOCAL, "100")),
    Contender("mailhog", SINK, ("mailhog", "-smtp-bind-addr", LOCAL, *MAILHOG_WEB)),
    Contender("MailHog", SINK, ("MailHog", "-smtp-bind-addr", LOCAL, *MAILHOG_WEB)),
    Contender("mailpit", SINK, ("mailpit", "--smtp", LOCAL, "--listen", WEB)),
    Contender("maildev", SINK, ("maildev", *MAILDEV)),
)
NAMES = tuple(contender.name for contender in CONTENDERS)


@dataclass(frozen=True)
class Load:
    """What a client does: *size* in octets; with *keep*, a session keeps its connection.

    At least *fewest* mails are sent, however long they take.
    """

    sessions: int = 10
    size: int = 4096
    keep: bool = True
    in_megabytes: bool = False
    fewest: int = 10


REUSE = Load()
BIG = Load(sessions=1, size=20_000_000, in_megabytes=True)
WORKLOADS = {"connect": Load(keep=False), "reuse": REUSE, "serial": Load(sessions=1), "big": BIG}

Client = Callable[[int, Load, int], None]


@dataclass(frozen=True)
class Scale:
    """How much is done: how often, for about how many seconds, and how far growth is followed."""

    rounds: int = 5
    starts: int = 15
    growth_rounds: int = 2
    seconds: float = 1.5
    sessions: tuple[int, ...] = (10, 100, 1_000)
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 30_000_000)
    stored: tuple[int, ...] = (0, 1_000, 10_000, 100_000)


QUICK = Scale(1, 3, 1, 0.3, sizes=(1_000, 100_000, 1_000_000, 10_000_000), stored=(0, 10_000))


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    scale: Scale
    output: Path
    only: frozenset[str]
    client: str


@dataclass(frozen=True)
class Bench:
    """Who sends, for about how many seconds, and the folders to store in: in memory, on disk."""

    client: Client
    seconds: float
    memory: Path
    disk: Path


@dataclass(frozen=True)
class Metric:
    """What a table shows, and in which unit; *growing* is the unit of its columns."""

    name: str
    title: str
    unit: str
    growing: str = ""


METRICS = (
    Metric("connect", "10 sessions, 4 KiB, a connection per mail", "mails/s"),
    Metric("reuse", "10 sessions, 4 KiB, connections kept", "mails/s"),
    Metric("serial", "1 session, 4 KiB, connection kept", "mails/s"),
    Metric("big", "1 session, 20 MB, connection kept", "MB/s"),
    Metric("memory", "peak, 1 session with 10 mails of 20 MB", "MiB"),
    Metric("memory-10", "peak, 10 sessions with a mail of 20 MB each", "MiB"),
    Metric("start", "from the start of the process to its first 220", "ms"),
    Metric("design-memory", "reuse, by where dsmtpd stores, in memory", "mails/s"),
    Metric("design-disk", "reuse, by where dsmtpd stores, on this disk", "mails/s"),
    Metric("design-fsync", "reuse, by where dsmtpd stores, when an fsync takes 20 ms", "mails/s"),
    Metric("design-noop", "the longest that a NOOP waits for an fsync of 200 ms", "ms"),
    Metric("sessions", "reuse, by the number of sessions", "mails/s", "sessions"),
    Metric("size", "10 sessions, by the size of a mail", "MB/s", "octets"),
    Metric("stored-start", "start, by the number of mails in the Maildir", "ms", "mails"),
    Metric("stored-reuse", "reuse, by the number of mails in the Maildir", "mails/s", "mails"),
)


@dataclass(frozen=True)
class Key:
    """What numbers are about; *at* is the place on a growth curve."""

    metric: str
    subject: str
    at: int = 0

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.metric} {self.subject}" + (f" at {self.at:,}" if self.at else "")


@dataclass(frozen=True)
class Sample:
    """A value in the unit of its metric, and the processor time per mail in microseconds."""

    value: float
    cpu: float | None = None


@dataclass(frozen=True)
class Trial:
    """A measurement that can be repeated; its medians are compared with those of *reference*."""

    key: Key
    measure: Callable[[], Sample]
    reference: str = ""


@dataclass
class Outcome:
    """What a trial has given so far, or why it gives nothing."""

    reference: str
    samples: list[Sample] = field(default_factory=list)
    failure: str = ""

    @property
    def values(self) -> list[float]:
        """The values, unless the trial has failed in any round."""
        return [] if self.failure else [sample.value for sample in self.samples]

    @property
    def median(self) -> float | None:
        """The median of the values."""
        return statistics.median(self.values) if self.values else None

    @property
    def cpu(self) -> float | None:
        """The median of the processor times, where they are known."""
        times = [sample.cpu for sample in self.samples if sample.cpu is not None]
        return statistics.median(times) if times else None


Outcomes = dict[Key, Outcome]

RELATIONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Target:
    """A promise about the median of *subject*, divided by that of *against*."""

    subject: Key
    against: Key
    relation: str
    bound: float


# The servers.


def find_contenders(only: frozenset[str]) -> tuple[list[Contender], list[str]]:
    """Return the servers that can be started here, and a line for each that cannot."""
    wanted = [contender for contender in CONTENDERS if contender.name in only]
    obstacles = {contender.name: obstacle(contender) for contender in wanted}
    found = [contender for contender in wanted if not obstacles[contender.name]]
    return found, [f"{name} is left out: {why}" for name, why in obstacles.items() if why]


def obstacle(contender: Contender) -> str:
    """Return why *contender* cannot be started here, if so; install dsmtpd 1.2.1 for that."""
    try:
        if contender.name == OLD:
            install_old()
        program(contender.command[0])
    except BenchError as error:
        return str(error)
    is_missing = NODE_SERVER in contender.command and not NODE_MODULE.exists()
    return "it is not installed" if is_missing else ""


def install_old() -> None:
    """Install dsmtpd 1.2.1 into an environment of its own, unless that has been done."""
    if sys.version_info >= (3, 14):
        raise BenchError("it does not start on Python 3.14 and newer")
    # Its command is the last thing that pip writes.
    if not OLD_PYTHON.with_name("dsmtpd").exists():
        run(sys.executable, "-m", "venv", "--clear", str(OLD_PYTHON.parents[1]))
        run(str(OLD_PYTHON), "-m", "pip", "install", "--quiet", "dsmtpd==1.2.1")


def program(name: str) -> str:
    """Return the path of the program *name*."""
    if path := shutil.which(name, path=SEARCH_PATH):
        return path
    raise BenchError("it is not installed")


def run(*command: str) -> None:
    """Run *command* to its good end; raises `BenchError` with the last line that it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"not done after {PATIENCE:.0f} s") from None
    if done.returncode:
        raise BenchError(last_line(done.stderr) or f"exit code {done.returncode}")


def last_line(text: str) -> str:
    """Return the last line of *text* that has something in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class Server:
    """A contender as a process: its port, the seconds to its greeting, its peak memory in MiB."""

    start = peak = 0.0

    def __init__(
        self, contender: Contender, maildir: Path, folder: Path, env: dict[str, str]
    ) -> None:
        """Start it in *folder*, where its output goes as well."""
        self.port = free_port()
        places = {"port": self.port, "web": free_port(), "maildir": maildir}
        name, *arguments = contender.command
        self._log = folder / f"{contender.name}.log"
        self._started = time.perf_counter()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [program(name), *(argument.format(**places) for argument in arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **env},
            )

    def wait_for_greeting(self) -> None:
        """Return as soon as it has said 220."""
        while not greets(self.port):
            if self.process.poll() is not None:
                log = self._log.read_text(encoding="utf-8", errors="replace")
                raise BenchError(f"it does not start: {last_line(log)}")
            if time.perf_counter() - self._started > PATIENCE:
                raise BenchError(f"no greeting after {PATIENCE:.0f} s")
            time.sleep(0.001)
        self.start = time.perf_counter() - self._started

    def end(self) -> None:
        """End it, if need be by force."""
        if HAS_PROC:
            self.peak = peak_memory(self.process.pid)
        self.process.terminate()
        deadline = time.monotonic() + PATIENCE / 10
        while self.process.returncode is None:
            pid, _, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = 0
                # On Linux it counts from before the exec, when the process was a copy of this one.
                unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
                self.peak = self.peak or usage.ru_maxrss / unit
            elif time.monotonic() > deadline:
                self.process.kill()
            time.sleep(0.002)


def free_port() -> int:
    """Return a port that nobody listens on, and that has not been used before in this run."""
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise BenchError("no port is free")


def greets(port: int) -> bool:
    """Tell whether a server on *port* says 220."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        greeting = client.recv(1024)
        client.sendall(b"QUIT\r\n")
        return greeting.startswith(b"220")
    return False


def stat(pid: int) -> list[str]:
    """Return what proc(5) tells about *pid*, from its state on: its name may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """Return *pid* and all its descendants."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int(stat(int(entry.name))[1])
    members = [pid]
    for member in members:
        members.extend(child for child, parent in parents.items() if parent == member)
    return members


def processor_seconds(pid: int) -> float:
    """Return the processor time that *pid* and its children have taken, those that ended too."""
    ticks = 0
    for member in family(pid):
        with suppress(OSError):
            ticks += sum(map(int, stat(member)[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> float:
    """Return the most memory that *pid* and its children have held, in MiB."""
    peak = 0
    for member in family(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{member}/status").read_text(encoding="utf-8").splitlines()
            peak += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return peak / 1024


# The designs of storing that dsmtpd's own is compared with.


class InLoop(DsmtpdHandler):
    """Stores in the event loop."""

    async def _deliver(self, maildir: Maildir, message: Message) -> str:
        return self._store(maildir, message.envelope_fields(), message.content)


class InPool(DsmtpdHandler):
    """Stores in a pool of threads."""

    async def _deliver(self, maildir: Maildir, message: Message) -> str:
        head, content = message.envelope_fields(), message.content
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self._store, maildir, head, content)


class InOneThread(DsmtpdHandler):
    """Stores in one thread, which takes all that waits and answers for it at once."""

    def __init__(self, maildir: str | os.PathLike[str] | None = None) -> None:
        """Start the thread."""
        super().__init__(maildir)
        self._waiting: deque[tuple[asyncio.Future[str], Message]] = deque()
        self._thread = ThreadPoolExecutor(1)

    async def _deliver(self, maildir: Maildir, message: Message) -> str:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[str] = loop.create_future()
        self._waiting.append((reply, message))
        self._thread.submit(self._work, loop, maildir)
        return await reply

    def _work(self, loop: asyncio.AbstractEventLoop, maildir: Maildir) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        done = [
            (reply, self._store(maildir, message.envelope_fields(), message.content))
            for reply, message in batch
        ]
        if done:
            loop.call_soon_threadsafe(answer, done)


def answer(done: Iterable[tuple[asyncio.Future[str], str]]) -> None:
    """Give each of *done* its reply."""
    for reply, text in done:
        reply.set_result(text)


CHOSEN, SERVE = "as it is", "--serve"
DESIGNS: dict[str, type[DsmtpdHandler]] = {
    CHOSEN: DsmtpdHandler,
    "event loop": InLoop,
    "one thread": InOneThread,
    "pool of threads": InPool,
}


def serve(design: str, argv: Sequence[str]) -> int:
    """Run the command with the arguments *argv*, storing by *design*."""
    _dsmtpd.DsmtpdHandler = DESIGNS[design]  # type: ignore[misc]
    return _dsmtpd.main(argv)


# The clients.


def smtp_source(port: int, load: Load, mails: int) -> None:
    """Send *mails* with Postfix's smtp-source, which takes little of the processor itself."""
    counts = ("-s", str(min(load.sessions, mails)), "-m", str(mails), "-l", str(load.size))
    addresses = ("-f", "a@example.com", "-t", "b@example.com")
    keep = ("-d",) if load.keep else ()
    run(program("smtp-source"), *counts, *addresses, *keep, f"127.0.0.1:{port}")


def own_client(port: int, load: Load, mails: int) -> None:
    """Send *mails* as smtp-source does, from this process."""
    converse(send_mails(port, load, iter(range(mails))))


CLIENTS: dict[str, Client] = {"smtp-source": smtp_source, "asyncio": own_client}


def converse(conversation: Coroutine[Any, Any, T]) -> T:
    """Run *conversation* to its end; raises `BenchError` when it fails."""
    try:
        return asyncio.run(asyncio.wait_for(conversation, PATIENCE))
    except (OSError, asyncio.TimeoutError) as error:
        raise BenchError(f"the client fails: {error!r}") from error


async def send_mails(port: int, load: Load, mails: Iterator[int]) -> None:
    """Send as many mails as *mails* has, in concurrent sessions that take them from there."""
    line = b"X" * 78 + b"\r\n"
    content = b"Subject: Benchmark\r\n\r\n" + line * (load.size // len(line)) + b".\r\n"
    # More at once, and the system drops what exceeds a server's backlog, for seconds.
    connect = partial(connected, port, asyncio.Semaphore(50))
    sessions = (run_session(connect, content, mails, load) for _ in range(load.sessions))
    await asyncio.gather(*sessions)


async def run_session(connect: Connect, content: bytes, mails: Iterator[int], load: Load) -> None:
    """Send mails until there are none, in one connection or in one for each."""
    for _ in mails:
        async with connect() as talk:
            await send_mail(talk, content)
            for _ in mails if load.keep else ():
                await send_mail(talk, content)


@asynccontextmanager
async def connected(port: int, connecting: asyncio.Semaphore) -> AsyncIterator[Talk]:
    """Lend a session: a coroutine function that sends octets and waits for the good answer."""
    await connecting.acquire()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def talk(octets: bytes) -> None:
        writer.write(octets)
        await writer.drain()
        while (reply := await reader.readline())[3:4] == b"-":
            pass
        if not reply.startswith((b"2", b"3")):
            raise BenchError(f"the client fails: the answer is {reply!r}")

    try:
        await talk(b"")
        connecting.release()
        await talk(b"HELO client.test\r\n")
        yield talk
        await talk(b"QUIT\r\n")
    finally:
        writer.close()


async def send_mail(talk: Talk, content: bytes) -> None:
    """Send a mail, each command after the answer to the one before."""
    for command in (b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.com>", b"DATA"):
        await talk(command + b"\r\n")
    await talk(content)


async def worst_noop(port: int, seconds: float) -> float:
    """Return the longest time that a NOOP takes, in seconds, while ten sessions send mails."""
    sending = asyncio.ensure_future(send_mails(port, REUSE, itertools.repeat(0)))
    worst, end = 0.0, time.perf_counter() + seconds
    async with connected(port, asyncio.Semaphore()) as talk:
        while (started := time.perf_counter()) < end and not sending.done():
            await talk(b"NOOP\r\n")
            worst = max(worst, time.perf_counter() - started)
            await asyncio.sleep(0.005)
    # Done it can only be when it has failed: there is no end to the mails.
    if sending.done():
        sending.result()
    sending.cancel()
    await asyncio.wait([sending])
    return worst


# The measurements.


@contextmanager
def empty_maildir(folder: Path) -> Iterator[Path]:
    """Lend the path of a Maildir that is yet to be made, in *folder*; remove it afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        yield Path(parent, "mails")


@contextmanager
def stored_maildir(folder: Path, mails: int) -> Iterator[Path]:
    """Lend a Maildir that holds *mails*; it is kept, without what has been added to it."""
    path = folder / f"stored-{mails}"
    if not path.exists():
        fill_maildir(path, mails)
    try:
        yield path
    finally:
        for entry in os.scandir(path / "new"):
            if not entry.name.startswith("stored."):
                Path(entry).unlink()


def fill_maildir(path: Path, mails: int) -> None:
    """Make a Maildir of *mails*, links to few files: file systems limit the links to each."""
    for name in ("tmp", "new", "cur"):
        (path / name).mkdir(parents=True)
    for number in range(mails):
        mail = path / "new" / f"stored.{number}"
        if number % 10_000 == 0:
            mail.write_bytes(b"Subject: Stored\n\n")
            first = mail
        else:
            os.link(first, mail)


@contextmanager
def serving(
    bench: Bench,
    contender: Contender,
    *,
    folder: Path | None = None,
    stored: int = 0,
    fsync: float = 0,
) -> Iterator[Server]:
    """Run *contender* for as long as the block takes.

    Its Maildir is in *folder*, by default in memory, and holds *stored* mails already; its fsync
    takes so many seconds more.
    """
    folder = folder or bench.memory
    with stored_maildir(folder, stored) if stored else empty_maildir(folder) as maildir:
        server = Server(contender, maildir, bench.disk, slow_disk(bench.disk, fsync))
        try:
            server.wait_for_greeting()
            yield server
        finally:
            server.end()


def slow_disk(folder: Path, seconds: float) -> dict[str, str]:
    """Return the environment in which Python's programs find that flushing takes *seconds*."""
    if not seconds:
        return {}
    folder = folder / f"fsync-{seconds}"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SLOW_DISK.format(seconds=seconds), encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def throughput(bench: Bench, contender: Contender, load: Load, **storage: Any) -> Sample:
    """Measure mails or megabytes per second, in a new process that has been warmed up.

    *storage* is that of `serving`.
    """
    with serving(bench, contender, **storage) as server:
        mails = mails_for(bench, load, server.port)
        before = processor_seconds(server.process.pid)
        seconds = drive(bench, load, server.port, mails)
        after = processor_seconds(server.process.pid)
    rate = mails / seconds
    cpu = (after - before) / mails * 1e6 if HAS_PROC else None
    return Sample(rate * load.size / 1e6 if load.in_megabytes else rate, cpu)


def mails_for(bench: Bench, load: Load, port: int) -> int:
    """Warm the server up; return how many mails keep it busy for as long as *bench* wants."""
    mails = max(1, min(WARM_UP_MAILS, WARM_UP_OCTETS // load.size))
    rate = mails / drive(bench, load, port, mails)
    most = min(MOST_MAILS, MOST_OCTETS // load.size)
    return max(load.fewest, min(most, round(rate * bench.seconds)))


def drive(bench: Bench, load: Load, port: int, mails: int) -> float:
    """Return the seconds that *mails* take, the start of the client included."""
    started = time.perf_counter()
    bench.client(port, load, mails)
    return time.perf_counter() - started


def memory(bench: Bench, contender: Contender, sessions: int) -> Sample:
    """Measure the peak memory, in MiB, of a process that sees nothing but ten big mails."""
    with serving(bench, contender) as server:
        bench.client(server.port, replace(BIG, sessions=sessions), 10)
    return Sample(server.peak)


def start(bench: Bench, contender: Contender, stored: int = 0) -> Sample:
    """Measure the time from the start of the process to its greeting, in milliseconds."""
    with serving(bench, contender, stored=stored) as server:
        return Sample(server.start * 1000)


def noop(bench: Bench, contender: Contender) -> Sample:
    """Measure how long a session waits, in milliseconds, while others wait for a slow disk."""
    with serving(bench, contender, fsync=0.2) as server:
        return Sample(converse(worst_noop(server.port, 1.5)) * 1000)


# What is measured, and in which order.


def measure_all(bench: Bench, contenders: Sequence[Contender], scale: Scale) -> Outcomes:
    """Measure everything: what needs as many rounds, together."""
    keepers = [one for one in contenders if one.name in {NEW, OLD}]
    growers = [one for one in contenders if one.name in {NEW, OLD, SINK}]
    ends = (scale.stored[0], scale.stored[-1])
    designs = design_trials(bench) if any(one.name == NEW for one in contenders) else ()
    return {
        **run_trials(
            [*load_trials(bench, contenders), *on_growing_maildir(bench, keepers, ends)],
            scale.rounds,
        ),
        **run_trials(designs, scale.growth_rounds),
        **run_trials(start_trials(bench, contenders, keepers, scale.stored), scale.starts),
        **run_trials(growth_trials(bench, growers, scale), scale.growth_rounds),
    }


def load_trials(bench: Bench, contenders: Sequence[Contender]) -> Iterator[Trial]:
    """Return the workloads and the peak memory; of each, all contenders."""
    measures = {name: partial(throughput, bench, load=load) for name, load in WORKLOADS.items()}
    measures["memory"] = partial(memory, bench, sessions=1)
    measures["memory-10"] = partial(memory, bench, sessions=10)
    for name, measure in measures.items():
        for one in contenders:
            if not one.fails_at_large_mails or name in {"reuse", "connect", "serial"}:
                yield Trial(Key(name, one.name), partial(measure, contender=one), one.reference)


def on_growing_maildir(
    bench: Bench, contenders: Sequence[Contender], counts: Sequence[int]
) -> Iterator[Trial]:
    """Return the throughput into Maildirs that hold mails already."""
    for count, one in itertools.product(counts, contenders):
        measure = partial(throughput, bench, one, REUSE, stored=count)
        yield Trial(Key("stored-reuse", one.name, count), measure)


def design_trials(bench: Bench) -> Iterator[Trial]:
    """Return what shows where dsmtpd had best store, and how long others wait for that."""
    storages: dict[str, dict[str, Any]] = {
        "memory": {},
        "disk": {"folder": bench.disk},
        "fsync": {"fsync": 0.02},
    }
    for (name, storage), design in itertools.product(storages.items(), DESIGNS):
        one = Contender(design, CHOSEN, (sys.executable, __file__, SERVE, design, *STORING))
        measure = partial(throughput, bench, one, REUSE, **storage)
        yield Trial(Key(f"design-{name}", design), measure, one.reference)
        if name == "memory":
            yield Trial(Key("design-noop", design), partial(noop, bench, one), one.reference)


def start_trials(
    bench: Bench,
    contenders: Sequence[Contender],
    keepers: Sequence[Contender],
    counts: Sequence[int],
) -> Iterator[Trial]:
    """Return the starts: of all with nothing stored, of *keepers* with more and more."""
    for one in contenders:
        yield Trial(Key("start", one.name), partial(start, bench, one), one.reference)
    for count, one in itertools.product(counts, keepers):
        yield Trial(Key("stored-start", one.name, count), partial(start, bench, one, count))


def growth_trials(bench: Bench, contenders: Sequence[Contender], scale: Scale) -> Iterator[Trial]:
    """Return the growth with the sessions, and with the size of a mail."""
    loads = {("sessions", n): replace(REUSE, sessions=n, fewest=5 * n) for n in scale.sessions}
    loads |= {("size", size): replace(BIG, sessions=10, size=size) for size in scale.sizes}
    for ((name, at), load), one in itertools.product(loads.items(), contenders):
        yield Trial(Key(name, one.name, at), partial(throughput, bench, one, load))


def run_trials(trials: Iterable[Trial], rounds: int) -> Outcomes:
    """Measure all once, then all again: what disturbs the machine for a while is shared."""
    trials = list(trials)
    outcomes = {trial.key: Outcome(trial.reference) for trial in trials}
    for number, trial in itertools.product(range(1, rounds + 1), trials):
        outcome = outcomes[trial.key]
        if not outcome.failure:
            try_out(trial, outcome)
            told = outcome.failure or quantity(outcome.samples[-1].value)
            print(f"{number}/{rounds} {trial.key}: {told}", file=sys.stderr)
    return outcomes


def try_out(trial: Trial, outcome: Outcome) -> None:
    """Measure once more; one failure is enough."""
    try:
        outcome.samples.append(trial.measure())
    except BenchError as error:
        outcome.failure = str(error)


# The targets.


def targets(most: int) -> list[Target]:
    """Return what dsmtpd promises; *most* is the size of the fullest Maildir."""
    against_old = {
        "reuse": (">=", 5.2),
        "connect": (">=", 3.8),
        "serial": (">=", 3.6),
        "big": (">=", 13.0),
        "memory": ("<=", 0.22),
        "start": ("<=", 1.0),
    }
    against_sink = {"reuse": (">=", 0.6), "big": (">=", 1.9)}
    full = partial(Key, subject=NEW, at=most)
    return [
        *(Target(Key(name, NEW), Key(name, OLD), *what) for name, what in against_old.items()),
        *(Target(Key(name, PLAIN), Key(name, SINK), *what) for name, what in against_sink.items()),
        Target(full("stored-start"), Key("stored-start", NEW), "<=", 1.3),
        Target(Key("stored-reuse", NEW), full("stored-reuse"), "<=", 1.1),
    ]


def verdict(target: Target, outcomes: Outcomes) -> str:
    """Tell whether *target* holds; it does not when dsmtpd could not even finish."""
    share = ratio(outcomes, target.subject, target.against)
    if share is not None:
        return "pass" if RELATIONS[target.relation](share, target.bound) else "FAIL"
    failed = target.subject in outcomes and outcomes[target.subject].failure
    return "FAIL" if failed else "not measured"


def ratio(outcomes: Outcomes, subject: Key, against: Key) -> float | None:
    """Return the ratio of the medians, when there are both."""
    if subject not in outcomes or against not in outcomes:
        return None
    above, below = outcomes[subject].median, outcomes[against].median
    return above / below if above is not None and below else None


# The report.


def report(outcomes: Outcomes, promises: Sequence[Target]) -> str:
    """Return all tables as text, each an RST literal block."""
    blocks = []
    for metric in METRICS:
        if keys := [key for key in outcomes if key.metric == metric.name]:
            rows = growth_rows if metric.growing else plain_rows
            title = f"{metric.name}: {metric.title}, in {metric.unit}"
            blocks.append(literal_block(title, rows(metric, keys, outcomes)))
    failed = [f"{key}: {one.failure}" for key, one in outcomes.items() if one.failure]
    if failed:
        blocks.append(literal_block("failed", [[line] for line in failed]))
    return "\n".join([*blocks, literal_block("targets", target_rows(promises, outcomes))])


def plain_rows(_metric: Metric, keys: Sequence[Key], outcomes: Outcomes) -> list[list[str]]:
    """Return a row for each subject."""
    rows = [["", "median", "min", "max", "CPU us/mail", "ratio", "to"]]
    for key in keys:
        one = outcomes[key]
        share = ratio(outcomes, key, Key(key.metric, one.reference))
        extremes = [
            quantity(min(one.values, default=None)),
            quantity(max(one.values, default=None)),
        ]
        numbers = [median(one), *extremes, quantity(one.cpu), times(share)]
        rows.append([key.subject, *numbers, one.reference if share else ""])
    return rows


def growth_rows(metric: Metric, keys: Sequence[Key], outcomes: Outcomes) -> list[list[str]]:
    """Return a row of medians for each subject, with a column for each place."""
    places = sorted({key.at for key in keys})
    rows = [[metric.growing, *(f"{at:,}" for at in places)]]
    rows.extend(
        [subject, *(median(outcomes[Key(metric.name, subject, at)]) for at in places)]
        for subject in dict.fromkeys(key.subject for key in keys)
    )
    return rows


def target_rows(promises: Sequence[Target], outcomes: Outcomes) -> list[list[str]]:
    """Return a row for each target."""
    rows = [["", "against", "wanted", "ratio", ""]]
    for one in promises:
        wanted = f"{one.relation} {times(one.bound)}"
        share = times(ratio(outcomes, one.subject, one.against))
        against = str(one.against).partition(" ")[2]
        rows.append([str(one.subject), against, wanted, share, verdict(one, outcomes)])
    return rows


def literal_block(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return *rows* in columns, of which the first is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([f"{title}::", "", *(f"    {line}" for line in lines), ""])


def median(outcome: Outcome) -> str:
    """Return the median in words."""
    return "failed" if outcome.failure else quantity(outcome.median)


def quantity(value: float | None) -> str:
    """Return *value* with the three digits, or more, that mean something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004  # three digits


def times(value: float | None) -> str:
    """Return a ratio in words."""
    return "-" if value is None else f"{value:.2f}x"


def environment(client: str) -> list[str]:
    """Return what the numbers depend on."""
    return [
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        f"{platform.python_implementation()} {platform.python_version()}",
        f"dsmtpd {version('dsmtpd')}, aiosmtpd {version('aiosmtpd')}",
        f"client: {client}",
    ]


def save(folder: Path, about: list[str], outcomes: Outcomes) -> None:
    """Write every sample, and the figure when there is matplotlib, into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [{**asdict(key), **asdict(outcome)} for key, outcome in outcomes.items()]
    content = json.dumps({"about": about, "outcomes": samples}, indent=1)
    (folder / "results.json").write_text(content + "\n", encoding="utf-8")
    try:
        draw(folder / "growth.svg", outcomes)
    except ImportError:
        print("No figure: pip install --requirement benchmarks/requirements.txt")


# The figure.

COLOURS = {NEW: "#0072b2", OLD: "#d55e00", SINK: "#777777"}

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # The same numbers are to give the same file.
    "svg.hashsalt": "dsmtpd",
}


def draw(path: Path, outcomes: Outcomes) -> None:
    """Draw the growth in three panels; raises `ImportError` without matplotlib."""
    from matplotlib import pyplot  # noqa: ICN001, PLC0415  # all but the figure works without it

    pyplot.switch_backend("svg")
    pyplot.rcParams.update(STYLE)
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    curves = [metric for metric in METRICS if metric.name in {"sessions", "size", "stored-start"}]
    for metric, panel in zip(curves, panels, strict=True):
        draw_panel(panel, metric, outcomes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_panel(panel: Any, metric: Metric, outcomes: Outcomes) -> None:
    """Draw a curve through the medians for each subject, over a band from minimum to maximum."""
    # An empty Maildir is to have its place, too.
    empty = metric.name == "stored-start"
    scale = {"value": "symlog", "linthresh": 1_000, "linscale": 0.5} if empty else {"value": "log"}
    for subject, colour in COLOURS.items():
        points = [
            (key.at, outcome.median, min(outcome.values), max(outcome.values))
            for key, outcome in outcomes.items()
            if (key.metric, key.subject) == (metric.name, subject) and outcome.values
        ]
        if points:
            places, medians, least, most = zip(*points, strict=True)
            panel.plot(places, medians, "o-", color=colour, label=subject, markersize=4)
            panel.fill_between(places, least, most, color=colour, alpha=0.15, linewidth=0)
            # The places that were measured are the ones to name.
            panel.set_xscale(**scale)
            panel.set_xticks(places, [magnitude(place) for place in places])
            panel.xaxis.set_tick_params(which="minor", length=0)
    panel.set_yscale("log")
    panel.set(title=metric.title, xlabel=metric.growing, ylabel=metric.unit)


def magnitude(number: int) -> str:
    """Return *number* in few characters."""
    for factor, prefix in ((1_000_000, "M"), (1_000, "k")):
        if number >= factor:
            return f"{number / factor:g}{prefix}"
    return str(number)


# The command.


def parse_args(argv: Sequence[str] | None) -> Options:
    """Return what *argv* asks for; ends the process when that is not possible."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of short loads: a try")
    parser.add_argument("--output", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAME,...")
    parser.add_argument("--client", choices=CLIENTS, help="who sends the mails")
    given = parser.parse_args(argv)
    only = frozenset(given.only.split(","))
    if unknown := only.difference(NAMES):
        parser.error(f"--only knows {', '.join(NAMES)}, but not {', '.join(sorted(unknown))}")
    has_source = shutil.which("smtp-source", path=SEARCH_PATH)
    client = given.client or ("smtp-source" if has_source else "asyncio")
    if client == "smtp-source" and not has_source:
        parser.error("smtp-source is not installed")
    return Options(QUICK if given.quick else Scale(), given.output, only, client)


@contextmanager
def scratch_folders() -> Iterator[tuple[Path, Path, list[str]]]:
    """Lend a folder in memory, if there is room for it, and one on disk; and a line if not."""
    shm = Path("/dev/shm")  # noqa: S108  # the folders in it have names that cannot be foreseen
    roomy = os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2 * MOST_OCTETS
    notes = [] if roomy else [f"{shm} has no room: what is said to be in memory is on disk"]
    with (
        tempfile.TemporaryDirectory(prefix="dsmtpd-bench-", dir=shm if roomy else None) as memory,
        tempfile.TemporaryDirectory(prefix="dsmtpd-bench-") as disk,
    ):
        yield Path(memory), Path(disk), notes


def allow_descriptors() -> None:
    """Raise the limit of open files as far as we may, for us and for what we start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and tell; return 0 when all targets that were measured hold, else 1."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [SERVE]:
        return serve(argv[1], argv[2:])
    options = parse_args(argv)
    # As Ctrl+C does, so that nothing is left running, or behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    allow_descriptors()
    contenders, left_out = find_contenders(options.only)
    with scratch_folders() as (memory_folder, disk_folder, notes):
        client = CLIENTS[options.client]
        bench = Bench(client, options.scale.seconds, memory_folder, disk_folder)
        outcomes = measure_all(bench, contenders, options.scale)
    promises = targets(options.scale.stored[-1])
    about = [*environment(options.client), *left_out, *notes]
    print("\n".join([*about, "", report(outcomes, promises)]))
    save(options.output, about, outcomes)
    return int(any(verdict(target, outcomes) == "FAIL" for target in promises))


if __name__ == "__main__":
    raise SystemExit(main())
