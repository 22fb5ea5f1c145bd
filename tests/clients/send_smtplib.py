"""Sends one mail with Python's own smtplib."""

from __future__ import annotations

import os
import smtplib
import ssl
from email.message import EmailMessage

message = EmailMessage()
message["From"] = "app@example.com"
message["To"] = "user@example.com"
message["Subject"] = "Hello from smtplib"
message.set_content("It works.")

host, port, tls = os.environ["SMTP_HOST"], int(os.environ["SMTP_PORT"]), os.environ["SMTP_TLS"]
context = ssl.create_default_context(cafile=os.environ.get("SMTP_CA"))
connection = (
    smtplib.SMTP_SSL(host, port, timeout=20, context=context)
    if tls == "implicit"
    else smtplib.SMTP(host, port, timeout=20)
)
with connection:
    if tls == "starttls":
        # Without a context, starttls() verifies nothing.
        connection.starttls(context=context)
    connection.login(os.environ["SMTP_USER"], os.environ["SMTP_PASSWORD"])
    connection.send_message(message)
