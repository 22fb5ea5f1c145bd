"""Reads the arguments of MAIL and RCPT: a path, its parameters, and what is wrong with them."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# RFC 5321, section 4.1.2, with the non-ASCII characters that RFC 6531 adds, and with any atoms in
# domains: names with an underscore are common within companies and containers. An octet that is not
# UTF-8 comes as a surrogate.
_ATOM = r'[^\x00-\x20\x7f-\xa0()<>@,;:\\".\[\]\ud800-\udfff]+'
_DOT_ATOM = rf"{_ATOM}(?:\.{_ATOM})*"
_QUOTED_STRING = r'"(?:[^\x00-\x1f\x7f"\\\ud800-\udfff]|\\[ -~])*"'
_DOMAIN = rf"(?:{_DOT_ATOM}|\[[!-Z^-~]+\])"
_ROUTE = "(?:@[^ <>]+:)?"  # nobody follows it (RFC 5321, appendix C)
_MAILBOX = rf"(?:{_DOT_ATOM}|{_QUOTED_STRING})@{_DOMAIN}"
_WELL_FORMED = re.compile(rf"<({_ROUTE}{_MAILBOX}|(?i:postmaster)|)>((?: .*)?)")

# Malformed, but understood: `< a@x >`, `<a@x>SIZE=1`, `<App <a@x>>`, `<a@x`, `App <a@x>` and `a@x`.
# Within quotes, only the closing quote ends anything.
_ANY = r'(?:"(?:[^"\\]|\\.)*"|[^">])*'
_BRACKETS = rf"<({_ANY}(?=>\s|>$)|.*?(?=>\s|>$)|[^>]*)>"
_BARE = r'([^<>=]*<[^>]*>|(?:"(?:[^"\\]|\\.)*")?[^<\s]+)'
_UNDERSTOOD = re.compile(rf"(?:{_BRACKETS}|<(\S+)|{_BARE})(.*)", re.DOTALL)

# RFC 5321, sections 4.5.3.1.1 and 4.5.3.1.3; the angle brackets count.
_LOCAL_PART_OCTETS = 64
_PATH_OCTETS = 256

# RFC 1035, section 2.3.4.
_LABEL_OCTETS = 63

_MALFORMED = "a malformed address"


class Path(NamedTuple):
    """The reverse-path of MAIL or the forward-path of RCPT, with its parameters.

    *address*: the path as it was sent, without the angle brackets; `<>` when it is null.
    *parameters*: each keyword, in upper case, with its value, which is empty if there is none.
    *faults*: what other servers may refuse in the path, in words.
    """

    address: str
    parameters: dict[str, str]
    faults: list[str]

    @property
    def options(self) -> list[str]:
        """The parameters as aiosmtpd passes them to hooks."""
        return [
            f"{keyword}={value}" if value else keyword for keyword, value in self.parameters.items()
        ]


@lru_cache(maxsize=256)  # Applications use few addresses: worth 15 % with ten sessions.
def parse(keyword: str, argument: str) -> Path | None:
    """Return the path in *argument* after *keyword*, `FROM` or `TO`, and a colon.

    Whatever can be understood is accepted. Returns None if there is no path.
    """
    word, _, text = argument.partition(":")
    if word.rstrip().upper() != keyword:
        return None
    faults: list[str] = []
    if match := _WELL_FORMED.fullmatch(text):
        address, rest = match.groups()
    elif match := _UNDERSTOOD.fullmatch(text.lstrip()):
        closed, opened, bare, rest = match.groups()
        address = closed if closed is not None else opened or bare
        faults += _faults(text, address, rest, brackets=closed is not None)
    else:
        return None
    if word[-1].isspace():
        faults.append("a space before the colon")
    if address.lower() == "postmaster" and keyword == "FROM":
        faults.append("an address without a domain")
    if not address.strip() and keyword == "TO":
        faults.append("no address")
    if len(address) > _LOCAL_PART_OCTETS or not address.isascii():
        faults += _excesses(address)
    if _MALFORMED not in faults:
        faults += _domain_faults(address.rpartition("@")[2])
    words = [word.partition("=") for word in rest.split()]
    keywords = [keyword.upper() for keyword, _, _ in words]
    parameters = dict(zip(keywords, (value for _, _, value in words), strict=True))
    faults += (f"{name} twice" for name, count in Counter(keywords).items() if count > 1)
    return Path(address.strip() or "<>", parameters, faults)


def _faults(text: str, address: str, rest: str, *, brackets: bool) -> Iterator[str]:
    """Yield what is wrong with a path that is understood, but not well-formed."""
    if text[0].isspace():
        yield "a space after the colon"
    if not brackets:
        yield "missing angle brackets"
    if not _WELL_FORMED.fullmatch(f"<{address}>"):
        yield _MALFORMED
    if rest and not rest[0].isspace():
        yield "a missing space after the path"


def _excesses(address: str) -> Iterator[str]:
    """Yield what in *address* is longer than other servers must accept."""
    octets = address.encode("utf-8", "surrogateescape")
    mailbox = octets.partition(b":")[2] if address.startswith("@") else octets
    if len(mailbox.rpartition(b"@")[0]) > _LOCAL_PART_OCTETS:
        yield f"a local part of more than {_LOCAL_PART_OCTETS} octets"
    if len(octets) + len("<>") > _PATH_OCTETS:
        yield f"a path of more than {_PATH_OCTETS} octets"


def _domain_faults(domain: str) -> Iterator[str]:
    """Yield what is wrong with *domain*, which may be an address literal (RFC 5321, 4.1.3)."""
    if domain.startswith("["):
        host = domain[1:-1]
        try:
            if host.upper().startswith("IPV6:"):
                IPv6Address(host[5:])
            else:
                IPv4Address(host)
        except ValueError:
            yield "a malformed address literal"
        return
    labels = domain.split(".")
    if any(len(label) > _LABEL_OCTETS for label in labels):
        yield f"a label of more than {_LABEL_OCTETS} octets"
    if any(label.startswith("-") or label.endswith("-") for label in labels):
        yield "a label with a hyphen at its end"
