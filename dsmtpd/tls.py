"""How the server shows that it is the right one: the certificate, and why a handshake fails."""

from __future__ import annotations

import ssl
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import gethostname
from typing import IO, TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

    import trustme

    from dsmtpd.options import Options

# At the top of each CA file: what does not begin with it has another's work in it.
_MARK = b"# The CA of a dsmtpd, made when that started.\n"


# What OpenSSL says of clients that speak no TLS, or an old one, and what that means.
_REASONS = {
    "HTTP_REQUEST": "the client speaks HTTP",
    "WRONG_VERSION_NUMBER": "the client speaks plain text",
    "UNSUPPORTED_PROTOCOL": "the client speaks nothing newer than TLS 1.1",
}


class TLSError(Exception):
    """The server cannot speak TLS; the text tells the file and the reason."""


class Certificate(NamedTuple):
    """What clients are shown.

    *context*: holds the certificate and its key; None without TLS.
    *ca*: the certificate of the CA in PEM, when all this has been made.
    """

    context: ssl.SSLContext | None
    ca: bytes | None


def certificate(options: Options) -> Certificate:
    """Return the certificate that *options* name, or make one; raises `TLSError`."""
    if options.tls is None:
        return Certificate(None, None)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.tls_cert is None:
        return Certificate(context, _make(context, options.interface))
    _load(context, options.tls_cert, options.tls_key)
    return Certificate(context, None)


@contextmanager
def ca_file(ca: bytes | None, path: str | None) -> Iterator[str | None]:
    """Lend the name of a file with *ca*, if there is one: *path*, which stays, or a temporary file.

    Raises `TLSError`.
    """
    with ExitStack() as stack:
        if ca is not None:
            path = path or stack.enter_context(_temporary()).name
            _write(path, _MARK + ca)
        yield path


def failure(error: OSError) -> str:
    """Return in a few words why a handshake has failed with *error*."""
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        words = reason.replace("_", " ").lower()
        # The alerts of RFC 8446, section 6.2, such as unknown_ca and bad_certificate.
        if "ALERT" in reason and ("UNKNOWN_CA" in reason or "CERTIFICATE" in reason):
            return f"the client does not trust the certificate ({words.partition('alert ')[2]})"
        return _REASONS.get(reason, words)
    if isinstance(error, ConnectionAbortedError):
        return "it takes too long; perhaps the client speaks plain text"
    return "the client has left; perhaps it speaks plain text, or does not trust the certificate"


def _load(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    """Load the certificate of the file *cert*, with its key of the file *key*, or of the same."""

    def no_password() -> NoReturn:
        # Without it, OpenSSL would ask for one at the terminal.
        raise TLSError(f"Cannot use {key or cert}: The private key is encrypted")

    try:
        context.load_cert_chain(cert, key, no_password)
    except OSError as error:
        path, reason = _fault(cert, key or cert, error)
        raise TLSError(f"Cannot use {path}: {reason}") from error


def _fault(cert: str, key: str, error: OSError) -> tuple[str, str]:
    """Return which of two files is at fault for *error*, which does not name it, and why."""
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


def _make(context: ssl.SSLContext, interface: str) -> bytes:
    """Load a certificate that is made for this host and *interface*; return its CA in PEM."""
    try:
        import trustme  # noqa: PLC0415  # an extra, and slow to import
    except ImportError:
        raise TLSError(
            "Cannot make a certificate: pip install 'dsmtpd[tls]', or name one with --tls-cert"
        ) from None
    ca = trustme.CA(organization_name="dsmtpd")
    names = dict.fromkeys(("localhost", "127.0.0.1", "::1", gethostname(), interface))
    made = ca.issue_cert(*(name for name in names if _can_be_certified(ca, name)))
    try:
        made.configure_cert(context)  # by way of a temporary file
    except OSError as error:
        raise TLSError(f"Cannot make a certificate: {error.strerror}") from error
    return ca.cert_pem.bytes()


def _temporary() -> IO[bytes]:
    """Return a file that goes when it is closed."""
    import tempfile  # noqa: PLC0415  # slow to import

    try:
        return tempfile.NamedTemporaryFile(prefix="dsmtpd-ca-", suffix=".pem")
    except OSError as error:
        raise TLSError(f"Cannot write the CA to a temporary file: {error.strerror}") from error


def _can_be_certified(ca: trustme.CA, name: str) -> bool:
    """Tell whether *name* can stand in a certificate, which, say, `my_host` cannot."""
    try:
        ca.issue_cert(name)
    except ValueError:
        return False
    return True


def _write(path: str, pem: bytes) -> None:
    """Write the CA to the file *path*, but never over somebody else's work."""
    file = Path(path)
    try:
        if file.is_file() and (content := file.read_bytes()) and not content.startswith(_MARK):
            raise TLSError(f"Cannot write the CA to {path}: It has been written by another program")
        file.write_bytes(pem)
    except OSError as error:
        raise TLSError(f"Cannot write the CA to {path}: {error.strerror}") from error
