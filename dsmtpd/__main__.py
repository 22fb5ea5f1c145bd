"""Runs the command as `python -m dsmtpd`."""

from dsmtpd._dsmtpd import main

raise SystemExit(main())
