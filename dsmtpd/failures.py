"""Failures on demand: rules that say which replies fail, and how often."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from dsmtpd.conversation import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsmtpd.conversation import Stage

STAGES: tuple[Stage, ...] = ("connect", "auth", "mail", "rcpt", "data")

_CODE = re.compile("[45][0-9]{2}")
_DELAY = re.compile(r"delay=([0-9]{1,6}(?:\.[0-9]{1,6})?)")
_TIMES = re.compile("[1-9][0-9]{0,9}")


class RuleError(ValueError):
    """A rule that makes no sense; the text shows the rule and what is wrong with it."""

    def __init__(self, rule: str, part: str, wrong: str) -> None:
        """Say what is *wrong* with a *part* of a *rule*."""
        super().__init__(f"{rule}: {part!r} {wrong}")


class Rule(NamedTuple):
    """Which replies fail, and how.

    *text*: the rule as the user wrote it. *stage*: what is being replied to.
    *pattern*: a glob, case-insensitive, for the peer's address (`connect`), the user (`auth`), the
    reverse-path (`mail`, `data`) or the recipient (`rcpt`).
    *times*: how often the rule applies; None for always.
    *code*: the reply's code. *drop*: cut the connection. *delay*: seconds to wait before the reply.
    """

    text: str
    stage: Stage
    pattern: str = "*"
    times: int | None = None
    code: int | None = None
    drop: bool = False
    delay: float = 0

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Return the rule of `STAGE:CODE[:PATTERN][:TIMES]`; raises `RuleError`."""
        first, *rest = text.split(":")
        code, pattern, times, *more = [*rest, "", "", ""][: max(3, len(rest))]
        stage = next((stage for stage in STAGES if stage == first), None)
        delay = _DELAY.fullmatch(code)
        if stage is None:
            raise RuleError(text, first, f"is none of {', '.join(STAGES)}")
        if not (_CODE.fullmatch(code) or code == "drop" or delay):
            wrong = "is neither a code from 400 to 599, nor drop or delay=SECONDS"
            raise RuleError(text, code, wrong)
        if times and not _TIMES.fullmatch(times):
            raise RuleError(text, times, "is not a number of times, 1 or more")
        if more:
            wrong = "is one field too many; in a pattern, write ? for a colon"
            raise RuleError(text, ":".join(more), wrong)
        return cls(
            text,
            stage,
            pattern=pattern or "*",
            times=int(times) if times else None,
            code=int(code) if code.isdigit() else None,
            drop=code == "drop",
            delay=float(delay[1]) if delay else 0,
        )

    def failure(self, subject: str) -> Failure:
        """Return how the reply to *subject* fails."""
        reply = f"{self.code} {str(self.code)[0]}.0.0 Failed on demand" if self.code else ""
        what = "connection cut" if self.drop else reply or f"answered after {self.delay:g} s"
        text = f"{self.stage} {subject}: {what}, by the rule {self.text}"
        return Failure(text, reply, drop=self.drop, delay=self.delay)


class Failures:
    """Applies rules: the first one that matches and is not used up counts."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Begin with unused rules."""
        self._rules = list(rules)
        self._left = [rule.times for rule in rules]

    def ask(self, stage: Stage, subject: str) -> Failure | None:
        """Return how the reply to *subject* must fail, or None if it must not."""
        for number, rule in enumerate(self._rules):
            left = self._left[number]
            if rule.stage != stage or left == 0 or not _matches(subject, rule.pattern):
                continue
            self._left[number] = None if left is None else left - 1
            return rule.failure(subject)
        return None


def _matches(subject: str, pattern: str) -> bool:
    return fnmatchcase(subject.lower(), pattern.lower())
