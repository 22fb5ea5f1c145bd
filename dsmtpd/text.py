"""What comes from the network, as text that is safe to show: decoded, escaped and bounded."""

from __future__ import annotations

import re
from email.errors import HeaderParseError
from email.header import decode_header
from typing import Any

# The most octets that `printable` returns by default: a line of the log has at most 16 KiB.
_MOST_OCTETS = 12 * 1024

# RFC 2047, section 2; white space between two encoded words is not shown (section 6.2).
_ENCODED_WORD = r"=\?[^?\s]+\?[bq]\?[^?]*\?="
_ENCODED_WORDS = re.compile(rf"{_ENCODED_WORD}(?:\s*{_ENCODED_WORD})*", re.IGNORECASE)


def endpoint(address: Any) -> str:
    """Return a socket *address* as `host:port`, with an IPv6 host in brackets (RFC 3986)."""
    if not isinstance(address, tuple):
        return str(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def printable(text: str, most: int = _MOST_OCTETS) -> str:
    r"""Return *text* with every character that is not printable escaped, as in `\x1b` or `\u202e`.

    It can then neither forge a line of the log nor drive the terminal that shows it. A result of
    more than *most* octets (in UTF-8) is cut, and ends with `...`.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    if len(text) * 4 <= most:  # No character takes more than four octets.
        return text
    octets = text.encode()
    return text if len(octets) <= most else octets[: most - 3].decode("utf-8", "ignore") + "..."


def decoded(value: bytes) -> str:
    """Return the *value* of a header field as text.

    Octets that are not UTF-8 are read as Latin-1, and broken encoded words stay as they were sent.
    """
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return _ENCODED_WORDS.sub(lambda words: _decoded_words(words[0]), text)


def _decoded_words(words: str) -> str:
    """Return a run of encoded *words* as text, or unchanged when it is broken (RFC 2047)."""
    try:
        # A charset may be followed by a language (RFC 2231, section 5).
        return "".join(
            word.decode(str(charset).partition("*")[0], "replace")
            for word, charset in decode_header(words)
        )
    except (HeaderParseError, LookupError, ValueError):
        return words
