from __future__ import annotations

import logging
import re
import smtplib
import socket
import ssl
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

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

from dsmtpd.options import Options
from dsmtpd.server import Listener
from dsmtpd.tls import TLSError, ca_file, certificate, failure
from tests.tools import MAIL, PATIENCE, Clock, Handler, Wire, troubles

Way = Literal["starttls", "implicit"]
BOTH: tuple[Way, ...] = ("starttls", "implicit")

STARTTLS = Options(port=0, tls="starttls")
IMPLICIT = Options(port=0, tls="implicit")


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def context(ca: trustme.CA) -> ssl.SSLContext:
    """What a server shows that is called localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    return context


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    """Return what a client goes by that trusts *ca*, and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    return context


def connect(port: int, way: str, context: ssl.SSLContext, host: str = "localhost") -> smtplib.SMTP:
    """Return a client that speaks TLS."""
    if way == "implicit":
        return smtplib.SMTP_SSL(
            host, port, local_hostname="client.test", timeout=PATIENCE, context=context
        )
    client = smtplib.SMTP(host, port, local_hostname="client.test", timeout=PATIENCE)
    try:
        client.starttls(context=context)
    except OSError:
        client.close()
        raise
    return client


class Secret(Handler):
    """Keeps the ciphers by which mails have come."""

    def __init__(self) -> None:
        super().__init__()
        self.ciphers: list[str] = []

    async def handle_DATA(self, server: object, session: Any, envelope: object) -> str:
        self.ciphers.append(session.ssl["cipher"][0])
        return await super().handle_DATA(server, session, envelope)


@pytest.mark.parametrize("way", BOTH)
def test_mails_of_any_size_come_encrypted(
    way: Way, ca: trustme.CA, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handler = Secret()
    large = b"x" * 98 + b"\r\n"
    with Listener(handler, Options(port=0, tls=way), context) as listener:
        with connect(listener.port, way, trusting(ca)) as client:
            client.login("app", "secret")
            client.sendmail("a@x", ["b@x"], MAIL)
            client.sendmail("a@x", ["b@x"], large * 100_000)
        with connect(listener.port, way, trusting(ca)) as client:
            client.sendmail("a@x", ["b@x"], MAIL)
    assert handler.contents == [MAIL, large * 100_000, MAIL]
    assert all(cipher.startswith("TLS_") for cipher in handler.ciphers)
    login = r"127\.0\.0\.1:\d+: app logged in by AUTH PLAIN"
    assert any(re.fullmatch(login, message) for message in caplog.messages)
    assert troubles(caplog) == []


def test_starttls_is_offered_until_it_is_done(ca: trustme.CA, context: ssl.SSLContext) -> None:
    with (
        Listener(Handler(), STARTTLS, context) as listener,
        smtplib.SMTP("localhost", listener.port, timeout=PATIENCE) as client,
    ):
        assert b"STARTTLS" in client.help().split()
        assert client.docmd("STARTTLS now") == (501, b"Syntax: STARTTLS")
        client.ehlo()
        assert client.has_extn("starttls")
        client.starttls(context=trusting(ca))
        client.ehlo()
        assert not client.has_extn("starttls")
        assert client.docmd("STARTTLS")[0] == 503
        assert b"STARTTLS" not in client.help().split()
        assert client.noop()[0] == 250


def test_without_a_certificate_or_from_the_first_octet_starttls_is_not_offered(
    ca: trustme.CA, context: ssl.SSLContext
) -> None:
    with (
        Listener(Handler(), Options(port=0)) as listener,
        smtplib.SMTP("localhost", listener.port, timeout=PATIENCE) as client,
    ):
        client.ehlo()
        assert not client.has_extn("starttls")
        assert client.docmd("STARTTLS")[0] == 454
    with (
        Listener(Handler(), IMPLICIT, context) as listener,
        connect(listener.port, "implicit", trusting(ca)) as client,
    ):
        client.ehlo()
        assert not client.has_extn("starttls")
        assert client.docmd("STARTTLS")[0] == 503


def test_what_was_said_in_clear_is_forgotten(ca: trustme.CA, context: ssl.SSLContext) -> None:
    with (
        Listener(Handler(), STARTTLS, context) as listener,
        smtplib.SMTP("localhost", listener.port, timeout=PATIENCE) as client,
    ):
        client.login("app", "secret")
        client.mail("a@x")
        client.starttls(context=trusting(ca))
        assert client.docmd("RCPT TO:<b@x>")[0] == 503  # for want of a MAIL
        assert client.docmd("MAIL FROM:<a@x>")[0] == 503  # for want of an EHLO
        assert client.login("app", "secret")[0] == 235


def test_commands_injected_behind_starttls_are_dropped(
    ca: trustme.CA, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Handler()
    injected = b"EHLO x\r\nMAIL FROM:<evil@x>\r\nRCPT TO:<b@x>\r\nDATA\r\nevil\r\n.\r\n"
    with (
        Listener(handler, STARTTLS, context) as listener,
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
    (trouble,) = troubles(caplog)
    assert trouble[1].endswith(
        ": What was sent behind STARTTLS, without waiting for the reply, is dropped"
    )


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what has been told of handshakes, one line for each."""
    beginning = ": The TLS handshake has failed: "
    lines = []
    for level, text in troubles(caplog):
        assert (level, beginning in text) == ("WARNING", True), text
        assert "\n" not in text
        lines.append(text.partition(beginning)[2])
    return lines


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_does_not_trust_the_ca_is_told_of_and_the_next_one_served(
    way: Way,
    version: ssl.TLSVersion,
    ca: trustme.CA,
    context: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wary = trusting(trustme.CA())
    wary.maximum_version = version
    with Listener(Handler(), Options(port=0, tls=way), context) as listener:
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
def test_a_failure_is_told_in_a_few_words(reason: str | None, words: str) -> None:
    error = ssl.SSLError(1, "anything")
    error.reason = reason  # type: ignore[assignment]  # which it can lack
    assert failure(error) == words


PLAIN_TEXT = "the client speaks plain text"
LEFT = "the client has left; perhaps it speaks plain text, or does not trust the certificate"


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
def test_a_client_that_speaks_no_tls_is_told_of(
    way: Way, octets: bytes, reason: str, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Listener(Handler(), Options(port=0, tls=way), context) as listener,
        socket.create_connection(("localhost", listener.port), PATIENCE) as client,
    ):
        if way == "starttls":
            client.sendall(b"STARTTLS\r\n")
            with client.makefile("rb") as replies:
                assert [replies.readline()[:4] for _ in range(2)] == [b"220 ", b"220 "]
        client.sendall(octets)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1024):
            pass
    assert failures(caplog) == [reason]


@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_keeps_the_handshake_waiting_is_cut(
    way: Way, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()

    async def run() -> list[bytes]:
        wire = Wire(Handler(), tls_context=context, implicit_tls=way == "implicit")
        await wire.open()
        await wire.send(b"STARTTLS\r\n" if way == "starttls" else b"")
        clock.ahead += 9
        await wire.send(b"")
        assert wire.session.transport is not None
        clock.ahead += 2
        await wire.send(b"")
        assert wire.session.transport is None
        return await wire.replies()

    replies = clock.run_until_complete(run())
    clock.close()
    assert [reply[:3] for reply in replies] == ([b"220", b"220"] if way == "starttls" else [])
    assert failures(caplog) == ["it takes too long; perhaps the client speaks plain text"]


@pytest.mark.parametrize("way", BOTH)
def test_a_server_that_stops_tells_its_clients_by_tls(
    way: Way, ca: trustme.CA, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with Listener(Handler(), Options(port=0, tls=way), context) as listener:
        client = connect(listener.port, way, trusting(ca))
    assert client.getreply()[0] == 421
    client.close()
    assert troubles(caplog) == []


@pytest.mark.parametrize("way", BOTH)
def test_a_server_that_stops_says_nothing_into_a_handshake(
    way: Way, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with Listener(Handler(), Options(port=0, tls=way), context) as listener:
        client = socket.create_connection(("localhost", listener.port), PATIENCE)
        if way == "starttls":
            client.sendall(b"STARTTLS\r\n")
            with client.makefile("rb") as replies:
                assert [replies.readline()[:4] for _ in range(2)] == [b"220 ", b"220 "]
    with client:
        assert client.recv(1024) == b""
    assert troubles(caplog) == []


@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_leaves_before_it_is_answered_makes_no_trouble(
    way: Way, ca: trustme.CA, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with Listener(Handler(), Options(port=0, tls=way), context) as listener:
        for _ in range(20):
            client = connect(listener.port, way, trusting(ca))
            client.send(b"NOOP\r\n" * 50)
            client.close()
        with connect(listener.port, way, trusting(ca)) as client:
            assert client.noop()[0] == 250
    assert troubles(caplog) == []


def agree(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str | None:
    """Return the version of TLS that a server and a client agree on that looks for *name*."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname=name),
        server.wrap_bio(there, back, server_side=True),
    ]
    for end in ends * 3:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return ends[0].version()


def made(options: Options) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return what a server shows by *options*, and what a client goes by that trusts its CA."""
    context, ca = certificate(options)
    assert context is not None
    assert ca is not None
    return context, ssl.create_default_context(cadata=ca.decode())


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "::1", socket.gethostname(), "192.0.2.1", "mail.example"]
)
def test_a_made_certificate_is_for_the_names_of_the_host_and_the_interface(name: str) -> None:
    interface = name if name in {"192.0.2.1", "mail.example"} else "my_host"
    server, trust = made(Options(tls="starttls", interface=interface))
    assert agree(server, trust, name) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        agree(server, trust, "other.example")


@pytest.mark.skipif(not ssl.HAS_TLSv1_1, reason="OpenSSL has no TLS 1.1 any more")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_nothing_older_than_tls_1_2_is_spoken() -> None:
    server, client = made(STARTTLS)
    server.set_ciphers("ALL:@SECLEVEL=0")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert agree(server, client, "localhost") == "TLSv1.2"
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        agree(server, client, "localhost")


def test_without_tls_there_is_nothing_to_show() -> None:
    context, ca = certificate(Options())
    assert context is None
    with ca_file(ca, None) as file:
        assert file is None


def test_a_temporary_ca_file_goes_with_the_server() -> None:
    with ca_file(b"ca", None) as file:
        assert file is not None
        assert Path(file).read_bytes().endswith(b"\nca")
    assert not Path(file).exists()


def test_the_ca_file_that_is_asked_for_stays_and_is_replaced_by_the_next_start(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ca.pem"
    path.touch()
    for content in (b"one", b"another"):
        with ca_file(content, str(path)) as file:
            assert file == str(path)
        assert path.read_bytes().endswith(b"\n" + content)


def test_the_work_of_others_is_not_overwritten_by_a_ca(tmp_path: Path, ca: trustme.CA) -> None:
    file = tmp_path / "ca.pem"
    with ca_file(b"ca", str(file)):
        content = ca.cert_pem.bytes() + file.read_bytes()
    file.write_bytes(content)
    with (
        pytest.raises(TLSError, match=r"It has been written by another program$"),
        ca_file(b"ca", str(file)),
    ):
        pass
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("path", "reason"), [("missing/ca.pem", "No such file or directory"), (".", "Is a directory")]
)
def test_a_ca_file_that_cannot_be_written_is_told_in_one_line(
    path: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(TLSError) as raised, ca_file(b"ca", str(tmp_path / path)):
        pass
    assert str(raised.value) == f"Cannot write the CA to {tmp_path / path}: {reason}"


def refusal(**options: str) -> str:
    """Return why there is no certificate for *options*."""
    with pytest.raises(TLSError) as raised:
        certificate(Options(tls="starttls", **options))  # type: ignore[arg-type]
    return str(raised.value)


def test_a_temporary_file_that_cannot_be_made_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(TLSError) as raised, ca_file(b"ca", None):
        pass
    line = "Cannot write the CA to a temporary file: No such file or directory"
    assert str(raised.value) == line
    assert refusal() == "Cannot make a certificate: No such file or directory"


def test_without_the_extra_the_user_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    line = "Cannot make a certificate: pip install 'dsmtpd[tls]', or name one with --tls-cert"
    assert refusal() == line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, ca: trustme.CA) -> Path:
    """Return a folder with a certificate, its key, and what may be taken for them."""
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
def test_a_certificate_may_be_named(
    names: tuple[str, str | None], files: Path, ca: trustme.CA
) -> None:
    cert, key = (name and str(files / name) for name in names)
    context, made_ca = certificate(Options(tls="starttls", tls_cert=cert, tls_key=key))
    assert context is not None
    assert made_ca is None
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
def test_a_file_that_cannot_be_used_is_told_in_one_line(
    cert: str, key: str, at_fault: str, reason: str, files: Path
) -> None:
    line = f"Cannot use {files / at_fault}: {reason.format(cert=files / cert)}"
    assert refusal(tls_cert=str(files / cert), tls_key=str(files / key)) == line


def test_a_certificate_without_its_key_is_told_in_one_line(files: Path) -> None:
    line = f"Cannot use {files}/cert: No private key in PEM"
    assert refusal(tls_cert=str(files / "cert")) == line


def test_a_key_of_another_kind_is_told_in_one_line(files: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    other = trustme.CA().issue_cert("x.example", key_type=trustme.KeyType.RSA)
    other.private_key_pem.write_to_path(key)
    line = f"Cannot use {key}: Not the private key of the certificate in {files}/cert"
    assert refusal(tls_cert=str(files / "cert"), tls_key=str(key)) == line


def test_a_key_that_is_too_small_for_openssl_is_told_in_one_line(tmp_path: Path) -> None:
    cert = tmp_path / "cert"
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505  # the point of the test
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x.example")])
    year = datetime(2026, 1, 1, tzinfo=timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, year, year)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    cert.write_bytes(pem + builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    assert refusal(tls_cert=str(cert)) == f"Cannot use {cert}: OpenSSL says ee key too small"


@pytest.mark.parametrize("way", BOTH)
def test_a_client_that_leaves_after_the_handshake_without_a_word_is_told_of(
    way: Way, ca: trustme.CA, context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with Listener(Handler(), Options(port=0, tls=way), context) as listener:
        client = connect(listener.port, way, trusting(ca))
        client.close()
        with connect(listener.port, way, trusting(ca)) as other:
            end = time.monotonic() + PATIENCE
            while not troubles(caplog) and time.monotonic() < end:
                other.noop()
    (trouble,) = troubles(caplog)
    assert ": The client has left after the TLS handshake without a word; perhaps " in trouble[1]
