"""Sends one mail with fastapi-mail."""

from __future__ import annotations

import asyncio
import os

from fastapi_mail import ConnectionConfig, FastMail, MessageSchema, MessageType

config = ConnectionConfig(
    MAIL_SERVER=os.environ["SMTP_HOST"],
    MAIL_PORT=int(os.environ["SMTP_PORT"]),
    MAIL_STARTTLS=os.environ["SMTP_TLS"] == "starttls",
    MAIL_SSL_TLS=os.environ["SMTP_TLS"] == "implicit",
    CERT_BUNDLE=os.environ.get("SMTP_CA"),
    MAIL_USERNAME=os.environ["SMTP_USER"],
    MAIL_PASSWORD=os.environ["SMTP_PASSWORD"],
    MAIL_FROM="app@example.com",
    TIMEOUT=20,
)
message = MessageSchema(
    subject="Hello from fastapi_mail",
    recipients=["user@example.com"],
    body="It works.",
    subtype=MessageType.plain,
)
asyncio.run(FastMail(config).send_message(message))
