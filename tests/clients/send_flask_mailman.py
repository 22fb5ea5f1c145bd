"""Sends one mail with Flask-Mailman, which trusts the CAs in SSL_CERT_FILE."""

from __future__ import annotations

import os
import smtplib
import ssl
from typing import Any

from flask import Flask
from flask_mailman import EmailMessage, Mail
from flask_mailman.backends.smtp import EmailBackend


class VerifiedSMTP(smtplib.SMTP):
    def starttls(self, *_args: Any, **_kwargs: Any) -> tuple[int, bytes]:
        return super().starttls(context=ssl.create_default_context())


class StartTLSBackend(EmailBackend):
    """Verifies the server, as Flask-Mailman 1.1.1 does only with MAIL_USE_SSL."""

    connection_class = VerifiedSMTP


app = Flask(__name__)
app.config.update(
    MAIL_SERVER=os.environ["SMTP_HOST"],
    MAIL_PORT=int(os.environ["SMTP_PORT"]),
    MAIL_USE_TLS=os.environ["SMTP_TLS"] == "starttls",
    MAIL_USE_SSL=os.environ["SMTP_TLS"] == "implicit",
    MAIL_BACKEND=StartTLSBackend if os.environ["SMTP_TLS"] == "starttls" else "smtp",
    MAIL_USERNAME=os.environ["SMTP_USER"],
    MAIL_PASSWORD=os.environ["SMTP_PASSWORD"],
    MAIL_TIMEOUT=20,
)
Mail(app)
with app.app_context():
    EmailMessage(
        "Hello from flask_mailman", "It works.", "app@example.com", ["user@example.com"]
    ).send()
