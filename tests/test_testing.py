from __future__ import annotations

import os
import smtplib
import ssl
import subprocess
import sys
import time
from email.message import EmailMessage
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from dsmtpd.maildir import Maildir
from dsmtpd.message import Message
from dsmtpd.testing import (
    Attachment,
    ReceivedMessage,
    RuleError,
    Server,
    TLSError,
    messages,
)
from tests.tools import PATIENCE, connect, envelope, posix, send

if TYPE_CHECKING:
    from pathlib import Path

LINK = "https://shop.example/reset/" + "a" * 80


def a_mail() -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "a@example.com", "b@example.com", "Grüße"
    mail.set_content(f"Hallo Zoë, {LINK} hilft.\n", cte="quoted-printable")
    mail.add_alternative(f'<a href="{LINK}">Hier</a>', subtype="html")
    mail.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="ü.pdf")
    mail.as_bytes()  # this generates the boundaries
    return mail


def test_a_sent_mail_is_received_and_decoded() -> None:
    mail = a_mail()
    with Server() as server, connect(server.port, server.host) as client:
        client.send_message(mail)
        (message,) = server.messages
        assert client.sock is not None
        peer = "{}:{}".format(*client.sock.getsockname())
    assert message == ReceivedMessage(
        "a@example.com", ("b@example.com",), peer, mail.as_bytes().replace(b"\n", b"\r\n")
    )
    assert message.subject == "Grüße"
    assert message.text == f"Hallo Zoë, {LINK} hilft.\n"
    assert message.html == f'<a href="{LINK}">Hier</a>\n'
    assert message.links == (LINK,)
    assert message.attachments == (Attachment("ü.pdf", "application/pdf", b"%PDF"),)
    assert message.email["Subject"] == "Grüße"
    assert isinstance(message.email, EmailMessage)


def test_a_message_is_immutable_and_hashable() -> None:
    message = ReceivedMessage("<>", ("b@x",), "", b"")
    with pytest.raises(AttributeError):
        message.content = b"x"  # type: ignore[misc]  # the point of the test
    assert len({message, ReceivedMessage("<>", ("b@x",), "", b"")}) == 1


def test_a_null_reverse_path_is_shown_as_it_was_sent() -> None:
    with Server() as server, connect(server.port) as client:
        client.sendmail("", ["b@example.com"], "Subject: Gone\n\n")
    assert server.messages[0].mail_from == "<>"


@pytest.mark.parametrize(
    ("subject", "shown"),
    [
        ("Hello", "<a@x -> b@x, c@x [Hello]>"),
        ("\x1b[31m", r"<a@x -> b@x, c@x [\x1b[31m]>"),
        ("x" * 1000, f"<a@x -> b@x, c@x [{'x' * 380}...>"),
    ],
)
def test_the_repr_of_a_message_is_like_its_line_in_the_log(subject: str, shown: str) -> None:
    content = f"Subject: {subject}\r\n\r\n".encode()
    assert repr(ReceivedMessage("a@x", ("b@x", "c@x"), "", content)) == shown


def test_wait_returns_once_enough_mails_have_arrived() -> None:
    waited: SimpleQueue[object] = SimpleQueue()
    with Server() as server:
        Thread(target=lambda: waited.put(server.wait(2, timeout=1e6)), daemon=True).start()
        for _ in range(2):
            assert waited.empty()
            send(server.port)
        assert waited.get(timeout=PATIENCE) == server.messages
        assert server.wait() == server.messages
        assert len(server.messages) == 2


def test_wait_raises_an_error_that_shows_what_has_arrived() -> None:
    with Server() as server:
        with pytest.raises(TimeoutError) as raised:
            server.wait(timeout=0)
        assert str(raised.value) == "0 of 1 mails arrived within 0 s"
        send(server.port)
        with pytest.raises(TimeoutError) as raised:
            server.wait(2, timeout=0.001)
        assert str(raised.value) == (
            "1 of 2 mails arrived within 0.001 s\n<a@example.com -> b@example.com [Hello]>"
        )


def test_clear_forgets_the_mails() -> None:
    with Server() as server:
        send(server.port)
        server.clear()
        assert server.messages == ()
        send(server.port)
        assert len(server.messages) == 1


def test_a_stopped_server_keeps_its_mails_and_refuses_connections() -> None:
    with Server() as server:
        send(server.port)
    assert len(server.messages) == 1
    with pytest.raises(ConnectionRefusedError):
        connect(server.port)


def test_servers_run_side_by_side() -> None:
    with Server() as one, Server() as other:
        assert one.port != other.port
        send(one.port)
        assert (len(one.messages), len(other.messages)) == (1, 0)


@pytest.mark.parametrize(
    ("options", "keyword", "value"),
    [
        ({}, "auth", "PLAIN LOGIN OAUTHBEARER XOAUTH2"),
        ({"auth": False}, "auth", None),
        ({}, "smtputf8", ""),
        ({"smtputf8": False}, "smtputf8", None),
        ({}, "size", "33554432"),
        ({"max_size": 1000}, "size", "1000"),
        ({}, "starttls", None),
        ({"tls": "starttls"}, "starttls", ""),
    ],
)
def test_the_server_accepts_the_options_of_the_command(
    options: dict[str, Any], keyword: str, value: str | None
) -> None:
    with Server(**options) as server, connect(server.port) as client:
        client.ehlo()
        offered = client.esmtp_features.get(keyword)
        assert (offered and offered.strip()) == value


def test_clients_can_trust_the_ca_of_the_server() -> None:
    with Server(tls="implicit") as server:
        context = ssl.create_default_context(cadata=server.ca)
        with smtplib.SMTP_SSL(server.host, server.port, "c.test", context=context) as client:
            client.sendmail("a@example.com", ["b@example.com"], "Subject: Hello\n\n")
    assert len(server.messages) == 1


def test_without_tls_there_is_no_ca() -> None:
    assert Server().ca is None


def refused(server: Server) -> bool:
    try:
        send(server.port)
    except smtplib.SMTPRecipientsRefused:
        return True
    return False


@pytest.mark.parametrize("rules", ["rcpt:451:b@*:1", ["mail:451:z", "rcpt:451::1"]])
def test_rules_make_replies_fail(rules: str | list[str]) -> None:
    with Server(fail=rules) as server:
        assert [refused(server) for _ in range(2)] == [True, False]
        server.fail(rules)
        assert [refused(server) for _ in range(2)] == [True, False]
        server.fail("rcpt:550")
        assert refused(server)
        server.fail([])
        assert not refused(server)


def test_rules_apply_to_clients_that_are_already_connected() -> None:
    with Server() as server, connect(server.port) as client:
        client.ehlo()
        server.fail("mail:451")
        assert client.mail("a@example.com") == (451, b"4.0.0 Failed on demand")


def test_a_delay_of_zero_is_no_delay() -> None:
    with Server(fail="mail:delay=0") as server, connect(server.port) as client:
        client.ehlo()
        assert client.mail("a@example.com")[0] == 250


def test_a_delay_ends_even_if_the_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    with Server(fail="mail:delay=0.01") as server:
        send(server.port)
    assert len(server.messages) == 1


def test_a_program_that_forgets_to_stop_the_server_still_exits() -> None:
    program = "from dsmtpd.testing import Server; Server().__enter__()"
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)
    assert done.returncode == 0


def test_invalid_options_raise() -> None:
    with pytest.raises(ValueError, match=r"^max_size: -1 is not a number of octets, 0 or more"):
        Server(max_size=-1)
    with pytest.raises(ValueError, match=r"^max_size: '1000' is not a number of octets"):
        Server(max_size="1000")  # type: ignore[arg-type]  # as someone without mypy does
    with pytest.raises(RuleError, match=r"^rcpt:200: '200' is neither a code"):
        Server(fail="rcpt:200")
    with pytest.raises(ValueError, match=r"^tls: 'ssl' is neither starttls nor implicit"):
        Server(tls="ssl")  # type: ignore[arg-type]  # as someone without mypy does


def test_tls_without_trustme_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(TLSError, match="Cannot generate a certificate"):
        Server(tls="starttls")


# A Maildir


PEER = ("127.0.0.1", 1024)


def store(
    maildir: Path,
    *,
    peer: Any = PEER,
    mail_from: str | None = "a@x",
    rcpt_tos: tuple[str, ...] = ("b@x",),
    content: bytes = b"Hi\r\n",
) -> str:
    message = Message.from_envelope(peer, envelope(mail_from, rcpt_tos, content))
    return Maildir(maildir).add(content, head=message.envelope_fields())


def test_the_mails_in_a_maildir_are_returned_oldest_first_read_or_not(tmp_path: Path) -> None:
    keys = [store(tmp_path, content=b"Subject: %d\r\n\r\nHi\r\n" % number) for number in range(12)]
    for number in (0, 5):
        file = tmp_path / "new" / keys[number]
        file.rename(tmp_path / "cur" / f"{keys[number]}:2,S")
    (tmp_path / "tmp" / "half").touch()
    (tmp_path / "new" / ".hidden").touch()
    assert [message.subject for message in messages(tmp_path)] == [str(n) for n in range(12)]
    content = b"Subject: 0\n\nHi\n"
    assert messages(str(tmp_path))[0] == ReceivedMessage("a@x", ("b@x",), "127.0.0.1:1024", content)


@pytest.mark.parametrize(
    "rcpt_tos",
    [
        ("b@x", "c@x"),
        ('"b, c"@x', "d@x"),
        ("用户@例え.jp", "=?b@x"),
        (r'"\", "@x', '"b@x'),
        ("b,c@x",),
        ('"b@x', '"c@x'),
    ],
)
def test_a_stored_mail_keeps_its_envelope(rcpt_tos: tuple[str, ...], tmp_path: Path) -> None:
    store(tmp_path, mail_from="ä@x", rcpt_tos=rcpt_tos, peer=("::1", 1024, 0, 0))
    assert messages(tmp_path) == (ReceivedMessage("ä@x", rcpt_tos, "[::1]:1024", b"Hi\n"),)


def test_a_stored_mail_from_a_client_without_an_address_has_no_peer(tmp_path: Path) -> None:
    store(tmp_path, mail_from=None, peer="")
    assert messages(tmp_path) == (ReceivedMessage("<>", ("b@x",), "", b"Hi\n"),)


def test_a_mail_that_another_program_stored_has_no_envelope(tmp_path: Path) -> None:
    Maildir(tmp_path).add(b"Subject: Other\n\nX-Peer: x\nX-MailFrom: x\nX-RcptTo: x\n")
    (message,) = messages(tmp_path)
    assert (message.peer, message.mail_from, message.rcpt_tos) == ("", "", ())
    assert message.subject == "Other"


def test_a_mail_that_a_reader_moves_meanwhile_is_returned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = store(tmp_path), store(tmp_path)
    read = type(tmp_path).read_bytes
    steps = [(f"new/{key}", f"cur/{key}:2,"), (f"new/{other}", f"cur/{other}:2,")]
    steps += [(f"cur/{name}:2,", f"cur/{name}:2,S") for name in (key, other)]

    def move(file: Path) -> bytes:
        content = read(file)
        for old, new in (steps.pop(0) for _ in range(2) if steps):
            (tmp_path / old).rename(tmp_path / new)
        return content

    monkeypatch.setattr(type(tmp_path), "read_bytes", move)
    assert len(messages(tmp_path)) == 2
    assert not steps


@posix
def test_folders_and_fifos_are_skipped(tmp_path: Path) -> None:
    store(tmp_path)
    (tmp_path / "new" / "folder").mkdir()
    os.mkfifo(tmp_path / "new" / "fifo")
    assert len(messages(tmp_path)) == 1


def test_copies_of_mails_are_read_too(tmp_path: Path) -> None:
    key = store(tmp_path)
    octets = (tmp_path / "new" / key).read_bytes()
    (tmp_path / "cur" / "10:30.eml").write_bytes(octets)
    (tmp_path / "cur" / "10:45.eml").write_bytes(octets.replace(b"\n", b"\r\n"))
    unix, windows, original = messages(tmp_path)
    assert unix == original
    assert windows == ReceivedMessage("a@x", ("b@x",), "127.0.0.1:1024", b"Hi\r\n")


def test_a_missing_maildir_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mails/new"):
        messages(tmp_path / "mails")
