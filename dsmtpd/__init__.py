"""A debugging SMTP server: it takes every mail, shows it, stores it when asked, and sends none."""

__version__ = "1.2.0"
