"""`upcall ecryptfs`: inspects eCryptfs lower files, without mounting anything. Its other commands have files of their
own."""

from __future__ import annotations

import errno
import importlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import click

from upcall.cli import error_text, exit_code
from upcall.cli.commands import Group
from upcall.cli.keyshow import token_in_keyring
from upcall.cli.output import for_terminal
from upcall.cli.parameter_types import runtime_option
from upcall.client import Client
from upcall.core.errors import PeerError, Refused, UpcallError
from upcall.kernel import keyring
from upcall.keys.store import KeyStore
from upcall.protocols.ecryptfs.header import (
    CIPHER_NAMES,
    ENCRYPTED,
    ENCRYPTED_NAMES,
    HMAC,
    IN_XATTR,
    MAX_HEADER,
    XATTR,
    Header,
    Packet,
    PublicKeyPacket,
    has_marker,
    take_header,
)
from upcall.protocols.ecryptfs.packets import CIPHER_OPAQUE, TAG_64, Ask, pack_ask, take_file_key, take_reply

_FLAGS = {ENCRYPTED: "encrypted", HMAC: "hmac", IN_XATTR: "metadata_in_xattr", ENCRYPTED_NAMES: "encrypted_names"}
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # NONBLOCK: opening a FIFO must not hang


class _Group(Group):
    """Imports the commands that need a library for cryptography when they are called."""

    elsewhere = {"cat": "ecryptfscat", "rewrap": "rewrap"}  # modules below upcall.cli

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self.elsewhere])

    def find(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.elsewhere:
            return super().find(ctx, name)
        found = importlib.import_module(f"upcall.cli.{self.elsewhere[name]}").command
        return found if isinstance(found, click.Command) else None


@click.group(cls=_Group)
def command() -> None:
    """Inspect, decrypt and rewrap the lower files of eCryptfs, which hold the encrypted data."""


@command.command(short_help="Show the header of lower files.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--check", is_flag=True, help="Have your daemon unwrap each file's key, to prove that it can.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@runtime_option()
@click.pass_context
def inspect(ctx: click.Context, files: tuple[Path, ...], check: bool, as_json: bool, runtime: Path | None) -> None:
    """Show the header of each lower FILE: size, format, which keys wrapped the file's key, and which of them is yours.

    With --check, your own daemon unwraps the file's key, and the result is discarded.

    \b
    Exit codes: 65 a header is damaged, or there is none; 66 a file is missing; 69 with --check: the user keyring
    has none of the keys, or there is no broker or daemon; 75 with --check: the daemon refused.

    \b
    Examples:
      $ upcall ecryptfs inspect --check ~/.Private/*
    """
    reports, codes = [], set()
    names = _names()
    for file in files:
        report, code = _report(file, names, check, runtime)
        reports.append(report)
        codes.add(code)
        if not as_json:
            _print_report(report)
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    worst = os.EX_DATAERR if os.EX_DATAERR in codes else max(codes)
    if worst:
        ctx.exit(worst)


def _names() -> dict[str, list[str]]:
    """Returns signature -> names of the user's keys. Ignores broken entries: `upcall key list` reports them."""
    store, found = KeyStore(), dict[str, list[str]]()
    for name in store.names():
        try:
            found.setdefault(store.load(name).signature, []).append(name)
        except (UpcallError, OSError):
            continue
    return found


def _report(file: Path, names: dict[str, list[str]], check: bool, runtime: Path | None) -> tuple[dict[str, Any], int]:
    """Returns the report about one file, as plain data, and the exit code for it."""
    report: dict[str, Any] = {"file": str(file), "error": None}
    try:
        data, lower_size, place = _read(file)
        header = take_header(data)
    except (PeerError, OSError) as error:
        report["error"] = error_text(error) if isinstance(error, PeerError) else error.strerror
        if isinstance(error, PeerError):
            report["at"] = error.where
        return report, exit_code(error)
    report |= _facts(header, lower_size, place)
    report["packets"] = [_packet_facts(packet, names) for packet in header.packets]
    if not check:
        return report, os.EX_OK
    report["check"], code = _check(header, report["packets"], runtime)
    return report, code


def _read(file: Path) -> tuple[bytes, int, str]:
    """Reads the header, from the file or its extended attribute. Returns its bytes, the file's size, and the place."""
    fd = os.open(file, _OPEN)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
        data = os.pread(fd, MAX_HEADER, 0)
        if not has_marker(data):
            try:
                return os.getxattr(fd, XATTR), found.st_size, XATTR
            except OSError:
                pass  # no attribute, or none possible here: uses the file's own bytes
        return data, found.st_size, "contents"
    finally:
        os.close(fd)


def _facts(header: Header, lower_size: int, place: str) -> dict[str, Any]:
    in_front = header.header_size if place == "contents" else 0
    extents = -(-header.size // MAX_HEADER)  # of data; extents are always complete
    return {
        "size": header.size,
        "lower_size": lower_size,
        "missing": max(0, in_front + extents * MAX_HEADER - lower_size),
        "version": header.version,
        **{name: bool(header.flags & flag) for flag, name in _FLAGS.items()},
        "header_in": place,
        "extent_size": header.extent_size,
        "extents": header.extents,
        "header_size": header.header_size,
    }


def _packet_facts(packet: Packet, names: dict[str, list[str]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"signature": packet.signature, "wrapped": len(packet.wrapped)}
    if isinstance(packet, PublicKeyPacket):
        facts |= {"kind": "public key", "algorithm": packet.algorithm}
        facts["in_keyring"] = token_in_keyring(packet.signature) is not None
    else:
        cipher = {"cipher": CIPHER_NAMES[packet.cipher], "cipher_code": packet.cipher, "key_size": packet.key_size}
        facts |= {"kind": "passphrase", **cipher, "in_keyring": keyring.find(packet.signature) is not None}
    return {**facts, "keys": names.get(packet.signature, [])}


# --- --check ---------------------------------------------------------------------------------------------------


def _check(header: Header, facts: list[dict[str, Any]], runtime: Path | None) -> tuple[str, int]:
    """Tries the packets of the user's keys; one that the daemon can unwrap suffices. Returns (result, exit code)."""
    outcome = "none of its keys is in your user keyring", os.EX_UNAVAILABLE
    for packet, fact in zip(header.packets, facts, strict=True):
        if not isinstance(packet, PublicKeyPacket):
            if fact["in_keyring"] and outcome[1] == os.EX_UNAVAILABLE:
                outcome = "a key made of a passphrase is unwrapped by the kernel, not by a daemon", os.EX_UNAVAILABLE
            continue
        if not fact["in_keyring"]:
            continue
        try:
            fact["cipher"], fact["key_size"] = _unwrap(packet, runtime)
        except Refused as refused:
            refused.key = next(iter(fact["keys"]), packet.signature)
            outcome = f"{packet.signature}: {error_text(refused)}", exit_code(refused)
        except TimeoutError as error:
            outcome = str(error), os.EX_TEMPFAIL
        except PeerError as error:
            outcome = f"{packet.signature}: {error}", os.EX_DATAERR
        except UpcallError as error:
            return str(error), exit_code(error)
        else:
            return "ok", os.EX_OK
    return outcome


def _unwrap(packet: PublicKeyPacket, runtime: Path | None) -> tuple[str, int]:
    """Has the daemon unwrap a packet. Returns (cipher, size in bytes) of the key, but not the key itself."""
    with Client(runtime) as client:
        answer = client.ask("key", pack_ask(Ask(TAG_64, packet.signature, packet.wrapped)))
    key = take_file_key(take_reply(answer).content)
    if key.cipher == CIPHER_OPAQUE:
        raise PeerError("file key", "is none of eCryptfs's: a process had it wrapped", 0)
    return CIPHER_NAMES[key.cipher], len(key.key)


# --- for people ------------------------------------------------------------------------------------------------


def _print_report(report: dict[str, Any]) -> None:
    if report["error"] is not None:
        click.echo(for_terminal(f"{report['file']}: {report['error']}"), err=True)
        return
    lines = [("size", f"{report['size']} bytes, in a lower file of {report['lower_size']}")]
    if report["missing"]:
        lines.append(("", f"{report['missing']} bytes of the lower file are missing"))
    words = [name.replace("_", " ") for name in _FLAGS.values() if report[name]]
    lines.append(("format", ", ".join([f"version {report['version']}", *words])))
    place = "" if report["header_in"] == "contents" else f", kept in the attribute {report['header_in']}"
    lines.append(("header", f"{report['extents']} extents of {report['extent_size']} bytes{place}"))
    for packet in report["packets"]:
        lines += _packet_lines(packet)
    if "check" in report:
        lines.append(("check", report["check"]))
    click.echo(for_terminal(report["file"]))
    for head, text in lines:
        click.echo(f"  {head:<12} {for_terminal(text)}")


def _packet_lines(packet: dict[str, Any]) -> list[tuple[str, str]]:
    cipher = f"; {packet['cipher']}, a key of {packet['key_size']} bytes" if "cipher" in packet else ""
    who = ", ".join(packet["keys"]) or ("a key of yours" if packet["in_keyring"] else "none of your keys")
    where = "in the user keyring" if packet["in_keyring"] else "not in the user keyring"
    return [
        (packet["kind"], f"{packet['signature']}, {packet['wrapped']} bytes wrapped{cipher}"),
        ("opened by", f"{who} ({where})" if packet["keys"] else who),
    ]
