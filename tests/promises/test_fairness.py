from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from random import Random, SystemRandom
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from dsmtpd._dsmtpd import DsmtpdHandler
from dsmtpd.connection import Connection, Service
from dsmtpd.logs import FORMAT, Formatter, StderrHandler
from dsmtpd.options import Options
from dsmtpd.path import parse
from tests.tools import BEGIN

if TYPE_CHECKING:
    from collections.abc import Callable

# How long a client may block the others, in milliseconds of processor time.
BOUND = 50

# Measure up to this many times and keep the lowest, to ignore other load on the machine.
TRIES = 3

KIB, MIB = 1024, 1024 * 1024
EHLO = b"EHLO x\r\n"

# Slightly shorter than the longest line allowed.
LINE = 12_200

# How many of the worst attacks the search builds on.
KEPT = 8

# The clients' input.


def repeat(octets: bytes, length: int) -> bytes:
    return octets * (length // len(octets))


def mail(content: bytes) -> bytes:
    return EHLO + BEGIN + content + b"\r\n.\r\n"


def lines(begin: bytes, rest: bytes, end: bytes = b"", number: int = 30) -> bytes:
    """Return *number* long commands, all different."""
    return b"".join(b"%b%d%b%b\r\n" % (begin, n, rest, end) for n in range(number))


def words() -> bytes:
    """Return a line full of words, all different."""
    letters = ascii_lowercase + digits + "!#$%&'()*+,-./:;?@[]^_`{|}~"
    return " ".join(map("".join, product(letters, repeat=2))).encode()[:LINE]


def at_once(octets: bytes) -> bytes:
    """Return *octets* after commands that keep the server busy while many octets arrive."""
    return EHLO + b"NOOP\r\n" * 2000 + FROM + octets


FROM, PARAMETERS = b"MAIL FROM:<a@x>\r\n", b"@x> " + words()
NAMES = b"".join(b"x%d: a\r\n" % number for number in range(20_000))
CHARSETS = b"".join(b"=?x-%d?q?a?= " % number for number in range(1000))
USER = b64encode(b"\0" + b"\x01" * 9000 + b"\0")

# The worst of each kind come first.
HEADERS: dict[str, Callable[[], bytes]] = {
    "a fold with many CRs": lambda: mail(b"Subject: " + b"\r" * 20_000 + b"\n x"),
    "control characters, then folds": lambda: mail(
        b"Subject: " + b"\x01" * 8100 + b"\r\na:" + repeat(b"\n ", MIB)
    ),
    "folds with CR": lambda: mail(b"a:" + repeat(b"\r ", MIB)),
    "punycode": lambda: mail(b"Subject: =?punycode?q?-" + b"b" * 8100 + b"?="),
    "empty fields": lambda: mail(repeat(b"a:\r\n", MIB)),
    "continuation lines": lambda: mail(b"a: b\r\n" + repeat(b" c\r\n", MIB)),
    "folds with many CRs": lambda: mail(b"Subject:" + repeat(b"\r" * 4000 + b"\n x", MIB)),
    "20,000 field names": lambda: mail(NAMES),
    "From lines of an mbox": lambda: mail(repeat(b"From x\r\n", MIB)),
    "an 8-bit subject": lambda: mail(b"Subject: " + repeat(b"\xe9", MIB)),
    "encoded words": lambda: mail(b"Subject: " + repeat(b"=?x?q?a?= ", MIB)),
    "encoded words in many charsets": lambda: mail(b"Subject: " + CHARSETS),
    "halves of encoded words": lambda: mail(b"Subject: " + repeat(b"=?x?q?", MIB)),
    "question marks": lambda: mail(b"Subject: =?utf-8?q?" + repeat(b"?a", MIB)),
    "control characters": lambda: mail(b"Subject: " + repeat(b"\x01", MIB)),
}
CONTENTS: dict[str, Callable[[], bytes]] = {
    "dots at once": lambda: at_once(
        BEGIN.removeprefix(FROM) + repeat(b"..\r\n", 400 * KIB) + b".\r\n"
    ),
    "bare line ends": lambda: mail(repeat(b"a\rb\nc\0", 31 * MIB)),
    "CR": lambda: mail(repeat(b"\r", 31 * MIB)),
    "LF": lambda: mail(repeat(b"\n", 31 * MIB)),
    "CRLF": lambda: mail(repeat(b"\r\n", 31 * MIB)),
    "dots": lambda: mail(repeat(b"..\r\n", 2 * MIB)),
    "dots within a line": lambda: mail(repeat(b".", 31 * MIB)),
    "almost the end of data": lambda: mail(repeat(b"\r\n.\r", 2 * MIB)),
    "one line": lambda: mail(repeat(b"x", 31 * MIB)),
    "NUL": lambda: mail(repeat(b"\0", 31 * MIB)),
}
COMMANDS: dict[str, Callable[[], bytes]] = {
    "parameters of RCPT": lambda: at_once(lines(b"RCPT TO:<b", PARAMETERS)),
    "refused octets": lambda: at_once(lines(b"DATA ", b"\xff" * LINE)),
    "quotes": lambda: at_once(lines(b"RCPT TO:<", repeat(b'"a" ', LINE))),
    "parameters of MAIL": lambda: EHLO + lines(b"RSET\r\nMAIL FROM:<a", PARAMETERS),
    "parameters of 85 recipients": lambda: (
        EHLO + FROM + lines(b"RCPT TO:<b", PARAMETERS, number=85) + b"DATA\r\n.\r\n"
    ),
    "10,000 recipients": lambda: (
        EHLO + FROM + lines(b"RCPT TO:<", b"b" * 90 + b"@x>", number=10_000) + b"DATA\r\n.\r\n"
    ),
    "routes": lambda: at_once(lines(b"RCPT TO:<@", repeat(b"a:", LINE))),
    "atoms": lambda: at_once(lines(b"RCPT TO:<", repeat(b"a.", LINE))),
    "unknown commands": lambda: EHLO + repeat(b"x-y\r\n", MIB),
    "empty lines": lambda: EHLO + repeat(b"\n", 256 * KIB),
    "an endless line": lambda: EHLO + repeat(b"a", 31 * MIB),
    "AUTH": lambda: at_once(lines(b"AUTH PLAIN ", b"A" * LINE)),
    "AUTH responses": lambda: EHLO + lines(b"AUTH LOGIN\r\n", b"A" * LINE, b"!", number=100),
    "a user name of control characters": lambda: EHLO + b"AUTH PLAIN " + USER + b"\r\n",
}
INPUTS = HEADERS | CONTENTS | COMMANDS
OVER_TLS = ["dots at once", "bare line ends", "refused octets", "folds with CR", "one line"]


# The measurement.


class Probe:
    """Measures the longest turn of the event loop, during which it serves nobody else."""

    def __init__(self) -> None:
        self.longest = 0.0  # in seconds of processor time
        self._loop = asyncio.get_running_loop()
        self._begin = time.thread_time()
        self._next = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._begin)
        self._begin = now
        self._next = self._loop.call_soon(self._tick)

    def end(self) -> float:
        self._next.cancel()
        return max(self.longest, time.thread_time() - self._begin)


def attack(client: socket.socket, octets: bytes, trust: ssl.SSLContext | None) -> None:
    """Send *octets* as far as the server accepts them, over TLS with *trust*; read all replies."""
    with client.dup() as reader, ThreadPoolExecutor(1) as pool, suppress(OSError):
        sender = trust.wrap_socket(client, server_hostname="localhost") if trust else client
        with sender:
            end = pool.submit(read, reader)
            with suppress(OSError):
                sender.sendall(octets)
                reader.shutdown(socket.SHUT_WR)
            end.result()


def read(client: socket.socket) -> None:
    """Read until the server closes the connection."""
    with suppress(OSError):
        while client.recv(64 * KIB):
            pass


async def longest_turn(octets: bytes, service: Service) -> float:
    """Return the longest time that a client sending *octets* blocks others, in milliseconds."""
    client, server = socket.socketpair()
    loop = asyncio.get_running_loop()
    probe = Probe()
    await loop.connect_accepted_socket(lambda: Connection(service), server)
    trust = None if service.ca is None else ssl.create_default_context(cadata=service.ca.decode())
    await asyncio.to_thread(attack, client, octets, trust)
    return probe.end() * 1000


def measure(octets: bytes, service: Service, tries: int = TRIES) -> float:
    """Return the lowest of up to *tries* measurements; stop at one that is low enough."""
    least = float("inf")
    for _ in range(tries):
        parse.cache_clear()
        least = min(least, asyncio.run(longest_turn(octets, service)))
        if least < BOUND / 3:
            break
    return round(least, 1)


def configure() -> None:
    """Log as the command does, but to /dev/null."""
    handler = StderrHandler(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    handler.setFormatter(Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def measure_all(names: list[str], *, over_tls: bool) -> dict[str, float]:
    """Return the measurement for each input."""
    configure()
    service = Service(DsmtpdHandler(), Options(tls="implicit" if over_tls else None))
    return {name: measure(INPUTS[name](), service) for name in names}


def in_a_process(function: str, *arguments: object, **options: object) -> Any:
    """Call a function of this module in a new process, without coverage or debug mode."""
    program = (
        "import json, sys\n"
        "from tests.promises import test_fairness\n"
        "name, arguments, options = json.loads(sys.argv[1])\n"
        "print(json.dumps(getattr(test_fairness, name)(*arguments, **options)))\n"
    )
    call = json.dumps([function, arguments, options])
    process = subprocess.run(
        [sys.executable, "-c", program, call],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
        timeout=55,
    )
    assert process.returncode == 0, process.stderr.decode()
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("names", "over_tls"),
    [([*HEADERS], False), ([*CONTENTS], False), ([*COMMANDS], False), (OVER_TLS, True)],
    ids=["headers", "contents", "commands", "TLS"],
)
def test_nothing_that_a_client_sends_blocks_another_for_more_than_50_ms(
    times: Callable[[int, int], int], names: list[str], *, over_tls: bool
) -> None:
    found = in_a_process("measure_all", names[: times(2, len(names))], over_tls=over_tls)
    assert {name: ms for name, ms in found.items() if ms > BOUND} == {}


# The search for worse input.

BEGINS = [
    b"Subject: ",
    b"Subject:\r\n ",
    b"a:",
    b"#:",
    b"From x",
    b"From: ",
    b"",
    b"=?#?q?",
    b"x\r\n\r\n",
]
VERBS = [
    b"MAIL FROM:<#@x> ",
    b"RSET\r\nMAIL FROM:<#@x> ",
    b"RCPT TO:<#@x> ",
    b"RCPT TO:<#",
    b"RCPT TO:",
]
VERBS += [
    b"RCPT TO:<@",
    b'RCPT TO:<"',
    b"DATA #",
    b"EHLO #",
    b"NOOP",
    b"AUTH PLAIN #",
    b"AUTH LOGIN\r\n",
]
VERBS += [b"AUTH #", b"HELP", b"VRFY ", b"#", b"RCPT #", b"RCPT TO:<a@[IPv6:", b"RCPT TO:<a@-"]
ENDS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\n x",
    b"\r ",
    b"?=\r\n",
    b"?= ",
    b">\r\n",
    b"",
    b"@x>\r\n",
    b"\r\n.\r\n",
]
UNITS = [
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b".",
    b"..\r\n",
    b":",
    b"a",
    b"a:",
    b"a ",
    b"a.",
    b"-a.",
]
UNITS += [
    b"\xff",
    b"\xe9",
    "é".encode(),
    "🎉".encode(),
    b"\0",
    b"\x01",
    b"\x1b",
    b"\xe2\x80\xae",
    b"=1B",
]
UNITS += [
    b'"',
    b"\\",
    b"<",
    b">",
    b"@",
    b"=",
    b"?",
    b"?=",
    b"=?",
    b"=?x?q?a?=",
    b"=?utf-8?b?/w?= ",
    b";",
]
UNITS += [
    b"\r ",
    b"\n ",
    b"\r\n ",
    b"From x\n",
    b"a=b ",
    b'"a" ',
    b"SIZE=1 ",
    b"+AAo-",
    b"A",
    b"xn--",
]


class Run(NamedTuple):
    """A piece that repeats a unit, and is itself repeated."""

    begin: bytes  # each # is replaced by the number of the piece
    unit: bytes
    length: int
    end: bytes
    number: int

    def octets(self, most: int) -> bytes:
        """Return up to *most* octets."""
        piece = self.begin + repeat(self.unit, self.length) + self.end
        number = min(self.number, 1 + most // max(1, len(piece)))
        if b"#" not in piece:
            return (piece * number)[:most]
        return b"".join(piece.replace(b"#", b"%d" % n) for n in range(number))[:most]


class Attack(NamedTuple):
    """Commands, then a mail."""

    commands: tuple[Run, ...]
    content: tuple[Run, ...]

    def octets(self) -> bytes:
        commands = b"".join(run.octets(320 * KIB) for run in self.commands)
        return (
            EHLO + commands + b"\r\nRSET\r\n" + mail(b"".join(r.octets(MIB) for r in self.content))
        )


def random_run(chance: Random, *, is_content: bool) -> Run:
    lengths = (10, 1000, 8000, 60_000, 300_000) if is_content else (10, 400, 12_000)
    return Run(
        chance.choice(BEGINS if is_content else VERBS),
        b"".join(chance.choices(UNITS, k=chance.choice([1, 1, 2, 3]))),
        chance.choice(lengths),
        chance.choice(ENDS if is_content else [b"\r\n", b">\r\n", b"@x>\r\n"]),
        chance.choice([1, 10, 100, 10_000]),
    )


def changed(chance: Random, run: Run, *, is_content: bool) -> Run:
    """Return *run* with one change."""
    other = random_run(chance, is_content=is_content)
    return chance.choice(
        [
            run._replace(begin=other.begin),
            run._replace(unit=other.unit),
            run._replace(unit=run.unit + other.unit),
            run._replace(length=max(10, int(run.length * chance.choice([0.1, 0.5, 0.9, 1.2, 2])))),
            run._replace(end=other.end),
            run._replace(number=max(1, int(run.number * chance.choice([0.1, 0.5, 2, 10])))),
        ]
    )


def mutated(chance: Random, runs: tuple[Run, ...], *, is_content: bool) -> tuple[Run, ...]:
    """Return *runs* with one added, removed or changed."""
    place, more = chance.randint(0, len(runs)), chance.random()
    if more < 0.3 or not runs:
        return *runs[:place], random_run(chance, is_content=is_content), *runs[place:]
    place = chance.randrange(len(runs))
    if more < 0.45:
        return *runs[:place], *runs[place + 1 :]
    return *runs[:place], changed(chance, runs[place], is_content=is_content), *runs[place + 1 :]


def search(seconds: float, number: int) -> list[tuple[float, str]]:
    """Search with the seed *number*; return the worst attacks, with their milliseconds."""
    configure()
    service, chance = Service(DsmtpdHandler(), Options()), Random(number)  # noqa: S311  # no secret
    worst: list[tuple[float, Attack]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # Sometimes start from scratch.
        attack = chance.choice([attack for _, attack in worst] + [Attack((), ())] * 3)
        if chance.random() < 0.5:
            attack = attack._replace(content=mutated(chance, attack.content, is_content=True))
        else:
            attack = attack._replace(commands=mutated(chance, attack.commands, is_content=False))
        octets = attack.octets()
        took = measure(octets, service, 1)
        if len(worst) < KEPT or took > worst[-1][0]:
            # Other load on the machine may have slowed it down.
            took = min(took, measure(octets, service, 1))
            worst = sorted([*worst, (took, attack)], reverse=True)[:KEPT]
    return [(measure(attack.octets(), service), repr(attack)) for _, attack in worst[:3]]


def test_a_search_finds_nothing_that_blocks_for_more_than_50_ms(
    times: Callable[[int, int], int],
) -> None:
    seconds, number = times(0, 20), SystemRandom().getrandbits(32)
    if not seconds:
        pytest.skip("this needs --soak")
    found = in_a_process("search", seconds, number)
    assert [(ms, attack) for ms, attack in found if ms > BOUND] == [], number
