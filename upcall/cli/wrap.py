"""`upcall wrap` and `upcall unwrap`: a requester in user space."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from upcall.cli import completing
from upcall.cli.parameter_types import DAY, UID, Seconds, runtime_option
from upcall.client import Client
from upcall.core.errors import UsageError
from upcall.protocols.ecryptfs.packets import MAX_KEY, MAX_WRAPPED


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of both commands."""
    for option in (
        click.argument("key", metavar="NAME|SIGNATURE", shell_complete=completing.keys),
        click.option(
            "--encoding",
            type=click.Choice(["raw", "hex", "base64"]),
            default="raw",
            show_default=True,
            help="Encoding of the wrapped bytes; the clear bytes are always raw.",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path, allow_dash=True),
            metavar="FILE",
            help="Write to this file, atomically, with mode 0600; `-`: to standard output, "
            "even if it is a terminal.  [default: standard output]",
        ),
        click.option("--uid", type=UID, metavar="UID", help="Ask this uid's daemon (root only)."),
        click.option(
            "--timeout",
            type=Seconds(above=True, most=DAY),
            default=10.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait.",
        ),
        runtime_option(),
    ):
        function = option(function)
    return function


@click.command("wrap")
@_options
def wrap(key: str, encoding: str, output: Path | None, uid: int | None, timeout: float, runtime: Path | None) -> None:
    """Wrap 1 to 64 bytes from standard input with one of your keys; write the wrapped bytes to standard output.

    NAME or SIGNATURE names the key. The request goes through the broker to your own daemon, as the kernel's would.

    \b
    Exit codes: 0 wrapped; 64 there is no such key, the size is wrong, or the output is binary and a terminal; 65
    the key module failed; 69 there is no broker or daemon, or the key is not in the user keyring; 75 try again;
    77 the key is locked.

    \b
    Examples:
      $ head -c 32 /dev/urandom | upcall wrap default --encoding base64 > key.wrapped
      $ upcall unwrap default --encoding base64 < key.wrapped
    """
    _check_terminal(output, binary=encoding == "raw")
    clear = _read(MAX_KEY)
    with Client(runtime, uid, timeout) as client:
        wrapped = client.wrap(key, clear)
    _write(output, _ENCODE[encoding](wrapped))


@click.command("unwrap")
@_options
def unwrap(
    key: str, encoding: str, output: Path | None, uid: int | None, timeout: float, runtime: Path | None
) -> None:
    """Unwrap bytes from standard input that `upcall wrap` wrote; write the clear bytes to standard output.

    NAME or SIGNATURE names the key that wrapped them.

    \b
    Exit codes: 0 unwrapped; 64 there is no such key, the input has another encoding, or the output is a
    terminal; 65 another key wrapped it, or the PIN or passphrase is wrong; 69 there is no broker or daemon, or
    the key is not in the user keyring; 75 try again; 77 the key is locked.

    \b
    Examples:
      $ upcall unwrap default --encoding base64 < key.wrapped
    """
    _check_terminal(output, binary=True)
    data = _read(MAX_WRAPPED * 2 + 2)
    try:
        wrapped = _DECODE[encoding](data)
    except (ValueError, binascii.Error) as error:
        raise UsageError(f"standard input is not {encoding}: {error}") from None
    with Client(runtime, uid, timeout) as client:
        clear = client.unwrap(key, wrapped)
    _write(output, clear)


def _check_terminal(output: Path | None, binary: bool) -> None:
    """UsageError if binary data would be written to a terminal, unasked."""
    if binary and output is None and sys.stdout.isatty():
        raise UsageError("this would write binary data to a terminal: use -o FILE, or -o - to have it there")


def _write(output: Path | None, data: bytes) -> None:
    if output is None or str(output) == "-":
        sys.stdout.buffer.write(data)
        return
    from upcall.keys.private_file import write_over  # only here

    write_over(output, data)


def _read(most: int) -> bytes:
    data = sys.stdin.buffer.read(most + 1)
    if not 1 <= len(data) <= most:
        raise UsageError(f"standard input has {'no' if not data else 'too many'} bytes, 1 to {most} are taken")
    return data


_ENCODE: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "hex": lambda data: data.hex().encode("ascii") + b"\n",
    "base64": lambda data: base64.b64encode(data) + b"\n",
}
_DECODE: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "hex": lambda data: bytes.fromhex(data.decode("ascii").strip()),
    "base64": lambda data: base64.b64decode(data.strip(), validate=True),
}
