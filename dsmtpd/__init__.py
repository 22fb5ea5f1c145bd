"""A debugging SMTP server that accepts every mail, shows it, stores it, and never sends any."""

__version__ = "2.0.0"
