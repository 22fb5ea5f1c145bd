"""The options of the command line, as one frozen record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dsmtpd.failures import Rule

DEFAULT_INTERFACE = "127.0.0.1"
DEFAULT_PORT = 1025
DEFAULT_MAX_SIZE = 32 * 1024 * 1024


class Options(NamedTuple):
    """How to listen, what to accept and where to store it.

    *interface*: the address or the name of the interface to listen on.
    *port*: the TCP port, 0 to 65535; 0 picks a free one.
    *directory*: the Maildir that incoming mails are stored in, or None to store nothing.
    *max_size*: the largest message that is accepted, in octets; 0 sets no limit (RFC 1870, 3).
    *disable_smtputf8*: do not offer SMTPUTF8 (RFC 6531) and refuse non-ASCII addresses.
    *disable_auth*: do not offer AUTH (RFC 4954) and refuse it.
    *tls*: `starttls` offers STARTTLS (RFC 3207), `implicit` speaks TLS from the first octet
    (RFC 8314, section 3.3), None offers no TLS.
    *tls_cert*, *tls_key*: PEM files of a certificate and its private key; without *tls_cert*, a
    certificate is generated; without *tls_key*, the key is in the file of the certificate.
    *tls_ca*: the file that a generated certificate's CA is written to; None for a temporary one.
    *printing*: print each mail as `text` or as `json`, or None.
    *verbose*: log the whole dialogue.
    *failures*: rules that say which replies fail.
    *command*: a command and its arguments, to run beside the server; empty for none.
    """

    interface: str = DEFAULT_INTERFACE
    port: int = DEFAULT_PORT
    directory: str | None = None
    max_size: int = DEFAULT_MAX_SIZE
    disable_smtputf8: bool = False
    disable_auth: bool = False
    tls: Literal["starttls", "implicit"] | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    printing: Literal["text", "json"] | None = None
    verbose: bool = False
    failures: tuple[Rule, ...] = ()
    command: tuple[str, ...] = ()
