"""The contents of a mail for its reader: fields, bodies, links and attachments, decoded."""

from __future__ import annotations

import re
from email.parser import BytesParser
from email.policy import Compat32
from html.parser import HTMLParser
from typing import TYPE_CHECKING, NamedTuple, cast

from dsmtpd.text import decoded, decoded_body, unfolded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import Message

# A URL in a text ends before a character that no URL contains (RFC 3986, section 2), and before the
# punctuation of the sentence.
_URL = re.compile(r"https?://[^\s<>\"`{}|\\^]+", re.IGNORECASE)
_PUNCTUATION = ".,;:!?'*_"
_BRACKETS = {")": "(", "]": "["}

# Targets that are not links to follow: places in the mail itself, and ways to contact people.
_NO_LINK = re.compile(r"#|mailto:|tel:|sms:", re.IGNORECASE)

# HTML elements that begin a line, that have an empty line around them, and that are not shown.
_LINES = {"address", "dd", "div", "dt", "figure", "footer", "form", "header", "li", "section", "tr"}
_PARAGRAPHS = {"blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ol", "p", "pre"}
_PARAGRAPHS |= {"table", "ul"}
_HIDDEN = {"script", "style", "template", "title"}
_SPACES = re.compile(r"[ \t\n\r\f]+")

# At most this many characters of HTML are read: Python's parser can be quadratic.
_HTML = 1024 * 1024


class Attachment(NamedTuple):
    """A part of a mail that is neither its text nor its HTML.

    *name*: the file name, empty if there is none. *type*: as in `image/png` (RFC 2046).
    *content*: its octets, decoded.
    """

    name: str
    type: str
    content: bytes


class Content(NamedTuple):
    """The contents of a mail; no mail makes reading them fail.

    *fields*: the header's names and values, unfolded and decoded, in order.
    *text*, *html*: the first body of each kind, with LF as the line end; empty if there is none.
    *attachments*: all other parts, inline or not.
    """

    fields: tuple[tuple[str, str], ...]
    text: str
    html: str
    attachments: tuple[Attachment, ...]

    @classmethod
    def from_bytes(cls, octets: bytes) -> Content:
        """Read the mail in *octets*, with any line ends."""
        try:
            return cls._of(_parser.parsebytes(octets))
        except RecursionError:  # far more nested parts than any mail program writes
            return cls._of(_parser.parsebytes(octets, headersonly=True))

    @classmethod
    def _of(cls, mail: Message) -> Content:
        parts = [*_parts(mail)]
        text, html = _take(parts, "text/plain"), _take(parts, "text/html")
        fields = tuple((name, _value(value)) for name, value in mail.items())
        return cls(fields, text, html, tuple(map(_attachment, parts)))

    def field(self, name: str) -> str:
        """Return the values of all fields called *name*, joined by commas."""
        return ", ".join(value for key, value in self.fields if key.lower() == name.lower())

    @property
    def subject(self) -> str:
        """The first Subject; empty if there is none."""
        return next((value for name, value in self.fields if name.lower() == "subject"), "")

    @property
    def links(self) -> tuple[str, ...]:
        """The URLs in the text and the targets of links in the HTML, each once, in order."""
        return tuple(dict.fromkeys([*_urls(self.text), *Reader(self.html).links]))

    def readable(self) -> str:
        """Return the text, or if there is none the HTML as a text that shows its links."""
        return self.text or Reader(self.html).text


class _AsSent(Compat32):
    """Makes a message return the raw values of its fields; we decode them."""

    def header_fetch_parse(self, name: str, value: str) -> str:  # noqa: ARG002  # its signature
        return value


_parser = BytesParser(policy=_AsSent())


def _value(value: str) -> str:
    return decoded(unfolded(value.encode("utf-8", "surrogateescape")))


def _parts(mail: Message) -> Iterator[Message]:
    """Yield the parts of *mail* that are not multipart; a forwarded message is one part."""
    if mail.get_content_maintype() == "multipart" and mail.is_multipart():
        for part in _inner(mail):
            yield from _parts(part)
    else:
        yield mail


def _inner(mail: Message) -> list[Message]:
    return cast("list[Message]", mail.get_payload())


def _take(parts: list[Message], kind: str) -> str:
    """Remove the first body of a *kind* from *parts*, and return it."""
    for number, part in enumerate(parts):
        if _is_body(part, kind):
            del parts[number]
            return decoded_body(_octets(part), part.get_content_charset(""))
    return ""


def _is_body(part: Message, kind: str) -> bool:
    return part.get_content_type() == kind and not (
        part.get_content_disposition() == "attachment" or _name(part)
    )


def _name(part: Message) -> str:
    return _value(part.get_filename(""))


def _octets(part: Message) -> bytes:
    if part.is_multipart():  # a message
        return b"".join(message.as_bytes() for message in _inner(part))
    octets = part.get_payload(decode=True)
    return octets if isinstance(octets, bytes) else b""


def _attachment(part: Message) -> Attachment:
    return Attachment(_name(part), part.get_content_type(), _octets(part))


def _urls(text: str) -> Iterator[str]:
    """Yield the URLs in a *text*, without the punctuation around them."""
    for match in _URL.finditer(text):
        url = match[0].rstrip(_PUNCTUATION)
        while url[-1:] in _BRACKETS and url.count(url[-1]) > url.count(_BRACKETS[url[-1]]):
            url = url[:-1].rstrip(_PUNCTUATION)
        yield url


class Reader(HTMLParser):
    """Turns HTML into text.

    *text*: the text, with the target after each link.
    *links*: the targets of the links, each once, in order.
    """

    def __init__(self, html: str) -> None:
        """Read *html*, however broken."""
        super().__init__()
        self._pieces: list[str] = []
        self._newlines = 2  # at the end of what has been read
        self._links: list[tuple[str, int]] = []  # open ones, and at which piece they begin
        self._hidden = self._preformatted = 0  # how many such elements are open
        self._found: dict[str, None] = {}
        self.feed(html[:_HTML])
        self.close()
        self.text = "\n".join(line.rstrip(" ") for line in "".join(self._pieces).split("\n")).strip(
            "\n"
        )
        self.links = tuple(self._found)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        self._break(tag)
        attributes = dict(attrs)
        if tag in {"a", "area"}:
            target = re.sub("[\t\n\r]", "", attributes.get("href") or "").strip()
            if target and not _NO_LINK.match(target):
                self._found[target] = None
            if tag == "a":
                self._links.append((target, len(self._pieces)))
        elif tag == "li":
            self._add("- ")
        elif tag == "img" and attributes.get("alt"):
            self.handle_data(f"[{attributes['alt']}]")
        elif tag in {"td", "th"}:
            self.handle_data(" ")
        self._hidden += tag in _HIDDEN
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """End an element."""
        if tag == "a" and self._links:
            target, begin = self._links.pop()
            shown = "".join(self._pieces[begin:]).strip()
            if target and not target.startswith("#") and target != shown:
                self._add(f" <{target}>" if shown else f"<{target}>")
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data: str) -> None:
        """Read a text."""
        if self._hidden:
            return
        if not self._preformatted:
            data = _SPACES.sub(" ", data)
            if self._newlines or self._pieces[-1].endswith(" "):
                data = data.removeprefix(" ")
        self._add(data)

    def _add(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._newlines = len(text) - len(text.rstrip("\n"))

    def _break(self, tag: str) -> None:
        """End the line or the paragraph, if *tag* does that."""
        if tag == "br":
            self._pieces.append("\n")
            self._newlines += 1
        wanted = 2 if tag in _PARAGRAPHS else tag in _LINES
        if self._newlines < wanted:
            self._pieces.append("\n" * (wanted - self._newlines))
            self._newlines = wanted
