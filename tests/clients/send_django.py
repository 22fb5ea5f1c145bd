"""Sends one mail with Django's SMTP backend, which trusts the CAs in SSL_CERT_FILE."""

from __future__ import annotations

import os

from django.conf import settings
from django.core.mail import send_mail

settings.configure(
    EMAIL_HOST=os.environ["SMTP_HOST"],
    EMAIL_PORT=int(os.environ["SMTP_PORT"]),
    EMAIL_USE_TLS=os.environ["SMTP_TLS"] == "starttls",
    EMAIL_USE_SSL=os.environ["SMTP_TLS"] == "implicit",
    EMAIL_HOST_USER=os.environ["SMTP_USER"],
    EMAIL_HOST_PASSWORD=os.environ["SMTP_PASSWORD"],
    EMAIL_TIMEOUT=20,
)
send_mail("Hello from django", "It works.", "app@example.com", ["user@example.com"])
