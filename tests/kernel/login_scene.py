"""Logs in over ssh and on a terminal, with the complete PAM stack, in the lab's guest."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

import upcall
from upcall.process.trust import distrust
from upcall.testing.lab.stage import PATIENCE, Person, do_as, serving, wait_until

SLOW = 5 * PATIENCE
SCRIPT = Path(__file__).parent.parent.parent / "docs/private/private"
PRIVATE = Path("/srv/private")
COMMON = Path("/etc/pam.d/common-session")
CONFIG = Path("/etc/upcall/config.toml")
SSH = Path("/etc/ssh/lab")
SSHD_CONFIG = f"""HostKey {SSH}/host
ListenAddress 127.0.0.1
AuthorizedKeysFile {SSH}/own.pub
UsePAM yes
PrintMotd no
"""
CALL: tuple[str, ...] = ("ssh", "-F", "none", "-i", f"{SSH}/own", "-T", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR")
CALL += ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")

_numbers = itertools.count()


def upcall_command(*arguments: str) -> str:
    """Runs a command as root. Returns its output."""
    command = [sys.executable, "-I", "-m", "upcall", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SLOW)
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_setup() -> None:
    """Makes a copy of upcall that only root can change: `upcall setup` refuses others, as one below /tmp."""
    for path in (sys.executable, upcall.__file__):
        if why := distrust(path):
            pytest.skip(f"upcall setup would refuse this copy: {path}: {why}")


class Session:
    """A login session: a shell that runs commands. `process` ends with it."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self.process, self._write, self._read = process, write, read
        self.say("stty -echo 2>/dev/null; PS1= PS2=; export PS1 PS2")

    def say(self, command: str, answers: Mapping[bytes, bytes] = MappingProxyType({})) -> str:
        """Returns the command's output, followed by `ended with N` if its exit status is not 0. `answers`: what is
        typed, by a regular expression of the prompt."""
        number = next(_numbers)
        # A terminal echoes what is typed: there the number is still an expression.
        os.write(self._write, f"{{ {command}\n}} 2>&1; s=$?; echo; echo end-$((0+{number}))-$s-\n".encode())
        told, sign = b"", re.compile(rb"\r?\n?end-%d-(\d+)-" % number)
        deadline, seen = time.monotonic() + SLOW, 0
        while (found := sign.search(told)) is None:
            for asked, answer in answers.items():
                if re.search(asked, told[seen:]):
                    seen = len(told)
                    os.write(self._write, answer)
            rest = deadline - time.monotonic()
            if rest <= 0 or not select.select([self._read], [], [], rest)[0]:
                raise TimeoutError(f"{command}: {told!r}")
            chunk = os.read(self._read, 4096)
            if not chunk:
                raise AssertionError(f"the session has ended: {told!r}")
            told += chunk
        code = int(found[1])
        text = told[: found.start()].decode(errors="replace").replace("\r\n", "\n").strip("\n")
        return f"{text}\nended with {code}".lstrip("\n") if code else text

    def type(self, text: str) -> None:
        os.write(self._write, text.encode())

    def until(self, *words: str) -> str:
        """Waits for each of these words. Returns what was shown."""
        told, deadline = b"", time.monotonic() + SLOW
        while not all(one.encode() in told for one in words):
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{words}: {told!r}")
            chunk = os.read(self._read, 4096)
            if not chunk:
                raise AssertionError(f"the session has ended: {told!r}")
            told += chunk
        return told.decode(errors="replace").replace("\r\n", "\n").strip("\n")

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._write, b"exit\n")
        try:
            self.process.wait(SLOW)
        finally:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def ssh(who: Person, port: int = 22) -> Iterator[Session]:
    """A login by ssh, without a terminal."""
    process = subprocess.Popen(
        [*CALL, "-p", str(port), f"{who.name}@127.0.0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None and process.stdout is not None
    with _left(process, process.stdin.fileno(), process.stdout.fileno()) as session:
        yield session


@contextlib.contextmanager
def terminal(who: Person) -> Iterator[Session]:
    """A login on a terminal, as getty starts it."""
    have_login_wait()
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", "login", "-f", who.name], stdin=theirs, stdout=theirs, stderr=theirs, env={}
        )
        os.close(theirs)
        with _left(process, ours, ours) as session:
            yield session
    finally:
        os.close(ours)


def have_login_wait() -> None:
    """login(1) gives up after a minute, which the start of a user's manager takes on a busy machine."""
    file = Path("/etc/login.defs")
    file.write_text(re.sub(r"^LOGIN_TIMEOUT.*$", "LOGIN_TIMEOUT 900", file.read_text(), flags=re.MULTILINE))


@contextlib.contextmanager
def _left(process: subprocess.Popen[bytes], write: int, read: int) -> Iterator[Session]:
    try:
        session = Session(process, write, read)
        yield session
        session.leave()
    finally:
        process.kill()
        process.wait()


def prepare_sshd() -> None:
    """Writes sshd's configuration, and a key with which root logs in as any user."""
    if shutil.which("sshd", path="/usr/sbin") is None:
        pytest.skip("sshd is not installed (openssh-server)")
    SSH.mkdir(0o755)
    for name in ("host", "own"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", SSH / name], check=True, timeout=SLOW)
    Path("/etc/ssh/sshd_config").write_text(SSHD_CONFIG)


@contextlib.contextmanager
def private_folder(who: Person) -> Iterator[Path]:
    """Follows docs/operations.md, as administrator and as user: a key, and a folder that is mounted at login."""
    script = Path("/usr/local/sbin/private")
    program = Path(sys.executable).with_name("upcall")
    script.write_text(SCRIPT.read_text().replace("\nupcall=upcall ", f"\nupcall={program} "))
    script.chmod(0o755)
    folder = PRIVATE / who.name
    folder.mkdir(0o700, parents=True)
    os.chown(folder, who.uid, who.gid)

    def make_key() -> None:
        passphrase = who.home / ".passphrase"
        passphrase.touch(0o600)
        passphrase.write_text("labpass\n")
        words = ["key", "generate", "--module", "x25519", "--passphrase-file", str(passphrase), "--no-add"]
        subprocess.run([program, *words], check=True, capture_output=True, timeout=SLOW)

    do_as(who, make_key)
    before = COMMON.read_text()
    COMMON.write_text(f"{before}session optional pam_exec.so quiet seteuid {script}\n")
    try:
        yield folder
    finally:
        COMMON.write_text(before)


NAMES = tuple(f"name-{number}" for number in range(1, 200))


def prepare_names(owner: str) -> None:
    """Has `owner`'s daemon look up the kernel's names; it is started for that."""
    CONFIG.parent.mkdir(exist_ok=True)
    told = f'[request-key.dns_resolver]\nuser = "{owner}"\nwithout-daemon = "start"\n'
    CONFIG.write_text(told)
    with Path("/etc/hosts").open("a") as hosts:
        hosts.writelines(f"192.0.2.1 {name}\n" for name in NAMES)
    subprocess.run(["modprobe", "dns_resolver"], check=True, timeout=SLOW)


def name_key(name: str) -> bool:
    """Returns whether request_key(2) gets a key with the addresses of `name`. The kernel remembers a refusal for a
    while."""
    words = ["keyctl", "request2", "dns_resolver", name, "", "@s"]
    return subprocess.run(words, capture_output=True, timeout=SLOW, check=False).returncode == 0


def registered(uid: int, other_than: Sequence[int | None] = ()) -> int:
    """Waits for a daemon that serves this uid. Returns its pid."""
    wait_until(lambda: serving(uid) not in (None, *other_than), f"a daemon of uid {uid}", SLOW)
    found = serving(uid)
    assert found is not None
    return found


def gone(uid: int) -> None:
    wait_until(lambda: serving(uid) is None, f"no daemon of uid {uid}", SLOW)
