"""Sends one mail with aiosmtplib."""

from __future__ import annotations

import asyncio
import os
from email.message import EmailMessage

import aiosmtplib

message = EmailMessage()
message["From"] = "app@example.com"
message["To"] = "user@example.com"
message["Subject"] = "Hello from aiosmtplib"
message.set_content("It works.")

asyncio.run(
    aiosmtplib.send(
        message,
        hostname=os.environ["SMTP_HOST"],
        port=int(os.environ["SMTP_PORT"]),
        start_tls=os.environ["SMTP_TLS"] == "starttls",
        use_tls=os.environ["SMTP_TLS"] == "implicit",
        cert_bundle=os.environ.get("SMTP_CA"),
        username=os.environ["SMTP_USER"],
        password=os.environ["SMTP_PASSWORD"],
        timeout=20,
    )
)
