from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import pytest

from tests.tools import WARNINGS, connect

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tools import Daemon

# Runs the command, and prints each attempt to contact a host or to run a program.
WATCH = """
import sys
REACHING = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.gethostbyname",
            "socket.gethostbyaddr", "socket.getnameinfo", "subprocess.Popen", "os.system",
            "os.posix_spawn", "os.exec", "os.fork", "urllib.Request"}
sys.addaudithook(lambda event, arguments: event in REACHING and print(event, arguments, flush=True))
from dsmtpd.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("way", ["none", "starttls"])
def test_no_mail_makes_the_server_reach_out_to_anybody(
    start: Callable[..., Daemon], tmp_path: Path, way: str
) -> None:
    tls = [] if way == "none" else ["--tls", way]
    daemon = start(
        "-p", "0", "-d", str(tmp_path), *tls, run=[sys.executable, *WARNINGS, "-c", WATCH]
    )
    with connect(daemon.port()) as client:
        client.ehlo("client.example.com")
        client.login("user", "password") if way == "none" else client.starttls()
        client.sendmail("a@example.com", ["b@example.net", "c@[192.0.2.1]"], b"To: d@example.org")
        client.verify("b@example.net")
    assert daemon.process.stdout is not None
    assert daemon.end(signal.SIGTERM)[0] == 0
    assert daemon.process.stdout.read() == ""
