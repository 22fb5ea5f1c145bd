from __future__ import annotations

import codecs
from typing import Any

import pytest

from dsmtpd.text import decoded, endpoint, printable


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 25), "127.0.0.1:25"),
        (("::1", 33192, 0, 0), "[::1]:33192"),
        (("fe80::1%eth0", 25, 0, 2), "[fe80::1%eth0]:25"),
        (("localhost", 25), "localhost:25"),
        ("/run/socket", "/run/socket"),
        (None, "None"),
    ],
)
def test_an_ipv6_host_is_shown_in_brackets(address: Any, text: str) -> None:
    assert endpoint(address) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 用户, 🎉", "plain, é, 用户, 🎉"),
        ("a\r\nb", r"a\r\nb"),
        ("a\tb", r"a\tb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x00\x07\x7f\x85\x9b", r"\x00\x07\x7f\x85\x9b"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\u2028\u2029\u2066", r"\u2028\u2029\u2066"),
        ("\u200b\u200e\u061c\ufeff\xad", r"\u200b\u200e\u061c\ufeff\xad"),
        ("\ue000\U000f0000", r"\ue000\U000f0000"),
        ("\u0378\ufdd0\uffff\U0001fffe\U0010ffff", r"\u0378\ufdd0\uffff\U0001fffe\U0010ffff"),
        ("caf\udce9", r"caf\udce9"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "会議\u3000お知らせ",
        "Bienvenue\xa0!",
        "1\u202f000\u2009€",
        "👨\u200d👩\u200d👧",
        "\u0645\u06cc\u200c\u062e",
        "\U0001fffd",
    ],
)
def test_characters_that_readers_need_are_not_escaped(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("octets", "shown"),
    [
        (b"=?utf-8?b?5Lya6K2w44CA44GK55+l44KJ44Gb?=", "会議\u3000お知らせ"),
        (b"Bienvenue\xc2\xa0!", "Bienvenue\xa0!"),
        (b"=?gb2312?B?1uzpRrv5IIa0?=", "朱镕基 喆"),
        (b"=?GBK?B?1uzpRrv5IIa0?=", "朱镕基 喆"),
        (b"=?ks_c_5601-1987?b?jGO55rCix8+x?=", "똠방각하�"),
        (b"=?euc-kr?b?jGO55rCix8+x?=", "똠방각하�"),
        (b"=?shift_jis?b?h0A=?=", "①"),
        (b"=?x-sjis?b?h0A=?=", "①"),
        (b"=?windows-31j?q?=87=40?=", "①"),
        (b"=?iso-8859-1?q?=80_=93x=94?=", "€ “x”"),
        (b"=?us-ascii?q?caf=E9?=", "café"),
        (b"=?latin1?q?caf=E9?=", "café"),
        (b"=?big5?b?iEA=?=", "㇀"),
        (b"=?windows-874?q?=A1=80?=", "ก€"),
        (b"=?dos-437?q?=82?=", "é"),
        (b"=?cp-1252?q?=80?=", "€"),
        (b"=?iso-8859-8-i?q?=F9?=", "ש"),
        (b"=?utf8mb4?b?8J+OiQ?=", "🎉"),
        (b"=?UTF-8?Q?Alles=20klar??=", "Alles klar?"),
        (b"=?UTF-8?Q?What?_Who?_=C3=A9?= x", "What? Who? é x"),
        ("=?utf-8?q?Café_=C3=A9?=".encode(), "Café é"),
        ("=?iso-8859-1?q?Café?=".encode(), "Café"),
        ("é".encode() * 5000, "é" * 5000),
        ("Votre réservation été".encode()[:-1], "Votre réservation ét\ufffd"),
        (b"caf\xe9 \x80", "café €"),
        (b"caf\xe9 \xc3\xa9", "caf\ufffd é"),
        (b"=?utf-8-sig?q?a?= b =?utf-8-sig?q?c?=", "a b c"),
        (b"=?koi8-u?q?=D1?= =?koi8-u?q?=D1?=", "яя"),
        (b"=?x-1?q?a?= b =?x-2?q?a?= b =?utf-8?q?c?=", "=?x-1?q?a?= b =?x-2?q?a?= b c"),
    ],
)
def test_a_subject_is_shown_as_people_wrote_it(octets: bytes, shown: str) -> None:
    assert decoded(octets) == shown


def test_at_most_one_unknown_charset_is_looked_up_per_subject() -> None:
    looked_up: list[str] = []
    search = looked_up.append
    codecs.register(search)
    try:
        decoded(b" ".join(b"=?no-such-%d?q?a?= x" % i for i in range(500)))
    finally:
        codecs.unregister(search)
    assert looked_up == ["no_such_0"]


@pytest.mark.parametrize("text", ["x" * 101, "é" * 51, "🎉" * 26, "\x1b" * 26, "\udcff" * 17])
def test_a_text_that_is_too_long_is_cut_between_two_characters(text: str) -> None:
    shown = printable(text, 100)
    assert shown.endswith("...")
    assert 96 < len(shown.encode()) <= 100
    assert printable(text[:-1], 100) in {text[:-1], printable(text[:-1])}


def test_the_default_limit_is_12_kib() -> None:
    assert printable("x" * 12_288) == "x" * 12_288
    assert printable("x" * 12_289) == "x" * 12_285 + "..."


@pytest.mark.parametrize(
    "label", ["unicode_escape", "RAW-unicode-escape", "_unicode-escape!", "punycode", "IDNA"]
)
def test_not_every_python_codec_is_a_charset(label: str) -> None:
    text = f"=?{label}?q?=5Cd?="
    assert decoded(text.encode()) == text


# In a codec's name, Python up to 3.14 ignores non-ASCII characters, 3.15 warns, 3.17 refuses.
def test_a_charset_with_a_non_ascii_name_is_unknown() -> None:
    text = "=?utf-8\u00e9?q?a?="
    assert decoded(text.encode()) == text
