from __future__ import annotations

from typing import Any

import pytest

from dsmtpd.text import endpoint, printable


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
def test_an_ipv6_host_stands_in_brackets(address: Any, text: str) -> None:
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
        ("\u2028\u2066", r"\u2028\u2066"),
        ("caf\udce9", r"caf\udce9"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_not_printable_is_shown_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["x" * 101, "é" * 51, "🎉" * 26, "\x1b" * 26, "\udcff" * 17])
def test_what_is_too_long_is_cut_between_two_characters(text: str) -> None:
    shown = printable(text, 100)
    assert shown.endswith("...")
    assert 96 < len(shown.encode()) <= 100
    assert printable(text[:-1], 100) in {text[:-1], printable(text[:-1])}


def test_without_a_limit_a_text_has_at_most_12_kib() -> None:
    assert printable("x" * 12_288) == "x" * 12_288
    assert printable("x" * 12_289) == "x" * 12_285 + "..."
