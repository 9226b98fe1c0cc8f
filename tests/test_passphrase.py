"""Passphrases: from descriptors, files, a real terminal, and the keyring library in a child process."""

from __future__ import annotations

import os
import pty
import select
import termios
import time
from pathlib import Path

import pytest

from upcall.core.errors import UsageError
from upcall.keys.passphrase import (
    NoPassphrase,
    fetch_from_keyring,
    from_fd,
    from_file,
    from_terminal,
    store_in_keyring,
    wipe,
)
from upcall.testing.processes import PATIENCE, in_time

BACKEND = """
import os, time
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked

class Backend(KeyringBackend):
    priority = 1

    def get_password(self, service, username):
        assert service == "upcall"
        if username == "slow":
            time.sleep(3600)
        if username == "locked":
            raise KeyringLocked("somebody said no")
        return {"known": "corr\u00e9ct", "long": "x" * 2000, "empty": ""}.get(username)

    def set_password(self, service, username, password):
        raise KeyringLocked("somebody said no")
"""


def piped(content: bytes) -> bytearray:
    reader, writer = os.pipe()
    try:
        os.write(writer, content)
        os.close(writer)
        return from_fd(reader)
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("content", "secret"),
    [(b"word", b"word"), (b"word\n", b"word"), (b"word\n\n", b"word\n"), (b"\xff\0 ", b"\xff\0 "), (b"x" * 1024,) * 2],
)
def test_a_passphrase_from_a_descriptor_loses_one_newline(content: bytes, secret: bytes) -> None:
    assert piped(content) == secret


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 1025, b"x" * 1024 + b"\n\n", b"x" * 5000])
def test_a_passphrase_of_a_bad_length_is_refused_and_not_shown(content: bytes) -> None:
    with pytest.raises(UsageError, match="a passphrase has 1 to 1024 bytes") as caught:
        piped(content)
    assert "xxx" not in str(caught.value)


def test_the_longest_passphrase_may_end_in_a_newline() -> None:
    assert piped(b"x" * 1024 + b"\n") == b"x" * 1024


def test_a_passphrase_is_read_from_a_private_file_only(tmp_path: Path) -> None:
    path = tmp_path / "word"
    path.touch(0o600)
    path.write_bytes(b"word\n")
    assert from_file(path) == b"word"
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="lets others in"):
        from_file(path)


def test_wipe_zeroes_the_buffer() -> None:
    secret = bytearray(b"word")
    wipe(secret)
    assert secret == bytes(4)


# --- a terminal ---------------------------------------------------------------------------------------------


def typed(answers: list[bytes], again: str | None = None) -> tuple[bytes, bytes]:
    """What a child process on a terminal of its own reports, and what was to be seen on that terminal."""
    reader, writer = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            try:
                report = bytes(from_terminal("Word: ", again))
            except UsageError as error:
                report = b"UsageError: " + str(error).encode()
            echo = termios.tcgetattr(0)[3] & termios.ECHO
            os.write(writer, report + (b"" if echo else b" and the echo is still off"))
        finally:
            os._exit(0)
    os.close(writer)
    seen = b""
    try:
        for answer in answers:
            seen += _until_asked(terminal)
            os.write(terminal, answer)
        report = _all(reader)
        seen += _all(terminal)
    finally:
        os.close(terminal)
        os.close(reader)
        os.waitpid(pid, 0)
    return report, seen


def _until_asked(fd: int) -> bytes:
    seen, deadline = b"", time.monotonic() + PATIENCE
    while not seen.endswith(b": "):
        assert select.select([fd], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(fd, 1000)
    return seen


def _all(fd: int) -> bytes:
    data = b""
    while select.select([fd], [], [], PATIENCE)[0]:
        try:
            more = os.read(fd, 10000)
        except OSError:  # how a terminal ends
            break
        if not more:
            break
        data += more
    return data


def test_a_typed_passphrase_is_not_shown() -> None:
    report, seen = typed([b"correct horse\n"])
    assert report == b"correct horse"
    assert seen == b"Word: \r\n"


def test_a_repeated_passphrase_must_be_the_same() -> None:
    assert typed([b"horse\n", b"horse\n"], "Again: ") == (b"horse", b"Word: \r\nAgain: \r\n")
    report, seen = typed([b"horse\n", b"house\n"], "Again: ")
    assert report == b"UsageError: the two passphrases differ"
    assert b"ho" not in seen


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"\n", b"nothing was typed"),
        (b"\x04", b"nothing was typed"),
        (b"x" * 1100 + b"\n", b"what was typed: more than 1024 bytes"),
    ],
)
def test_a_typed_passphrase_of_a_bad_length_is_refused(answer: bytes, why: bytes) -> None:
    report, _ = typed([answer])
    assert report.startswith(b"UsageError: " + why)


def test_without_a_terminal_the_error_names_passphrase_fd() -> None:
    pid = os.fork()
    if pid == 0:
        os.setsid()  # a new session has no terminal
        try:
            from_terminal("Word: ")
        except UsageError as error:
            os._exit(7 if "--passphrase-fd" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# --- the keyring library ------------------------------------------------------------------------------------


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is found as a user would configure one."""
    config = tmp_path / "config" / "python_keyring"
    config.mkdir(parents=True)
    (config / "keyringrc.cfg").write_text(f"[backend]\ndefault-keyring=ours.Backend\nkeyring-path={tmp_path}\n")
    (tmp_path / "ours.py").write_text(BACKEND)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.mark.usefixtures("backend")
def test_the_keyring_child_imports_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("keyring.py", "upcall.py", "subprocess.py"):
        (tmp_path / name).write_text("raise SystemExit('planted in the working directory')\n")
    monkeypatch.chdir(tmp_path)
    assert fetch_from_keyring("known", 20) == "corréct".encode()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("unknown", "holds no passphrase for unknown"),
        ("locked", "could not give the passphrase for locked"),
    ],
)
def test_a_missing_or_locked_keyring_entry_is_no_passphrase(user: str, why: str) -> None:
    with pytest.raises(NoPassphrase, match=why):
        fetch_from_keyring(user, PATIENCE)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("user", ["long", "empty"])
def test_a_keyring_entry_of_a_bad_length_is_refused(user: str) -> None:
    with pytest.raises(UsageError, match="a passphrase has 1 to 1024 bytes"):
        fetch_from_keyring(user, PATIENCE)


@pytest.mark.usefixtures("backend")
def test_a_keyring_that_does_not_answer_is_given_up_after_the_time_out() -> None:
    """It sleeps for an hour."""
    with pytest.raises(NoPassphrase, match="no answer within 2 s"):
        in_time(lambda: fetch_from_keyring("slow", 2), "no answer")


def test_a_keyring_without_a_backend_gives_no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")
    with pytest.raises(NoPassphrase, match="no backend"):
        fetch_from_keyring("known", PATIENCE)


def test_a_passphrase_that_is_not_utf_8_is_not_stored_in_the_keyring() -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        store_in_keyring("known", bytearray(b"\xff"))
