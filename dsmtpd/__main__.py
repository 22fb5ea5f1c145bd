"""Starts the command: sets up signals first, and then loads the rest."""

from dsmtpd import signals


def main() -> int:
    """Run the command with the arguments of this process; return its exit code."""
    signals.end_at_once()
    from dsmtpd._dsmtpd import main  # noqa: PLC0415  # takes most of the start

    return main()


if __name__ == "__main__":
    raise SystemExit(main())
