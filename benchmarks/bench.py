"""Compares the speed and memory use of dsmtpd with those of other SMTP servers for testing.

README.rst in this folder says what is measured, and how to read the results.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = Path(__file__).resolve().parent / ".cache"

PATIENCE = 120  # seconds, far more than anything here takes

# smtp-source and smtp-sink are in /usr/sbin, which is only in root's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


class BenchError(Exception):
    """Something cannot be measured; the text says why."""


class Server(NamedTuple):
    """A server to measure.

    *command*: {port} stands for a free port, {folder} for the folder to store in.
    *rival*: the dsmtpd that does the same, to compare it with; empty for dsmtpd itself.
    *requirement*: what pip installs for it, into its own environment.
    *without*: the loads that it cannot handle.
    """

    name: str
    command: tuple[str, ...]
    rival: str = ""
    requirement: str = ""
    without: tuple[str, ...] = ()


STORING, PLAIN = "dsmtpd -d", "dsmtpd"
LISTENING = ("-i", "127.0.0.1", "-p", "{port}")
HERE = str(Path(sys.executable).with_name("dsmtpd"))
NODE = """
const {SMTPServer} = require("smtp-server");
const onData = (stream, session, done) => stream.on("end", done).resume();
new SMTPServer({authOptional: true, disabledCommands: ["STARTTLS"], onData})
  .listen(Number(process.argv[1]), "127.0.0.1");
"""
# As root, smtp-sink requires a user to switch to.
USER = ("-u", "nobody") if os.geteuid() == 0 else ()

MAILDIR = (*LISTENING, "-d", "{folder}/mails")
SINK = ("--host", "127.0.0.1", "--port", "{port}", "--dir", "{folder}/mails")
FAKE = ("-b", "127.0.0.1", "-p", "{port}", "-o", "{folder}/mbox")

SERVERS = (
    Server(STORING, (HERE, *MAILDIR)),
    Server("dsmtpd 1.2.1", ("dsmtpd", *MAILDIR), STORING, "dsmtpd==1.2.1"),
    Server("maildirsink 0.1.3", ("maildirsink", *SINK), STORING, "maildirsink==0.1.3"),
    # It needs minutes for a large mail.
    Server("fakesmtpd 2026.7", ("fakesmtpd", *FAKE), STORING, "fakesmtpd==2026.7.0", ("big",)),
    Server(PLAIN, (HERE, *LISTENING)),
    Server("smtp-server 3.21.6", ("node", "-e", NODE, "{port}"), PLAIN),
    Server("smtp-sink", ("smtp-sink", *USER, "127.0.0.1:{port}", "100"), PLAIN),
)


class Load(NamedTuple):
    """What to send: *mails* of *size* octets, in *sessions* concurrent sessions.

    *keep*: each session keeps its connection, instead of opening one for each mail.
    """

    name: str
    sessions: int
    size: int
    mails: int
    keep: bool = True


LOADS = (
    Load("reuse", sessions=10, size=4096, mails=4000),
    Load("connect", sessions=10, size=4096, mails=2000, keep=False),
    Load("serial", sessions=1, size=4096, mails=2000),
    Load("big", sessions=1, size=20_000_000, mails=10),
)
WARM_UP_MAILS = 300
# Also measured: milliseconds until the first greeting, and the peak in MiB after `big`.
START, MEMORY = "start", "memory"
COLUMNS = (*(load.name for load in LOADS), START, MEMORY)


def find(server: Server) -> list[str]:
    """Return the command of *server*; if there is none, print why, and return an empty list."""
    print(f"Preparing {server.name}", file=sys.stderr)
    try:
        return installed(server)
    except BenchError as error:
        print(f"Skipping {server.name}: {error}", file=sys.stderr)
        return []


def installed(server: Server) -> list[str]:
    """Install *server* if necessary, and return its command; raises `BenchError`."""
    command = [*server.command]
    if server.requirement:
        environment = CACHE / f"{server.requirement}-{platform.python_version()}"
        command[0] = str(environment / "bin" / command[0])
        if not Path(command[0]).exists():
            run(sys.executable, "-m", "venv", "--clear", str(environment))
            run(str(environment / "bin" / "pip"), "install", "--quiet", server.requirement)
    elif command[0] == "node" and not (CACHE / "node_modules" / "smtp-server").exists():
        run("npm", "install", "--silent", "--prefix", str(CACHE), "smtp-server@3.21.6")
    return [path_of(command[0]), *command[1:]]


def path_of(name: str) -> str:
    """Return the path of the program *name*; raises `BenchError`."""
    if path := shutil.which(name, path=PATH):
        return path
    raise BenchError(f"{name} is not installed")


def run(*command: str) -> None:
    """Run *command*, and wait for its end; raises `BenchError`."""
    words = [path_of(command[0]), *command[1:]]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise BenchError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-200:]}")


def greets(port: int) -> bool:
    """Return whether a server on *port* says 220."""
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            greeting = client.recv(1024)
            client.sendall(b"QUIT\r\n")
    except OSError:
        return False
    return greeting.startswith(b"220")


@contextmanager
def started(command: list[str], folder: str) -> Iterator[tuple[int, int, float]]:
    """Start a server; yield its process ID, its port and how many milliseconds the start took."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [word.replace("{port}", str(port)).replace("{folder}", folder) for word in command]
    # As for users, Python finds the bytecode from an earlier start.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "NODE_PATH": f"{CACHE}/node_modules"}
    with (Path(folder) / "log").open("w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(words, stdout=log, stderr=log, cwd=folder, env=environment)
        try:
            while not greets(port):
                if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                    raise BenchError("it did not start")
                time.sleep(0.001)
            yield process.pid, port, (time.perf_counter() - begin) * 1000
        finally:
            process.terminate()
            process.wait(PATIENCE)


def send(port: int, load: Load) -> float:
    """Send *load* with Postfix's smtp-source; return the seconds that it took."""
    counts = ("-s", str(load.sessions), "-m", str(load.mails), "-l", str(load.size))
    addresses = ("-f", "a@example.com", "-t", "b@example.com")
    begin = time.perf_counter()
    run("smtp-source", *counts, *addresses, *(("-d",) if load.keep else ()), f"127.0.0.1:{port}")
    return time.perf_counter() - begin


def peak_memory(process: int) -> float:
    """Return the peak memory of *process* in MiB (Linux, proc(5))."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return peak / 1024


def measure(server: Server, command: list[str]) -> dict[str, float]:
    """Return a value for each column, with a new process for each load."""
    values = {}
    for load in LOADS:
        if load.name in server.without:
            continue
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            Path(folder).chmod(0o777)  # for a server that switches to another user
            with started(command, folder) as (process, port, values[START]):
                if load.name == "big":
                    values[load.name] = load.size * load.mails / 1e6 / send(port, load)
                    values[MEMORY] = peak_memory(process)
                else:
                    send(port, load._replace(mails=WARM_UP_MAILS))
                    values[load.name] = load.mails / send(port, load)
    return values


def row(server: Server, samples: dict[str, dict[str, list[float]]]) -> str:
    """Return the medians of a dsmtpd, or the ratios of dsmtpd to another *server*, with spread."""
    cells = []
    for column in COLUMNS:
        mine = samples[server.name].get(column, [])
        rival = samples.get(server.rival, {}).get(column, [])
        if ratios := [ours / theirs for ours, theirs in zip(rival, mine, strict=False)]:
            spread = f"{min(ratios):#.3g}-{max(ratios):#.3g}"
            cells.append(f"{statistics.median(ratios):#.3g} ({spread})")
        else:
            cells.append(f"{statistics.median(mine):,.0f}" if mine and not server.rival else "-")
    return f"{server.name:<20}" + "".join(f"{cell:>20}" for cell in cells)


def main() -> int:
    """Measure, and print a table; return 1 if a server fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    rounds = parser.parse_args().rounds
    commands = {server: command for server in SERVERS if (command := find(server))}
    samples: dict[str, dict[str, list[float]]] = {server.name: {} for server in commands}
    for number, (server, command) in itertools.product(range(rounds), commands.items()):
        print(f"round {number + 1} of {rounds}: {server.name}", file=sys.stderr)
        try:
            values = measure(server, command)
        except BenchError as error:
            print(f"{server.name}: {error}", file=sys.stderr)
            return 1
        for column, value in values.items():
            samples[server.name].setdefault(column, []).append(value)
    print(" " * 20 + "".join(f"{column:>20}" for column in COLUMNS))
    print("\n".join(row(server, samples) for server in commands))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
