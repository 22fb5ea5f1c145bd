from __future__ import annotations

import asyncio
import gc
import re
import resource
import smtplib
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd import __version__, server
from dsmtpd.options import Options
from dsmtpd.server import Listener, ListenError, StopError
from tests.tools import (
    BEGIN,
    FREE,
    MAIL,
    PATIENCE,
    Gate,
    Handler,
    begin_data,
    connect,
    reset,
    send,
    troubles,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def handler() -> Handler:
    return Handler()


def test_mail_goes_to_the_handler(handler: Handler) -> None:
    with Listener(handler, FREE) as listener:
        send(listener.port)
    assert handler.contents == [MAIL]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_listener_knows_its_real_address(handler: Handler, host: str) -> None:
    with Listener(handler, Options(interface=host, port=0)) as listener:
        assert listener.host == host
        assert listener.port > 0
        send(listener.port, host=host)
    assert handler.contents == [MAIL]


def test_all_addresses_of_a_name_share_one_port(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        hosts = ["127.0.0.1", "::1"] if host == "two.test" else [host]
        return [info for one in hosts for info in resolve(one, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Listener(handler, Options(interface="two.test", port=0)) as listener:
        assert listener.host in {"127.0.0.1", "::1"}
        send(listener.port, host="127.0.0.1")
        send(listener.port, host="::1")
    assert handler.contents == [MAIL, MAIL]


@pytest.mark.parametrize("interface", ["127.0.0.1", "::1", "localhost"])
def test_a_loopback_interface_is_local(interface: str) -> None:
    with Listener(Handler(), Options(interface=interface, port=0)) as listener:
        assert listener.is_local


def test_the_ipv6_wildcard_accepts_both_families_and_shows_ipv4_peers_as_ipv4() -> None:
    peers: list[str] = []

    async def keep_peer(_server: object, session: Any, _envelope: object) -> None:
        peers.append(session.peer[0])

    with Listener(Handler(keep_peer), Options(interface="::", port=0)) as listener:
        assert not listener.is_local
        send(listener.port, host="127.0.0.1")
        send(listener.port, host="::1")
    assert peers == ["127.0.0.1", "::1"]


def test_the_thread_ends_with_the_block(handler: Handler) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("dsmtpd")]

    with Listener(handler, FREE):
        assert len(threads()) == 1
    assert threads() == []
    with pytest.raises(ListenError), Listener(handler, Options(interface="192.0.2.254")):
        pytest.fail("nothing can listen there")
    assert threads() == []


def test_a_failure_to_start_a_thread_is_reported(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with (
        pytest.raises(ListenError, match=r"port 0: can't start new thread$"),
        Listener(handler, FREE),
    ):
        pytest.fail("there is no thread to listen in")


def test_the_greeting_names_the_host_and_the_version(handler: Handler) -> None:
    with (
        Listener(handler, FREE) as listener,
        socket.create_connection(("127.0.0.1", listener.port), PATIENCE) as client,
    ):
        greeting = client.recv(1000).decode()
    assert re.fullmatch(rf"220 {socket.gethostname()} dsmtpd {__version__}\r\n", greeting)


def test_no_connection_resolves_a_name(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    def getfqdn(_name: str = "") -> str:
        raise AssertionError

    monkeypatch.setattr(socket, "getfqdn", getfqdn)
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        assert client.ehlo()[1].splitlines()[0] == b"localhost"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_reported_at_once(handler: Handler, host: str) -> None:
    with (
        Listener(handler, Options(interface=host, port=0)) as first,
        pytest.raises(ListenError) as raised,
        Listener(handler, Options(interface=host, port=first.port)),
    ):
        pytest.fail("two servers cannot listen on one port")
    assert (
        str(raised.value) == f"Cannot listen on {host}, port {first.port}: Address already in use"
    )


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        # An address reserved for documentation (RFC 5737), which no machine has.
        ("192.0.2.254", "Cannot assign requested address"),
        ("a..b", "Malformed name"),
        ("not a name", "(Name or service not known|Temporary failure in name resolution)"),
    ],
)
def test_an_interface_that_the_system_lacks_is_reported(
    handler: Handler, interface: str, reason: str
) -> None:
    with (
        pytest.raises(ListenError, match=f"^Cannot listen on {interface}, port 1025: {reason}$"),
        Listener(handler, Options(interface=interface)),
    ):
        pytest.fail("nothing can listen there")


def test_an_interface_is_looked_up_before_anything_is_opened() -> None:
    with pytest.raises(ListenError, match=r"a\.\.b, port 1025: Malformed name"):
        Listener(Handler(), Options(interface="a..b"))


def test_a_delivery_that_hangs_does_not_block_the_shutdown_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_END_PATIENCE", 0.2)
    gate = Gate()
    listener = Listener(Handler(gate), FREE)
    listener.__enter__()
    with connect(listener.port) as idle, connect(listener.port) as client:
        begin_data(client)
        client.send(MAIL + b".\r\n")
        assert gate.begun.wait(PATIENCE)
        with pytest.raises(StopError, match=r"A mail could not be stored within 0\.2 s"):
            listener.__exit__()
        assert idle.getreply()[0] == 421
        gate.may_end.set()
        # The mail is still answered, as long as the process lives.
        assert client.getreply()[0] == 250
        idle.close()
        client.close()


def test_an_interface_that_gives_no_socket_is_reported(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def create_server(*_args: object, **_kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(sockets=())

    # Python before 3.12.2 does this for IPv6 on a system without it.
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_server", create_server)
    with (
        pytest.raises(ListenError, match="port 1025: Cannot assign requested address"),
        Listener(handler, Options(interface="::1")),
    ):
        pytest.fail("there is no socket")


def test_a_listener_can_be_used_inside_a_running_event_loop(handler: Handler) -> None:
    async def run() -> None:
        with Listener(handler, FREE) as listener:
            await asyncio.to_thread(send, listener.port)

    asyncio.run(run())
    assert handler.contents == [MAIL]


def test_leaving_the_block_frees_the_port(handler: Handler) -> None:
    with Listener(handler, FREE) as listener:
        pass
    with pytest.raises(ConnectionRefusedError):
        connect(listener.port)
    with Listener(handler, Options(port=listener.port)) as again:
        send(again.port)
    assert handler.contents == [MAIL]


def test_leaving_the_block_lets_a_delivery_finish_and_answers_it() -> None:
    gate = Gate()
    handler = Handler(gate)
    with ExitStack() as block, ThreadPoolExecutor(1) as pool:
        listener = block.enter_context(Listener(handler, FREE))
        idle = [connect(listener.port) for _ in range(5)]
        busy = connect(listener.port)
        begin_data(busy)
        busy.send(b"Subject: x\r\n.\r\nNOOP\r\n")
        assert gate.begun.wait(PATIENCE)
        leaving = pool.submit(block.close)
        for client in idle:
            assert client.getreply() == (421, b"4.3.2 dsmtpd is stopping")
            client.close()
        with pytest.raises(ConnectionRefusedError):
            connect(listener.port)
        assert not leaving.done()
        gate.may_end.set()
        assert busy.getreply() == (250, b"OK")
        assert busy.getreply() == (421, b"4.3.2 dsmtpd is stopping")
        leaving.result(PATIENCE)
        busy.close()
    assert handler.contents == [b"Subject: x\r\n"]


def test_leaving_the_block_does_not_wait_for_all_pipelined_mails() -> None:
    gate = Gate()
    gate.may_end.set()
    handler = Handler(gate)
    with Listener(handler, FREE) as listener:
        client = connect(listener.port)
        client.helo()
        client.send((BEGIN + b".\r\n") * 2000)
        assert gate.begun.wait(PATIENCE)
    client.close()
    assert 0 < len(handler.contents) < 2000


def test_leaving_the_block_drops_a_mail_in_mid_transfer(handler: Handler) -> None:
    with Listener(handler, FREE) as listener:
        client = connect(listener.port)
        begin_data(client)
        client.send(b"Subject: never finished\r\n")
    assert client.getreply()[0] == 421
    with pytest.raises(smtplib.SMTPServerDisconnected):
        client.getreply()
    assert handler.contents == []


def test_leaving_the_block_lets_a_delivery_finish_after_its_client_is_gone() -> None:
    gate = Gate()
    handler = Handler(gate)
    with ExitStack() as block, ThreadPoolExecutor(1) as pool:
        listener = block.enter_context(Listener(handler, FREE))
        client, other = connect(listener.port), connect(listener.port)
        begin_data(client)
        client.send(b".\r\n")
        assert gate.begun.wait(PATIENCE)
        reset(client)
        other.noop()
        leaving = pool.submit(block.close)
        assert other.getreply()[0] == 421
        other.close()
        gate.may_end.set()
        leaving.result(PATIENCE)
    assert handler.contents == [b""]


class Stop:
    """Blocks the event loop in a delivery until the test lets it continue."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    async def __call__(self, *_: object) -> None:
        self.begun.set()
        assert self.may_end.wait(PATIENCE)  # on purpose


def test_a_client_that_connects_during_shutdown_gets_a_greeting_and_a_421(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Stop()
    run = asyncio.run_coroutine_threadsafe

    def run_with_the_clients(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        future = run(coroutine, loop)
        stop.may_end.set()
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", run_with_the_clients)
    with Listener(Handler(stop), FREE) as listener:
        busy = connect(listener.port)
        begin_data(busy)
        busy.send(b".\r\n")
        assert stop.begun.wait(PATIENCE)
        new = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(5)]
    for client in new:
        client.settimeout(PATIENCE)
        with client, client.makefile("rb") as replies:
            assert [reply[:3] for reply in replies] == [b"220", b"421"]
    busy.close()
    assert troubles(caplog) == []


@pytest.fixture
def _many_files() -> Iterator[None]:
    """Allow enough open files for a thousand clients and their server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_many_files")
def test_a_thousand_clients_that_connect_at_once_are_all_greeted(handler: Handler) -> None:
    with Listener(handler, FREE) as listener, ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(1000)]
        for client in clients:
            client.setblocking(False)  # noqa: FBT003  # positional-only
            client.connect_ex((listener.host, listener.port))
        end = time.monotonic() + PATIENCE
        for client in clients:
            client.settimeout(max(0.0, end - time.monotonic()))
            assert client.recv(4) == b"220 "


def test_where_the_system_sets_a_limit_one_client_too_many_is_refused(
    handler: Handler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsmtpd.connection._CLIENTS", 1)
    with Listener(handler, FREE) as listener:
        with connect(listener.port) as client:
            with pytest.raises(smtplib.SMTPConnectError, match="421"):
                connect(listener.port)
            client.sendmail("a@example.com", ["b@example.com"], MAIL)
        (text,) = [text for _, text in troubles(caplog)]
        assert text.endswith(": Too many clients at a time")
    assert handler.contents == [MAIL]


@contextmanager
def out_of_file_descriptors(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> Iterator[smtplib.SMTP]:
    """Use up the file descriptors; yield a client that is already connected to *listener*."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(connect(listener.port)) as client, ExitStack() as more:
        others = [more.enter_context(socket.socket()) for _ in range(20)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (others[-1].fileno() + 5, limits[1]))
            for other in others:
                other.connect((listener.host, listener.port))
            while not caplog.records:
                client.noop()
            yield client
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


OUT_OF_FILE_DESCRIPTORS = (
    "ERROR",
    "socket.accept() out of system resource: OSError(24, 'Too many open files')",
)


def test_out_of_file_descriptors_the_server_does_not_spin(
    handler: Handler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dsmtpd.server._QUIET", 0)
    with Listener(handler, FREE) as listener, out_of_file_descriptors(listener, caplog) as client:
        client.noop()
    assert set(troubles(caplog)) == {OUT_OF_FILE_DESCRIPTORS}
    assert len(caplog.records) < 1000


def test_a_server_that_stops_out_of_file_descriptors_reports_nothing_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # asyncio retries after this many seconds, even if it has stopped listening by then.
    delay = 0.05
    monkeypatch.setattr("asyncio.constants.ACCEPT_RETRY_DELAY", delay)
    gate = Gate()

    async def outlast_the_delay(*_: object) -> None:
        await gate()
        await asyncio.sleep(delay)

    with ExitStack() as block, ThreadPoolExecutor(1) as pool:
        listener = block.enter_context(Listener(Handler(outlast_the_delay), FREE))
        idle = connect(listener.port)
        with out_of_file_descriptors(listener, caplog) as client:
            begin_data(client)
            client.send(b".\r\n")
            assert gate.begun.wait(PATIENCE)
            leaving = pool.submit(block.close)
            assert idle.getreply()[0] == 421
            idle.close()
            gate.may_end.set()
            assert client.getreply()[0] == 250
            leaving.result(PATIENCE)
    assert troubles(caplog) == [OUT_OF_FILE_DESCRIPTORS]


# A handler that ends the thread of the loop, and a client that makes it do so.
ENDING = """
import smtplib
from dsmtpd.options import Options
from dsmtpd.server import Listener
class Handler:
    async def handle_DATA(self, *_):
        raise SystemExit
with Listener(Handler(), Options(port=0)) as listener:
    with smtplib.SMTP("127.0.0.1", listener.port, "client.test", timeout=20) as client:
        try:
            client.sendmail("a@example.com", ["b@example.com"], "Hi")
        except smtplib.SMTPException:
            client.close()
"""


def test_a_loop_that_has_ended_does_not_block_the_end() -> None:
    command = [sys.executable, "-c", ENDING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert "TimeoutError\n" in ended.stderr


def test_leaving_the_block_cancels_the_tasks_of_a_handler() -> None:
    begun: list[asyncio.Task[None]] = []

    async def begin(*_: object) -> None:
        begun.append(asyncio.create_task(asyncio.sleep(3600)))

    with Listener(Handler(begin), FREE) as listener:
        send(listener.port)
    assert [task.cancelled() for task in begun] == [True]


@pytest.mark.parametrize(
    ("begin", "reports"), [(lambda _client: None, 0), (begin_data, 1)], ids=["idle", "in DATA"]
)
def test_a_client_that_vanishes_is_no_error(
    handler: Handler,
    begin: Callable[[smtplib.SMTP], None],
    reports: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Listener(handler, FREE) as listener:
        client = connect(listener.port)
        begin(client)
        reset(client)
        send(listener.port)
    gc.collect()
    assert handler.contents == [MAIL]
    reported = [text.partition(": ")[2] for level, text in troubles(caplog) if level == "WARNING"]
    half = "The client left in the middle of a mail from a@example.com for b@example.com"
    assert reported == [f"{half}, after 0 octets"] * reports


def test_a_client_that_vanishes_while_the_server_waits_for_it_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    with Listener(Handler(gate), FREE) as listener, connect(listener.port) as other:
        client = connect(listener.port)
        begin_data(client)
        client.send(b".\r\n" + b"HELP\r\n" * 10_000)
        assert gate.begun.wait(PATIENCE)
        gate.may_end.set()
        reset(client)
        other.ehlo()
    gc.collect()
    assert troubles(caplog) == []


def test_an_asyncio_error_is_logged_in_one_line_and_repeated_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        asyncio.get_running_loop().call_soon(int, "no number")

    with Listener(Handler(fail), FREE) as listener:
        for lines in (1, 1, 1):
            send(listener.port)
            assert len(troubles(caplog)) == lines
        monkeypatch.setattr("dsmtpd.server._QUIET", 0)
        send(listener.port)
    first, second = troubles(caplog)
    assert first == second
    assert first[0] == "ERROR"
    assert re.fullmatch(r"Exception in callback .*: ValueError\(.*", first[1])
    assert caplog.records[-1].name == "dsmtpd"


def test_a_different_asyncio_error_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def report(_server: object, _session: object, envelope: Any) -> None:
        message = f"about {envelope.mail_from}"
        asyncio.get_running_loop().call_exception_handler({"message": message})

    with Listener(Handler(report), FREE) as listener, connect(listener.port) as client:
        for sender in ("a\x1b@x", "b@x", "b@x"):
            client.sendmail(sender, ["c@x"], MAIL)
    lines = [text for _, text in troubles(caplog) if text.startswith("about")]
    assert lines == [r"about a\x1b@x: None", "about b@x: None"]
