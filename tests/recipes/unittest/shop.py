"""An application that sends from a thread."""

import smtplib
from threading import Thread


def order(host, port, customer):
    """Confirm an order by mail, in the background."""
    Thread(target=_confirm, args=(host, port, customer)).start()


def _confirm(host, port, customer):
    with smtplib.SMTP(host, port) as client:
        mail = "From: shop@example.com\nSubject: Your order\n\nThank you!\n"
        client.sendmail("shop@example.com", [customer], mail)
