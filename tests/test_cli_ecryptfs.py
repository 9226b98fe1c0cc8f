"""`upcall ecryptfs inspect`: captured headers, damaged ones, and keys that a real daemon unwraps."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from tests.test_cli_key import home, shown
from tests.test_cli_key import run as run_key
from upcall.cli import main
from upcall.client import Client
from upcall.daemon.plugins import Module, Plugins
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import keyring
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.header import (
    ENCRYPTED,
    IN_XATTR,
    XATTR,
    Header,
    PassphrasePacket,
    PublicKeyPacket,
    pack_header,
)
from upcall.testing.processes import RunningBroker, Started

__all__ = ["home"]  # the fixture

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "ecryptfs.json").read_text())
PASSPHRASE = PassphrasePacket("0f1e2d3c4b5a6978", b"k" * 16, 0x07, b"saltsalt", 0x60)
CLEAR = bytes(range(100, 132))


def inspect(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["ecryptfs", "inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert CLEAR.hex() not in result.output
    return result


def told(*arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    reports = json.loads(inspect("--json", *arguments, code=code).stdout)
    assert isinstance(reports, list)
    return reports


def lower(home: Path, name: str, header: bytes, size: int = 3 * 4096) -> Path:
    path = home / name
    path.write_bytes(header.ljust(size, b"\0"))
    return path


@pytest.fixture
def captured(home: Path) -> list[Path]:
    return [lower(home, name, bytes.fromhex(text)) for name, text in VECTORS["lower_header"].items()]


def header(*packets: PublicKeyPacket | PassphrasePacket, flags: int = ENCRYPTED) -> bytes:
    return pack_header(Header(100, 0x12345678, 3, flags, 4096, 2, packets))


def test_captured_headers_are_reported_in_full(captured: list[Path]) -> None:
    reports = told(*captured)
    assert [report["file"] for report in reports] == [str(path) for path in captured]
    for report in reports:
        (packet,) = report.pop("packets")
        assert report == {
            "file": report["file"],
            "error": None,
            "size": 100,
            "lower_size": 12288,
            "missing": 0,
            "version": 3,
            "encrypted": True,
            "hmac": False,
            "metadata_in_xattr": False,
            "encrypted_names": False,
            "header_in": "contents",
            "extent_size": 4096,
            "extents": 2,
            "header_size": 8192,
        }
        assert (packet["kind"], packet["signature"], packet["wrapped"]) == ("public key", "80f0e50e8a936f95", 256)
        assert packet["keys"] == []
    lines = inspect(captured[0]).stdout.splitlines()
    assert lines[:5] == [
        str(captured[0]),
        "  size         100 bytes, in a lower file of 12288",
        "  format       version 3, encrypted",
        "  header       2 extents of 4096 bytes",
        "  public key   80f0e50e8a936f95, 256 bytes wrapped",
    ]


def test_a_passphrase_packet_is_reported_and_its_check_finds_no_key(home: Path) -> None:
    path = lower(home, "f", header(PASSPHRASE))
    (report,) = told(path)
    assert report["packets"] == [
        {
            "signature": PASSPHRASE.signature,
            "wrapped": 16,
            "kind": "passphrase",
            "cipher": "aes",
            "cipher_code": 7,
            "key_size": 16,
            "in_keyring": False,
            "keys": [],
        }
    ]
    text = inspect(path).stdout
    assert f"passphrase   {PASSPHRASE.signature}, 16 bytes wrapped; aes, a key of 16 bytes\n" in text
    assert "opened by    none of your keys\n" in text
    (report,) = told("--check", path, code=os.EX_UNAVAILABLE)
    assert report["check"] == "none of its keys is in your user keyring"


def test_damaged_and_missing_files_are_reported_and_the_others_still_shown(home: Path, captured: list[Path]) -> None:
    bad = lower(home, "bad", header(PASSPHRASE).replace(b"\x8c", b"\x8d"))
    short = lower(home, "short", b"", 0)
    (home / "folder").mkdir()
    os.mkfifo(home / "fifo")
    result = inspect(bad, captured[0], short, home / "none", code=os.EX_DATAERR)
    assert result.stderr.splitlines() == [
        f"{bad}: eCryptfs header: unknown tag 0x8d at byte 26",
        f"{short}: eCryptfs header: 0 bytes, at least 20 are needed at byte 0",
        f"{home}/none: No such file or directory",
    ]
    assert "80f0e50e8a936f95" in result.stdout
    reports = told(bad, captured[0], code=os.EX_DATAERR)
    assert (reports[0]["at"], reports[1]["error"]) == (26, None)
    assert "No such file" in inspect(home / "none", captured[0], code=os.EX_NOINPUT).stderr
    for name in ("folder", "fifo"):
        assert "not a regular file" in inspect(home / name, code=os.EX_OSERR).stderr


def test_names_of_files_send_nothing_to_the_terminal(home: Path, captured: list[Path]) -> None:
    name = "x\x1b]0;title\x07\n"
    for path in (lower(home, name, captured[0].read_bytes()), home / f"no{name}"):
        done = CliRunner().invoke(main, ["ecryptfs", "inspect", str(path), str(captured[0])])
        assert "\x1b" not in done.output and "\x07" not in done.output
        assert "x\\x1b]0;title\\x07\\n" in done.output


def test_missing_bytes_of_a_truncated_lower_file_are_reported(home: Path) -> None:
    path = lower(home, "f", header(PASSPHRASE), 8192 + 100)
    assert told(path)[0]["missing"] == 3996
    assert "3996 bytes of the lower file are missing" in inspect(path).stdout


def test_a_header_in_an_extended_attribute_is_read(home: Path) -> None:
    path = lower(home, "f", b"", 4096)
    try:
        os.setxattr(path, XATTR, header(PASSPHRASE, flags=ENCRYPTED | IN_XATTR))
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            pytest.skip("this file system has no attributes of the user")
        raise
    (report,) = told(path)
    assert (report["header_in"], report["metadata_in_xattr"], report["missing"]) == (XATTR, True, 0)
    assert "kept in the attribute user.ecryptfs" in inspect(path).stdout


# --- --check ---------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    broker: Path
    signature: str
    lower: Path

    def wrapped(self, code: int, signature: str | None = None) -> PublicKeyPacket:
        """A packet such as the kernel has the daemon make."""
        signature = signature or self.signature
        content = wire.pack_file_key(wire.FileKey(code, CLEAR))
        with Client(self.broker) as client:
            answer = client.ask("key", wire.pack_ask(wire.Ask(wire.TAG_66, signature, content)))
        return PublicKeyPacket(signature, wire.take_reply(answer).content)


@pytest.fixture
def scene(folder: Path, home: Path) -> Iterator[Scene]:
    """A broker, this user's daemon with the true user keyring, a key, and a file whose key it has wrapped."""
    plugins = Plugins((Module("openssl", "upcall_rsa:module"),))
    daemon = ["-m", "upcall.daemon", dumps(DaemonSettings(folder, plugins=plugins))]
    with RunningBroker(folder) as broker, Started(daemon, folder.parent / "daemon.log") as running:
        broker.registered(running.pid)
        run_key("generate", "mine", "--bits", "2048", "--no-passphrase")
        found = Scene(folder, shown("mine")["signature"], home / "f")
        lower(home, "f", header(PASSPHRASE, found.wrapped(wire.CIPHER_AES_256)))
        yield found


def test_check_succeeds_if_the_key_is_available(scene: Scene) -> None:
    (report,) = told("--check", "--runtime", scene.broker, scene.lower)
    assert report["check"] == "ok"
    theirs, ours = report["packets"]
    assert theirs["keys"] == []
    assert (ours["keys"], ours["in_keyring"]) == (["mine"], True)
    assert (ours["cipher"], ours["key_size"]) == ("aes", 32)
    text = inspect("--check", "--runtime", scene.broker, scene.lower).stdout
    assert f"public key   {scene.signature}, 256 bytes wrapped; aes, a key of 32 bytes\n" in text
    assert "opened by    mine (in the user keyring)\n" in text
    assert text.endswith("check        ok\n")
    assert "cipher" not in told(scene.lower)[0]["packets"][1]


def test_check_reports_a_locked_key_and_one_missing_from_the_keyring(scene: Scene) -> None:
    run_key("lock", "mine")
    (report,) = told("--check", "--runtime", scene.broker, scene.lower, code=os.EX_NOPERM)
    assert report["check"].startswith(f"{scene.signature}: the key mine is locked")
    assert """(locked; the daemon says "locked since """ in report["check"]
    assert report["check"].endswith("run `upcall unlock mine`")
    run_key("unlock", "mine")
    inspect("--check", "--runtime", scene.broker, scene.lower)
    run_key("remove", "mine", "--keyring-only")
    text = inspect("--check", "--runtime", scene.broker, scene.lower, code=os.EX_UNAVAILABLE).stdout
    assert "opened by    mine (not in the user keyring)\n" in text
    assert "check        none of its keys is in your user keyring\n" in text


def test_check_refuses_a_damaged_or_opaque_wrapped_key(scene: Scene, home: Path) -> None:
    good = scene.wrapped(wire.CIPHER_AES_256)
    bad = good._replace(wrapped=good.wrapped[:-1] + bytes((good.wrapped[-1] ^ 1,)))
    path = lower(home, "bad", header(bad))
    (report,) = told("--check", "--runtime", scene.broker, path, code=os.EX_DATAERR)
    assert "(module-failed; the daemon says " in report["check"]
    second = lower(home, "second", header(bad, good))
    assert told("--check", "--runtime", scene.broker, second)[0]["check"] == "ok"
    opaque = lower(home, "opaque", header(scene.wrapped(wire.CIPHER_OPAQUE)))
    (report,) = told("--check", "--runtime", scene.broker, opaque, code=os.EX_DATAERR)
    assert "none of eCryptfs's" in report["check"]


def test_check_without_a_broker_says_so(scene: Scene, home: Path) -> None:
    (report,) = told("--check", "--runtime", home / "nowhere", scene.lower, code=os.EX_UNAVAILABLE)
    assert "no broker" in report["check"]


def test_check_of_a_passphrase_in_the_keyring_says_the_kernel_unwraps_it(home: Path) -> None:
    signature = os.urandom(8).hex()
    serial = keyring.add_user_key(signature, b"stands for a passphrase token")
    try:
        path = lower(home, "f", header(PASSPHRASE._replace(signature=signature)))
        (report,) = told("--check", path, code=os.EX_UNAVAILABLE)
    finally:
        keyring.unlink(serial)
    assert report["packets"][0]["in_keyring"] is True
    assert "unwrapped by the kernel" in report["check"]


def test_a_broken_key_entry_does_not_stop_inspection(home: Path, captured: list[Path]) -> None:
    keys = home / "DATA/upcall/keys"
    keys.mkdir(parents=True, mode=0o700)
    (keys / "broken.toml").touch(0o600)
    assert told(captured[0])[0]["packets"][0]["keys"] == []
    shutil.rmtree(keys)
