from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmtpd.path import parse

WELL_FORMED = [
    "a@example.com",
    "bounce+user=example.org@lists.example.com",
    "!#$%&'*+-/=?^_`{|}~@example.com",
    "=?utf-8?q?boss?=@example.com",
    "first.last@sub.example.com",
    "a_b@my_host",
    "user@localhost",
    "a@[127.0.0.1]",
    "a@[IPv6:2001:db8::1]",
    '"a b"@example.com',
    '"a>b, (c) \\" @"@example.com',
    '""@example.com',
    "@relay.example.org,@[192.0.2.1]:a@example.com",
    "a@x-y.example.com",
    "a@xn--bcher-kva.example",
    "A@EXAMPLE.COM",
    "a-b@example.com",
    "-@example.com",
    "1234567890@example.com",
    "a@example.museum",
    "a@a.b.c.d.e.f.g.example.com",
    "user%example.org@example.com",
    "o'brien@example.com",
    "a/b=c@example.com",
    '"a\\ b"@example.com',
    '"very.(),:;<>[]\\".very"@example.com',
    "a@[IPv6:::]",
    "a@[IPv6:::ffff:192.0.2.1]",
    "bücher@bücher.example",
    "a@1.example.com",
    "用户@例え.jp",
    "a\u0301@example.com",
    f"{'l' * 64}@{'d' * 62}.{'d' * 63}.{'d' * 62}",
]

# Each with the address that the parser returns.
MALFORMED = {
    "root": "root",
    "a@": "a@",
    "@example.com": "@example.com",
    "a@b@c": "a@b@c",
    ".a@example.com": ".a@example.com",
    "a..b@example.com": "a..b@example.com",
    "a@example.com.": "a@example.com.",
    "a b@example.com": "a b@example.com",
    " a@example.com ": "a@example.com",
    '"a@example.com': '"a@example.com',
    "App <a@example.com>": "App <a@example.com>",
    "a(comment)@example.com": "a(comment)@example.com",
    "caf\udce9@example.com": "caf\udce9@example.com",
    "a\x01@example.com": "a\x01@example.com",
    "(" * 900: "(" * 900,
    "a>b@example.com": "a>b@example.com",
    "a@x>z": "a@x>z",
    "@x y:a@example.com": "@x y:a@example.com",
    "@x<y:a@example.com": "@x<y:a@example.com",
    "@x>y:a@example.com": "@x>y:a@example.com",
    "a@[]": "a@[]",
    "a@[a b]": "a@[a b]",
    "a@[a[b]": "a@[a[b]",
    '"a\x01"@example.com': '"a\x01"@example.com',
    '"a\x7f"@example.com': '"a\x7f"@example.com',
    '"caf\udce9"@example.com': '"caf\udce9"@example.com',
    '"caf\\é"@example.com': '"caf\\é"@example.com',
    **{address: address for address in (f"a{c}b@example.com" for c in ")(<,;:\\[]\x7f\x85\xa0")},
}

LONGEST = ".".join(["d" * 63] * 3)

ADDRESS = "a malformed address"
LITERAL = "a malformed address literal"
LABEL = "a label of more than 63 octets"
HYPHEN = "a label with a hyphen at its end"
BRACKETS = "missing angle brackets"
COLON = "a space after the colon"
LOCAL_PART = "a local part of more than 64 octets"
PATH = "a path of more than 256 octets"


@pytest.mark.parametrize("address", WELL_FORMED)
@pytest.mark.parametrize("keyword", ["FROM", "from", "From"])
def test_a_well_formed_path_is_accepted_as_it_was_sent(keyword: str, address: str) -> None:
    assert parse("FROM", f"{keyword}:<{address}>") == (address, {}, [])


def test_the_null_path_is_a_fault_only_in_rcpt() -> None:
    assert parse("FROM", "FROM:<>") == ("<>", {}, [])
    assert parse("TO", "TO:<>") == ("<>", {}, ["no address"])
    assert parse("TO", "TO:< >") == ("<>", {}, [ADDRESS, "no address"])


def test_a_bare_postmaster_is_a_fault_only_in_mail() -> None:
    for address in ("postmaster", "Postmaster"):
        assert parse("TO", f"TO:<{address}>") == (address, {}, [])
        assert parse("FROM", f"FROM:<{address}>") == (address, {}, ["an address without a domain"])


@pytest.mark.parametrize(("sent", "address"), MALFORMED.items())
def test_a_malformed_address_is_accepted_and_reported(sent: str, address: str) -> None:
    path = parse("TO", f"TO:<{sent}>")
    assert path is not None
    assert (path.address, path.faults[0]) == (address, ADDRESS)


@pytest.mark.parametrize(
    ("sent", "address", "faults"),
    [
        ("FROM:a@x", "a@x", [BRACKETS]),
        ("FROM:<a@x", "a@x", [BRACKETS]),
        ("FROM:App <a@x>", "App <a@x>", [BRACKETS, ADDRESS]),
        ('FROM:"a b"@x', '"a b"@x', [BRACKETS]),
        (r'FROM:"a\" b"@x', r'"a\" b"@x', [BRACKETS]),
        ("FROM: <a@x>", "a@x", [COLON]),
        (r'FROM: <"a\"> b"@x> SIZE=1', r'"a\"> b"@x', [COLON]),
        ("FROM:\t<>", "<>", [COLON]),
        ("FROM: a@x", "a@x", [COLON, BRACKETS]),
        ("FROM :<a@x>", "a@x", ["a space before the colon"]),
        ("FROM:<a@x>\tSIZE=1", "a@x", []),
        (f"FROM:<@{'r' * 90}:a@x>", f"@{'r' * 90}:a@x", []),
        ("FROM:<a@x>SIZE=1", "a@x", ["a missing space after the path"]),
        (f"FROM:<{'l' * 65}@x>", f"{'l' * 65}@x", [LOCAL_PART]),
        (f"FROM:<{'é' * 33}@x>", f"{'é' * 33}@x", [LOCAL_PART]),
        (f'FROM:<"{"l" * 31}@{"l" * 31}"@x>', f'"{"l" * 31}@{"l" * 31}"@x', [LOCAL_PART]),
        (f"FROM:<l@{LONGEST}.{'d' * 61}>", f"l@{LONGEST}.{'d' * 61}", [PATH]),
        (f"FROM:<{'l' * 150}@{LONGEST}>", f"{'l' * 150}@{LONGEST}", [LOCAL_PART, PATH]),
        (f"FROM:<a@{'d' * 64}.x>", f"a@{'d' * 64}.x", [LABEL]),
        ("FROM:<a@-x.y>", "a@-x.y", [HYPHEN]),
        ("FROM:<a@x-.y>", "a@x-.y", [HYPHEN]),
        ("FROM:<a@-x..y>", "a@-x..y", [ADDRESS]),
        ("FROM:<a@[256.0.0.1]>", "a@[256.0.0.1]", [LITERAL]),
        ("FROM:<a@[::1]>", "a@[::1]", [LITERAL]),
        ("FROM:<a@[IPv6:1::2::3]>", "a@[IPv6:1::2::3]", [LITERAL]),
        ("FROM:<a@x> SIZE=1 body=7BIT size=2 BODY=7BIT", "a@x", ["SIZE twice", "BODY twice"]),
    ],
)
def test_a_path_that_other_servers_may_refuse_is_accepted_and_reported(
    sent: str, address: str, faults: list[str]
) -> None:
    path = parse("FROM", sent)
    assert path is not None
    assert (path.address, path.faults) == (address, faults)


@pytest.mark.parametrize("path", ["<a@x>", "a@x", "<App <a@x>>", "<>", '<"> "@x>', "App <a>"])
def test_parameters_follow_the_path(path: str) -> None:
    parsed = parse("TO", f"TO:{path} notify=SUCCESS,failure ORCPT=rfc822;<b@x>  X-Vendor ENVID=")
    assert parsed is not None
    assert parsed.parameters == {
        "NOTIFY": "SUCCESS,failure",
        "ORCPT": "rfc822;<b@x>",
        "X-VENDOR": "",
        "ENVID": "",
    }
    assert parsed.options == ["NOTIFY=SUCCESS,failure", "ORCPT=rfc822;<b@x>", "X-VENDOR", "ENVID"]
    alone = parse("TO", f"TO:{path}")
    assert alone is not None
    assert (parsed.address, parsed.faults) == (alone.address, alone.faults)


@pytest.mark.parametrize("argument", ["", "FROM", "FROM:", "FROM: ", "FROM:<", "TO:<a@x>", "<a@x>"])
def test_without_a_path_parse_returns_none(argument: str) -> None:
    assert parse("FROM", argument) is None


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.text(
        st.characters(exclude_characters='<>"', exclude_categories=["Cs"])
        | st.sampled_from("@. \\:\udce9"),
        max_size=40,
    )
)
def test_any_text_in_brackets_is_accepted_as_it_was_sent(text: str) -> None:
    path = parse("FROM", f"FROM:<{text}> SIZE=1")
    assert path is not None
    assert (path.address, path.parameters) == (text.strip() or "<>", {"SIZE": "1"})


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(['"', "\\", "<", ">", "@", ".", " ", "=", "a", "é"])).map("".join))
def test_no_input_makes_the_parser_fail(text: str) -> None:
    path = parse("FROM", f"FROM:{text}")
    assert path is None or path.address == "<>" or path.address in text


def test_thousands_of_parameters_are_read_in_linear_time() -> None:
    words = " ".join(f"X{number}=" for number in range(100_000))
    path = parse("FROM", f"FROM:<a@x> {words} X7=")
    assert path is not None
    assert path.faults == ["X7 twice"]
