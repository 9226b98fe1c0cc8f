"""The keyring library's backend over the kernel's keyrings: its own suite, and what the suite does not know of."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keyring as library
import pytest
from keyring.errors import KeyringError, PasswordDeleteError, PasswordSetError
from keyring.testing.backend import BackendBasicTests

from upcall import config
from upcall.kernel import keyring as kernel
from upcall.keys import keyring_backend as keyringbackend
from upcall.keys.keyring_backend import KernelKeyring, unusable
from upcall.testing.processes import in_child, until

PROJECT = Path(__file__).parents[1]
NAME = "upcall.keys.keyring_backend.KernelKeyring"
NOBODY = 65534
WORD = "correct horse"
WHERE = ["persistent", "user"]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
user_only = pytest.mark.skipif(os.geteuid() == 0, reason="root's quota is large; runs as an ordinary user, below")
pytestmark = pytest.mark.skipif(bool(unusable()), reason=unusable())


@pytest.fixture(autouse=True)
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A keyring for this test alone, which goes with all that is in it; and no configuration of this machine's."""
    name = f"upcall-test-{os.urandom(6).hex()}"
    monkeypatch.setenv("KEYRING_PROPERTY_CONTAINER", name)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", NAME)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")
    monkeypatch.setattr(config, "SYSTEM", Path("/nonexistent/config.toml"))
    yield name
    dropped(name)


def dropped(name: str) -> None:
    for where in WHERE:
        outer = keyringbackend._outer(where)
        held = kernel.search(outer, "keyring", name)
        if held is not None:
            kernel.unlink(held, outer)


@pytest.fixture(params=WHERE)
def backend(request: pytest.FixtureRequest) -> KernelKeyring:
    return made(where=request.param)


def made(**properties: object) -> KernelKeyring:
    backend = KernelKeyring().with_properties(**properties)
    assert isinstance(backend, KernelKeyring)
    return backend


def key_of(backend: KernelKeyring) -> kernel.KeyDescription:
    """The only one that it holds."""
    held = backend._held()
    assert held is not None
    (key,) = kernel.list_keyring(held)
    return key


# --- the library's own suite -----------------------------------------------------------------------------------


class TestInThePersistentKeyring(BackendBasicTests):
    def init_keyring(self) -> KernelKeyring:
        return made(where="persistent")


class TestInTheUserKeyring(BackendBasicTests):
    def init_keyring(self) -> KernelKeyring:
        return made(where="user")


@pytest.fixture
def ordinary() -> Iterator[Callable[..., Any]]:
    """Runs Python as an ordinary user, with all that this process can import; skips where that user cannot read it."""
    home = Path("/tmp") / f"upcall-home-{os.urandom(6).hex()}"
    home.mkdir(0o700)
    os.chown(home, NOBODY, NOBODY)
    packages = Path(library.__file__).parents[1]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(packages)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def suits(candidate: str) -> bool:
        try:
            wanted = "import pytest, hypothesis, keyring, upcall.keys.keyring_backend"
            return start(candidate, "-c", wanted).returncode == 0
        except OSError:
            return False

    def start(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=PROJECT,
            env=environment,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=100,
        )

    try:
        candidates = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
        python = next(filter(suits, candidates), "")
        if not python:
            pytest.skip("an ordinary user can read no Python with what is needed")
        yield lambda *arguments: start(python, *arguments)
    finally:
        shutil.rmtree(home)


@root_only
def test_the_tests_of_this_file_pass_as_an_ordinary_user(ordinary: Callable[..., Any]) -> None:
    done = ordinary("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > 60, done.stdout


# --- what the library makes of it ------------------------------------------------------------------------------


def test_the_keyring_library_lists_the_backend() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "keyring", "--list-backends"], capture_output=True, text=True, timeout=60, check=True
    )
    if "upcall" not in done.stdout:
        pytest.skip("upcall is not installed, only imported")
    assert f"{NAME} (priority: 0.9)" in done.stdout


def test_the_keyring_command_sets_gets_and_deletes_a_password(container: str) -> None:
    def run(*words: str, word: str = "", code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "keyring", "-b", NAME, *words],
            input=word,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert WORD not in done.stderr
        return done.stdout

    run("set", "service", "user", word=WORD)
    assert run("get", "service", "user") == f"{WORD}\n"
    assert made().get_password("service", "user") == WORD
    run("del", "service", "user")
    assert run("get", "service", "user", code=1) == ""


def test_no_repr_or_log_shows_a_password(backend: KernelKeyring, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    backend.set_password("service", "user", WORD)
    credential = backend.get_credential("service", "user")
    assert credential is not None and credential.password == WORD
    key = key_of(backend)
    assert not any(WORD in text for text in (repr(backend), str(backend), repr(credential), repr(key), caplog.text))


# --- keys ------------------------------------------------------------------------------------------------------


def test_a_password_is_a_user_key_with_quoted_description_and_safe_permissions(
    backend: KernelKeyring, container: str
) -> None:
    backend.set_password("imap://a:b%", "jürgen;x y\n", WORD)
    key = key_of(backend)
    assert key.description == "upcall:imap%3A//a%3Ab%25:j%C3%BCrgen%3Bx%20y%0A"
    assert (key.type, key.uid, key.permissions) == ("user", os.geteuid(), kernel.PERMISSIONS)
    assert kernel.read(key.serial) == WORD.encode()
    credential = backend.get_credential("imap://a:b%", None)
    assert credential is not None and credential.username == "jürgen;x y\n"


def test_similar_service_and_user_names_are_kept_apart(backend: KernelKeyring) -> None:
    pairs = [("a", "b:c"), ("a:b", "c"), ("a%3Ab", "c"), ("", "a:b:c"), ("a:b:c", ""), ("a\udcff", "b"), ("aÿ", "b")]
    for number, (service, user) in enumerate(pairs):
        if user:
            backend.set_password(service, user, str(number))
    for number, (service, user) in enumerate(pairs):
        assert backend.get_password(service, user) == (str(number) if user else None)


@pytest.mark.parametrize("word", ["", "\0", "\0\0", "\0a", "a\0", "\ud800", "x" * kernel.MAX_PAYLOAD], ids=ascii)
def test_unusual_passwords_come_back_unchanged(word: str) -> None:
    if len(word) > 1000 and os.geteuid() != 0:
        pytest.skip("more than an ordinary user's quota")
    backend = made()
    backend.set_password("service", "user", word)
    assert backend.get_password("service", "user") == word


def test_a_password_or_name_that_is_too_long_is_refused(backend: KernelKeyring) -> None:
    with pytest.raises(PasswordSetError, match="the password is 32768 bytes, at most 32767 fit"):
        backend.set_password("service", "user", "x" * 32768)
    long = "n" * (4095 - len("upcall:service:"))
    backend.set_password("service", long, WORD)
    assert backend.get_password("service", long) == WORD
    with pytest.raises(PasswordSetError, match="are 4096 bytes when quoted, at most 4095 fit"):
        backend.set_password("service", long + "n", WORD)
    assert backend.get_password("service", long + "n") is None
    with pytest.raises(PasswordDeleteError, match="no such password"):
        backend.delete_password("service", long + "n")


def test_a_new_password_displaces_the_old_one(backend: KernelKeyring) -> None:
    backend.set_password("service", "user", "old")
    backend.set_password("service", "user", "new")
    assert backend.get_password("service", "user") == "new"
    key_of(backend)


def test_get_credential_returns_the_first_user_name_in_alphabetical_order(backend: KernelKeyring) -> None:
    for user in ("c", "a", "b"):
        backend.set_password("service", user, user * 3)
    backend.set_password("service2", "0", "other")
    credential = backend.get_credential("service", None)
    assert credential is not None and (credential.username, credential.password) == ("a", "aaa")


def test_a_password_that_is_not_utf8_is_an_error_without_its_bytes(backend: KernelKeyring) -> None:
    backend.set_password("service", "user", WORD)
    held = backend._held()
    assert held is not None
    kernel.add_user_key("upcall:service:user", b"\xffsecret", held)
    with pytest.raises(KeyringError, match="not UTF-8") as caught:
        backend.get_password("service", "user")
    assert caught.value.__context__ is None


def test_nothing_is_left_in_the_process_keyring(backend: KernelKeyring) -> None:
    def tried() -> list[str]:
        backend.set_password("service", "user", WORD)
        backend.get_password("service", "user")
        return [key.description for key in kernel.list_keyring(kernel.PROCESS_KEYRING)]

    assert in_child(tried) == [
        f"_persistent.{os.getuid()}" if backend.where == "persistent" else f"_uid.{os.getuid()}"
    ]


# --- time-outs -------------------------------------------------------------------------------------------------


def gone(backend: KernelKeyring) -> None:
    until(lambda: backend.get_password("service", "user") is None, "the password has expired")


def test_an_expired_password_is_not_found(backend: KernelKeyring) -> None:
    short, long = backend.with_properties(timeout="1"), backend.with_properties(timeout=1000)
    short.set_password("service", "user", WORD)
    long.set_password("service", "other", WORD)
    assert backend.get_password("service", "user") == WORD
    gone(made(where=backend.where))
    assert backend.get_credential("service", "user") is None
    credential = backend.get_credential("service", None)
    assert credential is not None and credential.username == "other"
    with pytest.raises(PasswordDeleteError, match="no such password"):
        backend.delete_password("service", "user")
    long.set_password("service", "user", "again")
    assert backend.get_password("service", "user") == "again"


def expiry(backend: KernelKeyring) -> str:
    """As /proc/keys shows it: "perm", or the time that is left."""
    serial = f"{key_of(backend).serial:08x}"
    (line,) = [one for one in Path("/proc/keys").read_text().splitlines() if one.startswith(serial)]
    return line.split()[3]


def test_each_set_password_sets_the_time_out_again(backend: KernelKeyring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYRING_PROPERTY_TIMEOUT", "1000")
    limited = made(where=backend.where)
    limited.set_password("service", "user", WORD)
    assert expiry(backend) == "16m"
    limited.with_properties(timeout=0).set_password("service", "user", WORD)
    assert expiry(backend) == "perm"


def test_the_configuration_sets_time_out_and_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = config.user_file()
    file.parent.mkdir(mode=0o755)
    file.write_text('[keyring]\ntimeout = 7200\nwhere = "user"\n')
    file.chmod(0o644)
    backend = made()
    backend.set_password("service", "user", WORD)
    assert expiry(backend) == "2h"
    assert made(where="user").get_password("service", "user") == WORD
    assert made(where="persistent").get_password("service", "user") is None
    made(timeout=60).set_password("service", "user", WORD)
    assert expiry(backend) in ("60s", "59s", "1m")
    file.write_text("[keyring]\ntimeout = -1\n")
    with pytest.raises(KeyringError, match=r"keyring\.timeout: must be a whole number from 0 to 4294967295"):
        backend.get_password("service", "user")


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "", 4294967296, "²", True])
def test_an_invalid_time_out_property_is_refused(value: object) -> None:
    with pytest.raises(KeyringError, match=r"the property timeout is .*; seconds from 0 to 4294967295 are needed"):
        made(timeout=value).set_password("service", "user", WORD)


def test_an_invalid_where_property_is_refused() -> None:
    with pytest.raises(KeyringError, match="the property where is 'here'; persistent or user is needed"):
        made(where="here").get_password("service", "user")


# --- possession ------------------------------------------------------------------------------------------------


def test_passwords_work_in_a_process_with_an_empty_session_keyring(backend: KernelKeyring) -> None:
    backend.set_password("service", "user", WORD)

    def tried() -> list[str | None]:
        kernel._call("KEYCTL_JOIN_SESSION_KEYRING", 1, 0)
        found = [backend.get_password("service", "user")]
        backend.set_password("service", "user", "from there")
        return [*found, backend.get_password("service", "user")]

    assert in_child(tried) == [WORD, "from there"]
    assert backend.get_password("service", "user") == "from there"


def test_passwords_work_in_a_process_with_a_revoked_session_keyring(backend: KernelKeyring) -> None:
    backend.set_password("service", "user", WORD)

    def tried() -> list[str | None]:
        kernel.revoke(kernel._call("KEYCTL_JOIN_SESSION_KEYRING", 1, 0))
        found = [backend.get_password("service", "user")]
        backend.set_password("service", "user", "from there")
        backend.delete_password("service", "user")
        return [*found, backend.get_password("service", "user")]

    assert in_child(tried) == [WORD, None]


def test_passwords_work_in_threads_that_run_already(backend: KernelKeyring) -> None:
    """They do not inherit a process keyring that another thread creates."""
    start, wrong = threading.Event(), list[str]()

    def work(mine: str) -> None:
        start.wait(60)
        try:
            for number in range(50):
                backend.set_password("service", mine, f"{mine} {number}")
                if backend.get_password("service", mine) != f"{mine} {number}":
                    wrong.append(mine)
        except KeyringError as error:
            wrong.append(str(error))

    def tried() -> list[str]:
        kernel._call("KEYCTL_JOIN_SESSION_KEYRING", 1, 0)
        threads = [threading.Thread(target=work, args=(f"user{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        start.set()
        for thread in threads:
            thread.join(60)
        return wrong

    assert in_child(tried, timeout=120) == []
    assert backend.get_password("service", "user3") == "user3 49"


def test_processes_that_start_at_once_share_one_keyring(backend: KernelKeyring) -> None:
    """None of them may replace the keyring that another has just filled."""
    code = (
        "import sys; from upcall.keys.keyring_backend import KernelKeyring; sys.stdin.read(); "
        "KernelKeyring().with_properties(where=sys.argv[1]).set_password('service', sys.argv[2], 'x')"
    )
    command = [sys.executable, "-c", code, str(backend.where)]
    running = [subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE) for number in range(6)]
    for process in running:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in running] == [0] * 6
    assert [backend.get_password("service", str(number)) for number in range(6)] == ["x"] * 6


def test_a_keyring_created_by_another_process_meanwhile_is_used(
    backend: KernelKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process creates it between our look-up and our creation."""
    backend.set_password("service", "other", WORD)
    found, looks = KernelKeyring._found, iter([True])
    monkeypatch.setattr(
        KernelKeyring, "_found", lambda self, outer: None if next(looks, False) else found(self, outer)
    )
    backend.set_password("service", "user", WORD)
    assert [backend.get_password("service", user) for user in ("user", "other")] == [WORD, WORD]


def test_a_revoked_keyring_is_replaced_by_the_next_password(backend: KernelKeyring) -> None:
    backend.set_password("service", "user", WORD)
    held = backend._held()
    assert held is not None
    kernel.revoke(held)
    assert backend.get_password("service", "user") is None
    backend.set_password("service", "user", "again")
    assert backend.get_password("service", "user") == "again"


@root_only
def test_another_user_cannot_read_the_passwords(backend: KernelKeyring) -> None:
    backend.set_password("service", "user", WORD)
    held, serial = backend._held() or 0, key_of(backend).serial

    def tried() -> list[object]:
        kernel._call("KEYCTL_JOIN_SESSION_KEYRING", 1, 0)  # root's, which a login would not leave to others
        found: list[object] = [backend.get_password("service", "user")]
        for look in (kernel.read, kernel.describe, kernel.list_keyring):
            for one in (serial, held):
                with contextlib.suppress(PermissionError):
                    found.append(look(one))
        return found

    assert in_child(tried, uid=NOBODY) == [None]


# --- where it cannot work --------------------------------------------------------------------------------------


@user_only
def test_a_full_quota_of_keys_is_an_error_until_keys_are_deleted(container: str) -> None:
    backend = made()
    with pytest.raises(PasswordSetError, match="the kernel holds no more keys for this user: /proc/key-users"):
        for number in range(1000):
            backend.set_password("service", f"user{number}", WORD)
    assert backend.get_password("service", "user0") == WORD
    backend.delete_password("service", "user0")
    assert backend.get_password("service", "user0") is None
    dropped(container)

    def room() -> bool:
        with contextlib.suppress(PasswordSetError):
            backend.set_password("service", "user", WORD)
            return True
        return False

    until(room, "the kernel has collected what was dropped")


@user_only
def test_a_full_quota_of_bytes_is_an_error() -> None:
    with pytest.raises(PasswordSetError, match="the kernel holds no more keys for this user"):
        made().set_password("service", "user", "x" * 32000)


def forbid(code: int, *numbers: int) -> None:
    """This process gets `code` for these system calls: a seccomp filter, as containers have it (linux/seccomp.h)."""
    load, equal, give = 0x20, 0x15, 0x06
    body = [(load, 0, 0, 0)]
    for number in numbers:
        body += [(equal, 0, 1, number), (give, 0, 0, 0x00050000 | code)]  # SECCOMP_RET_ERRNO
    body.append((give, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in body))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(body), ctypes.addressof(packed)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP


@pytest.mark.parametrize(
    ("code", "numbers", "why"),
    [
        (errno.EPERM, [kernel._KEYCTL, kernel._ADD_KEY], "this process may not use the kernel's keyrings, as in most"),
        (errno.EPERM, [kernel._ADD_KEY], "this process may not use the kernel's keyrings, as in most"),
        (errno.ENOSYS, [kernel._KEYCTL, kernel._ADD_KEY], r"has no keyrings \(add_key: Function not implemented\)"),
        (errno.EOPNOTSUPP, [kernel._KEYCTL], "Linux 5.3 or newer is needed"),
    ],
)
def test_a_kernel_that_refuses_keyrings_makes_the_backend_not_viable_with_a_reason(
    code: int, numbers: list[int], why: str
) -> None:
    def tried() -> list[object]:
        forbid(code, *numbers)
        said: list[object] = [KernelKeyring.viable]
        try:
            said.append(KernelKeyring.priority)
        except RuntimeError as error:
            said.append(str(error))
        try:
            made().set_password("service", "user", WORD)
        except PasswordSetError as error:
            said.append(str(error))
        return said

    viable, priority, failed = in_child(tried)
    assert not viable
    assert re.search(why, priority), priority
    assert os.strerror(code) in failed


def test_without_persistent_keyrings_the_user_keyring_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "capabilities", lambda: kernel.MOVE)
    made().set_password("service", "user", WORD)
    assert made(where="user").get_password("service", "user") == WORD


def test_a_kernel_that_cannot_move_keys_is_unusable_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "capabilities", lambda: kernel.PERSISTENT_KEYRINGS)
    assert unusable() == "Linux 5.3 or newer is needed"
