"""Reads a key's passphrase from a descriptor, file, terminal or the `keyring` library.

Never from arguments or environment, which other processes can read. Returned passphrases are bytearrays, which the
caller wipes. Copies may remain: the `keyring` library uses str, which cannot be wiped. Therefore it is used in
short-lived processes only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Final

from upcall.core.errors import UpcallError, UsageError, error_words
from upcall.keys.private_file import read_private
from upcall.keys.private_file import wipe as wipe
from upcall.process import start_python as startpython

SERVICE: Final = "upcall"  # in the `keyring` library; the user name there is the key's signature
MAX_SIZE: Final = 1024  # bytes
TTY: Final = "/dev/tty"
PATIENCE: Final = 20.0  # seconds for the keyring library: a person may have to unlock it


class NoPassphrase(UpcallError):
    """The passphrase cannot be obtained from its source. The text names the reason, for people."""


class NoTerminal(UsageError):
    """There is no terminal to type a passphrase on."""


def from_fd(fd: int) -> bytearray:
    """Reads a passphrase from a descriptor to its end; drops one newline at its end. Blocks. UsageError if it
    is empty, longer than MAX_SIZE bytes, or cannot be read."""
    buffer = bytearray(MAX_SIZE + 2)
    try:
        size = _fill(fd, buffer)
    except (OSError, OverflowError) as error:
        known = isinstance(error, OSError) and error.errno != errno.EBADF
        raise UsageError(f"descriptor {fd}: {error_words(error) if known else 'is not open for reading'}") from None
    return _strip(buffer, size, f"descriptor {fd}")


def from_file(path: str | Path) -> bytearray:
    """Reads a passphrase from a file that no other user may read or write; drops one newline at its end. OSError as
    `read_private`; UsageError as `from_fd`."""
    buffer, _ = read_private(path, MAX_SIZE + 1)
    return _strip(buffer, len(buffer), str(path))


def from_terminal(
    prompt: str, again: str | None = None, other: str = "--passphrase-fd or --passphrase-file", empty: str = ""
) -> bytearray:
    """Reads a passphrase from the controlling terminal, without echo. Blocks until a line is typed.

    `again`: a second prompt, to type it twice; None: once. `other`: options that the error names if there is no
    terminal; "": none. `empty`: what helps if nothing is typed. NoTerminal; UsageError if nothing is typed, or the
    two differ.
    """
    try:
        fd = os.open(TTY, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        hint = f": use {other}" if other else ""
        raise NoTerminal(f"no terminal to ask on ({prompt.rstrip(': ')}){hint}") from None
    try:
        secret = _ask(fd, prompt, empty)
        if again is not None:
            repeated = _ask(fd, again, empty)
            same = secret == repeated
            wipe(repeated)
            if not same:
                wipe(secret)
                raise UsageError("the two passphrases differ")
        return secret
    finally:
        os.close(fd)


def _ask(fd: int, prompt: str, empty: str) -> bytearray:
    before = termios.tcgetattr(fd)
    hidden = list(before)
    hidden[3] &= ~termios.ECHO  # the fourth field holds the local modes
    buffer = bytearray(MAX_SIZE + 2)
    try:
        termios.tcsetattr(fd, termios.TCSAFLUSH, hidden)
        os.write(fd, prompt.encode())
        size = _fill(fd, buffer, stop_at_line_end=True)
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)  # discards input after the line
        os.write(fd, b"\n")
    if not size or (size == 1 and buffer[0] == 0x0A):
        raise UsageError("nothing was typed" + (f": {empty}" if empty else ""))
    return _strip(buffer, size, "what was typed")


def _fill(fd: int, buffer: bytearray, *, stop_at_line_end: bool = False) -> int:
    size = 0
    with memoryview(buffer) as view:
        while size < len(buffer) and (count := os.readv(fd, [view[size:]])):
            size += count
            if stop_at_line_end and view[size - 1] == 0x0A:
                break
    return size


def _strip(buffer: bytearray, size: int, what: str) -> bytearray:
    """Returns a copy of the first `size` bytes, without a newline at the end, and wipes the buffer. UsageError."""
    if size and buffer[size - 1] == 0x0A:
        size -= 1
    secret = buffer[:size]
    wipe(buffer)
    if not 1 <= size <= MAX_SIZE:
        wipe(secret)
        found = f"more than {MAX_SIZE} bytes" if size else "is empty"
        raise UsageError(f"{what}: {found}; a passphrase has 1 to {MAX_SIZE} bytes")
    return secret


# --- the `keyring` library ----------------------------------------------------------------------------------


def fetch_from_keyring(signature: str, timeout: float) -> bytearray:
    """Fetches a key's passphrase from the `keyring` library, in a child process. Blocks for at most `timeout` seconds.

    A child process, because the library and its backends cost 100 ms and 12 MB, may use D-Bus and may wait for a
    person. NoPassphrase if the library has none, or the time-out passes; UsageError if it is too long.
    """
    deadline = time.monotonic() + timeout
    # -I excludes the working directory and PYTHONPATH, but not the site-packages of a virtual environment, where
    # keyring's backends are.
    command = startpython.command("upcall.keys.passphrase", signature, isolated=True)
    buffer = bytearray(MAX_SIZE + 2)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=startpython.cleaned(), bufsize=0
    ) as child:
        try:
            size = _collect(child, buffer, deadline)
            status = child.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise NoPassphrase(f"the keyring library gave no answer within {timeout:g} s") from None
        finally:
            child.kill()  # has no effect once the child was reaped
    if status:
        wipe(buffer)
        raise NoPassphrase(_WHY.get(status, "the keyring library failed").format(signature))
    return _strip(buffer, size, "the keyring library")


def _collect(child: subprocess.Popen[bytes], buffer: bytearray, deadline: float) -> int:
    """Reads the child's output to its end into a buffer; returns its size. Not by communicate(), which returns bytes
    that cannot be wiped. `deadline`: seconds of CLOCK_MONOTONIC; TimeoutError after it."""
    if child.stdout is None:
        raise NoPassphrase("the child process has no output")
    poll, size = select.poll(), 0
    poll.register(child.stdout, select.POLLIN)
    with memoryview(buffer) as view:
        while size < len(buffer):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(errno.ETIMEDOUT, "no answer")
            count = os.readv(child.stdout.fileno(), [view[size:]])
            if not count:
                break
            size += count
    return size


def store_in_keyring(signature: str, secret: bytearray) -> None:
    """Stores a passphrase in the `keyring` library, in this process, which must be short-lived: copies remain in its
    memory. NoPassphrase if the library fails; UsageError unless the passphrase is UTF-8."""
    import keyring
    from keyring.errors import KeyringError

    try:
        keyring.set_password(SERVICE, signature, secret.decode())
    except UnicodeDecodeError:
        raise UsageError("the keyring library keeps text only, and the passphrase is not UTF-8") from None
    except KeyringError as error:
        raise NoPassphrase(f"the keyring library cannot keep it: {_first_line(error)}") from error


def delete_from_keyring(signature: str) -> None:
    """Deletes a key's passphrase from the `keyring` library, in this process, which must be short-lived. No error if
    there is none, or the library does not work: it may be the reason for the deletion."""
    import keyring
    from keyring.errors import KeyringError

    with contextlib.suppress(KeyringError):
        keyring.delete_password(SERVICE, signature)


_WHY = {
    os.EX_NOINPUT: "the keyring library holds no passphrase for {}",
    os.EX_UNAVAILABLE: "the keyring library has no backend here",
    os.EX_TEMPFAIL: "the keyring library could not give the passphrase for {}",
}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _main(signature: str) -> int:
    """Runs the child process of fetch_from_keyring: writes the passphrase to stdout. Returns the exit status."""
    import keyring
    from keyring.errors import KeyringError, NoKeyringError

    from upcall.kernel.process import harden

    harden()
    try:
        secret = keyring.get_password(SERVICE, signature)
    except NoKeyringError:
        return os.EX_UNAVAILABLE
    except KeyringError as error:
        sys.stderr.write(f"keyring: {_first_line(error)}\n")
        return os.EX_TEMPFAIL
    if secret is None:
        return os.EX_NOINPUT
    os.write(sys.stdout.fileno(), secret.encode())
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
