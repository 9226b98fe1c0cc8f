"""Runs `upcall lab cifs` in the guest: two users' files on an encrypted CIFS share with Kerberos.

It uses a KDC, an smbd and one mount with each user's own credentials. Broker, daemons and request-key's configuration
are set up as on a real system: `upcall broker`, one `upcall daemon` per user, `upcall request-key install`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from upcall.core.errors import UpcallError
from upcall.observe.status import show
from upcall.process import start_python as startpython
from upcall.testing.lab import fileserver, kerberos, stage
from upcall.testing.lab.console import complain, console, must, say
from upcall.testing.lab.fileserver import PEER, FileServer
from upcall.testing.lab.kerberos import Realm
from upcall.testing.lab.stage import Person, Task

MOUNT = Path("/tmp/cifs")  # noqa: S108 - the guest's own
_MOUNTS = 8  # of each contender, for the comparison


class Folder:
    """One user's files on the share."""

    def __init__(self, who: Person, share: FileServer, files: int) -> None:
        self.who, self.share = who, share
        self.contents = {f"file-{number}": secrets.token_bytes(200 + number % 8000) for number in range(files)}

    def write(self) -> None:
        for name, content in self.contents.items():
            (MOUNT / self.who.name / name).write_bytes(content)

    def read(self) -> None:
        """Reads all files. Failed unless the content is as written."""
        for name, content in self.contents.items():
            path = MOUNT / self.who.name / name
            must(path.read_bytes() == content, f"{path} came back different")

    def check_owners(self) -> None:
        for name in self.contents:
            found = (self.share.files / self.who.name / name).stat().st_uid
            must(found == self.who.uid, f"the server says that {name} belongs to {found}, not to {self.who.name}")


def options(who: Person, *others: str) -> list[str]:
    return ["seal", f"user={who.name}", f"cruid={who.uid}", *others]


def at_once(folders: Sequence[Folder], verb: str) -> float:
    """Runs a method of all folders in parallel. Returns the seconds for all."""
    start = time.monotonic()
    for task in [Task(folder.who, getattr(folder, verb)) for folder in folders]:
        task.result(2 * stage.PATIENCE)
    return time.monotonic() - start


def touching(who: Person) -> tuple[int, float]:
    """Lists the user's own folder, which may need a session with the server. Returns (errno, seconds)."""
    start = time.monotonic()
    try:
        stage.do_as(who, lambda: list((MOUNT / who.name).iterdir()))
    except OSError as error:
        return error.errno or -1, time.monotonic() - start
    return 0, time.monotonic() - start


def install() -> None:
    """Runs `upcall request-key install`, as an administrator would. The line of cifs-utils remains."""
    command = startpython.command("upcall", "request-key", "install", "--copy")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    must(done.returncode == 0, f"upcall request-key install: {done.stderr.strip()}")
    say("upcall request-key install: the kernel's requests for tickets come to upcall")


# --- the acts ------------------------------------------------------------------------------------------------


def files_of_everybody(folders: Sequence[Folder]) -> None:
    total = sum(len(folder.contents) for folder in folders)
    span = at_once(folders, "write")
    say(f"{total} files written by {len(folders)} people at once: {total / span:.0f}/s")
    for folder in folders:
        folder.check_owners()
    say("on the server each file belongs to who wrote it")
    span = at_once(folders, "read")
    say(f"{total} files read back, all equal: {total / span:.0f}/s")


def break_connections(share: FileServer, folders: Sequence[Folder]) -> None:
    share.drop_connections()
    start = time.monotonic()
    for folder in folders:
        stage.wait_until(lambda who=folder.who: touching(who)[0] == 0, f"{folder.who.name}'s session")  # type: ignore[misc]
    say(f"all connections are broken: everybody is back after {time.monotonic() - start:.1f} s")
    at_once(folders, "read")


def without_a_ticket(realm: Realm, loser: Person, other: Person) -> None:
    realm.logout(loser)
    with fileserver.mounted(MOUNT, *options(other, "multiuser")):
        code, span = touching(loser)
        must(code == errno.EACCES, f"{loser.name} without a ticket: {errno.errorcode.get(code, code)}")
        say(f"{loser.name}'s ticket is gone: refused after {span * 1000:.0f} ms")
        code, span = touching(other)
        must(code == 0, f"{other.name} is affected: {errno.errorcode.get(code, code)}")
        realm.login(loser)
        time.sleep(1.1)  # a rejected key is refused again for one second
        code, span = touching(loser)
        must(code == 0, f"{loser.name} with a ticket again: {errno.errorcode.get(code, code)}")
        say(f"{other.name} notices nothing; with a new ticket {loser.name} is back in {span * 1000:.0f} ms")


def stopped(daemon: subprocess.Popen[bytes], who: Person) -> None:
    daemon.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    code = fileserver.mount_cifs(MOUNT, *options(who))
    span = time.monotonic() - start
    daemon.send_signal(signal.SIGCONT)
    must(code == errno.ETIMEDOUT, f"a mount although the daemon is stopped: {errno.errorcode.get(code, code)}")
    say(f"{who.name}'s daemon is stopped: a mount is refused after {span:.1f} s ({errno.errorcode.get(code, code)})")
    start = time.monotonic()
    with fileserver.mounted(MOUNT, *options(who)):
        say(f"it goes on: mounted in {(time.monotonic() - start) * 1000:.0f} ms")


def mount_time(who: Person) -> float:
    """Returns the seconds of one mount."""
    start = time.monotonic()
    with fileserver.mounted(MOUNT, *options(who)):
        return time.monotonic() - start


def compare(who: Person) -> None:
    """Compares mounts with keys by cifs.upcall and by upcall, alternately."""
    peers, ours = [], []
    for _ in range(_MOUNTS):
        with fileserver.request_key_lines(PEER):
            peers.append(mount_time(who))
        ours.append(mount_time(who))
    mine, other = statistics.median(ours) * 1000, statistics.median(peers) * 1000
    say(f"a mount takes {mine:.0f} ms, and {other:.0f} ms when cifs.upcall answers")


def run(files: int, log: int) -> None:
    started = time.monotonic()
    must(not fileserver.missing(), f"not installed: {', '.join(fileserver.missing())}")
    people = [stage.person(name) for name in kerberos.PEOPLE]
    alice, bob = people
    with contextlib.ExitStack() as stack:
        realm = stack.enter_context(kerberos.realm())
        say(f"a KDC serves {realm.name}")
        share = stack.enter_context(fileserver.server(realm))
        say(f"smbd serves //{kerberos.FILE_SERVER}/{fileserver.SHARE} to whoever has a ticket and encrypts")
        for who in people:
            realm.login(who)
        broker = stage.start_broker(log)
        stack.callback(stage.end, broker)
        daemons = stage.start_daemons(*people, stderr=log)
        for daemon in daemons:
            stack.callback(stage.end, daemon)
        say(f"the broker, and a daemon each for {' and '.join(who.name for who in people)} with the user's own rights")
        install()
        compare(alice)
        folders = [Folder(who, share, files) for who in people]
        with fileserver.mounted(MOUNT, *options(alice, "multiuser")):
            files_of_everybody(folders)
            break_connections(share, folders)
        without_a_ticket(realm, bob, alice)
        stopped(daemons[0], alice)
        show(stage.broker_status() or {}, console)
    faults = stage.kernel_faults()
    must(not faults, f"the kernel complains: {faults}")
    say(f"the kernel's log is clean; {time.monotonic() - started:.0f} s")


def main(arguments: Sequence[str]) -> int:
    """Runs the demonstration. `arguments`: the number of files per user. Logs go to /results."""
    log = os.open("/results/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        run(int(arguments[0]), log)
    except (UpcallError, OSError, subprocess.SubprocessError) as error:
        complain(error)
        return os.EX_SOFTWARE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
