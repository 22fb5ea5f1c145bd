"""The command line: the usage text, and argv turned into `Options`."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

from docopt import DocoptExit, docopt

from dsmtpd import __version__
from dsmtpd.failures import Rule, RuleError
from dsmtpd.options import Options

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
dsmtpd accepts every mail, logs it as one line, and never sends any.

Usage:
  dsmtpd [options] [--fail RULE]...

Add -- COMMAND [ARG...] to run a command while dsmtpd listens, and to exit with its exit code.
The command finds the server through DSMTPD_HOST and DSMTPD_PORT, its Maildir through
DSMTPD_DIRECTORY, and the CA to trust through DSMTPD_TLS_CA.

Options:
  -p PORT, --port PORT        Listen on this port; 0 picks a free one [default: 1025].
  -i NAME, --interface NAME   Listen on this address or host name [default: 127.0.0.1].
  -d DIR, --directory DIR     Store the mails in this Maildir, which is created if it is
                              missing; without -d, nothing is stored.
  --print FORM                Print each mail on stdout, as text or as json.
  --fail RULE                 Make replies fail: STAGE:CODE[:PATTERN][:TIMES], where STAGE is
                              connect, auth, mail, rcpt or data, and CODE is 400 to 599,
                              drop or delay=SECONDS. May be given several times.
  -v, --verbose               Log the whole SMTP dialogue, without passwords.
  -s BYTES, --max-size BYTES  Refuse larger messages; 0 sets no limit [default: 33554432].
  --disable-smtputf8          Do not offer SMTPUTF8, and refuse non-ASCII addresses.
  --disable-auth              Do not offer AUTH, and refuse it.
  --tls WAY                   Speak TLS: starttls offers STARTTLS, implicit begins with TLS.
  --tls-cert FILE             Use this certificate (PEM); without it, one is generated,
                              which needs trustme to be installed.
  --tls-key FILE              The certificate's private key (PEM), if it is not in the same
                              file.
  --tls-ca FILE               Write the generated certificate's CA to this file; without
                              it, to a temporary file.
  --version                   Print the version and exit.
  -h, --help                  Print this text and exit.
"""

_POINTER = "(see dsmtpd --help)"

# Options that make no sense without another one.
_NEEDS = {"--tls-cert": "--tls", "--tls-key": "--tls-cert", "--tls-ca": "--tls"}

# RFC 1870, section 4: a size has at most 20 digits.
_NUMBER = re.compile(r"[0-9]{1,20}")


class UsageError(Exception):
    """A command line that makes no sense; the text names the option and its value."""


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Return the options in *argv*, by default the arguments of this process.

    `--help` and `--version` print and raise `SystemExit`, as docopt does.

    Raises `UsageError` for an argument that is unknown, given twice, incomplete or out of range.
    """
    ours, command = _split(sys.argv[1:] if argv is None else list(argv))
    arguments = _parse(ours)
    try:
        return _options(arguments, command)
    except UsageError as error:
        raise UsageError(f"{error} {_POINTER}") from None


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Split *argv* into our arguments and the command after `--`, which is None without a `--`."""
    if "--" not in argv:
        return argv, None
    end = argv.index("--")
    return argv[:end], argv[end + 1 :]


def _options(arguments: dict[str, Any], command: list[str] | None) -> Options:
    if command is not None and not any(command[:1]):
        raise UsageError("No command after --")
    for option, needed in _NEEDS.items():
        if arguments[option] is not None and arguments[needed] is None:
            raise UsageError(f"{option} needs {needed}")
    if arguments["--tls-ca"] is not None and arguments["--tls-cert"] is not None:
        raise UsageError("--tls-ca makes no sense with --tls-cert")
    return Options(
        interface=_text("--interface", arguments["--interface"], "a host"),
        port=_number("--port", arguments["--port"], "a port from 0 to 65535", 65535),
        directory=_path("--directory", arguments["--directory"], "a folder"),
        max_size=_number("--max-size", arguments["--max-size"], "a number of bytes, 0 or more"),
        disable_smtputf8=arguments["--disable-smtputf8"],
        disable_auth=arguments["--disable-auth"],
        tls=_choice("--tls", arguments["--tls"], "starttls", "implicit"),
        tls_cert=_path("--tls-cert", arguments["--tls-cert"], "a file"),
        tls_key=_path("--tls-key", arguments["--tls-key"], "a file"),
        tls_ca=_path("--tls-ca", arguments["--tls-ca"], "a file"),
        printing=_choice("--print", arguments["--print"], "text", "json"),
        verbose=arguments["--verbose"],
        failures=tuple(_rule("--fail", text) for text in arguments["--fail"]),
        command=tuple(command or ()),
    )


def _parse(argv: list[str]) -> dict[str, Any]:
    try:
        try:
            return docopt(USAGE, argv, version=__version__)
        finally:
            print(end="", flush=True)  # noqa: T201  # fails if docopt's text cannot be written
    except DocoptExit as error:
        raise UsageError(f"{_complaint(error, argv)} {_POINTER}") from None
    except OSError as error:
        # Python would fail on it again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(f"Cannot print: {error.strerror}") from None


def _complaint(error: DocoptExit, argv: list[str]) -> str:
    """Return in one line what docopt dislikes about *argv*.

    docopt names an option whose value is missing or not allowed. It does not name an argument that
    it does not expect: that is the one after the longest beginning that it can parse.
    """
    line = str(error).partition("\n")[0]
    if line.startswith("-"):
        return line
    count = next(count for count in reversed(range(len(argv))) if _can_parse(argv[:count]))
    return f"Unexpected argument: {argv[count]!r}{_hint(argv[count].partition('=')[0])}"


def _hint(option: str) -> str:
    """Suggest the option that a mistyped *option* resembles."""
    from difflib import get_close_matches  # noqa: PLC0415  # slow to import

    options = re.findall(r"--[a-z0-9-]+", USAGE)
    meant = [] if option in options else get_close_matches(option, options, 1)
    return "".join(f"; did you mean {name}?" for name in meant)


def _can_parse(argv: list[str]) -> bool:
    try:
        docopt(USAGE, argv)
    except DocoptExit:
        return False
    return True


def _text(option: str, value: str, wanted: str) -> str:
    # To the system, an empty host means every interface: an unset variable must not open that.
    if not value:
        raise UsageError(f"{option}: '' is not {wanted}")
    return value


def _number(option: str, value: str, wanted: str, most: float = float("inf")) -> int:
    if _NUMBER.fullmatch(value) and int(value) <= most:
        return int(value)
    raise UsageError(f"{option}: {value!r} is not {wanted}")


def _rule(option: str, text: str) -> Rule:
    try:
        return Rule.parse(text)
    except RuleError as error:
        raise UsageError(f"{option} {error}") from None


def _choice(option: str, value: str | None, one: str, other: str) -> Any:
    if value is None or value.lower() in {one, other}:
        return value and value.lower()
    raise UsageError(f"{option}: {value!r} is neither {one} nor {other}")


def _path(option: str, value: str | None, wanted: str) -> str | None:
    if value is None:
        return None
    path = os.path.expanduser(_text(option, value, wanted))  # noqa: PTH111  # shown as it was typed
    if path.startswith("~"):
        raise UsageError(f"{option}: {value!r} names a user without a home")
    return path
