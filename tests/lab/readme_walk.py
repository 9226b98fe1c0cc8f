"""Runs in the lab's guest, as root: `python -m tests.lab.readme_walk NAME PACKAGES`.

Takes the consoles of README.md that are marked with `install` and with NAME, and runs their commands in order: `#` as
root, `$` in a terminal in which alice has been logged in since before the installation. Beforehand there is what the
text takes for granted: a realm with a file server, or a filesystem with quotas. Prints what each command took.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.documents import Command, shown, walk
from tests.kernel.login_scene import SLOW, Session, registered, terminal
from tests.kernel.quota_scene import MB, Disk
from tests.lab.deb_walk import ENVIRONMENT, command, furnish, step
from upcall.testing.lab.fileserver import server
from upcall.testing.lab.kerberos import FILE_SERVER, PEOPLE, realm
from upcall.testing.lab.stage import Person, broker_status, daemon_status, drop_caches, person

CLONE = Path("/srv/upcall")
PASSWORD, PASSPHRASE = "correct horse", "battery staple"
ANSWERS: Mapping[bytes, bytes] = {
    rb"(?i)(passphrase|once more)[^\r\n]*: ?$": f"{PASSPHRASE}\n".encode(),
    rb"(?i)password[^\r\n]*: ?$": f"{PASSWORD}\n".encode(),
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROGRESS = re.compile(r"\(Reading database \.\.\. (\d+%)?$|.*\bMaking a key \.\.\.")
STATUS = {"upcall quota test": {0, 69}}  # 69: not every sink works: no desktop
CONTENT = "what only its owner may read"


class Walk:
    """Runs the commands of a page. `names`: what this machine calls what the page names."""

    def __init__(self, session: Session, names: Mapping[str, str] | None = None) -> None:
        self.session, self._names = session, names or {}

    def go(self, name: str, instead: Mapping[str, Callable[[Session, str], str]] | None = None) -> None:
        """Runs the consoles of this mark. `instead`: what runs a command that does not end by itself."""
        found = walk(name)
        assert found, f"no console of README.md is marked with {name}"
        for one in found:
            self.take(one, (instead or {}).get(one.text))

    def take(self, one: Command, run: Callable[[Session, str], str] | None = None) -> str:
        text = one.text
        for theirs, ours in self._names.items():
            text = text.replace(theirs, ours)
        if text.startswith("make "):
            return ""  # outside, where there is a compiler
        print(f"{'#' if one.root else '$'} {text}", flush=True)
        began = time.monotonic()
        if one.root:
            status, said = as_root(text)
        elif run is not None:
            status, said = 0, run(self.session, text)
        else:
            status, said = split(self.session.say(text, ANSWERS))
        said = ESCAPES.sub("", said)
        if not one.root:
            lines = [line for line in said.splitlines() if not PROGRESS.match(line)]
            print("".join(f"    {line}\n" for line in lines), end="")
        print(f"    -- {time.monotonic() - began:.1f} s", flush=True)
        if text == "upcall doctor" and status == 1:  # its limits are for a machine, not for an emulator of one
            problems = [line for line in said.splitlines() if line.startswith("✗")]
            assert all(re.search(r"within \d+ s$", line) for line in problems), problems
            status = 0
        assert status in STATUS.get(text, {0}), f"{text}: {status}"
        lacking = shown(one, said.splitlines())
        assert lacking is None, f"{text}: no line like {lacking!r}"
        return said


def as_root(text: str) -> tuple[int, str]:
    """In the clone's folder; apt's question is answered. Prints output as it comes, and returns it with the status."""
    said = []
    with subprocess.Popen(
        ["timeout", str(4 * SLOW), "sh", "-c", text], env=ENVIRONMENT, cwd=CLONE, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("y\n")
        process.stdin.close()
        for line in process.stdout:
            if line.strip() and not PROGRESS.match(line):
                print(f"    {line}", end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def split(said: str) -> tuple[int, str]:
    """What `Session.say` returned: (exit status, output)."""
    found = re.search(r"(?:^|\n)ended with (\d+)$", said)
    return (int(found[1]), said[: found.start()]) if found else (0, said)


def offline() -> None:
    """Apt knows the packages that are installed, and no archive."""
    for folder in ("/var/lib/apt/lists", "/var/cache/apt"):
        command("mount", "-t", "tmpfs", "-o", "mode=0755", "none", folder)


def quick_to_compile(compiled: Path) -> None:
    """Has py3compile copy what was compiled outside (tests/packed.py)."""
    Path("/usr/bin/py3compile").write_text(f'#!/bin/sh\nexec cp -r "{compiled}/$2/usr/lib/upcall/." "$3/"\n')


# --- the walks -------------------------------------------------------------------------------------------------


def ecryptfs(taking: Walk, alice: Person, home: Path) -> None:
    lower, upper = home / ".private", home / "private"
    mounted: list[bool] = []

    def unmounting(session: Session, text: str) -> str:
        """First looks at what is in both folders, and then goes on with the page."""
        mounted.append(upper.is_mount())
        assert (lower / "letter").exists() and b"secret" not in (lower / "letter").read_bytes()
        assert (upper / "letter").stat().st_uid == alice.uid
        return session.say(text)

    taking.go("ecryptfs", {"upcall umount private": unmounting})
    assert mounted == [True]
    assert not upper.is_mount() and not (upper / "letter").exists()
    taking.session.leave()
    with terminal(alice) as session:
        registered(alice.uid)
        Walk(session).take(Command(False, "upcall mount private", ()))  # "After the next login `...` suffices"
        drop_caches()
        assert session.say(f"cat {upper}/letter") == "secret"
        assert session.say("upcall umount private") != ""


@contextlib.contextmanager
def share() -> Iterator[Path]:
    """The shared folder on the server."""
    with realm() as lab, server(lab) as made:
        lab.administer(*(f'change_password -pw "{PASSWORD}" {who}' for who in PEOPLE))
        yield made.files


def cifs(taking: Walk, alice: Person, files: Path) -> None:
    taking.go("cifs")
    assert Path("/mnt").is_mount()
    assert daemon_status(alice.uid)["answered"] >= 1
    bob = person("bob")
    with terminal(bob) as other:
        registered(bob.uid)
        Walk(other).take(Command(False, "kinit", ()))
        for who, session in ((alice, taking.session), (bob, other)):
            assert session.say(f"echo {CONTENT} >/mnt/{who.name}/letter && cat /mnt/{who.name}/letter") == CONTENT
            assert (files / who.name / "letter").stat().st_uid == who.uid
        assert split(other.say("cat /mnt/alice/letter"))[0] != 0
        assert daemon_status(bob.uid)["answered"] >= 1
    print(f"    the broker: {(broker_status() or {}).get('request_key')}")
    assert "cifs.upcall" not in command("journalctl", "--no-pager", "--quiet", "SYSLOG_IDENTIFIER=cifs.upcall")
    command("umount", "/mnt")


def disk(alice: Person) -> Path:
    folder = Path("/srv/quota")
    folder.mkdir()
    made = Disk("ext4", folder)
    made.limit("u", alice.uid, 0, MB)
    return made.point


def quota(taking: Walk, alice: Person, point: Path) -> None:
    def watching(session: Session, text: str) -> str:
        """In this terminal, while another one writes."""
        session.type(f"{text}\n")
        said = session.until("Ctrl-C ends it")
        with terminal(alice) as other:
            status, complaint = split(other.say(f"dd if=/dev/zero of='{point}/file' bs=64k count=32"))
            assert status and "Disk quota exceeded" in complaint, complaint
            said += "\n" + session.until("(by alice)", "Quota used up")
        session.type("\x03")
        return said

    taking.session.say("mesg y")  # login(1) turns messages off, other than terminals of a desktop and of ssh
    taking.go("quota", {"upcall quota watch": watching})


BEFORE: Mapping[str, Callable[[Person], contextlib.AbstractContextManager[Path]]] = {
    "ecryptfs": lambda alice: contextlib.nullcontext(alice.home),
    "cifs": lambda _: share(),
    "quota": lambda alice: contextlib.nullcontext(disk(alice)),
}
WALKS: Mapping[str, Callable[[Walk, Person, Path], None]] = {"ecryptfs": ecryptfs, "cifs": cifs, "quota": quota}


def main() -> int:
    *names, packages = sys.argv[1:]
    CLONE.joinpath("dist").mkdir(parents=True)
    CLONE.joinpath("dist/deb").symlink_to(packages)
    with step("what the text takes for granted"), contextlib.ExitStack() as before:
        furnish()
        offline()
        quick_to_compile(Path(packages).with_suffix(".compiled"))
        alice = person("alice")
        found = {name: before.enter_context(BEFORE[name](alice)) for name in names}
        session = before.enter_context(terminal(alice))
        stack = before.pop_all()
    with stack:
        try:
            with step("the walk"):
                taking = Walk(session, {"fs.example.com": FILE_SERVER})
                taking.go("install")
                registered(alice.uid)  # who was logged in before has a daemon, too
                for name in names:
                    WALKS[name](taking, alice, found[name])
        finally:
            with Path("/results/journal").open("wb") as kept:
                subprocess.run(["journalctl", "--no-pager"], stdout=kept, check=False, timeout=SLOW)
    return 0


if __name__ == "__main__":
    sys.exit(main())
