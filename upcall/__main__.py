"""`python -m upcall` is `upcall`, and this is where both begin."""

from __future__ import annotations

import signal


def main() -> None:
    """Runs the program. Ctrl-C while it is imported ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until errors are caught: cli/running.py
    from upcall.cli import main as program

    program(prog_name="upcall")


if __name__ == "__main__":
    main()
