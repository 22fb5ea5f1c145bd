"""Turns octets from the network into text that is safe to show: decoded, escaped, bounded."""

from __future__ import annotations

import re
from binascii import a2b_base64, a2b_qp
from codecs import lookup
from contextlib import suppress
from encodings.aliases import aliases
from itertools import groupby
from typing import Any
from unicodedata import category

# The most octets that `printable` returns by default: a line of the log has at most 16 KiB.
_MOST_OCTETS = 12 * 1024

# It begins at the first of several CR, as searching for it would be quadratic otherwise.
_FOLD = re.compile(rb"(?:(?<!\r)\r*\n|\r)[ \t]+")
_LINE_END = re.compile("\r\n?")

# RFC 2047, section 2, also with a few question marks that should have been encoded. White space
# between two encoded words is not shown (section 6.2).
_WORD = r"=\?([^?\s]+)\?([bq])\?([^?]*(?:\?(?!=)[^?]*){0,5})\?="
_ENCODED_WORD = re.compile(_WORD, re.IGNORECASE)
_ENCODED_WORDS = re.compile(rf"(?:{_WORD}\s*)*{_WORD}", re.IGNORECASE)

# Labels of charsets by which people mean something else than Python does, as in WHATWG's Encoding
# Standard, and some names of databases and code pages.
_CHARSETS = {
    "ascii": "cp1252",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859_1": "cp1252",
    "iso_8859_1": "cp1252",
    "iso_8859_8_e": "iso8859_8",
    "iso_8859_8_i": "iso8859_8",
    "ks_c_5601_1987": "cp949",
    "latin1": "cp1252",
    "latin_1": "cp1252",
    "shift_jis": "cp932",
    "us_ascii": "cp1252",
    "utf8mb4": "utf_8",
    "windows_31j": "cp932",
    "windows_874": "cp874",
    "x_gbk": "gb18030",
    "x_sjis": "cp932",
}
# Text labelled ASCII, or not labelled at all, often is not ASCII (RFC 2045, section 5.2).
_DEFAULT = {"", "ascii", "us-ascii"}
_CODE_PAGE = re.compile(r"(?:dos|cp)_([0-9]{3,4})")
_KNOWN = {*aliases, *aliases.values(), *_CHARSETS.values()}

# Text codecs that are no charsets: those of Python's source, whose warnings would show the mail's
# text, and those of host names, which are quadratic.
_NO_CHARSETS = {"unicode-escape", "raw-unicode-escape", "idna", "punycode"}

# The bits of the last two code points of each plane, which are never characters.
_NONCHARACTER = 0xFFFE


def endpoint(address: Any) -> str:
    """Return a socket *address* as `host:port`, with an IPv6 host in brackets (RFC 3986)."""
    if not isinstance(address, tuple):
        return str(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def printable(text: str, most: int = _MOST_OCTETS) -> str:
    r"""Return *text* with everything that is not printable escaped, as in `\x1b` or `\u202e`.

    The result can neither forge a line of the log nor control the terminal that shows it. If it is
    longer than *most* octets (in UTF-8), it is cut and ends with `...`.
    """
    if not text.isprintable():
        text = "".join(c if _is_shown(c) else repr(c)[1:-1] for c in text[: most + 1])
    if len(text) * 4 <= most:  # No character takes more than four octets.
        return text
    octets = text.encode()
    return text if len(octets) <= most else octets[: most - 3].decode("utf-8", "ignore") + "..."


def _is_shown(character: str) -> bool:
    """Return whether *character* is shown as it is.

    Besides those that Python calls printable, these are all spaces, the joiners that Persian and
    emoji need, and characters that are newer than this Python.
    """
    if character.isprintable() or character in "\u200c\u200d":
        return True
    if category(character) == "Cn":
        return character > "\uffff" and ord(character) & _NONCHARACTER != _NONCHARACTER
    return category(character) == "Zs"


def decoded(value: bytes) -> str:
    """Return the *value* of a header field as text.

    The octets are UTF-8 if any non-ASCII character in them is, else windows-1252. Broken encoded
    words stay as they were sent. Only one unknown charset is looked up: Python remembers each one
    forever.
    """
    unknown: set[str] = set()

    def words(match: re.Match[str]) -> str:
        return _decoded_words(match[0], unknown)

    return _ENCODED_WORDS.sub(words, _guessed(value))


def decoded_body(octets: bytes, label: str) -> str:
    """Return *octets* as text in the charset of a *label*, which may be empty, unknown or wrong.

    Its lines end with LF.
    """
    text, codec = None, _labelled(label)
    if codec in _KNOWN and label.lower() not in _DEFAULT:
        with suppress(LookupError, ValueError):
            text = _text(codec, octets, set())
    return _LINE_END.sub("\n", _guessed(octets) if text is None else text)


def unfolded(value: bytes) -> bytes:
    """Return the *value* of a header field as one line (RFC 5322, section 2.2.3)."""
    return _FOLD.sub(b" ", value).strip(b" \t\r\n")


def _guessed(octets: bytes) -> str:
    """Return *octets* as text: UTF-8 if any non-ASCII character in them is, else windows-1252."""
    text = octets.decode("utf-8", "replace")
    if "\ufffd" in text and all(c < "\x80" or c == "\ufffd" for c in text):
        return octets.decode("cp1252", "replace")
    return text


def _decoded_words(words: str, unknown: set[str]) -> str:
    """Return a run of encoded *words* as text, or unchanged if it is broken (RFC 2047)."""
    found = ((_codec(match), match) for match in _ENCODED_WORD.finditer(words))
    try:
        return "".join(
            _text(codec, b"".join(_octets(match) for _, match in group), unknown)
            for codec, group in groupby(found, lambda pair: pair[0])
        )
    except (LookupError, ValueError):
        return words


def _codec(word: re.Match[str]) -> str:
    """Return Python's name for the charset of an encoded *word*."""
    if not word[3].isascii():
        return "utf_8"  # It should have been encoded, but was sent as UTF-8.
    # A charset may be followed by a language (RFC 2231, section 5).
    return _labelled(word[1].partition("*")[0])


def _labelled(label: str) -> str:
    """Return Python's name for the charset that people mean by a *label*."""
    label = _CODE_PAGE.sub(r"cp\1", label.lower().replace("-", "_"))
    return _CHARSETS.get(label, label)


def _octets(word: re.Match[str]) -> bytes:
    octets = word[3].encode()
    if word[2] in "qQ":
        return a2b_qp(octets, header=True)
    return a2b_base64(octets + b"=" * (-len(octets) % 4))


def _text(codec: str, octets: bytes, unknown: set[str]) -> str:
    """Return *octets* as text; *unknown* keeps the one unknown codec that may be looked up."""
    if not codec.isascii():
        raise LookupError(codec)
    if codec not in _KNOWN and codec not in unknown:
        if unknown:
            raise LookupError(codec)
        unknown.add(codec)
    if lookup(codec).name in _NO_CHARSETS:
        raise LookupError(codec)
    return octets.decode(codec, "replace")
