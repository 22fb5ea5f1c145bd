"""A debugging SMTP server: it takes every mail, shows it, stores it when asked, and sends none."""

__version__ = "2.0.0"
