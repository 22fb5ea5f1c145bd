"""Prints mails on stdout, as text for people or as JSON for programs."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmtpd.content import Content
from dsmtpd.output import Output
from dsmtpd.text import endpoint, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal, TextIO

    from typing_extensions import Self

    from dsmtpd.message import Message

log = logging.getLogger(__package__)

_RULE = "-" * 72 + "\n"

# How many octets of mails may wait for a reader of stdout, and for how many seconds a reply.
_WAITING_OCTETS = 64 * 1024 * 1024
_PATIENCE = 1

# Seconds to wait at the end for mails that are still to be printed.
_END_PATIENCE = 5


class Arrival(NamedTuple):
    """A mail that has been accepted.

    *time*: when, in local time. *tls*: the TLS version that it came by, or None. *user*: the name
    that had logged in, or None. *file*: the path of the file that it is stored in, or None.
    """

    message: Message
    time: datetime
    tls: str | None = None
    user: str | None = None
    file: str | None = None


def as_text(arrival: Arrival) -> str:
    """Return a mail as a person wants to read it, safe for a terminal; no line is wrapped."""
    content = Content.from_bytes(arrival.message.content)
    values = ((name, content.field(name)) for name in ("From", "To", "Cc", "Subject", "Date"))
    lines = [f"{name}: {value}" for name, value in values if value]
    lines += [f"File: {arrival.file}"] if arrival.file else []
    lines += ["", *content.readable().rstrip("\n").split("\n")]
    lines += [""] if content.attachments else []
    for name, kind, octets in content.attachments:
        lines.append(f"Attachment: {name or 'no name'}, {kind}, {len(octets):,} octets")
    return "".join(f"{_escaped(line)}\n" for line in lines)


def _escaped(line: str) -> str:
    return printable(line.expandtabs(), sys.maxsize)


def as_json(arrival: Arrival) -> str:
    """Return a mail as a line of JSON in ASCII; README.rst lists the keys."""
    message, content = arrival.message, Content.from_bytes(arrival.message.content)
    record = {
        "time": arrival.time.isoformat(timespec="milliseconds"),
        "peer": endpoint(message.peer),
        "tls": arrival.tls,
        "auth_user": arrival.user,
        "mail_from": message.mail_from,
        "rcpt_tos": message.rcpt_tos,
        "subject": content.subject,
        "message_id": content.field("Message-ID"),
        "size": len(message.content),
        "file": arrival.file,
        "text": content.text,
        "html": content.html,
        "links": content.links,
        "attachments": [
            {"name": name, "type": kind, "size": len(octets)}
            for name, kind, octets in content.attachments
        ],
        "warnings": message.faults(),
    }
    return json.dumps(record) + "\n"


class Printer:
    """Prints mails while its `with` block runs, one after the other, in a thread of its own.

    If stdout is closed or full, or nobody reads it while many mails wait, it logs a warning and
    stops printing.
    """

    def __init__(self, form: Literal["text", "json"], stream: TextIO | None) -> None:
        """Print to *stream*, which is None if the process was started without stdout."""
        self._render, self._rule = (as_text, _RULE) if form == "text" else (as_json, "")
        self._stream = stream
        self._mails: SimpleQueue[tuple[Arrival, Callable[[], object]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="printing", daemon=True)
        self._output: Output | None = None  # while mails are printed
        self._begun = self._done = 0  # octets of mails
        self._is_stuck = False

    def __enter__(self) -> Self:
        """Start printing."""
        if self._stream is None:
            self._end(os.strerror(errno.EBADF))
            return self
        self._output = Output(self._stream)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._end(error)
        return self

    def __exit__(self, *_: object) -> None:
        """Print what is pending, unless nobody reads it."""
        self._hurry()
        self._mails.put(None)
        if self._thread.ident is not None:
            self._thread.join(_END_PATIENCE)

    async def show(self, message: Message, session: Any, file: str | None) -> None:
        """Print *message* of *session*, which is stored in *file*.

        Return when that is done, or when nobody seems to read stdout.
        """
        if self._output is None:
            return
        time, tls = datetime.now().astimezone(), session.ssl and session.ssl["version"]
        arrival = Arrival(message, time, tls, session.auth_data, file)
        loop = asyncio.get_running_loop()
        printed = loop.create_future()
        self._begun += len(message.content)
        if self._begun - self._done > _WAITING_OCTETS:
            self._hurry()
        self._mails.put((arrival, partial(loop.call_soon_threadsafe, printed.set_result, None)))
        if not self._is_stuck:
            done, _ = await asyncio.wait([printed], timeout=_PATIENCE)
            self._is_stuck = not done

    def _hurry(self) -> None:
        if (output := self._output) is not None:
            output.hurry()

    def _run(self) -> None:
        between = ""
        while (mail := self._mails.get()) is not None:
            arrival, tell = mail
            if self._output is not None:
                self._print(self._output, between + self._render(arrival))
            between = self._rule
            self._done += len(arrival.message.content)
            self._is_stuck = False
            with suppress(RuntimeError):  # The loop is closed.
                tell()
        if self._output is not None:
            self._output.close()

    def _print(self, output: Output, text: str) -> None:
        try:
            reason = None if output.write(text) else "Nobody reads them"
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            output.close()
            self._end(reason)

    def _end(self, reason: object) -> None:
        self._output = None
        log.warning("Mails are no longer printed: %s", reason)
