"""An application that tries again when the server refuses a recipient."""

import smtplib


def order(host, port, customer):
    """Confirm an order by mail."""
    try:
        _confirm(host, port, customer)
    except smtplib.SMTPRecipientsRefused:
        _confirm(host, port, customer)


def _confirm(host, port, customer):
    mail = "From: shop@example.com\nSubject: Your order\n\nhttps://shop.example/orders/42\n"
    with smtplib.SMTP(host, port) as client:
        client.sendmail("shop@example.com", [customer], mail)
