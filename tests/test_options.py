from __future__ import annotations

import pytest

from dsmtpd.options import Options


def test_the_defaults_are_those_of_the_command() -> None:
    assert Options()._asdict() == {
        "interface": "127.0.0.1",
        "port": 1025,
        "directory": None,
        "max_size": 33554432,
        "disable_smtputf8": False,
        "disable_auth": False,
        "tls": None,
        "tls_cert": None,
        "tls_key": None,
        "tls_ca": None,
        "printing": None,
        "verbose": False,
        "failures": (),
        "command": (),
    }


def test_options_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Options().port = 1  # type: ignore[misc]  # the point of the test
