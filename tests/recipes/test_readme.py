"""Run what README shows as it is printed, except for the port, which is a free one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import smtplib
import socket
import subprocess
import time
from ast import literal_eval
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from textwrap import dedent, indent
from typing import TYPE_CHECKING, NamedTuple

import pytest

from dsmtpd import __version__
from dsmtpd.testing import messages
from tests.clients.test_clients import INSTALLED, PYTHON
from tests.tools import PATIENCE, connect, require, send

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent
README = (FOLDER.parent.parent / "README.rst").read_text(encoding="utf-8")

# A literal block: the indented lines after a directive or a line that ends with two colons.
BLOCK = re.compile(r"^(?:\.\. code-block:: \w+|.*::)\n\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
BLOCKS = [dedent(match[1]).strip("\n") + "\n" for match in BLOCK.finditer(README)]

# Matches snippets that start dsmtpd, send to it, or read the mails.
SERVES = re.compile(
    r"^(?:\$ |- run: )?dsmtpd(?: |$)|smtplib|\b1025\b|MAIL_SERVER|dsmtpd\.testing|\(.?dsmtpd\b",
    re.MULTILINE,
)
LOG_LINE = re.compile(r"[0-9-]{10} [0-9:,]{12} [A-Z]+: ")


class Place:
    """A folder in which `dsmtpd` listens on a free port, unless it is started with -p."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._pid = folder / "pid"
        command = folder / "bin" / "dsmtpd"
        command.parent.mkdir()
        real = shlex.quote(str(INSTALLED / "bin" / "dsmtpd"))
        command.write_text(
            f"#!/bin/sh\necho $$ >{shlex.quote(str(self._pid))}\n"
            f'case " $* " in *" -p "*) exec {real} "$@";; esac\nexec {real} -p {self.port} "$@"\n'
        )
        command.chmod(0o755)
        path = (str(command.parent), str(INSTALLED / "bin"), os.environ["PATH"])
        # Without the variables of the pytest that runs this test.
        mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        self.environment = {**mine, "PATH": ":".join(path)}

    def run(self, *command: str, code: int = 0, **variables: str) -> str:
        """Run *command*, and return its output; its exit code must be *code*."""
        done = subprocess.run(
            command,
            check=False,
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def bash(self, text: str) -> str:
        return self.run("bash", "-c", text.replace("1025", str(self.port)))

    def python(self, text: str) -> str:
        return self.run(str(PYTHON), "-c", text.replace("1025", str(self.port)))

    @contextmanager
    def started(self, text: str = "dsmtpd") -> Iterator[Output]:
        """Run *text*, which starts dsmtpd; stop dsmtpd after the block."""
        stdout, stderr = self.folder / "stdout", self.folder / "stderr"
        with stdout.open("w") as out, stderr.open("w") as log:
            process = subprocess.Popen(
                ["bash", "-c", text],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )
        output = Output([], [])
        try:
            self._wait(process, stdout, stderr, self.folder / "dsmtpd.log")
            yield output
        finally:
            if process.poll() is None:
                os.kill(int(self._pid.read_text()), signal.SIGINT)
            process.wait(PATIENCE)
            output.stdout.extend(stdout.read_text(encoding="utf-8").splitlines())
            output.stderr.extend(stderr.read_text(encoding="utf-8").splitlines())
        assert process.returncode == 0, output

    def _wait(self, process: subprocess.Popen[bytes], *logs: Path) -> None:
        """Wait until one of the *logs* says that dsmtpd has started."""
        end = time.monotonic() + PATIENCE
        while not any("Starting dsmtpd" in log.read_text("utf-8") for log in logs if log.exists()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)


class Output(NamedTuple):
    """The lines that a command has printed, once it has ended."""

    stdout: list[str]
    stderr: list[str]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    require(PYTHON)
    return Place(tmp_path)


# Whole examples: README shows one file of each.


RECIPES = {
    "pytest/test_shop.py": "pytest -n 2 --strict-markers -W error",
    "fastapi/test_app.py": "pytest",
    "flask/test_app.py": "pytest",
    "unittest/test_shop.py": "python -W error -m unittest",
    "django/tests.py": "python manage.py test",
    "node/app.test.mjs": "node --test",
    "shell/check.sh": "bash check.sh",
}


def copy_recipe(place: Place, name: str) -> None:
    shutil.copytree(FOLDER / Path(name).parent, place.folder, dirs_exist_ok=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_and_readme_shows_it(place: Place, name: str) -> None:
    command = RECIPES[name].split()
    require(*command[:1])
    copy_recipe(place, name)
    (place.folder / "node_modules").symlink_to(INSTALLED / "node_modules")
    output = place.run(*command)
    assert (FOLDER / name).read_text(encoding="utf-8") in BLOCKS
    if "check.sh" not in name:
        assert re.search(r"\b[1-9] passed|Ran [1-9] test|pass [1-9]", output)


# A change that breaks each application, so that its test must fail.
FAULTS = {
    "pytest/test_shop.py": ("shop.py", "orders", "oders"),
    "fastapi/test_app.py": ("app.py", "confirm?", "conform?"),
    "flask/test_app.py": ("app.py", '"Welcome"', '"Hello"'),
    "unittest/test_shop.py": ("shop.py", "Your", "My"),
    "django/tests.py": ("urls.py", '"accounts/', '"account/'),
    "node/app.test.mjs": ("app.mjs", "token=", "tokken="),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_recipe_fails_when_its_application_is_broken(place: Place, name: str) -> None:
    file, old, new = FAULTS[name]
    command = RECIPES[name].split()
    require(*command[:1])
    copy_recipe(place, name)
    (place.folder / "node_modules").symlink_to(INSTALLED / "node_modules")
    source = (place.folder / file).read_text(encoding="utf-8")
    assert old in source
    (place.folder / file).write_text(source.replace(old, new), encoding="utf-8")
    output = place.run(*command, code=1)
    assert re.search(r"\b1 failed|FAILED \((?:failures|errors)=1\)|fail 1\b", output)
    assert "ImportError" not in output


def test_a_script_has_the_exit_code_of_its_tests_and_leaves_nothing_behind(place: Place) -> None:
    copy_recipe(place, "shell/check.sh")
    (place.folder / "scratch").mkdir()
    place.run("bash", "check.sh", code=7, CODE="7", TMPDIR=str(place.folder / "scratch"))
    assert not [*(place.folder / "scratch").iterdir()]
    with pytest.raises(ProcessLookupError):
        os.kill(int((place.folder / "pid").read_text()), 0)


# All other snippets.


def snippet(beginning: str) -> str:
    """Return the block of README that starts with *beginning*."""
    (block,) = (block for block in BLOCKS if block.startswith(beginning))
    return block


def test_each_snippet_that_starts_dsmtpd_or_sends_to_it_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    beginnings = tuple(map(literal_eval, re.findall(r"= snippet\((.+)\)", source)))
    recipes = {(FOLDER / name).read_text(encoding="utf-8") for name in RECIPES}
    serving = [block for block in BLOCKS if SERVES.search(block) and not LOG_LINE.match(block)]
    run = [block for block in BLOCKS if block.startswith(beginnings) or block in recipes]
    assert serving == run


def assert_log(expected: list[str], lines: list[str], port: int) -> None:
    """Check that *lines* are as *expected*, except for times, ports and the version."""

    def normalized(text: str) -> str:
        text = LOG_LINE.sub("T ", text.replace(str(port), "1025"))
        return re.sub(r"127\.0\.0\.1:(?!1025)\d+", "PEER", text.replace(__version__, "V"))

    assert [normalized(line) for line in lines] == [normalized(line) for line in expected]


def test_the_first_screen_is_what_dsmtpd_prints(place: Place) -> None:
    block = snippet("$ dsmtpd --print text\n")
    command, *shown = block.splitlines()
    start = command.removeprefix("$ ") + " 2>&1"
    with place.started(start) as output, connect(place.port) as client:
        client.send_message(reset_mail())
    assert_log(shown, output.stdout[: len(shown)], place.port)


def test_the_quick_start_shows_the_mail(place: Place) -> None:
    start = snippet("dsmtpd\n")
    mail = snippet("python3 -c ")
    with place.started(start) as output:
        assert place.bash(mail) == ""
    (line,) = (line for line in output.stderr if "app@example.com" in line)
    assert line.endswith(": app@example.com -> user@test.com [Welcome Email]")


def test_the_mails_in_a_maildir_can_be_read(place: Place) -> None:
    start = snippet("dsmtpd -d mails")
    script = snippet("from dsmtpd.testing import messages")
    with place.started(start):
        send(place.port, b"From: a@x\r\nSubject: Hi\r\n\r\nhttps://example.com/ is it.\r\n")
    assert place.python(script) == "Hi https://example.com/\n"


DJANGO = """
from django.conf import settings
from django.core.mail import send_mail
settings.configure(EMAIL_HOST=EMAIL_HOST, EMAIL_PORT=EMAIL_PORT)
send_mail("Hello", "It works.", "app@example.com", ["user@test.com"])
"""
FLASK = """
from flask import Flask
from flask_mailman import EmailMessage, Mail
app = Flask("app")
{}
Mail(app)
with app.app_context():
    EmailMessage("Hello", "It works.", "app@example.com", ["user@test.com"]).send()
"""
FASTAPI = """
import asyncio
from fastapi_mail import ConnectionConfig, FastMail, MessageSchema, MessageType
mail = FastMail({})
message = MessageSchema(
    subject="Hello", recipients=["user@test.com"], body="It works.", subtype=MessageType.plain
)
asyncio.run(mail.send_message(message))
"""
NODE = """
import nodemailer from "nodemailer";
const transport = {}
await transport.sendMail({{
  from: "app@example.com", to: "user@test.com", subject: "Hello", text: "It works.",
}});
"""


def assert_hello(output: Output) -> None:
    assert output.stderr[-2].endswith(": app@example.com -> user@test.com [Hello]")


def test_the_settings_of_python_frameworks_send_a_mail(place: Place) -> None:
    django = snippet("EMAIL_HOST = ")
    flask = snippet("app.config.update(")
    fastapi = snippet("ConnectionConfig(")
    for program in (django + DJANGO, FLASK.format(flask), FASTAPI.format(fastapi)):
        with place.started() as output:
            place.python(program)
        assert_hello(output)


def test_the_settings_of_nodemailer_send_a_mail(place: Place) -> None:
    settings = snippet("nodemailer.createTransport(")
    require("node", INSTALLED / "node_modules")
    (place.folder / "node_modules").symlink_to(INSTALLED / "node_modules")
    program = NODE.format(settings.replace("1025", str(place.port)))
    with place.started() as output:
        place.run("node", "--input-type=module", "--eval", program)
    assert_hello(output)


def test_swaks_sends_a_mail_by_hand(place: Place) -> None:
    block = snippet("swaks ")
    require("swaks")
    with place.started() as output:
        place.bash(block)
    (line,) = (line for line in output.stderr if "INFO: 127" in line)
    assert "a@example.com -> 用户@例え.jp [test " in line


def test_tls_writes_the_ca_and_logs_what_readme_shows(place: Place) -> None:
    block = snippet("$ dsmtpd --tls")
    command, *log = block.splitlines()
    with place.started(command.removeprefix("$ ")) as output:
        assert (place.folder / "ca.pem").exists()
    assert_log(log, output.stderr[: len(log)], place.port)


LINK = "https://shop.example/accounts/reset/MQ/cq2n5f-7c3f0b6f1d8e5ae4b9b7e4c1af8a1c3d/"


def reset_mail() -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"] = "Shop <shop@example.com>", "user@test.com"
    mail["Subject"] = "Reset your password"
    mail.set_content(f"Hello Zoë, here you go:\n\n{LINK}\n", cte="quoted-printable")
    return mail


def test_a_mail_is_printed_as_readme_shows(place: Place) -> None:
    block = snippet("$ dsmtpd --print text 2")
    command, *printed = block.splitlines()
    mail = reset_mail()
    mail.add_attachment(b"%" * 12_345, maintype="application", subtype="pdf", filename="terms.pdf")
    with place.started(command.removeprefix("$ ")) as output, connect(place.port) as client:
        client.send_message(mail)
    assert output.stdout == printed


def test_jq_prints_the_links_of_a_mail(place: Place) -> None:
    block = snippet("dsmtpd --print json")
    require("jq")
    with place.started(block) as output, connect(place.port) as client:
        client.send_message(reset_mail())
    assert output.stdout == [LINK]


def test_replies_fail_on_demand_as_readme_says(place: Place) -> None:
    block = snippet("dsmtpd --fail ")
    (hit,) = (block for block in BLOCKS if "Failed on demand" in block)
    with place.started(block) as output, connect(place.port) as client:
        client.ehlo()
        client.mail("a@example.com")
        assert [client.rcpt("a@flaky.test")[0] for _ in range(3)] == [451, 451, 250]
        client.rset()
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.mail("gone@example.com")
    assert_log([hit.strip()], output.stderr[1:2], place.port)


def test_a_command_sends_to_the_dsmtpd_that_runs_it(place: Place) -> None:
    block = snippet("dsmtpd -p 0 -d mails -- ")
    copy_recipe(place, "shell/check.sh")
    place.bash(block)
    assert [message.subject for message in messages(place.folder / "mails")] == ["Welcome"]


def test_the_handler_stores_the_mails_of_a_program(place: Place) -> None:
    block = snippet("from aiosmtpd.controller import")
    program = f"{block}import smtplib\nclient = smtplib.SMTP('127.0.0.1', 1025)\n"
    place.python(f"{program}client.sendmail('a@x', ['b@x'], 'Subject: Hi')")
    assert [message.subject for message in messages(place.folder / "mails")] == ["Hi"]


def test_the_job_for_github_stores_the_mails_of_its_tests(place: Place) -> None:
    block = snippet("- run: pip install")
    workflow = (FOLDER / "github" / "tests.yml").read_text(encoding="utf-8")
    assert indent(block, " " * 6) in workflow
    (command,) = re.findall("- run: (dsmtpd .*)", block)
    copy_recipe(place, "shell/check.sh")
    place.bash(command)
    assert len(messages(place.folder / "mails")) == 1
