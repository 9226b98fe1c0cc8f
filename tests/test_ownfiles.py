"""Files that a daemon must not open. No eCryptfs is needed: a list of mounts is played, and says that a folder is one.
With the real one: tests/kernel/test_ownrequests.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upcall.protocols.ecryptfs.own_files import OwnMounts
from upcall.testing.keys import FolderKeyring

OURS, PASSPHRASES, NOBODYS = "0123456789abcdef", "fedcba9876543210", "00112233445566aa"


@pytest.fixture
def keyring(tmp_path: Path) -> FolderKeyring:
    """With a key of ours; and a token that is none, as of a passphrase."""
    made = FolderKeyring(tmp_path / "keys")
    made.add(OURS, "toy", b"-")
    made.add(PASSPHRASES, "toy", b"-")
    file = next(path for path in (tmp_path / "keys").iterdir() if PASSPHRASES in path.name)
    data = bytearray(file.read_bytes())
    data[2] = 0  # ECRYPTFS_PASSWORD
    file.write_bytes(data)
    return made


def mountinfo(folder: Path, signature: str, kind: str = "ecryptfs") -> Path:
    device = folder.stat().st_dev
    file = folder / "mountinfo"
    number = f"{os.major(device)}:{os.minor(device)}"
    file.write_text(f"36 1 {number} / {folder} rw - {kind} /lower rw,ecryptfs_sig={signature},ecryptfs_cipher=aes\n")
    return file


@pytest.mark.parametrize(
    ("signature", "kind", "refused"),
    [
        (OURS, "ecryptfs", True),
        (PASSPHRASES, "ecryptfs", False),
        (NOBODYS, "ecryptfs", False),
        (OURS, "ext4", False),
    ],
    ids=["our key", "a passphrase's", "a key that we have not", "another filesystem"],
)
def test_only_files_below_mounts_with_one_of_our_keys_are_found(
    tmp_path: Path, keyring: FolderKeyring, signature: str, kind: str, refused: bool
) -> None:
    """A mount with a passphrase makes no requests: key files may lie below it."""
    own = OwnMounts(keyring, mountinfo(tmp_path, signature, kind))
    key = OURS if refused else None
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert own.key_of(str(tmp_path / "file")) == key
    assert own.key_of(os.fsencode(tmp_path / "link")) == key
    assert own.key_of(str(tmp_path / "new")) is None
    assert own.key_of(str(tmp_path / "new"), creates=True) == key
    assert own.key_of("/proc/self/status") is None
    assert own.key_of("a\0b") is None


TRIES = """
import os, sys
from pathlib import Path
from upcall.protocols.ecryptfs import own_files as ownfiles
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok

class Keyring:
    def find(self, description): return 7
    def read(self, serial): return token

there, signature = Path(sys.argv[1]), sys.argv[2]
token = pack_auth_tok(AuthTok(signature, "toy", b"-"))
ownfiles.OwnMounts.__init__.__defaults__ = (there / "mountinfo",)
ownfiles.refuse(Keyring(), lambda event, **told: print(event, told["file"], told["key"], told["thread"]))
file = there / "file"
file.stat()
os.close(os.open(there, os.O_RDONLY | os.O_DIRECTORY))
os.close(os.open(file, os.O_PATH))
os.close(os.open("/proc/self/status", os.O_RDONLY))
for opens in (lambda: open(file), lambda: os.open(file, os.O_RDONLY), file.read_bytes, (there / "new").touch):
    try:
        opens()
    except OSError as error:
        print(error.errno == 35, error.filename)
"""


def test_a_process_is_refused_its_own_files_however_it_opens_them(tmp_path: Path) -> None:
    """By every call that opens a file; stat and folders are allowed."""
    file = tmp_path / "file"
    file.touch()
    mountinfo(tmp_path, OURS)
    command = [sys.executable, "-c", TRIES, str(tmp_path), OURS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    expected = [f"own-file-refused {file} {OURS} MainThread", f"True {file}"] * 3
    assert ran.stdout.splitlines() == [
        *expected,
        f"own-file-refused {tmp_path / 'new'} {OURS} MainThread",
        f"True {tmp_path / 'new'}",
    ]
    assert not (tmp_path / "new").exists()
