from __future__ import annotations

import asyncio
import gc
import re
import smtplib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd import __version__
from dsmtpd.options import Options
from dsmtpd.server import Listener, ListenError
from tests.tools import FREE, MAIL, PATIENCE, begin_data, connect, reset, send, troubles

if TYPE_CHECKING:
    from collections.abc import Callable


class Handler:
    """Keeps what arrives; a delivery of it waits until the test lets it go on."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:
        self.begun.set()
        await asyncio.to_thread(self.may_end.wait, PATIENCE)
        self.contents.append(envelope.content)
        return "250 OK"


@pytest.fixture
def handler() -> Handler:
    return Handler()


def test_mail_goes_to_the_handler(handler: Handler) -> None:
    with Listener(handler, FREE) as listener:
        send(listener.port)
    assert handler.contents == [MAIL]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_real_address_is_known(handler: Handler, host: str) -> None:
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


def test_the_thread_ends_with_the_block(handler: Handler) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("dsmtpd")]

    with Listener(handler, FREE):
        assert len(threads()) == 1
    assert threads() == []
    with pytest.raises(ListenError), Listener(handler, Options(interface="192.0.2.254")):
        pytest.fail("it cannot listen there")
    assert threads() == []


def test_the_greeting_names_the_host_and_the_version(handler: Handler) -> None:
    with (
        Listener(handler, FREE) as listener,
        socket.create_connection(("127.0.0.1", listener.port), PATIENCE) as client,
    ):
        greeting = client.recv(1000).decode()
    assert re.fullmatch(rf"220 {socket.gethostname()} dsmtpd {__version__}\r\n", greeting)


def test_no_connection_asks_the_resolver(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    def getfqdn(_name: str = "") -> str:
        raise AssertionError

    monkeypatch.setattr(socket, "getfqdn", getfqdn)
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        assert client.ehlo()[1].splitlines()[0] == b"localhost"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_told_at_once(handler: Handler, host: str) -> None:
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
        # An address of the range for documentation (RFC 5737), which no machine has.
        ("192.0.2.254", "Cannot assign requested address"),
        ("a..b", "Malformed name"),
        ("not a name", "(Name or service not known|Temporary failure in name resolution)"),
    ],
)
def test_an_interface_that_is_none_of_ours_is_told(
    handler: Handler, interface: str, reason: str
) -> None:
    with (
        pytest.raises(ListenError, match=f"^Cannot listen on {interface}, port 1025: {reason}$"),
        Listener(handler, Options(interface=interface)),
    ):
        pytest.fail("it cannot listen there")


def test_an_interface_that_gives_no_socket_is_told(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def create_server(*_args: object, **_kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(sockets=())

    # What Python before 3.12.2 does for IPv6 on a system that has none.
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


def test_leaving_the_block_lets_a_delivery_finish_and_answers_it(handler: Handler) -> None:
    handler.may_end.clear()
    with ExitStack() as block, ThreadPoolExecutor(1) as pool:
        listener = block.enter_context(Listener(handler, FREE))
        idle = [connect(listener.port) for _ in range(5)]
        busy = connect(listener.port)
        begin_data(busy)
        busy.send(b"Subject: x\r\n.\r\nNOOP\r\n")
        assert handler.begun.wait(PATIENCE)
        leaving = pool.submit(block.close)
        for client in idle:
            assert client.getreply() == (421, b"4.3.2 dsmtpd is stopping")
            client.close()
        with pytest.raises(ConnectionRefusedError):
            connect(listener.port)
        assert not leaving.done()
        handler.may_end.set()
        assert busy.getreply() == (250, b"OK")
        assert busy.getreply() == (421, b"4.3.2 dsmtpd is stopping")
        leaving.result(PATIENCE)
        busy.close()
    assert handler.contents == [b"Subject: x\r\n"]


def test_leaving_the_block_does_not_wait_for_all_that_a_client_has_pipelined(
    handler: Handler,
) -> None:
    transaction = b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n.\r\n"
    with Listener(handler, FREE) as listener:
        client = connect(listener.port)
        client.helo()
        client.send(transaction * 2000)
        assert handler.begun.wait(PATIENCE)
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


class Blocking:
    """A handler that stops the event loop at NOOP."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    async def handle_NOOP(self, *_: object) -> str:
        self.begun.set()
        assert self.may_end.wait(PATIENCE)  # on purpose
        return "250 OK"


def test_a_client_that_connects_while_the_block_is_left_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Blocking()
    run = asyncio.run_coroutine_threadsafe

    def run_with_the_clients(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        future = run(coroutine, loop)
        handler.may_end.set()
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", run_with_the_clients)
    with Listener(handler, FREE) as listener:
        busy = connect(listener.port)
        busy.putcmd("NOOP")
        assert handler.begun.wait(PATIENCE)
        new = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(5)]
    for client in new:
        client.settimeout(PATIENCE)
        with client, client.makefile("rb") as replies:
            assert [reply[:3] for reply in replies] == [b"220", b"421"]
    busy.close()
    assert troubles(caplog) == []


class Talkative:
    """A handler with an answer to NOOP that fits into no buffer of the system."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    async def handle_NOOP(self, *_: object) -> str:
        self.asked.set()
        return "250 " + "x" * 20_000_000


def test_leaving_the_block_does_not_wait_for_a_client_that_does_not_read() -> None:
    handler = Talkative()
    with Listener(handler, FREE) as listener:
        client = connect(listener.port)
        client.putcmd("NOOP")
        assert handler.asked.wait(PATIENCE)
    client.close()


class Endless:
    """A handler that never answers a NOOP."""

    async def handle_NOOP(self, *_: object) -> None:
        await asyncio.sleep(3600)


def test_leaving_the_block_waits_for_nothing_but_deliveries() -> None:
    with Listener(Endless(), FREE) as listener:
        client = connect(listener.port)
        client.putcmd("NOOP")
    assert client.getreply()[0] == 421
    client.close()


class Busy:
    """A handler that begins, at NOOP, what never ends."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Task[None]] = []

    async def handle_NOOP(self, *_: object) -> str:
        self.begun.append(asyncio.create_task(asyncio.sleep(3600)))
        return "250 OK"


def test_leaving_the_block_cancels_what_a_handler_has_begun() -> None:
    handler = Busy()
    with Listener(handler, FREE) as listener, connect(listener.port) as client:
        client.noop()
    assert [task.cancelled() for task in handler.begun] == [True]


@pytest.mark.parametrize("begin", [lambda _client: None, begin_data], ids=["idle", "in DATA"])
def test_a_client_that_vanishes_is_no_error(
    handler: Handler, begin: Callable[[smtplib.SMTP], None], caplog: pytest.LogCaptureFixture
) -> None:
    with Listener(handler, FREE) as listener:
        client = connect(listener.port)
        begin(client)
        reset(client)
        send(listener.port)
    gc.collect()
    assert handler.contents == [MAIL]
    assert troubles(caplog) == []


class Failing:
    """A handler for which, at NOOP, something fails in the event loop."""

    async def handle_NOOP(self, *_: object) -> str:
        asyncio.get_running_loop().call_soon(int, "no number")
        return "250 OK"


def test_what_asyncio_has_to_tell_is_one_line_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Listener(Failing(), FREE) as listener, connect(listener.port) as client:
        client.noop()
        client.noop()
    ((level, text),) = troubles(caplog)
    assert level == "ERROR"
    assert re.fullmatch(r"Exception in callback .*: ValueError\(.*", text)


class Telling:
    """A handler for which asyncio has, at NOOP, something to tell that is no exception."""

    async def handle_NOOP(self, *_: object) -> str:
        asyncio.get_running_loop().call_exception_handler({"message": "told"})
        return "250 OK"


def test_what_is_no_exception_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    with Listener(Telling(), FREE) as listener, connect(listener.port) as client:
        client.noop()
    assert troubles(caplog) == [("ERROR", "told: None")]
    assert caplog.records[-1].name == "dsmtpd"


def test_a_connection_that_breaks_while_the_server_waits_for_it_is_nothing_to_tell(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = Talkative()
    with Listener(handler, FREE) as listener, connect(listener.port) as other:
        client = connect(listener.port)
        client.putcmd("NOOP")
        assert handler.asked.wait(PATIENCE)
        reset(client)
        other.ehlo()
    gc.collect()
    assert troubles(caplog) == []
