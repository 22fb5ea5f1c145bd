"""Mail clients that people use, each sending to the real command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.tools import PATIENCE, Daemon, stored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTENT = b"From: a@example.com\nSubject: =?utf-8?q?caf=C3=A9?=\n\n.a dot\nand the end\n"

COMMANDS = {
    "swaks": (
        "swaks --server 127.0.0.1 --port {port} --helo client.test"
        " --from a@example.com --to b@example.com --data -"
    ),
    "msmtp": (
        "msmtp --host=127.0.0.1 --port={port} --auth=off --tls=off"
        " --from=a@example.com b@example.com"
    ),
    "curl": (
        "curl --silent --show-error smtp://127.0.0.1:{port}/client.test"
        " --mail-from a@example.com --mail-rcpt b@example.com --upload-file - --crlf"
    ),
}


def require(program: str) -> None:
    """Skip the test when *program* is missing; where CI runs, it must not be."""
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("program", COMMANDS)
def test_a_mail_of_a_real_client_is_logged_and_stored_as_it_was_sent(
    start: Callable[..., Daemon], tmp_path: Path, program: str
) -> None:
    require(program)
    daemon = start("-p", "0", "-d", str(tmp_path))
    command = COMMANDS[program].format(port=daemon.port()).split()
    subprocess.run(command, input=CONTENT, check=True, capture_output=True, timeout=PATIENCE)
    code, lines = daemon.end(signal.SIGTERM)
    assert code == 0
    assert lines[0].endswith(": a@example.com -> b@example.com [café]")
    (mail,) = stored(tmp_path)
    head, content = mail.split(b"X-RcptTo: b@example.com\n")
    assert head.endswith(b"X-MailFrom: a@example.com\n")
    # swaks adds empty lines below the mail, msmtp fields above it.
    assert (content.rstrip(b"\n") + b"\n").endswith(CONTENT)


def test_swaks_sends_to_an_address_in_utf8(start: Callable[..., Daemon], tmp_path: Path) -> None:
    require("swaks")
    daemon = start("-p", "0", "-d", str(tmp_path))
    swaks = f"swaks --from a@example.com --to 用户@例え.jp -s localhost -p {daemon.port()}"
    subprocess.run(swaks.split(), check=True, capture_output=True, timeout=PATIENCE)
    _, lines = daemon.end(signal.SIGTERM)
    assert "Servers may refuse an address beyond ASCII without SMTPUTF8 in: RCPT TO:" in lines[0]
    assert " a@example.com -> 用户@例え.jp [test " in lines[1]
    assert len(stored(tmp_path)) == 1
