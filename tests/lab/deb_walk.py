"""Runs in the lab's guest, as root: `python -m tests.lab.deb_walk OLDER NEWER`, folders with packages.

Installs, logs in, makes a key, mounts, logs out, upgrades with a request in hand, removes and purges. Prints what each
step took. Only assertions and logins are this Python's; all that is asserted of runs from the packages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kernel.login_scene import COMMON, SLOW, Session, gone, prepare_sshd, registered, ssh
from upcall.client import Client, NoBroker
from upcall.core.errors import Refused, UpcallError
from upcall.testing.lab.stage import Person, Task, broker_pid, drop_caches, person, serving, wait_until

# An emulated processor is slow. Nobody is kept after the last logout.
SERVICE = "[Service]\nWatchdogSec=120\nTimeoutStartSec=180\n"
DROP_INS = {
    **{f"/etc/systemd/system/upcall-{name}.service.d/lab.conf": SERVICE for name in ("broker", "quota", "mount")},
    **{f"/etc/systemd/system/upcall-{name}-daemon.service.d/lab.conf": "[Service]\nWatchdogSec=120\n"
       for name in ("system", "root")},
    "/etc/systemd/user/upcall-daemon.service.d/lab.conf": "[Service]\nWatchdogSec=300\n",
    "/etc/systemd/logind.conf.d/lab.conf": "[Login]\nUserStopDelaySec=0\nKillUserProcesses=yes\n",
}  # fmt: skip
RUNNING = ("upcall-broker.service", "upcall-system-daemon.service", "upcall-quota.service")
LOOKED_AT = (
    "/etc", "/usr/bin", "/usr/sbin", "/usr/lib/systemd", "/usr/lib/sysusers.d", "/usr/lib/tmpfiles.d",
    "/usr/lib/upcall", "/usr/share/bash-completion", "/usr/share/fish", "/usr/share/man", "/usr/share/pam-configs",
    "/usr/share/zsh", "/var/lib/pam", "/var/lib/systemd", "/var/lib/upcall", "/run/upcall",
)  # fmt: skip
ACCOUNTS = re.compile(r"/etc/(\.pwd\.lock|(passwd|group|shadow|gshadow|subuid|subgid)-?)")
# What stays after removal: state, and what dpkg, update-rc.d and deb-systemd-helper know packages by until they are
# purged. The script for other inits is a conffile.
STATE = re.compile(
    r"/etc/(init\.d/upcall-broker|rc.\.d/[SK]\d\dupcall-broker|upcall(/.*)?"
    r"|systemd/(system|user)/[a-z.-]+\.target\.wants(/upcall-.*)?)"
    r"|/var/lib/(upcall(/.*)?|systemd/deb-systemd-(user-)?helper-(en|mas)[a-z]+(/.*)?)"
)
ENVIRONMENT = {
    # /run/lab/bin: modprobe, by the lab's index of modules
    "PATH": "/run/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive",
}  # fmt: skip
CONTENT = "what only its owner may read"
NAME = "private"


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    print(f"--- {name}", flush=True)
    began = time.monotonic()
    yield
    print(f"--- {name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def command(*words: str | Path) -> str:
    """Runs a program as root, as an administrator does; returns what it says."""
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=4 * SLOW, cwd="/")
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def say_until(session: Session, line: str, wanted: str) -> None:
    """Repeats a command until it says `wanted`: to open a key for the first time may take an emulated processor longer
    than the kernel waits for its daemon."""
    wait_until(lambda: session.say(line) == wanted, line, SLOW)


def dpkg(*words: str | Path) -> None:
    """Runs dpkg as an administrator does; what it says is seen at once."""
    done = subprocess.run(["dpkg", *words], env=ENVIRONMENT, timeout=4 * SLOW, cwd="/", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, words


def inventory() -> set[str]:
    """The files and folders where packages put something."""
    found = {folder for folder in LOOKED_AT if Path(folder).exists()}
    for folder in LOOKED_AT:
        for path, folders, names in os.walk(folder):
            found.update(f"{path}/{name}" for name in (*folders, *names))
    found |= {f"/usr/share/doc/{name}" for name in os.listdir("/usr/share/doc")}
    return {path for path in found if not ACCOUNTS.fullmatch(path)}


def processes() -> list[str]:
    """The command lines of the processes that run from the packages."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if words[0].startswith("/usr/lib/upcall/"):
                found.append(" ".join(words))
    return found


def furnish(*services: str) -> None:
    """Makes a machine as an administrator has it before the installation, with these services besides logind."""
    for path, text in DROP_INS.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    Path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)  # of containers, where nothing may start
    Path("/var/lib/man-db/auto-update").unlink(missing_ok=True)  # an index of all pages takes an emulator minutes
    shutil.rmtree("/var/lib/upcall", ignore_errors=True)  # of the host's
    command("systemctl", "start", "systemd-journald.service", "dbus.service", "systemd-logind.service", *services)


def installed(folder: Path) -> None:
    dpkg("--install", *sorted(folder.glob("*.deb")))
    wait_until(lambda: active(*RUNNING), "the services", SLOW)


def active(*units: str) -> bool:
    done = subprocess.run(["systemctl", "is-active", *units], capture_output=True, text=True, timeout=SLOW)
    return done.stdout.split() == ["active"] * len(units)


def check_installed() -> None:
    """The machine is as `upcall setup` would leave it."""
    assert pwd.getpwnam("upcall").pw_uid < 1000
    registered(pwd.getpwnam("upcall").pw_uid)
    assert "upcall.install.sessions open" in COMMON.read_text()
    assert "nothing to do" in command("upcall", "setup", "--check")
    makers = command("sh", "-c", "upcall request-key status || :")
    for name in ("cifs.spnego", "dns_resolver", "id_resolver", "cifs.idmap"):
        assert re.search(rf"^{re.escape(name)} +upcall ", makers, re.MULTILINE), makers
    assert "upcall-key-generate" in command("man", "-w", "upcall-key-generate")
    assert all("/usr/lib/upcall/bin/python3 -I -m upcall" in line for line in processes()), processes()
    name = "lab"  # of /etc/hosts
    command("modprobe", "dns_resolver")
    made = command("keyctl", "request2", "dns_resolver", name, "", "@s").strip()
    assert "127.0.0.1" in command("keyctl", "print", made)


def check_login(session: Session, who: Person) -> None:
    pid = registered(who.uid)
    cgroup = Path(f"/proc/{pid}/cgroup").read_text()
    assert f"/user@{who.uid}.service/app.slice/upcall-daemon.service" in cgroup
    assert not Path("/run/upcall/sessions").exists()  # the PAM profile leaves it to systemd
    assert session.say("command -v upcall") == "/usr/bin/upcall"


class Asking:
    """Requests of a person, one after the other, until `end`."""

    def __init__(self, who: Person, ask: Callable[[int], str]) -> None:
        self._reader, writer = os.pipe()
        self._text = b""

        def work() -> None:
            os.close(self._reader)
            for number in range(1_000_000):
                began = time.monotonic()
                os.write(writer, f"{ask(number)} {time.monotonic() - began:.3f}\n".encode())

        self._task = Task(who, work)
        os.close(writer)
        os.set_blocking(self._reader, False)

    def outcomes(self) -> list[tuple[str, float]]:
        """The outcomes so far, each with the seconds that it took."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._reader, 1 << 16):
                self._text += chunk
        lines = [line.split() for line in self._text.decode().splitlines(keepends=True) if line.endswith("\n")]
        return [(outcome, float(seconds)) for outcome, seconds in lines]

    def answered(self) -> bool:
        """Whether the last request was answered."""
        return [outcome for outcome, _ in self.outcomes()][-1:] == ["answered"]

    def end(self) -> None:
        self._task.end()
        os.close(self._reader)


def by_client(signature: str) -> Callable[[int], str]:
    def ask(_number: int) -> str:
        try:
            with Client() as client:
                client.wrap(signature, b"x" * 16)
        except Refused as refused:
            return refused.reason
        except NoBroker:
            time.sleep(0.05)  # not to take the processor from the one that is about to start
            return "no-broker"
        except (UpcallError, OSError) as error:
            return type(error).__name__
        return "answered"

    return ask


def by_file(folder: Path) -> Callable[[int], str]:
    def ask(number: int) -> str:
        try:
            (folder / f"file-{number}").touch()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "answered"

    return ask


def upgraded(folder: Path, who: Person, signature: str, upper: Path) -> None:
    """With requests in hand: the daemon is stopped when the maintainer's script is about to restart the broker."""
    broker, daemon = broker_pid(), serving(who.uid)
    assert broker is not None and daemon is not None
    packages = [str(path) for path in sorted(folder.glob("*.deb"))]
    process = subprocess.Popen(["dpkg", "--install", *packages], env=ENVIRONMENT, cwd="/", stdin=subprocess.DEVNULL)
    asking = {}
    try:
        wait_until(lambda: restarting() or process.poll() is not None, "the restart of the broker", 4 * SLOW)
        assert process.poll() is None
        os.kill(daemon, signal.SIGSTOP)
        asking = {"a program": Asking(who, by_client(signature)), "the kernel": Asking(who, by_file(upper))}
        wait_until(lambda: broker_pid() not in (None, broker), "the new broker", SLOW)
        os.kill(daemon, signal.SIGCONT)
        assert registered(who.uid) == daemon  # not a new one: it may have been told a passphrase
        for name, asked in asking.items():
            wait_until(asked.answered, f"an answer for {name}", SLOW)
        assert process.wait(4 * SLOW) == 0
    finally:
        os.kill(daemon, signal.SIGCONT)
        process.kill()
        outcomes = {name: asked.outcomes() for name, asked in asking.items()}
        for asked in asking.values():
            asked.end()
    for name, found in outcomes.items():
        counted, longest = Counter(outcome for outcome, _ in found), max(seconds for _, seconds in found)
        print(f"    {name}: {len(found)} requests: {dict(counted)}; the longest took {longest:.1f} s")
        assert {*counted} - {"answered", "no-broker"}, f"no request was in hand: {counted}"
        assert longest < 60  # each has a deadline of 3 s and less; the rest is the emulated processor's
    wait_until(lambda: active(*RUNNING), "the services", SLOW)


def restarting() -> bool:
    """Whether the maintainer's script restarts the broker."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"restart" in words and b"upcall-broker.service" in words:
                return True
    return False


def walk(older: Path, newer: Path) -> None:
    prepare_sshd()
    furnish("ssh.service")
    alice, before, pam = person("alice"), inventory(), COMMON.read_text()
    with ssh(alice) as session:
        with step("install, with somebody logged in"):
            installed(older)
        check_login(session, alice)
    check_installed()
    config = Path("/etc/upcall/config.toml")
    config.parent.mkdir(exist_ok=True)
    config.write_text('[mount]\nusers = ["alice"]\n')
    command("systemctl", "restart", "upcall-mount.service")
    lower, upper = alice.home / ".private", alice.home / NAME
    with contextlib.ExitStack() as stack:
        with step("log in"):
            session = stack.enter_context(ssh(alice))
            check_login(session, alice)
        with step("generate"):
            said = session.say("umask 077; echo labpass >~/.passphrase; "
                               "upcall key generate --passphrase-file ~/.passphrase")  # fmt: skip
            print(said)
            found = re.search(r"^signature +([0-9a-f]{16})$", said, re.MULTILINE)
            assert found is not None
        with step("mount"):
            print(said := session.say(f"upcall mount {NAME} {lower} {upper} --create"))
            assert "mounted on" in said and upper.is_mount()
            say_until(session, f"echo {CONTENT} 2>/dev/null >{upper}/file && cat {upper}/file", CONTENT)
            assert CONTENT.encode() not in (lower / "file").read_bytes()
        with step("log out"):
            session.leave()
            gone(alice.uid)
    with ssh(alice) as session, step("log in again"):
        check_login(session, alice)
        print(session.say(f"upcall mount {NAME} || upcall key add default"))
        drop_caches()
        say_until(session, f"cat {upper}/file", CONTENT)
    with ssh(alice) as session:
        check_login(session, alice)
        session.say(f"upcall mount {NAME} || upcall key add default")
        with step("upgrade with requests in hand"):
            upgraded(newer, alice, found[1], upper)
        drop_caches()
        say_until(session, f"cat {upper}/file", CONTENT)
        assert session.say("upcall --version").endswith("9.1.0")
        check_installed()
        daemon = registered(alice.uid)
        assert session.say("systemctl --user restart upcall-daemon") == ""
        assert registered(alice.uid, other_than=[daemon])
        drop_caches()
        say_until(session, f"cat {upper}/file", CONTENT)
        assert "taken away" in session.say(f"upcall umount {NAME}") or not upper.is_mount()
        names = command("dpkg-query", "--show", "--showformat", "${Package}\n", "upcall*").split()
        names = [name for name in names if Path(f"/var/lib/dpkg/info/{name}.list").exists()]
        with step("remove"):
            dpkg("--remove", *names)
        assert processes() == []
        assert COMMON.read_text() == pam
        left = sorted(inventory() - before)
        print("\n".join(["    left by removal:", *(f"    {path}" for path in left)]))
        assert [path for path in left if not STATE.fullmatch(path)] == []
        with step("purge"):
            dpkg("--purge", *names)
    left = sorted(inventory() - before)
    assert left == []
    assert "upcall" not in {entry.pw_name for entry in pwd.getpwall()}
    assert before <= inventory()
    assert (lower / "file").exists() and (alice.home / ".local/share/upcall/keys/default.pem").exists()


def main() -> int:
    began = time.monotonic()
    try:
        walk(*map(Path, sys.argv[1:]))
    finally:
        with Path("/results/journal").open("wb") as kept:
            subprocess.run(["journalctl", "--no-pager"], stdout=kept, check=False, timeout=SLOW)
    print(f"--- all of it: {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
