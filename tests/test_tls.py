from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import re
import signal
import smtplib
import socket
import ssl
import sys
import tempfile
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from dsmtpd.connection import Connection
from dsmtpd.options import Options
from dsmtpd.server import Listener
from dsmtpd.tls import Layer, TLSError, ca_file, certificate, failure
from tests.tools import (
    BEGIN,
    MAIL,
    PATIENCE,
    Clock,
    Handler,
    Wire,
    codes,
    posix,
    reset,
    troubles,
    turns,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.tools import Way

BOTH: tuple[Way, ...] = ("starttls", "implicit")
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)

STARTTLS = Options(port=0, tls="starttls")


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def cert(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the file with the certificate and the key of a server called localhost."""
    file = tmp_path_factory.mktemp("cert") / "localhost.pem"
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
    return str(file)


@pytest.fixture(scope="module")
def context(cert: str) -> ssl.SSLContext:
    """Return the TLS context of that server."""
    context, _ = certificate(Options(tls="implicit", tls_cert=cert))
    assert context is not None
    return context


def listener_by(way: Way, cert: str, handler: Handler | None = None) -> Listener:
    return Listener(handler or Handler(), Options(port=0, tls=way, tls_cert=cert))


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    """Return the TLS context of a client that trusts only *ca*."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    return context


def connect(port: int, way: Way, context: ssl.SSLContext) -> smtplib.SMTP:
    """Return a client that speaks TLS."""
    if way == "implicit":
        return smtplib.SMTP_SSL(
            "localhost", port, local_hostname="client.test", timeout=PATIENCE, context=context
        )
    client = smtplib.SMTP("localhost", port, local_hostname="client.test", timeout=PATIENCE)
    try:
        client.starttls(context=context)
    except OSError:
        client.close()
        raise
    return client


def before_the_handshake(port: int, way: Way) -> socket.socket:
    """Return the socket of a client that may begin the handshake."""
    client = socket.create_connection(("localhost", port), PATIENCE)
    if way == "starttls":
        client.sendall(b"STARTTLS\r\n")
        with client.makefile("rb") as replies:
            assert [replies.readline()[:4] for _ in range(2)] == [b"220 ", b"220 "]
    return client


class Client:
    """A client's TLS, without I/O."""

    def __init__(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._handshake_done = self.ended = False

    def begin(self) -> bytes:
        return self.receive(b"")[1]

    def receive(self, octets: bytes) -> tuple[bytes, bytes]:
        """Decrypt *octets* from the server; return the plain text, and what to send back."""
        self._incoming.write(octets)
        plain = b""
        with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            if not self._handshake_done:
                self._object.do_handshake()
                self._handshake_done = True
            while octets := self._object.read(65536):
                plain += octets
            self.ended = True
        return plain, self._outgoing.read()

    def encrypt(self, octets: bytes) -> bytes:
        self._object.write(octets)
        return self._outgoing.read()

    def end(self) -> bytes:
        """Return the close_notify that says nothing more will be sent."""
        with suppress(ssl.SSLWantReadError):
            self._object.unwrap()
        return self._outgoing.read()


class SecureWire:
    """A `Wire` over TLS."""

    def __init__(self, wire: Wire, ca: trustme.CA) -> None:
        self.wire = wire
        self.client = Client(trusting(ca))

    async def open(self) -> None:
        """Shake hands."""
        await self.wire.open()
        await self.wire.send(self.client.begin())
        _, octets = self.client.receive(self.wire.read())
        await self.wire.send(octets)

    async def send(self, octets: bytes) -> None:
        await self.wire.send(self.client.encrypt(octets))

    def read(self) -> bytes:
        """Return what has arrived so far."""
        return self.client.receive(self.wire.read())[0]


@pytest.fixture
def clock() -> Iterator[Clock]:
    loop = Clock()
    yield loop
    loop.close()


# The layer alone.


def shake_hands(client: Client, layer: Layer, piece: int) -> None:
    """Shake hands; the layer receives at most *piece* octets at a time."""
    octets = client.begin()
    while octets:
        for begin in range(0, len(octets), piece):
            assert layer.cipher is None
            assert layer.receive(octets[begin : begin + piece]) == b""
        plain, octets = client.receive(layer.outgoing())
        assert plain == b""
    assert layer.cipher is not None


def forged(record: bytes) -> bytes:
    return record[:-1] + bytes([record[-1] ^ 1])


@pytest.mark.parametrize("piece", [1, 5, 1000, 1_000_000])
@pytest.mark.parametrize("version", VERSIONS)
def test_tls_may_arrive_in_pieces_of_any_size(
    version: ssl.TLSVersion, piece: int, ca: trustme.CA, context: ssl.SSLContext
) -> None:
    trust = trusting(ca)
    trust.maximum_version = version
    client, layer = Client(trust), Layer(context)
    shake_hands(client, layer, piece)
    text = bytes(range(256)) * 100  # several records
    octets = client.encrypt(b"EHLO x\r\n") + client.encrypt(text) + client.end()
    plain = b""
    for begin in range(0, len(octets), piece):
        assert not layer.ended
        plain += layer.receive(octets[begin : begin + piece])
    assert plain == b"EHLO x\r\n" + text
    assert layer.ended


def test_replies_are_encrypted_and_the_end_is_announced(
    ca: trustme.CA, context: ssl.SSLContext
) -> None:
    client, layer = Client(trusting(ca)), Layer(context)
    shake_hands(client, layer, 1_000_000)
    layer.send(b"250 OK\r\n" * 10_000)
    octets = layer.outgoing()
    assert b"250 OK" not in octets
    assert client.receive(octets)[0] == b"250 OK\r\n" * 10_000
    assert not client.ended
    layer.close()
    assert client.receive(layer.outgoing()) == (b"", b"")
    assert client.ended
    assert layer.outgoing() == b""


def test_a_client_can_still_read_after_its_close_notify(
    ca: trustme.CA, context: ssl.SSLContext
) -> None:
    client, layer = Client(trusting(ca)), Layer(context)
    shake_hands(client, layer, 1_000_000)
    layer.receive(client.end())
    layer.send(b"250 OK\r\n")
    assert client.receive(layer.outgoing())[0] == b"250 OK\r\n"


def test_octets_that_are_not_tls_raise(context: ssl.SSLContext) -> None:
    with pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
        Layer(context).receive(b"EHLO client.test\r\n")


def test_a_forged_record_raises_and_alerts_the_client(
    ca: trustme.CA, context: ssl.SSLContext
) -> None:
    client, layer = Client(trusting(ca)), Layer(context)
    shake_hands(client, layer, 1_000_000)
    with pytest.raises(ssl.SSLError, match=r"BAD_RECORD_MAC|RECORD_LAYER_FAILURE"):
        layer.receive(forged(client.encrypt(b"NOOP\r\n")))
    with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
        client.receive(layer.outgoing())


# A session.


@pytest.mark.parametrize("way", BOTH)
def test_mails_of_any_size_arrive_over_tls(
    way: Way, ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ciphers: list[str] = []

    async def keep_cipher(_server: object, session: Any, _envelope: object) -> None:
        ciphers.append(session.ssl["cipher"][0])

    handler = Handler(keep_cipher)
    large = b"x" * 98 + b"\r\n"
    with listener_by(way, cert, handler) as listener:
        with connect(listener.port, way, trusting(ca)) as client:
            client.login("app", "secret")
            client.sendmail("a@x", ["b@x"], MAIL)
            client.sendmail("a@x", ["b@x"], large * 100_000)
        with connect(listener.port, way, trusting(ca)) as client:
            client.sendmail("a@x", ["b@x"], MAIL)
    assert handler.contents == [MAIL, large * 100_000, MAIL]
    assert len(ciphers) == 3
    assert all(cipher.startswith("TLS_") for cipher in ciphers)
    login = r"127\.0\.0\.1:\d+: app logged in with AUTH PLAIN"
    assert any(re.fullmatch(login, message) for message in caplog.messages)
    assert troubles(caplog) == []


def test_starttls_forgets_what_came_before_it(ca: trustme.CA, cert: str) -> None:
    sessions = []

    async def keep_session(_server: object, session: Any, _envelope: object) -> None:
        sessions.append((session.authenticated, session.auth_data))

    with (
        listener_by("starttls", cert, Handler(keep_session)) as listener,
        smtplib.SMTP("localhost", listener.port, timeout=PATIENCE) as client,
    ):
        client.login("app", "secret")
        client.mail("a@x")
        client.starttls(context=trusting(ca))
        assert client.docmd("RCPT TO:<b@x>")[0] == 503  # without MAIL
        assert client.docmd("MAIL FROM:<a@x>")[0] == 503  # without EHLO
        client.sendmail("a@x", ["b@x"], MAIL)
        assert client.login("other", "secret")[0] == 235
        client.sendmail("a@x", ["b@x"], MAIL)
    assert sessions == [(None, None), (True, "other")]


def test_commands_injected_after_starttls_are_dropped(
    ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    injected = b"EHLO x\r\nMAIL FROM:<evil@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nevil\r\n.\r\n"
    with (
        listener_by("starttls", cert, handler) as listener,
        socket.create_connection(("localhost", listener.port), PATIENCE) as plain,
    ):
        plain.sendall(b"STARTTLS\r\n" + injected)
        with plain.makefile("rb") as replies:
            assert [replies.readline()[:4] for _ in range(2)] == [b"220 ", b"220 "]
        with (
            trusting(ca).wrap_socket(plain, server_hostname="localhost") as encrypted,
            encrypted.makefile("rb") as replies,
        ):
            encrypted.sendall(b"NOOP\r\nRCPT TO:<b@x>\r\nQUIT\r\n")
            assert [reply[:3] for reply in replies] == [b"250", b"503", b"221"]
    assert handler.envelopes == []
    first, second = troubles(caplog)
    assert (first[0], second[0]) == ("WARNING", "WARNING")
    assert first[1].endswith(": Dropped what was sent after STARTTLS without waiting for the reply")
    assert second[1].endswith(": RCPT TO:<b@x> was refused: 503 Error: need MAIL command")


def test_the_server_ends_tls_after_quit(ca: trustme.CA, cert: str) -> None:
    async def run() -> bytes:
        secure = SecureWire(Wire(Handler(), tls="implicit", tls_cert=cert), ca)
        await secure.open()
        assert codes(secure.read().splitlines()) == [220]
        await secure.send(b"QUIT\r\n")
        assert secure.wire.session not in secure.wire.service.clients
        reply = secure.read()
        assert secure.client.ended
        secure.wire.socket.close()
        return reply

    assert asyncio.run(run()) == b"221 Bye\r\n"


@pytest.mark.parametrize("last", ["close_notify", "FIN", "both"])
def test_a_client_that_half_closes_after_its_mail_gets_a_reply(
    last: str, ca: trustme.CA, cert: str
) -> None:
    handler = Handler()

    async def run() -> bytes:
        secure = SecureWire(Wire(handler, tls="implicit", tls_cert=cert), ca)
        wire = secure.wire
        await secure.open()
        octets = secure.client.encrypt(b"HELO x\r\n" + BEGIN + b"hi\r\n.\r\n")
        if last != "FIN":
            octets += secure.client.end()
        await wire.loop.sock_sendall(wire.socket, octets)
        if last != "close_notify":
            wire.socket.shutdown(socket.SHUT_WR)
        await turns(10)
        assert wire.session not in wire.service.clients
        replies = secure.read()
        wire.socket.close()
        return replies

    assert codes(asyncio.run(run()).splitlines()) == [220, 250, 250, 250, 354, 250]
    assert handler.contents == [b"hi\r\n"]


@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_leaves_before_the_reply_causes_no_warning(
    way: Way, ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    with listener_by(way, cert) as listener:
        for _ in range(20):
            client = connect(listener.port, way, trusting(ca))
            client.send(b"NOOP\r\n" * 50)
            client.close()
        with connect(listener.port, way, trusting(ca)) as client:
            assert client.noop()[0] == 250
    assert troubles(caplog) == []


@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_leaves_right_after_the_handshake_is_reported(
    way: Way, ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    with listener_by(way, cert) as listener:
        connect(listener.port, way, trusting(ca)).close()
        with connect(listener.port, way, trusting(ca)) as other:
            other.noop()
    ((level, text),) = troubles(caplog)
    assert level == "WARNING"
    reason = "perhaps it does not trust the certificate"
    assert text.endswith(f": The client left after the TLS handshake without a word; {reason}")


def test_a_client_that_resets_right_after_the_handshake_is_reported_too(
    ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        secure = SecureWire(Wire(Handler(), tls="implicit", tls_cert=cert), ca)
        await secure.open()
        secure.wire.socket.close()  # a reset, as the greeting is unread
        await turns(3)
        assert secure.wire.session not in secure.wire.service.clients

    asyncio.run(run())
    ((level, text),) = troubles(caplog)
    assert (level, text[:48]) == ("WARNING", ": The client left after the TLS handshake withou")


def test_a_forged_record_is_reported_and_ends_the_session(
    ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        secure = SecureWire(Wire(Handler(), tls="implicit", tls_cert=cert), ca)
        await secure.open()
        await secure.send(b"NOOP\r\n")
        assert codes(secure.read().splitlines()) == [220, 250]
        await secure.wire.send(forged(secure.client.encrypt(b"NOOP\r\n")) + MAIL)
        assert secure.wire.session not in secure.wire.service.clients
        with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
            secure.read()
        secure.wire.socket.close()

    asyncio.run(run())
    ((level, text),) = troubles(caplog)
    # OpenSSL 3.6 words it differently.
    reason = "decryption failed or bad record mac|record layer failure"
    assert re.fullmatch(rf": TLS failed: ({reason})", text)
    assert level == "WARNING"


# A failed handshake.


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return why handshakes failed, one line for each."""
    beginning = ": The TLS handshake failed: "
    lines = []
    for level, text in troubles(caplog):
        assert (level, beginning in text) == ("WARNING", True), text
        assert "\n" not in text
        lines.append(text.partition(beginning)[2])
    return lines


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_does_not_trust_the_ca_is_reported_and_the_next_one_served(
    way: Way,
    version: ssl.TLSVersion,
    ca: trustme.CA,
    cert: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wary = trusting(trustme.CA())
    wary.maximum_version = version
    with listener_by(way, cert) as listener:
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(listener.port, way, wary)
        with connect(listener.port, way, trusting(ca)) as client:
            assert client.noop()[0] == 250
    assert failures(caplog) == ["the client does not trust the certificate (unknown ca)"]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (
            "TLSV1_ALERT_UNKNOWN_CA",
            "the client does not trust the certificate (unknown ca)",
        ),
        (
            "SSLV3_ALERT_BAD_CERTIFICATE",
            "the client does not trust the certificate (bad certificate)",
        ),
        ("TLSV1_ALERT_USER_CANCELLED", "tlsv1 alert user cancelled"),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "peer did not return a certificate"),
        ("UNSUPPORTED_PROTOCOL", "the client speaks nothing newer than TLS 1.1"),
        ("NO_SHARED_CIPHER", "no shared cipher"),
        (None, "anything"),
    ],
)
def test_a_failure_is_reported_in_a_few_words(reason: str | None, words: str) -> None:
    error = ssl.SSLError(1, "anything")
    error.reason = reason  # type: ignore[assignment]  # it may be None
    assert failure(error) == words


PLAIN_TEXT = "the client speaks plain text"
LEFT = "the client left; perhaps it speaks plain text, or does not trust the certificate"


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"EHLO client.test\r\n", PLAIN_TEXT),
        (b"GET / HTTP/1.1\r\n\r\n", "the client speaks HTTP"),
        (b"\x16\x03\x01\x00", LEFT),
        (b"", LEFT),
    ],
)
@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_does_not_speak_tls_is_reported(
    way: Way, octets: bytes, reason: str, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        listener_by(way, cert) as listener,
        before_the_handshake(listener.port, way) as client,
    ):
        client.sendall(octets)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1024):
            pass
    assert failures(caplog) == [reason]


def test_a_client_that_resets_during_the_handshake_is_reported(
    cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        wire = Wire(Handler(), tls="starttls", tls_cert=cert)
        await wire.open()
        await wire.send(b"STARTTLS\r\n")
        wire.socket.close()  # a reset, as the replies are unread
        await turns(3)
        assert wire.session not in wire.service.clients

    asyncio.run(run())
    assert failures(caplog) == [LEFT]


@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_stalls_the_handshake_is_disconnected(
    way: Way, clock: Clock, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> list[bytes]:
        wire = Wire(Handler(), tls=way, tls_cert=cert)
        await wire.open()
        await wire.send(b"STARTTLS\r\n" if way == "starttls" else b"")
        clock.ahead += 9
        await wire.send(b"\x16")
        assert wire.session in wire.service.clients
        clock.ahead += 2
        await turns(3)
        assert wire.session not in wire.service.clients
        return await wire.replies()

    replies = clock.run_until_complete(run())
    assert codes(replies) == ([220, 220] if way == "starttls" else [])
    assert failures(caplog) == ["it takes too long; perhaps the client speaks plain text"]


def test_a_client_that_neither_reads_nor_begins_tls_is_disconnected(
    clock: Clock, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        wire = Wire(Handler(), tls="starttls", tls_cert=cert)
        await wire.open()
        # Too little to make the server wait, but more than the system buffers.
        wire.hold_little()
        await wire.send(b"HELP\r\n" * 100 + b"STARTTLS\r\n")
        await turns(100)
        clock.ahead += 11
        await turns(3)
        assert wire.session not in wire.service.clients
        wire.socket.close()

    clock.run_until_complete(run())
    assert failures(caplog) == ["it takes too long; perhaps the client speaks plain text"]


def test_after_the_handshake_the_usual_timeout_applies(
    ca: trustme.CA, clock: Clock, cert: str
) -> None:
    async def run() -> bytes:
        secure = SecureWire(Wire(Handler(), tls="implicit", tls_cert=cert), ca)
        await secure.open()
        clock.ahead += 299
        await turns(3)
        greeting = secure.read()
        assert codes(greeting.splitlines()) == [220]
        clock.ahead += 2
        await turns(3)
        replies = greeting + secure.read()
        secure.wire.socket.close()
        return replies

    assert codes(clock.run_until_complete(run()).splitlines()) == [220, 421]


# The end of a session.


@pytest.mark.parametrize("way", BOTH)
def test_a_stopping_server_says_so_over_tls(
    way: Way, ca: trustme.CA, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    with listener_by(way, cert) as listener:
        client = connect(listener.port, way, trusting(ca))
    assert client.getreply()[0] == 421
    client.close()
    assert troubles(caplog) == []


@pytest.mark.parametrize("way", BOTH)
def test_a_stopping_server_sends_nothing_during_a_handshake(
    way: Way, cert: str, caplog: pytest.LogCaptureFixture
) -> None:
    with listener_by(way, cert) as listener:
        client = before_the_handshake(listener.port, way)
    with client:
        assert client.recv(1024) == b""
    assert troubles(caplog) == []


@pytest.mark.parametrize("end", ["the server stops", "300 s have passed"])
def test_a_client_that_does_not_read_after_quit_is_disconnected(
    end: str, ca: trustme.CA, clock: Clock, cert: str
) -> None:
    async def run() -> None:
        secure = SecureWire(Wire(Handler(), tls="implicit", tls_cert=cert), ca)
        wire = secure.wire
        wire.hold_little()
        await secure.open()
        await secure.send(b"HELP\r\n" * 100 + b"QUIT\r\n")
        await turns(100)
        assert wire.session in wire.service.clients
        if end == "the server stops":
            await wire.service.hang_up()
        else:
            clock.ahead += 301
        await turns(3)
        assert wire.session not in wire.service.clients
        wire.socket.close()

    clock.run_until_complete(run())


# The memory of a session.


def alive(kind: type) -> int:
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def leave_after_quit(port: int, context: ssl.SSLContext) -> None:
    with connect(port, "implicit", context) as client:
        client.sendmail("a@x", ["b@x"], MAIL)


def leave_with_a_reset(port: int, context: ssl.SSLContext) -> None:
    client = connect(port, "implicit", context)
    client.noop()
    reset(client)


def leave_before_the_handshake(port: int, _context: ssl.SSLContext) -> None:
    with socket.create_connection(("localhost", port), PATIENCE) as client:
        client.sendall(b"EHLO x\r\n")
        while client.recv(1024):
            pass


@pytest.mark.parametrize(
    "leave", [leave_after_quit, leave_with_a_reset, leave_before_the_handshake]
)
def test_a_session_is_freed_without_garbage_collection(
    leave: Callable[[int, ssl.SSLContext], None], ca: trustme.CA, cert: str
) -> None:
    trust = trusting(ca)
    gc.collect()
    before = alive(Connection), alive(Layer), alive(ssl.SSLObject)
    gc.disable()
    try:
        with listener_by("implicit", cert) as listener:
            for _ in range(9):
                leave(listener.port, trust)
            with connect(listener.port, "implicit", trust) as other:
                other.noop()
                other.noop()
                after = alive(Connection), alive(Layer), alive(ssl.SSLObject)
                assert after == tuple(count + 1 for count in before)
    finally:
        gc.enable()


# The certificate, and the CA.


def agree(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str | None:
    """Return the TLS version that a server and a client that expects *name* agree on."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname=name),
        server.wrap_bio(there, back, server_side=True),
    ]
    for end in ends * 3:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return ends[0].version()


def generated(options: Options) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the TLS contexts of a server with *options* and of a client that trusts its CA."""
    context, ca = certificate(options)
    assert context is not None
    assert ca is not None
    return context, ssl.create_default_context(cadata=ca.decode())


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "::1", socket.gethostname(), "192.0.2.1", "mail.example"]
)
def test_a_generated_certificate_is_valid_for_the_host_and_the_interface(name: str) -> None:
    interface = name if name in {"192.0.2.1", "mail.example"} else "my_host"
    server, trust = generated(Options(tls="starttls", interface=interface))
    assert agree(server, trust, name) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        agree(server, trust, "other.example")


@pytest.mark.skipif(not ssl.HAS_TLSv1_1, reason="this OpenSSL has no TLS 1.1")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_nothing_older_than_tls_1_2_is_accepted() -> None:
    server, client = generated(STARTTLS)
    server.set_ciphers("ALL:@SECLEVEL=0")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert agree(server, client, "localhost") == "TLSv1.2"
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        agree(server, client, "localhost")


def test_without_tls_there_is_no_certificate() -> None:
    context, ca = certificate(Options())
    assert context is None
    with ca_file(ca, None) as file:
        assert file is None


def test_a_temporary_ca_file_is_removed_at_the_end() -> None:
    with ca_file(b"ca", None) as file:
        assert file is not None
        assert Path(file).read_bytes().endswith(b"\nca")
    assert not Path(file).exists()


def test_a_named_ca_file_stays_until_the_next_start_replaces_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ca.pem"
    path.touch()
    for content in (b"one", b"another"):
        with ca_file(content, str(path)) as file:
            assert file == str(path)
        assert path.read_bytes().endswith(b"\n" + content)


def test_the_ca_does_not_overwrite_a_file_of_another_program(
    tmp_path: Path, ca: trustme.CA
) -> None:
    file = tmp_path / "ca.pem"
    with ca_file(b"ca", str(file)):
        content = ca.cert_pem.bytes() + file.read_bytes()
    file.write_bytes(content)
    assert refusal_of_ca(file) == "Another program has written it"
    assert file.read_bytes() == content


def refusal_of_ca(file: Path) -> str:
    """Return why no CA is written to *file*."""
    with pytest.raises(TLSError) as raised, ca_file(b"ca", str(file)):
        pass
    line = str(raised.value)
    assert line.startswith(f"Cannot write the CA to {file}: ")
    return line.rpartition(": ")[2]


@pytest.mark.parametrize("content", [b"theirs", None])
def test_the_ca_replaces_a_link_instead_of_following_it(
    tmp_path: Path, content: bytes | None
) -> None:
    link, target = tmp_path / "ca.pem", tmp_path / "target"
    link.symlink_to(target)
    if content is not None:
        target.write_bytes(content)
    with ca_file(b"ca", str(link)):
        assert not link.is_symlink()
        assert link.read_bytes().endswith(b"\nca")
    assert (target.read_bytes() if target.exists() else None) == content


@posix
def test_the_ca_does_not_overwrite_a_file_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "ca.pem", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path / "none")
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    assert refusal_of_ca(file) == refusal_of_ca(link) == "It belongs to another user"
    assert file.read_bytes() == b""
    assert link.is_symlink()


@posix
@pytest.mark.parametrize("is_link", [False, True])
def test_a_fifo_is_refused_without_waiting(tmp_path: Path, *, is_link: bool) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    if is_link:
        fifo = tmp_path / "link"
        fifo.symlink_to("fifo")
    assert refusal_of_ca(fifo) == "Not a regular file"
    line = f"Cannot use {fifo}: Not a regular file"
    assert refusal(tls_cert=str(fifo)) == line
    assert refusal(tls_cert=__file__, tls_key=str(fifo)) == line


def test_a_failure_to_write_the_ca_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ca.pem"
    with ca_file(b"one", str(file)):
        content = file.read_bytes()

    def replace(_path: Path, _to: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", replace)
    assert refusal_of_ca(file) == "No space left on device"
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("path", "reason"), [("missing/ca.pem", "No such file or directory"), (".", "Is a directory")]
)
def test_a_ca_file_that_cannot_be_written_is_reported_in_one_line(
    path: str, reason: str, tmp_path: Path
) -> None:
    assert refusal_of_ca(tmp_path / path) == reason


def refusal(**options: str) -> str:
    """Return why there is no certificate for *options*."""
    with pytest.raises(TLSError) as raised:
        certificate(Options(tls="starttls", **options))  # type: ignore[arg-type]
    return str(raised.value)


def test_a_temporary_file_that_cannot_be_created_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(TLSError) as raised, ca_file(b"ca", None):
        pass
    line = "Cannot write the CA to a temporary file: No such file or directory"
    assert str(raised.value) == line
    assert refusal() == "Cannot generate a certificate: No such file or directory"


@posix
def test_signals_are_blocked_while_a_temporary_file_holds_the_generated_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure, masks = trustme.LeafCert.configure_cert, []

    def configure_cert(cert: trustme.LeafCert, context: ssl.SSLContext) -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        configure(cert, context)

    monkeypatch.setattr(trustme.LeafCert, "configure_cert", configure_cert)
    certificate(Options(tls="starttls"))
    assert masks == [{signal.SIGINT, signal.SIGTERM, signal.SIGHUP}]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_without_the_extra_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    line = "Cannot generate a certificate: install trustme, or name one with --tls-cert"
    assert refusal() == line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, ca: trustme.CA) -> Path:
    """Return a folder with a certificate, its key, and files that may be mistaken for them."""
    folder = tmp_path_factory.mktemp("files")
    certificate, other = ca.issue_cert("named.example"), ca.issue_cert("other.example")
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    contents = {
        "cert": chain,
        "key": certificate.private_key_pem.bytes(),
        "both": certificate.private_key_and_cert_chain_pem.bytes(),
        "other": other.private_key_pem.bytes(),
        "encrypted": encrypted,
        "broken": chain[:200] + b"\n-----END CERTIFICATE-----\n",
        "text": b"Hello\n",
        "empty": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("names", [("cert", "key"), ("both", "key"), ("both", None)])
def test_the_named_certificate_is_used(
    names: tuple[str, str | None], files: Path, ca: trustme.CA
) -> None:
    cert, key = (name and str(files / name) for name in names)
    context, generated_ca = certificate(Options(tls="starttls", tls_cert=cert, tls_key=key))
    assert context is not None
    assert generated_ca is None
    assert agree(context, trusting(ca), "named.example") == "TLSv1.3"


@pytest.mark.parametrize(
    ("cert", "key", "at_fault", "reason"),
    [
        ("cert", "other", "other", "Not the private key of the certificate in {cert}"),
        ("cert", "text", "text", "No private key in PEM"),
        ("cert", "empty", "empty", "No private key in PEM"),
        ("cert", "cert", "cert", "No private key in PEM"),
        ("cert", "encrypted", "encrypted", "The private key is encrypted"),
        ("cert", "missing", "missing", "No such file or directory"),
        ("cert", ".", ".", "Is a directory"),
        ("text", "key", "text", "No certificate in PEM"),
        ("key", "cert", "key", "No certificate in PEM"),
        ("empty", "text", "empty", "No certificate in PEM"),
        ("broken", "key", "broken", "No certificate in PEM"),
        ("missing", "key", "missing", "No such file or directory"),
        (".", "key", ".", "Is a directory"),
    ],
)
def test_an_unusable_file_is_reported_in_one_line(
    cert: str, key: str, at_fault: str, reason: str, files: Path
) -> None:
    line = f"Cannot use {files / at_fault}: {reason.format(cert=files / cert)}"
    assert refusal(tls_cert=str(files / cert), tls_key=str(files / key)) == line


def test_a_certificate_without_its_key_is_reported_in_one_line(files: Path) -> None:
    line = f"Cannot use {files}/cert: No private key in PEM"
    assert refusal(tls_cert=str(files / "cert")) == line


def test_a_key_of_another_type_is_reported_in_one_line(files: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    other = trustme.CA().issue_cert("x.example", key_type=trustme.KeyType.RSA)
    other.private_key_pem.write_to_path(key)
    line = f"Cannot use {key}: Not the private key of the certificate in {files}/cert"
    assert refusal(tls_cert=str(files / "cert"), tls_key=str(key)) == line


def test_a_key_that_is_too_small_for_openssl_is_reported_in_one_line(tmp_path: Path) -> None:
    cert = tmp_path / "cert"
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505  # the point of the test
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x.example")])
    year = datetime(2026, 1, 1, tzinfo=timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, year, year)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    cert.write_bytes(pem + builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    assert refusal(tls_cert=str(cert)) == f"Cannot use {cert}: OpenSSL says ee key too small"
