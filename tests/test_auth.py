from __future__ import annotations

from base64 import b64encode

import pytest

from dsmtpd.auth import MECHANISMS, AuthError, decode


def log_in(mechanism: str, *responses: bytes) -> tuple[list[bytes], str]:
    """Return the challenges of *mechanism*, and the user that it finds in *responses*."""
    exchange = MECHANISMS[mechanism]()
    challenges = [next(exchange), *map(exchange.send, responses[:-1])]
    with pytest.raises(StopIteration) as done:
        exchange.send(responses[-1])
    return challenges, done.value.value


@pytest.mark.parametrize(
    ("response", "user"),
    [
        (b"\0app@example.com\0secret", "app@example.com"),
        (b"admin\0app\0secret", "app"),
        ("\0café\0sésame".encode(), "café"),
        (b"\0\xff\0secret", r"\xff"),
        (b"\0\0", "(no name)"),
    ],
)
def test_plain_asks_for_everything_at_once(response: bytes, user: str) -> None:
    assert log_in("PLAIN", response) == ([b""], user)


@pytest.mark.parametrize("response", [b"", b"app", b"app\0secret", b"\0a\0b\0c"])
def test_plain_requires_three_values(response: bytes) -> None:
    exchange = MECHANISMS["PLAIN"]()
    next(exchange)
    with pytest.raises(AuthError, match=r"^501 5\.5\.2 "):
        exchange.send(response)


def test_login_asks_for_the_name_and_then_for_the_password() -> None:
    assert log_in("LOGIN", b"app", b"secret") == ([b"Username:", b"Password:"], "app")
    assert log_in("LOGIN", b"", b"") == ([b"Username:", b"Password:"], "(no name)")
    assert log_in("LOGIN", b"\xff", b"secret")[1] == r"\xff"


def test_login_refuses_a_plain_response_as_a_name() -> None:
    exchange = MECHANISMS["LOGIN"]()
    next(exchange)
    exchange.send(b"\0app\0secret")
    with pytest.raises(AuthError, match=r"^501 5\.5\.2 "):
        exchange.send(b"")


DIGEST = b"b913a602c7eda7a495b4e6e7334d3890"


@pytest.mark.parametrize(
    ("mechanism", "challenge", "response", "user"),
    [
        ("CRAM-MD5", b"<1.1@dsmtpd>", b"tim " + DIGEST, "tim"),
        ("CRAM-MD5", b"<1.1@dsmtpd>", b"tim tom " + DIGEST.upper(), "tim tom"),
        ("CRAM-MD5", b"<1.1@dsmtpd>", b" " + DIGEST, "(no name)"),
        ("XOAUTH2", b"", b"user=a@x\1auth=Bearer token\1\1", "a@x"),
        ("XOAUTH2", b"", b"auth=Bearer token\1user=\xc3\xa9@x\1\1", "é@x"),
        ("XOAUTH2", b"", b"auth=Bearer token\1\1", "(no name)"),
        ("XOAUTH2", b"", b"user=\1auth=Bearer token\1\1", "(no name)"),
        ("OAUTHBEARER", b"", b"n,a=a@x,\1host=h\1port=25\1auth=Bearer token\1\1", "a@x"),
        ("OAUTHBEARER", b"", b"n,a=a=2Cb=3Dc@x,\1auth=Bearer token\1\1", "a,b=c@x"),
        ("OAUTHBEARER", b"", b"y,,\1auth=Bearer token\1\1", "(no name)"),
    ],
)
def test_the_other_mechanisms_ask_for_everything_at_once(
    mechanism: str, challenge: bytes, response: bytes, user: str
) -> None:
    assert log_in(mechanism, response) == ([challenge], user)


@pytest.mark.parametrize(
    ("mechanism", "response"),
    [
        ("CRAM-MD5", b""),
        ("CRAM-MD5", b"\0app\0secret word"),
        ("CRAM-MD5", b"\0app " + DIGEST),
        ("OAUTHBEARER", b""),
        ("OAUTHBEARER", b"user=a@x\1auth=Bearer token\1\1"),
    ],
)
def test_the_other_mechanisms_refuse_malformed_responses(mechanism: str, response: bytes) -> None:
    exchange = MECHANISMS[mechanism]()
    next(exchange)
    with pytest.raises(AuthError, match=rf"^501 5\.5\.2 {mechanism} needs "):
        exchange.send(response)


@pytest.mark.parametrize(
    ("response", "octets"),
    [
        (b"c2VjcmV0", b"secret"),
        (b"YQ==", b"a"),
        (b"YQ=", b"a"),
        (b"YQ", b"a"),
        (b"", b""),
        (b"=", b""),
        (b64encode(bytes(9216)), bytes(9216)),
    ],
)
def test_a_response_is_decoded(response: bytes, octets: bytes) -> None:
    assert decode(response) == octets


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (b"*", "501 5.7.0"),
        (b"Y", "501 5.5.2"),
        (b"Y===", "501 5.5.2"),
        (b"YQ==YQ==", "501 5.5.2"),
        (b"Y Q==", "501 5.5.2"),
        (b"**", "501 5.5.2"),
        (b"\xff\xff\xff\xff", "501 5.5.2"),
        (b"A" * 12_289, "500 5.5.6"),
    ],
)
def test_an_invalid_response_is_refused(response: bytes, code: str) -> None:
    with pytest.raises(AuthError) as raised:
        decode(response)
    assert str(raised.value).startswith(f"{code} ")
