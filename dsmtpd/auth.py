"""What AUTH asks, and who the answers say it is (RFC 4954); any password will do."""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    # Yields challenges, is sent the responses, and returns the name that has logged in.
    Exchange = Generator[bytes, bytes, str]

# RFC 4954, section 4: the longest line of an exchange, the command's included.
LINE_OCTETS = 12288


class AuthError(Exception):
    """An exchange fails; the text is the reply."""


def _plain() -> Exchange:
    """Ask for authorization identity, name and password at once (RFC 4616, section 2)."""
    try:
        _, name, _ = (yield b"").split(b"\0")
    except ValueError:
        raise AuthError("501 5.5.2 PLAIN takes three values") from None
    return _text(name)


def _login() -> Exchange:
    """Ask for the name, then for the password (draft-murchison-sasl-login-00)."""
    # What all servers ask, and some clients look for, instead of the draft's "User Name".
    name = yield b"Username:"
    yield b"Password:"
    if b"\0" in name:
        # It is what PLAIN takes, with a password that the log would show.
        raise AuthError("501 5.5.2 LOGIN takes a name without NUL")
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


MECHANISMS: dict[str, Callable[[], Exchange]] = {"PLAIN": _plain, "LOGIN": _login}


def decode(response: bytes) -> bytes:
    """Return what the client says by *response*, where `=` stands for nothing (section 4).

    Raises `AuthError` when that cancels the exchange, is too long or is no base64.
    """
    if len(response) > LINE_OCTETS:
        raise AuthError("500 5.5.6 Authentication Exchange line is too long")
    if response == b"*":
        raise AuthError("501 5.7.0 Authentication cancelled")
    try:
        return b"" if response == b"=" else b64decode(response, validate=True)
    except binascii.Error:
        raise AuthError("501 5.5.2 Cannot decode base64") from None
