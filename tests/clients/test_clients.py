"""Real mail clients, each sending to the real server."""

from __future__ import annotations

import email
import email.policy
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from dsmtpd._dsmtpd import DsmtpdHandler
from dsmtpd.options import Options
from dsmtpd.server import Listener
from tests.tools import PATIENCE, Handler, require, stored, troubles

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.tools import Daemon, Way

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


# Clients configured as in production; .ci/install-clients installs what they need.
FOLDER = Path(__file__).parent
INSTALLED = FOLDER.parent.parent / ".venv-clients"
PYTHON = INSTALLED / "bin" / "python"
CLASSES = INSTALLED / "classes"
JARS = ("/usr/share/java/jakarta-mail.jar", "/usr/share/java/jakarta-activation.jar")
# The options for short runs halve the time that Java takes to start.
JAVA = (
    "java",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-cp",
    ":".join((str(CLASSES), *JARS)),
)

PROGRAMS: dict[str, tuple[tuple[str, ...], tuple[str | Path, ...]]] = {
    "smtplib": ((sys.executable, "send_smtplib.py"), ()),
    "aiosmtplib": ((str(PYTHON), "send_aiosmtplib.py"), ()),
    "django": ((str(PYTHON), "send_django.py"), ()),
    "flask_mailman": ((str(PYTHON), "send_flask_mailman.py"), ()),
    "fastapi_mail": ((str(PYTHON), "send_fastapi_mail.py"), ()),
    "nodemailer": (("node", "send_nodemailer.mjs"), (INSTALLED / "node_modules" / "nodemailer",)),
    "JakartaMail": ((*JAVA, "SendJakartaMail"), (CLASSES, *JARS)),
    "phpmailer": (("php", "send_phpmailer.php"), ("/usr/share/php/libphp-phpmailer",)),
    "swaks": (("sh", "send_swaks.sh"), ("swaks",)),
    "msmtp": (("sh", "send_msmtp.sh"), ("msmtp",)),
    "curl": (("sh", "send_curl.sh"), ("curl",)),
}


def run(name: str, port: int, way: Way | None, ca: Path) -> int:
    """Have a client send its mail, trusting *ca* if it speaks TLS; return its exit code."""
    (*command, program), needs = PROGRAMS[name]
    require(command[0], *needs)
    environment = {
        **os.environ,
        "SMTP_HOST": "localhost",
        "SMTP_PORT": str(port),
        "SMTP_TLS": way or "none",
        "SMTP_USER": "app",
        "SMTP_PASSWORD": "correct horse",
    }
    if way is not None:
        environment |= {"SMTP_CA": str(ca), "SSL_CERT_FILE": str(ca)}
    if name == "nodemailer":
        # Only a module from stdin looks for its imports in the current folder.
        command, cwd, stdin = [*command, "--input-type=module"], INSTALLED, FOLDER / program
    else:
        command, cwd, stdin = [*command, program], FOLDER, Path(os.devnull)
    with stdin.open() as source:
        return subprocess.run(
            command,
            check=False,
            stdin=source,
            cwd=cwd,
            env=environment,
            capture_output=True,
            timeout=60,
        ).returncode


@pytest.mark.parametrize("way", [None, "starttls", "implicit"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_configured_for_production_delivers_its_mail(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str, way: Way | None
) -> None:
    caplog.set_level(logging.INFO, "dsmtpd")
    ca = tmp_path / "ca.pem"
    with Listener(DsmtpdHandler(tmp_path / "mails"), Options(port=0, tls=way)) as listener:
        ca.write_bytes(listener.ca or b"")
        assert run(name, listener.port, way, ca) == 0
    login, mail = (line.partition(": ")[2] for line in caplog.messages)
    assert login.startswith("app logged in with AUTH ")
    assert mail == f"app@example.com -> user@example.com [Hello from {name}]"
    (content,) = stored(tmp_path / "mails")
    message = email.message_from_bytes(content, policy=email.policy.default)
    body = message.get_body()
    assert body is not None
    assert body.get_content().strip() == "It works."


@pytest.mark.parametrize(
    ("way", "wrong"), [("starttls", "ca"), ("implicit", "ca"), ("implicit", "host")]
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_sends_nothing_to_a_server_it_does_not_trust_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str, way: Way, wrong: str
) -> None:
    trusted, other = trustme.CA(), trustme.CA()
    (ca := tmp_path / "ca.pem").write_bytes(trusted.cert_pem.bytes())
    certificate = other.issue_cert("localhost") if wrong == "ca" else trusted.issue_cert("x.test")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    handler = Handler()
    options = Options(port=0, tls=way, tls_cert=str(tmp_path / "cert.pem"))
    with Listener(handler, options) as listener:
        code = run(name, listener.port, way, ca)
    if name == "swaks" and wrong == "host" and code == 0:
        pytest.skip("this swaks does not check the host name; 20240103 and newer do")
    assert code != 0
    assert handler.envelopes == []
    ((level, text),) = troubles(caplog)
    assert level == "WARNING"
    assert re.match(r"\S+: The .+does not trust the certificate", text)


def test_the_readme_names_the_versions_that_are_tested() -> None:
    requirements = (FOLDER / "requirements.txt").read_text()
    versions = re.findall("==(.+)", requirements)
    versions += json.loads((FOLDER / "package.json").read_text())["dependencies"].values()
    readme = (FOLDER / "README.rst").read_text()
    assert len(versions) == 5
    for version in versions:
        assert f"\n     - {version}\n" in readme


@pytest.mark.parametrize("program", COMMANDS)
def test_a_mail_from_a_real_client_is_logged_and_stored_as_it_was_sent(
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
    # swaks adds empty lines after the mail, msmtp adds fields before it.
    assert (content.rstrip(b"\n") + b"\n").endswith(CONTENT)


def test_swaks_sends_to_an_address_in_utf8(start: Callable[..., Daemon], tmp_path: Path) -> None:
    require("swaks")
    daemon = start("-p", "0", "-d", str(tmp_path))
    swaks = f"swaks --from a@example.com --to 用户@例え.jp -s localhost -p {daemon.port()}"
    subprocess.run(swaks.split(), check=True, capture_output=True, timeout=PATIENCE)
    _, lines = daemon.end(signal.SIGTERM)
    assert "an address beyond ASCII without SMTPUTF8 in RCPT TO:<用户@例え.jp>" in lines[0]
    assert " a@example.com -> 用户@例え.jp [test " in lines[1]
    assert len(stored(tmp_path)) == 1
