"""`python -m upcall` is `upcall`."""

from upcall.cli import main

if __name__ == "__main__":
    main(prog_name="upcall")
