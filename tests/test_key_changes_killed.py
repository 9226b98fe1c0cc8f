"""Commands that change keys, killed by SIGKILL at each system call that changes anything: no key is lost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.fresh_key import WORD as OLD_WORD
from tests.fresh_key import fresh_key
from tests.killed import NoPtrace, step
from tests.test_cli_key import home, run, shown
from upcall.cli import main
from upcall.core.errors import ModuleFailed, UpcallError
from upcall.kernel import keyring
from upcall.keys.keyring_backend import unusable
from upcall.keys.plugins import find, load
from upcall.keys.store import COMPAT, Entry, KeyStore
from upcall.testing.secrets import GivenSecrets

__all__ = ["home"]  # the fixture

OLD, NEW = b"the old passphrase", b"the new passphrase"
ALL = bool(os.environ.get("UPCALL_KILL_AT_ALL"))  # at each system call, whether it changes anything or not: minutes


def state(folder: Path, signature: str) -> str:
    """A digest of all files below a folder, and of the key's auth token and kept passphrase."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    keyring.ensure_user_keyring_linked()
    for description in (signature, f"upcall:upcall:{signature}"):
        serial = keyring.find(description)
        digest.update(b"" if serial is None else keyring.read(serial))
    return digest.hexdigest()


def killed_everywhere(
    folder: Path, signature: str, command: Callable[[], None], prepare: Callable[[], None]
) -> Iterator[int]:
    """Runs `command` again and again, killed at the entry of its first system call, then of the first one after its
    first change of the state, after its second change, and so on until it ends. With UPCALL_KILL_AT_ALL it is killed
    at each of its system calls. Yields after each, for the checks. `prepare` restores what was there at first."""
    prepare()
    command()  # imports what it needs
    point = 0
    while True:
        prepare()
        try:
            if step(command, _Point(point, folder, signature)) is not None:
                break
        except NoPtrace as why:
            pytest.skip(str(why))
        yield point
        point += 1
    assert point > 1, "nothing has changed"


class _Point:
    """Where to kill: after so many changes of the state, or at so many system calls."""

    def __init__(self, point: int, folder: Path, signature: str) -> None:
        self._point, self._folder, self._signature = point, folder, signature
        self._seen, self._changes = state(folder, signature), 0

    def __call__(self, number: int) -> bool:
        if ALL:
            return number == self._point
        now = state(self._folder, self._signature)
        self._changes += now != self._seen
        self._seen = now
        return self._changes == self._point


def invoked(*arguments: str | Path) -> Callable[[], None]:
    """`upcall key`, in this process."""

    def command() -> None:
        result = CliRunner().invoke(main, ["key", *map(str, arguments)])
        assert result.exit_code == 0, result.output

    return command


def secret_file(home: Path, name: str, secret: bytes) -> Path:
    path = home / name
    path.touch(0o600)
    path.write_bytes(secret)
    return path


def restoring(home: Path) -> Callable[[], None]:
    """Returns a function that restores the store as it is now, with the same names and contents."""
    folder, copy = home / "DATA/upcall/keys", home / "copy"
    shutil.copytree(folder, copy)

    def restore() -> None:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        folder.chmod(0o700)

    return restore


def opens(entry: Entry, passphrase: bytes) -> bool:
    module = load(find(entry.module).spec)
    try:
        module.open(entry.signature, entry.blob or b"", GivenSecrets(passphrase))
    except ModuleFailed:
        return False
    return True


def files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "DATA/upcall/keys").iterdir())


def check_resumed(home: Path, name: str) -> None:
    """Nothing is left of the interrupted command. Its temporary files count as leftovers after a minute."""
    for path in (home / "DATA/upcall/keys").glob(".*"):
        os.utime(path, (1, 1))
    run("resume")
    assert run("resume").stdout == "nothing to do\n"
    assert files(home) == [f"{name}.pem", f"{name}.toml"]


def test_passwd_killed_anywhere_leaves_a_key_that_the_old_or_the_new_passphrase_opens(home: Path) -> None:
    old, new = secret_file(home, "old", OLD), secret_file(home, "new", NEW)
    run("generate", "k", "--module", "x25519", "--no-add", word=OLD.decode())
    signature = shown("k")["signature"]
    command = invoked("passwd", "k", "--passphrase-file", old, "--new-file", new, "--keep-in", "ask")
    outcomes = set()
    for _ in killed_everywhere(home / "DATA", signature, command, restoring(home)):
        before = [opens(KeyStore().load("k"), word) for word in (OLD, NEW)]
        assert sorted(before) == [False, True]  # also without `resume`
        check_resumed(home, "k")
        assert [opens(KeyStore().load("k"), word) for word in (OLD, NEW)] == before
        outcomes.add(tuple(before))
    assert len(outcomes) == 2


def test_passwd_killed_anywhere_leaves_entry_and_file_that_fit_when_the_source_changes(home: Path) -> None:
    """The entry names the file with the passphrase: both must change together."""
    old, new = secret_file(home, "old", OLD), secret_file(home, "new", NEW)
    run("generate", "k", "--module", "x25519", "--passphrase-file", old)
    signature = shown("k")["signature"]
    first = KeyStore().load("k")
    prepare = restoring(home)

    def prepared() -> None:
        prepare()
        run("add", "k")

    command = invoked("passwd", "k", "--new-file", new)
    sources = set()
    for _ in killed_everywhere(home / "DATA", signature, command, prepared):
        check_resumed(home, "k")
        entry = KeyStore().load("k")
        sources.add(entry.source)
        assert opens(entry, {f"file:{old}": OLD, f"file:{new}": NEW}[entry.source])
        run("add", "k")  # reads the file that the entry names, and proves the key
        assert entry._replace(source=first.source, blob=first.blob) == first
    assert len(sources) == 2


@pytest.mark.skipif(bool(unusable()), reason=unusable())
def test_passwd_killed_anywhere_leaves_a_key_that_the_kept_passphrase_opens(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keyring as library

    from upcall.keys.keyring_backend import KernelKeyring
    from upcall.keys.passphrase import delete_from_keyring, fetch_from_keyring, store_in_keyring

    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "upcall.keys.keyring_backend.KernelKeyring")
    monkeypatch.setenv("KEYRING_PROPERTY_CONTAINER", f"upcall-test-{os.urandom(6).hex()}")
    monkeypatch.setenv("KEYRING_PROPERTY_WHERE", "user")
    before = library.get_keyring()
    library.set_keyring(KernelKeyring())
    try:
        old, new = secret_file(home, "old", OLD), secret_file(home, "new", NEW)
        run("generate", "k", "--module", "x25519", "--no-add", "--passphrase-fd", _reader(OLD), "--passphrase-keyring")
        signature = shown("k")["signature"]
        prepare = restoring(home)

        def prepared() -> None:
            prepare()
            store_in_keyring(signature, bytearray(OLD))

        command = invoked("passwd", "k", "--passphrase-file", old, "--new-file", new, "--keep-in", "keyring")
        kept = set()
        for _ in killed_everywhere(home / "DATA", signature, command, prepared):
            check_resumed(home, "k")
            passphrase = bytes(fetch_from_keyring(signature, 20.0))
            kept.add(passphrase)
            assert opens(KeyStore().load("k"), passphrase)
        assert kept == {OLD, NEW}
        delete_from_keyring(signature)
    finally:
        library.set_keyring(before)
        container = keyring.search(keyring.USER_KEYRING, "keyring", os.environ["KEYRING_PROPERTY_CONTAINER"])
        if container is not None:
            keyring.unlink(container)


def _reader(secret: bytes) -> str:
    reader, writer = os.pipe()
    os.write(writer, secret)
    os.close(writer)
    return str(reader)


def test_passwd_of_a_compat_key_killed_anywhere_leaves_no_token_with_a_wrong_passphrase(home: Path) -> None:
    from upcall.protocols.ecryptfs.authtok import take_auth_tok

    old, new = secret_file(home, "old", OLD_WORD.encode()), secret_file(home, "new", NEW)
    KeyStore().prepare()
    path, signature = fresh_key(home / "DATA/upcall/keys/k.pem")
    run("import", "k", "--file", path, "--compat", word=OLD_WORD)
    prepare = restoring(home)

    def prepared() -> None:
        prepare()
        run("add", "k", word=OLD_WORD)

    command = invoked("passwd", "k", "--passphrase-file", old, "--new-file", new)
    opened = set()
    for _ in killed_everywhere(home / "DATA", signature, command, prepared):
        check_resumed(home, "k")
        entry = KeyStore().load("k")
        assert (entry.source, entry.blob) == (COMPAT, None)
        serial = keyring.find(signature)
        if serial is not None:
            blob = take_auth_tok(keyring.read(serial)).blob
            load(find("openssl").spec).open(signature, blob, GivenSecrets())
        for file, word in ((old, OLD_WORD.encode()), (new, NEW)):
            with contextlib.suppress(UpcallError, AssertionError):
                run("add", "k", "--passphrase-file", file)
                opened.add(word)
                break
        else:
            pytest.fail("neither passphrase opens the key")
    assert len(opened) == 2


def test_rename_killed_anywhere_leaves_the_key_under_one_of_the_two_names(home: Path) -> None:
    run("generate", "k", "--module", "x25519", "--no-add", "--no-passphrase")
    store = KeyStore()
    store.replace(store.load("k")._replace(own_file=None))  # as older versions wrote it: two steps
    signature, names = shown("k")["signature"], set()
    for _ in killed_everywhere(home / "DATA", signature, invoked("rename", "k", "new"), restoring(home)):
        run("resume")
        (name,) = store.names()
        names.add(name)
        assert store.load(name).signature == signature
        assert store.owns_file(store.load(name))
        assert opens(store.load(name), b"")
    assert names == {"k", "new"}


def test_remove_killed_anywhere_can_be_repeated(home: Path) -> None:
    run("generate", "k", "--module", "x25519", "--no-add", "--no-passphrase")
    signature = shown("k")["signature"]
    for _ in killed_everywhere(home / "DATA", signature, invoked("remove", "k", "--yes"), restoring(home)):
        if KeyStore().names():
            run("remove", "k", "--yes")
        assert not files(home)
