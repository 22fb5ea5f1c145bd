"""The mechanisms of AUTH: they ask for a name and accept any password (RFC 4954)."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    # Yields challenges, receives the responses, and returns the name that has logged in.
    Exchange = Generator[bytes, bytes, str]

# RFC 4954, section 4: the longest line of an exchange, including the command.
LINE_OCTETS = 12288

# The digest is in hexadecimal; whatever else comes may be a password.
_CRAM_MD5 = re.compile(rb"([^\0]*) [0-9A-Fa-f]{32}")

# RFC 5801, section 4: the authorization identity in a GS2 header.
_GS2_HEADER = re.compile(rb"[ny],(?:a=([^,]*))?,")

# The user who logs in without a name.
_NOBODY = "(no name)"


class AuthError(Exception):
    """An exchange fails; the text is the reply."""


def _plain() -> Exchange:
    """Ask for authorization identity, name and password at once (RFC 4616, section 2)."""
    try:
        _, name, _ = (yield b"").split(b"\0")
    except ValueError:
        raise AuthError("501 5.5.2 PLAIN needs three values") from None
    return _text(name)


def _login() -> Exchange:
    """Ask for the name, then for the password (draft-murchison-sasl-login-00)."""
    # All servers ask this, and some clients look for it, instead of the draft's "User Name".
    name = yield b"Username:"
    yield b"Password:"
    if b"\0" in name:
        # This is a response to PLAIN, with a password that the log would show.
        raise AuthError("501 5.5.2 LOGIN needs a name without NUL")
    return _text(name)


def _cram_md5() -> Exchange:
    """Ask for the name, and a digest of the challenge and the password (RFC 2195, section 2)."""
    match = _CRAM_MD5.fullmatch((yield b"<1.1@dsmtpd>"))
    if match is None:
        raise AuthError("501 5.5.2 CRAM-MD5 needs a name and a digest")
    return _text(match[1])


def _oauthbearer() -> Exchange:
    """Ask for the name, if there is one, and a token (RFC 7628, section 3.1)."""
    header = _GS2_HEADER.match((yield b""))
    if header is None:
        raise AuthError("501 5.5.2 OAUTHBEARER needs a GS2 header and a token")
    return _text((header[1] or b"").replace(b"=2C", b",").replace(b"=3D", b"="))


def _xoauth2() -> Exchange:
    """Ask for the name and a token, as Google does."""
    fields = (yield b"").split(b"\1")
    return next((_text(field[5:]) for field in fields if field.startswith(b"user=")), _NOBODY)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace") or _NOBODY


MECHANISMS: dict[str, Callable[[], Exchange]] = {
    "PLAIN": _plain,
    "LOGIN": _login,
    "OAUTHBEARER": _oauthbearer,
    "XOAUTH2": _xoauth2,
    "CRAM-MD5": _cram_md5,
}
# smtplib would prefer CRAM-MD5; a client without a token chooses neither of the OAuth ones.
OFFERED = ("PLAIN", "LOGIN", "OAUTHBEARER", "XOAUTH2")


def decode(response: bytes) -> bytes:
    """Decode a client's *response*; `=` alone is an empty one (RFC 4954, section 4).

    Raises `AuthError` when it cancels the exchange, is too long or is not base64.
    """
    if len(response) > LINE_OCTETS:
        raise AuthError("500 5.5.6 Authentication Exchange line is too long")
    if response == b"*":
        raise AuthError("501 5.7.0 Authentication cancelled")
    try:
        response = response.rstrip(b"=")
        return b64decode(response + b"=" * (-len(response) % 4), validate=True)
    except binascii.Error:
        raise AuthError("501 5.5.2 Cannot decode base64") from None
