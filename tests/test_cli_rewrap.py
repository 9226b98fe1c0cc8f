"""`upcall ecryptfs rewrap` and `cat`, with a real broker, a real daemon and keys of the true user keyring."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.test_cli_key import home, shown
from tests.test_cli_key import run as run_key
from upcall.cli import main
from upcall.client import Client
from upcall.daemon.plugins import Module, Plugins
from upcall.daemon.settings import DaemonSettings
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs import file_cipher
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.file_cipher import EXTENT, stretch
from upcall.protocols.ecryptfs.header import (
    ENCRYPTED,
    MAX_HEADER,
    Header,
    Packet,
    PassphrasePacket,
    PublicKeyPacket,
    pack_header,
    take_header,
)
from upcall.testing.processes import RunningBroker, Started

__all__ = ["home"]  # the fixture

FILE_KEY = bytes(range(100, 116))
CLEAR = b"what only its owner may read\n" * 300
SALT = bytes.fromhex("0011223344556677")
MOUNT_PASSPHRASE = b"test"


class Scene(NamedTuple):
    """A broker, this user's daemon, an RSA-1024 key as ecryptfs-utils makes them, and one of ours."""

    broker: Path
    folder: Path
    old: str
    new: str

    def packet(self, signature: str) -> PublicKeyPacket:
        content = wire.pack_file_key(wire.FileKey(wire.CIPHER_AES_128, FILE_KEY))
        with Client(self.broker) as client:
            answer = client.ask("key", wire.pack_ask(wire.Ask(wire.TAG_66, signature, content)))
        return PublicKeyPacket(signature, wire.take_reply(answer).content)

    def lower(self, name: str, *packets: Packet, size: int = len(CLEAR)) -> Path:
        """A lower file that holds the beginning of CLEAR."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        header = Header(size, 0x12345678, 3, ENCRYPTED, 4096, 2, packets or (self.packet(self.old),))
        path.write_bytes(pack_header(header).ljust(8192, b"\0") + encrypted(CLEAR[:size]))
        return path

    def rewrap(self, *arguments: str | Path, code: int = 0) -> Result:
        return invoke("rewrap", "--runtime", self.broker, *arguments, code=code)

    def cat(self, *arguments: str | Path, code: int = 0) -> Result:
        return invoke("cat", "--runtime", self.broker, *arguments, code=code)


def encrypted(clear: bytes) -> bytes:
    cipher = file_cipher.FileCipher(wire.FileKey(wire.CIPHER_AES_128, FILE_KEY))
    padded = clear.ljust(-(-len(clear) // EXTENT) * EXTENT, b"\0")
    parts = []
    for number in range(len(padded) // EXTENT):
        iv = file_cipher._md5(cipher._root_iv + str(number).encode().ljust(16, b"\0"))
        encryptor = Cipher(algorithms.AES(FILE_KEY), modes.CBC(iv)).encryptor()
        parts.append(encryptor.update(padded[number * EXTENT : (number + 1) * EXTENT]))
    return b"".join(parts)


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["ecryptfs", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert FILE_KEY.hex() not in result.output
    return result


def signatures(path: Path) -> list[str]:
    return [packet.signature for packet in take_header(path.read_bytes()[:MAX_HEADER]).packets]


@pytest.fixture
def scene(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "STATE"))
    plugins = Plugins((Module("openssl", "upcall_rsa:module"),))
    daemon = ["-m", "upcall.daemon", dumps(DaemonSettings(folder, plugins=plugins))]
    pem = home / "old.pem"
    pem.touch(0o600)
    key = rsa.generate_private_key(65537, 1024)
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    with RunningBroker(folder) as broker, Started(daemon, folder.parent / "daemon.log") as running:
        broker.registered(running.pid)
        run_key("import", "old", "--module", "openssl", "--file", str(pem))
        run_key("generate", "new", "--bits", "2048", "--no-passphrase")
        yield Scene(folder, home / "lower", shown("old")["signature"], shown("new")["signature"])


# --- rewrap -------------------------------------------------------------------------------------------------------


def test_a_dry_run_tries_both_keys_and_changes_nothing(scene: Scene) -> None:
    paths = [scene.lower(name) for name in ("a", "b/c")]
    before = [path.read_bytes() for path in paths]
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--dry-run")
    assert result.stdout.splitlines() == [
        f"to rewrap            2  from {scene.old}",
        "rewrapped            0",
        "nothing was changed",
    ]
    assert [path.read_bytes() for path in paths] == before
    run_key("lock", "old")
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--dry-run", code=os.EX_NOPERM)
    assert "run `upcall unlock old`" in result.stderr


def test_files_of_an_old_key_get_the_new_one_and_hold_the_same(scene: Scene) -> None:
    paths = [scene.lower(name) for name in ("a", "b/c")]
    result = scene.rewrap("-r", scene.folder, "--from", "old", "--to", "new", "--yes")
    assert result.stdout.startswith(f"rewrapped            2  from {scene.old}; ")
    run_key("remove", "old", "--keyring-only")
    for path in paths:
        assert signatures(path) == [scene.new]
        assert scene.cat(path).stdout_bytes == CLEAR
    again = scene.rewrap("-r", scene.folder, "--to", "new", "--yes")
    assert again.stdout.splitlines() == ["rewrapped            0", "up to date           2"]


def test_json_names_every_file_and_what_became_of_it(scene: Scene) -> None:
    good, damaged = scene.lower("good"), scene.lower("damaged")
    with damaged.open("r+b") as file:
        file.seek(27)
        file.write(b"\xff")
    (scene.folder / "plain").write_text("in clear")
    (scene.folder / "link").symlink_to(good)
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--yes", "--json", code=os.EX_DATAERR)
    assert result.stderr == ""
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["to"] == {"name": "new", "signature": scene.new}
    assert report["counts"] == {
        "pending": 0,
        "rewrapped": 1,
        "current": 0,
        "other-key": 0,
        "not-encrypted": 1,
        "skipped": 1,
        "failed": 1,
    }
    files = {Path(file["file"]).name: file for file in report["files"]}
    assert files["damaged"]["at"] == 27
    assert files["good"] == {"file": str(good), "outcome": "rewrapped", "from": scene.old, "why": None}
    assert files["link"]["why"] == "a symbolic link"


def test_damaged_and_foreign_files_are_named_on_stderr_and_the_rest_goes_on(scene: Scene) -> None:
    good, damaged = scene.lower("good"), scene.lower("damaged")
    with damaged.open("r+b") as file:
        file.seek(26)
        file.write(b"\x44")
    scene.lower("foreign", PublicKeyPacket("7777777777777777", b"w" * 128))
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--yes", code=os.EX_DATAERR)
    assert result.stderr == f"{damaged}: eCryptfs header: unknown tag 0x44 at byte 26\n"
    assert "other keys           1  none of its keys is yours: 7777777777777777" in result.stdout
    assert signatures(good) == [scene.new]
    damaged.unlink()
    scene.rewrap("-r", scene.folder, "--to", "new", "--yes", code=os.EX_UNAVAILABLE)
    scene.rewrap("-r", scene.folder, "--from", "old", "--to", "new", "--yes")


def test_a_run_that_was_killed_is_finished_by_the_next(scene: Scene) -> None:
    from tests.test_rewrap import patched
    from upcall.protocols.ecryptfs.header import replace_packets
    from upcall.protocols.ecryptfs.rewrap_journal import Record, default_folder, pack_records

    path = scene.lower("f")
    data = path.read_bytes()[:MAX_HEADER]
    change = replace_packets(data, [0], scene.packet(scene.new))
    record = Record(str(path), data[8:16], 0o644, change)
    folder = default_folder()
    folder.mkdir(0o700, parents=True)
    (folder / "1-x.journal").write_bytes(pack_records([record]))
    patched(path, record, 100)
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--yes")
    assert result.stderr == f"upcall: note: {path}: its header was half written by an earlier run, and is restored\n"
    assert scene.cat(path).stdout_bytes == CLEAR
    assert list(folder.iterdir()) == []


def test_interrupted_it_ends_with_130_and_the_next_run_goes_on(scene: Scene) -> None:
    packet = scene.packet(scene.old)
    paths = [scene.lower(f"{number:03}", packet, size=10) for number in range(600)]
    options = ["-r", str(scene.folder), "--to", "new", "--yes", "--runtime", str(scene.broker)]
    command = [sys.executable, "-m", "upcall", "ecryptfs", "rewrap", *options]
    made = paths[0].stat().st_ctime_ns  # looked at without opening the file, which would keep it from being rewrapped
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and paths[0].stat().st_ctime_ns == made:
            pass
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert "interrupted; run it again, and it goes on" in told
    before = [signatures(path) for path in paths]
    assert [scene.old] in before
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--yes")
    assert f"rewrapped    {before.count([scene.old]):>9}" in result.stdout
    assert [signatures(path) for path in paths] == [[scene.new]] * 600


@pytest.mark.parametrize(
    ("arguments", "why", "code"),
    [
        (("{folder}", "--to", "new", "--yes"), "is a folder: -r goes through it", os.EX_USAGE),
        (("-r", "{folder}", "--to", "nosuch", "--yes"), "there is no key 'nosuch'", os.EX_USAGE),
        (("-r", "{folder}", "--to", "new", "--from", "new", "--yes"), "are the same key", os.EX_USAGE),
        (("-r", "{folder}", "--to", "new"), "add --yes, or --dry-run", os.EX_USAGE),
        (("{folder}/none", "--to", "new"), "none: No such file or directory", os.EX_NOINPUT),
        (("{folder}/none", "--to", "new", "--yes"), "No such file or directory", os.EX_NOINPUT),
        (("{folder}/plain", "--to", "new", "--yes"), "this is no eCryptfs file", os.EX_DATAERR),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_changed(
    scene: Scene, arguments: tuple[str, ...], why: str, code: int
) -> None:
    path = scene.lower("f")
    (scene.folder / "plain").write_text("in clear")
    result = scene.rewrap(*(word.format(folder=scene.folder) for word in arguments), code=code)
    assert why in result.stderr
    assert signatures(path) == [scene.old]


def test_a_key_that_is_not_added_is_refused_with_the_command_that_adds_it(scene: Scene) -> None:
    path = scene.lower("f")
    run_key("remove", "new", "--keyring-only")
    result = scene.rewrap(path, "--to", "new", "--yes", code=os.EX_USAGE)
    assert "upcall key add new" in result.stderr


def test_a_locked_key_stops_the_run_before_the_first_file(scene: Scene) -> None:
    paths = [scene.lower(str(number)) for number in range(5)]
    run_key("lock", "new")
    result = scene.rewrap("-r", scene.folder, "--to", "new", "--yes", code=os.EX_NOPERM)
    assert "run `upcall unlock new`" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "nothing was changed" in result.stdout
    assert [signatures(path) for path in paths] == [[scene.old]] * 5
    run_key("unlock", "new")


def test_without_a_broker_nothing_is_changed(scene: Scene) -> None:
    path = scene.lower("f")
    result = invoke("rewrap", path, "--to", "new", "--yes", "--runtime", scene.folder / "none", code=69)
    assert "no broker" in result.stderr
    assert signatures(path) == [scene.old]


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_shows_what_would_be_done_and_asks(scene: Scene, answer: bytes, code: int) -> None:
    path = scene.lower("f")
    command = ["-m", "upcall", "ecryptfs", "rewrap", str(path), "--to", "new", "--runtime", str(scene.broker)]
    status, shown_there = on_terminal(command, b"[y/N]", answer)
    assert status == code, shown_there
    assert b"Rewrap 1 file to new?" in shown_there
    assert signatures(path) == [scene.new if code == 0 else scene.old]


def on_terminal(command: list[str], prompt: bytes, answer: bytes) -> tuple[int, bytes]:
    """Runs Python with a terminal, and types the answer once the prompt has appeared."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, *command], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if prompt in seen and answer:
                os.write(ours, answer)
                answer = b""
        return process.wait(60), seen
    finally:
        process.kill()
        os.close(ours)


# --- passphrases of mounts ----------------------------------------------------------------------------------------


def passphrase_packet() -> PassphrasePacket:
    key = stretch(MOUNT_PASSPHRASE, SALT)
    encryptor = Cipher(algorithms.AES(key.key[:16]), modes.ECB()).encryptor()
    return PassphrasePacket(key.signature, encryptor.update(FILE_KEY), wire.CIPHER_AES_128, SALT, 0x60)


@pytest.fixture
def secret(home: Path) -> Path:
    path = home / "passphrase"
    path.touch(0o600)
    path.write_bytes(MOUNT_PASSPHRASE + b"\n")
    return path


def test_files_of_a_mounts_passphrase_are_read_and_get_a_key(scene: Scene, secret: Path) -> None:
    path = scene.lower("f", passphrase_packet())
    assert scene.cat(path, "--passphrase-file", secret).stdout_bytes == CLEAR
    result = scene.rewrap(path, "--to", "new", "--yes", code=os.EX_UNAVAILABLE)
    assert "none of its keys is yours: d395309aaad4de06 (a passphrase)" in result.stdout
    result = scene.rewrap(path, "--from", "d395309aaad4de06", "--to", "new", "--yes", code=os.EX_UNAVAILABLE)
    assert "a mount's passphrase wrapped it (d395309aaad4de06): add --ask-passphrase" in result.stderr
    scene.rewrap(path, "--to", "new", "--yes", "--passphrase-file", secret)
    assert signatures(path) == [scene.new]
    assert scene.cat(path).stdout_bytes == CLEAR


def test_a_wrong_passphrase_is_told_from_a_damaged_file(scene: Scene, secret: Path) -> None:
    path = scene.lower("f", passphrase_packet())
    secret.write_bytes(b"another")
    result = scene.cat(path, "--passphrase-file", secret, code=os.EX_DATAERR)
    assert "another passphrase wrapped it, with the signature d395309aaad4de06" in result.stderr
    result = scene.rewrap(path, "--to", "new", "--yes", "--passphrase-file", secret, code=os.EX_UNAVAILABLE)
    assert signatures(path) == ["d395309aaad4de06"]
    secret.chmod(0o644)
    assert "chmod 600" in scene.cat(path, "--passphrase-file", secret, code=os.EX_NOPERM).stderr


def test_only_one_passphrase_option_is_taken(scene: Scene, secret: Path) -> None:
    path = scene.lower("f")
    result = scene.cat(path, "--passphrase-file", secret, "--passphrase-fd", "0", code=os.EX_USAGE)
    assert "only one of" in result.stderr


# --- cat ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, len(CLEAR)])
def test_exactly_the_bytes_of_the_file_come_out(scene: Scene, size: int) -> None:
    assert scene.cat(scene.lower("f", size=size)).stdout_bytes == CLEAR[:size]


def test_several_files_come_out_in_their_order_and_a_bad_one_is_named(scene: Scene) -> None:
    first, second = scene.lower("a", size=10), scene.lower("b", size=20)
    (scene.folder / "plain").write_text("in clear")
    result = scene.cat(first, scene.folder / "plain", second, code=os.EX_DATAERR)
    assert result.stdout_bytes == CLEAR[:10] + CLEAR[:20]
    assert result.stderr == (
        f"upcall: {scene.folder}/plain: eCryptfs header: no marker: "
        "this is no eCryptfs file, or it is damaged at byte 8\n"
    )


def test_a_truncated_file_gives_what_it_has_and_an_error(scene: Scene) -> None:
    path = scene.lower("f")
    os.truncate(path, 8192 + 4096 + 100)
    result = scene.cat(path, code=os.EX_DATAERR)
    assert result.stdout_bytes == CLEAR[:4096]
    assert f"ends before the {len(CLEAR)} bytes that its header says at byte {8192 + 4096 + 100}" in result.stderr


def test_output_goes_to_a_new_file_for_its_owner_only(scene: Scene) -> None:
    path, output = scene.lower("f"), scene.folder / "out"
    scene.cat(path, "-o", output)
    assert (output.read_bytes(), output.stat().st_mode & 0o777) == (CLEAR, 0o600)
    scene.cat(path, "-o", output, code=os.EX_CANTCREAT)
    assert "-o takes one FILE" in scene.cat(path, path, "-o", output, code=os.EX_USAGE).stderr
    os.truncate(path, 9000)
    scene.cat(path, "-o", scene.folder / "other", code=os.EX_DATAERR)
    assert not (scene.folder / "other").exists()


def test_a_terminal_gets_text_but_nothing_binary(scene: Scene) -> None:
    command = ["-m", "upcall", "ecryptfs", "cat", "--runtime", str(scene.broker)]
    status, seen = on_terminal([*command, str(scene.lower("text", size=29))], b"", b"")
    assert (status, seen.replace(b"\r\n", b"\n")) == (0, CLEAR[:29])
    binary = scene.lower("binary")
    data = bytearray(binary.read_bytes())
    data[8192 + 64] ^= 1
    data[0:8] = (4096).to_bytes(8, "big")
    binary.write_bytes(bytes(data[:8192]) + encrypted(b"\0" * 4096))
    status, seen = on_terminal([*command, str(binary)], b"", b"")
    assert (status, b"use -o FILE" in seen) == (os.EX_USAGE, True)


def test_a_locked_key_is_a_refusal_and_a_foreign_one_too(scene: Scene) -> None:
    path = scene.lower("f")
    run_key("lock", "old")
    assert "run `upcall unlock old`" in scene.cat(path, code=os.EX_NOPERM).stderr
    run_key("unlock", "old")
    foreign = scene.lower("foreign", PublicKeyPacket("7777777777777777", b"w" * 128))
    assert "no-key" in scene.cat(foreign, code=os.EX_UNAVAILABLE).stderr
