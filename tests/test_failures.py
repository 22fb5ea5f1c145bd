from __future__ import annotations

import pytest

from dsmtpd.conversation import Failure
from dsmtpd.failures import Failures, Rule, RuleError


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("rcpt:451", Rule("", "rcpt", code=451)),
        ("connect:421::1", Rule("", "connect", times=1, code=421)),
        ("mail:drop:gone@*", Rule("", "mail", "gone@*", drop=True)),
        ("data:599:*@x:20", Rule("", "data", "*@x", times=20, code=599)),
        ("auth:delay=1.5", Rule("", "auth", delay=1.5)),
        ("rcpt:400:7", Rule("", "rcpt", "7", code=400)),
    ],
)
def test_a_rule_names_stage_code_pattern_and_times(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule._replace(text=text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "'' is none of connect, auth, mail, rcpt, data"),
        ("RCPT:451", "'RCPT' is none of connect, auth, mail, rcpt, data"),
        ("rcpt", "'' is neither a code from 400 to 599, nor drop or delay=SECONDS"),
        ("rcpt:250", "'250' is neither a code from 400 to 599, nor drop or delay=SECONDS"),
        ("rcpt:600", "'600' is neither a code from 400 to 599, nor drop or delay=SECONDS"),
        ("rcpt:٤٥١", "'٤٥١' is neither a code from 400 to 599, nor drop or delay=SECONDS"),
        ("rcpt:delay=", "'delay=' is neither a code from 400 to 599, nor drop or delay=SECONDS"),
        (
            "rcpt:delay=-1",
            "'delay=-1' is neither a code from 400 to 599, nor drop or delay=SECONDS",
        ),
        ("rcpt:451:*:0", "'0' is not a number of times, 1 or more"),
        ("rcpt:451:*:two", "'two' is not a number of times, 1 or more"),
        ("connect:421:::1", "'1' is one field too many; in a pattern, write ? for a colon"),
    ],
)
def test_a_rule_error_names_the_wrong_part(text: str, wrong: str) -> None:
    with pytest.raises(RuleError) as raised:
        Rule.parse(text)
    assert str(raised.value) == f"{text}: {wrong}"


def failures(*rules: str) -> Failures:
    return Failures([Rule.parse(rule) for rule in rules])


def test_a_reply_fails_by_code_drop_or_delay() -> None:
    code, drop, delay = "rcpt:551:a@x", "rcpt:drop:b@x", "rcpt:delay=0.5:c@x"
    found = failures(code, drop, delay)
    assert found.ask("rcpt", "a@x") == Failure(
        f"rcpt a@x: 551 5.0.0 Failed on demand, by the rule {code}", "551 5.0.0 Failed on demand"
    )
    assert found.ask("rcpt", "b@x") == Failure(
        f"rcpt b@x: connection cut, by the rule {drop}", drop=True
    )
    assert found.ask("rcpt", "c@x") == Failure(
        f"rcpt c@x: answered after 0.5 s, by the rule {delay}", delay=0.5
    )
    assert found.ask("rcpt", "d@x") is None
    assert found.ask("mail", "a@x") is None


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("", "anything", True),
        ("*@flaky.test", "a@FLAKY.test", True),
        ("*@flaky.test", "a@flaky.test.x", False),
        ("<>", "<>", True),
        ("??1", "::1", True),
        ("[ab]@x", "b@x", True),
        ("a.b@x", "axb@x", False),
        ("*\n*", "a\nb", True),
    ],
)
def test_a_pattern_is_a_glob(pattern: str, subject: str, *, matches: bool) -> None:
    assert (failures(f"mail:451:{pattern}").ask("mail", subject) is not None) is matches


def codes(found: Failures, subject: str, count: int) -> list[str]:
    asked = (found.ask("rcpt", subject) for _ in range(count))
    return ["-" if failure is None else failure.reply[:3] for failure in asked]


def test_the_first_matching_rule_that_is_not_used_up_applies() -> None:
    found = failures("rcpt:451:a@*:2", "rcpt:452:*:1", "rcpt:550:a@x")
    assert codes(found, "b@x", 2) == ["452", "-"]
    assert codes(found, "a@y", 3) == ["451", "451", "-"]
    assert codes(found, "a@x", 3) == ["550", "550", "550"]
