"""The server's certificate, and TLS as a layer without I/O."""

from __future__ import annotations

import os
import ssl
import stat
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, NoReturn

from dsmtpd import signals

if TYPE_CHECKING:
    from collections.abc import Iterator

    import trustme

    from dsmtpd.options import Options

# At the top of each CA file: files without this marker belong to someone else.
_MARK = b"# The CA of a dsmtpd, made when that started.\n"

# The largest piece of plain text that TLS encrypts at once, in octets (RFC 8446, section 5.1).
_RECORD = 16 * 1024

# What OpenSSL says about clients that speak no TLS, or only old versions, and what it means.
_REASONS = {
    "HTTP_REQUEST": "the client speaks HTTP",
    "WRONG_VERSION_NUMBER": "the client speaks plain text",
    "UNSUPPORTED_PROTOCOL": "the client speaks nothing newer than TLS 1.1",
}


_NOT_REGULAR = "Not a regular file"


class TLSError(Exception):
    """The server cannot speak TLS; the text names the file and the reason."""


def certificate(options: Options) -> tuple[ssl.SSLContext | None, bytes | None]:
    """Return a context with the certificate that *options* name, or with a generated one.

    A generated one comes with its CA in PEM; without TLS there is neither. Raises `TLSError`.
    """
    if options.tls is None:
        return None, None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.tls_cert is None:
        return context, _generate(context, options.interface)
    _load(context, options.tls_cert, options.tls_key)
    return context, None


@contextmanager
def ca_file(ca: bytes | None, path: str | None) -> Iterator[str | None]:
    """Write *ca*, if there is one, to *path*, which stays, or to a temporary file; yield its name.

    Raises `TLSError`.
    """
    with ExitStack() as stack:
        try:
            if ca is not None:
                path = path or stack.enter_context(_temporary())
                _write(Path(path), _MARK + ca)
        except OSError as error:
            where = path or "a temporary file"
            raise TLSError(f"Cannot write the CA to {where}: {error.strerror}") from error
        yield path


class Layer:
    """TLS between a connection and a conversation: encrypted octets in, plain octets out, and back.

    *cipher*: the cipher, the TLS version and the secret bits, as `ssl.SSLObject.cipher` has them;
    None until the handshake is done.
    *ended*: whether the client has announced that it sends nothing more.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        """Wait for the client to begin."""
        self.cipher: tuple[str, str, int] | None = None
        self.ended = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    @property
    def version(self) -> str | None:
        """The version of TLS, as in `TLSv1.3`; None until the handshake is done."""
        return self._object.version()

    def receive(self, octets: bytes) -> bytes:
        """Decrypt *octets* of the client; afterwards, `outgoing` has what must be sent.

        Raises `ssl.SSLError` if they are not TLS, or if no session is possible.
        """
        # In pieces, since the buffer for them never shrinks.
        view = memoryview(octets)
        pieces = (view[begin : begin + _RECORD] for begin in range(0, len(octets), _RECORD))
        return b"".join(record for piece in pieces for record in self._records(piece))

    def _records(self, octets: memoryview) -> Iterator[bytes]:
        """Yield the plain text of each record that *octets* complete."""
        self._incoming.write(octets)
        with suppress(ssl.SSLWantReadError):
            if self.cipher is None:
                self._object.do_handshake()
                self.cipher = self._object.cipher()
            while record := self._object.read(_RECORD):
                yield record
            self.ended = True

    def outgoing(self) -> bytes:
        """Return the octets that must be sent to the client."""
        return self._outgoing.read()

    def send(self, octets: bytes) -> None:
        """Encrypt *octets*."""
        self._object.write(octets)

    def close(self) -> None:
        """Announce that nothing more is sent (RFC 8446, section 6.1)."""
        # It would also wait for the client to do the same, which we do not.
        with suppress(ssl.SSLError):
            self._object.unwrap()


def failure(error: ssl.SSLError) -> str:
    """Return in a few words why a handshake failed with *error*."""
    reason = error.reason or str(error)
    words = reason.replace("_", " ").lower()
    # The alerts of RFC 8446, section 6.2, such as unknown_ca and bad_certificate.
    if "ALERT" in reason and ("UNKNOWN_CA" in reason or "CERTIFICATE" in reason):
        return f"the client does not trust the certificate ({words.partition('alert ')[2]})"
    return _REASONS.get(reason, words)


def _load(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    """Load the certificate in the file *cert* and its key in the file *key*, or in the same."""
    for path in filter(None, (cert, key)):
        if _is_special(Path(path)):
            raise TLSError(f"Cannot use {path}: {_NOT_REGULAR}")

    def no_password() -> NoReturn:
        # Without it, OpenSSL would ask for one at the terminal.
        raise TLSError(f"Cannot use {key or cert}: The private key is encrypted")

    try:
        context.load_cert_chain(cert, key, no_password)
    except OSError as error:
        path, reason = _fault(cert, key or cert, error)
        raise TLSError(f"Cannot use {path}: {reason}") from error


def _is_special(path: Path) -> bool:
    """Return whether *path* is a FIFO, a socket or a device, which may block forever."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _fault(cert: str, key: str, error: OSError) -> tuple[str, str]:
    """Return which of two files caused *error*, which does not say so, and why."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cert)
    except ssl.SSLError:
        return cert, "No certificate in PEM"
    except OSError as unreadable:
        return cert, str(unreadable.strerror)
    if not isinstance(error, ssl.SSLError):
        return key, str(error.strerror)
    if error.reason in {"KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}:
        return key, f"Not the private key of the certificate in {cert}"
    if error.reason is not None:
        return cert, f"OpenSSL says {error.reason.replace('_', ' ').lower()}"
    return key, "No private key in PEM"


def _generate(context: ssl.SSLContext, interface: str) -> bytes:
    """Load a new certificate for this host and *interface*; return its CA in PEM."""
    try:
        import trustme  # noqa: PLC0415  # an extra, and slow to import
    except ImportError:
        raise TLSError(
            "Cannot generate a certificate: install trustme, or name one with --tls-cert"
        ) from None
    ca = trustme.CA(organization_name="dsmtpd")
    names = dict.fromkeys(("localhost", "127.0.0.1", "::1", gethostname(), interface))
    generated = ca.issue_cert(*(name for name in names if _can_be_certified(ca, name)))
    try:
        with signals.blocked():  # It passes the key through a temporary file.
            generated.configure_cert(context)
    except OSError as error:
        raise TLSError(f"Cannot generate a certificate: {error.strerror}") from error
    return ca.cert_pem.bytes()


@contextmanager
def _temporary() -> Iterator[str]:
    """Yield the name of a file that is removed at the end."""
    import tempfile  # noqa: PLC0415  # slow to import

    descriptor, name = tempfile.mkstemp(prefix="dsmtpd-ca-", suffix=".pem")
    os.close(descriptor)  # Windows cannot replace an open file.
    try:
        yield name
    finally:
        with suppress(OSError):
            Path(name).unlink()


def _can_be_certified(ca: trustme.CA, name: str) -> bool:
    """Return whether a certificate can contain *name*; `my_host`, for example, cannot be in one."""
    try:
        ca.issue_cert(name)
    except ValueError:
        return False
    return True


def _write(file: Path, pem: bytes) -> None:
    """Write the CA to a new file and move it to *file*, but never over another program's file."""
    with suppress(FileNotFoundError):
        if fault := _fault_of_ca(file, file.lstat()):
            raise TLSError(f"Cannot write the CA to {file}: {fault}")
    draft = file.with_name(f"{file.name}.{os.urandom(4).hex()}")
    try:
        with draft.open("xb") as new:
            new.write(pem)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _fault_of_ca(file: Path, status: os.stat_result) -> str | None:
    """Return why *file*, which exists, must not be replaced with a CA."""
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        return "It belongs to another user"
    if _is_special(file):
        return _NOT_REGULAR
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return None  # A link is replaced. A folder cannot be.
    if file.read_bytes().startswith(_MARK):
        return None
    return "Another program has written it"
