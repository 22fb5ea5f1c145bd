"""Failures on demand: rules that say which replies are to fail, and how often."""

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
    """A rule that makes no sense; the text shows it, and the part that is wrong."""

    def __init__(self, rule: str, part: str, wrong: str) -> None:
        """Tell what is *wrong* with a *part* of a *rule*."""
        super().__init__(f"{rule}: {part!r} {wrong}")


class Rule(NamedTuple):
    """Which replies are to fail, and how.

    *text*: the rule as it was given. *stage*: what the reply is to.
    *pattern*: a glob; case does not count. Of `connect` it is to match the peer's address, of
    `auth` the user, of `mail` and `data` the reverse-path, of `rcpt` the recipient.
    *times*: how often the rule applies, None for always.
    *code*: that of the reply. *drop*: cut the connection. *delay*: wait so many seconds.
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
            raise RuleError(text, times, "is not how often, a number from 1")
        if more:
            wrong = "is too much; in a pattern, ? stands for a colon"
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
        what = "is cut" if self.drop else reply or f"is answered after {self.delay:g} s"
        text = f"{self.stage} {subject}: {what}, by the rule {self.text}"
        return Failure(text, reply, drop=self.drop, delay=self.delay)


class Failures:
    """Applies rules: the first one that matches, and that is not spent, counts."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Begin with rules that have not been applied yet."""
        self._rules = list(rules)
        self._left = [rule.times for rule in rules]

    def ask(self, stage: Stage, subject: str) -> Failure | None:
        """Return how the reply to *subject* is to fail, or None when it is not to."""
        for number, rule in enumerate(self._rules):
            left = self._left[number]
            if rule.stage != stage or left == 0 or not _matches(subject, rule.pattern):
                continue
            self._left[number] = None if left is None else left - 1
            return rule.failure(subject)
        return None


def _matches(subject: str, pattern: str) -> bool:
    return fnmatchcase(subject.lower(), pattern.lower())
