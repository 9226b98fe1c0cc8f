"""`upcall ecryptfs cat`: reads lower files without eCryptfs in the kernel."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from upcall.cli import error_text, exit_code
from upcall.cli.filekeys import FileKeys, mount_passphrase_options
from upcall.cli.output import for_terminal
from upcall.cli.parameter_types import runtime_option
from upcall.core.errors import PeerError, UpcallError, UsageError
from upcall.keys.passphrase import from_terminal
from upcall.protocols.ecryptfs.file_cipher import FileCipher, decrypted
from upcall.protocols.ecryptfs.header import ENCRYPTED, Header, PassphrasePacket
from upcall.protocols.ecryptfs.lower_file import open_lower
from upcall.protocols.ecryptfs.packets import CIPHER_OPAQUE, FileKey


@click.command("cat", short_help="Decrypt lower files without eCryptfs in the kernel.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write to this new file, which only you may read."
)
@mount_passphrase_options
@runtime_option()
@click.pass_context
def command(
    ctx: click.Context,
    files: tuple[Path, ...],
    output: Path | None,
    passphrase: bytearray | None,
    runtime: Path | None,
) -> None:
    """Decrypt lower FILEs to standard output, without mounting anything.

    Your daemon unwraps each file's key, unless a mount's passphrase wrapped it: that is asked for on the terminal, or
    given by one of the --passphrase options. Only AES, with keys of 16, 24 or 32 bytes. FILE is the name of the lower
    file as it is: encrypted names (ECRYPTFS_FNEK_ENCRYPTED...) are not decrypted. eCryptfs does not authenticate data:
    a file that was changed decrypts to garbage, here as in the kernel.

    \b
    Exit codes: 64 wrong options, or binary data to a terminal; 65 a file is damaged, or is none of eCryptfs's; 66
    it is not there; 69 no broker or daemon, or none of its keys is yours; 73 the file of -o exists; 75 try again
    later; 77 a key is locked, or you may not read the file.

    \b
    Examples:
      $ upcall ecryptfs cat ~/.Private/letter.txt
      $ upcall ecryptfs cat --ask-passphrase ~/.Private/photo.jpg -o photo.jpg
    """
    if output is not None and len(files) > 1:
        raise UsageError("-o takes one FILE")
    keys, codes = FileKeys(runtime, passphrase), set[int]()
    try:
        for file in files:
            try:
                _decrypt(file, keys, output)
            except BrokenPipeError:
                raise
            except (UpcallError, OSError) as error:
                text = error_text(error)
                name = "" if text.startswith(str(file)) or isinstance(error, UsageError) else f"{file}: "
                click.echo(for_terminal(f"upcall: {name}{text}"), err=True)
                codes.add(exit_code(error))
    finally:
        keys.close()
    if codes:
        ctx.exit(max(codes) if os.EX_DATAERR not in codes else os.EX_DATAERR)


def _decrypt(path: Path, keys: FileKeys, output: Path | None) -> None:
    with open_lower(path) as file:
        header = file.header()
        if not header.flags & ENCRYPTED:
            raise PeerError("eCryptfs header", "says that the file is not encrypted", 16)
        parts = decrypted(file.fd, file.data_at(header), header.size, FileCipher(_file_key(header, keys)))
        if output is not None:
            _write_new(output, parts)
            return
        to_terminal = sys.stdout.isatty()
        for part in parts:
            if to_terminal and b"\0" in part:
                raise UsageError(f"{path} is binary, which a terminal cannot show: use -o FILE, or > FILE")
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()


def _file_key(header: Header, keys: FileKeys) -> FileKey:
    """Returns the file's key, by the first packet whose key is at hand. The error of the first packet that failed."""
    if keys.passphrase is None and all(isinstance(packet, PassphrasePacket) for packet in header.packets):
        signature = header.packets[0].signature
        keys.passphrase = from_terminal(f"Passphrase of the mount (its signature is {signature}): ")
    errors: list[UpcallError] = []
    # One's own first; others may still be known to the daemon.
    for packet in sorted(header.packets, key=lambda packet: not keys.holds(packet)):
        try:
            key = keys.unwrap(packet)
        except UpcallError as error:
            errors.append(error)
            continue
        if key.cipher != CIPHER_OPAQUE:
            return key
        errors.append(PeerError("file key", "is none of eCryptfs's: a process had it wrapped", 0))
    raise errors[0]


def _write_new(path: Path, parts: Iterator[bytes]) -> None:
    """Writes a new file, and removes it again if that fails. FileExistsError, OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as out:
            for part in parts:
                out.write(part)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
