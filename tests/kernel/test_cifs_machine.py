"""Root's own mount by the machine's keytab: it is answered by the daemon with a uid of its own, and what is root's is
out of the reach of that, really tried from inside its handler."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.cifs_scene import mount_for, mounting, ours, spnego
from tests.kernel.scene import House
from upcall.core.errors import REASONS
from upcall.handler import Handler
from upcall.install.wanted import SYSTEMD, content
from upcall.kernel import keyring
from upcall.process import machine
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.testing.lab.fileserver import FileServer
from upcall.testing.lab.kerberos import Realm, default_ccache
from upcall.testing.lab.stage import Person, person
from upcall.wire.envelope import Envelope

SYSUSERS = "/etc/sysusers.d/upcall.conf"
HANDED_OVER = Path("/run/upcall/credentials")  # as the init script has it
PRIED = Path("/tmp/ring3/pried")
ROOTS_SOCKET = Path("/run/roots.sock")
CLOSED = (errno.EACCES, errno.EPERM)


@pytest.fixture(scope="module")
def upcall_user() -> Iterator[Person]:
    """Where there is this user, its daemon is asked for root's keys: so it goes again."""
    Path(SYSUSERS).parent.mkdir(parents=True, exist_ok=True)
    Path(SYSUSERS).write_bytes(content(SYSTEMD, SYSUSERS, "/usr/bin/python3"))
    subprocess.run(["systemd-sysusers", "upcall.conf"], check=True, timeout=180)
    machine.uid.cache_clear()
    user = person(machine.USER)
    assert 0 < user.uid == machine.uid()
    yield user
    subprocess.run(["userdel", "--force", machine.USER], check=True, timeout=180)
    machine.uid.cache_clear()


@pytest.fixture(autouse=True)
def scene(upcall_user: Person, house: House, kerberos: Realm, share: FileServer) -> Iterator[None]:
    """We answer the kernel, and the broker knows the machine's uid. Root has a ticket of its own, of no use here."""
    kerberos.login(person("root"), "bob")
    with ours():
        yield
    kerberos.logout(person("root"))


@contextlib.contextmanager
def keytab(kerberos: Realm, user: Person) -> Iterator[Path]:
    """Root's, and the copy that is handed over."""
    with kerberos.installed_keytab() as roots:
        HANDED_OVER.mkdir(exist_ok=True)
        copy = HANDED_OVER / machine.KEYTAB
        shutil.copyfile(roots, copy)
        os.chown(copy, user.uid, 0)
        copy.chmod(0o400)
        try:
            yield roots
        finally:
            copy.unlink()


def machines(make: Callable[[], Handler] = spnego) -> Handler:
    os.environ |= {"KRB5_KTNAME": f"FILE:{HANDED_OVER / machine.KEYTAB}"}
    return make()


def connecting(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
        one.connect(str(path))


def tried(work: Callable[[], object]) -> int:
    """The errno; 0 if it could be done."""
    try:
        work()
    except OSError as error:
        return error.errno or -1
    return 0


class Prying:
    """The handler, taken over: it answers, and tries what is root's before."""

    services: tuple[str, ...] = ("cifs.spnego",)

    def __init__(self, roots_key: int) -> None:
        self._handler, self._roots_key = machines(), roots_key

    def lane(self, envelope: Envelope, /) -> str:
        return self._handler.lane(envelope)

    def answer(self, envelope: Envelope, /) -> bytes:
        attempts = {
            "uid": lambda: os.setresuid(0, 0, 0),
            "shadow": Path("/etc/shadow").read_bytes,
            "keytab": Path("/etc/krb5.keytab").read_bytes,
            "ticket": default_ccache(person_root()).read_bytes,
            "forwarders": lambda: connecting(Place(SYSTEM_FOLDER).request_key_socket),
            "socket": lambda: connecting(ROOTS_SOCKET),
            "key": lambda: keyring.read(self._roots_key),
            "memory": Path("/proc/1/mem").read_bytes,
            "kill": lambda: os.kill(1, signal.SIGCONT),
        }
        PRIED.write_text(json.dumps([os.getuid(), {name: tried(one) for name, one in attempts.items()}]))
        return self._handler.answer(envelope)


def person_root() -> Person:
    return Person("root", 0, 0, Path("/root"))


def test_the_machines_daemon_mounts_and_reaches_nothing_of_roots(
    house: House, kerberos: Realm, share: FileServer, upcall_user: Person
) -> None:
    roots_key = keyring.add_user_key("0123456789abcdef", b"secret")
    PRIED.parent.mkdir(exist_ok=True)
    PRIED.touch()
    os.chown(PRIED, upcall_user.uid, 0)
    with keytab(kerberos, upcall_user), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as roots:
        roots.bind(str(ROOTS_SOCKET))
        ROOTS_SOCKET.chmod(0o600)
        roots.listen()
        house.daemon(upcall_user, lambda: Prying(roots_key))
        try:
            with mount_for(person("root")) as folder:
                (folder / "by-the-machine").touch()
        finally:
            ROOTS_SOCKET.unlink()
    uid, found = json.loads(PRIED.read_text())
    assert uid == upcall_user.uid
    assert {name for name, code in found.items() if code not in CLOSED} == set(), found
    assert len(found) == 9


def test_roots_own_ticket_is_of_no_use_and_a_keytab_that_is_handed_over_helps(
    house: House, kerberos: Realm, upcall_user: Person
) -> None:
    house.daemon(upcall_user, machines)
    assert mounting(person("root")).errno == REASONS["no-ticket"]
    with keytab(kerberos, upcall_user):
        assert mounting(person("root")).errno == 0


def test_roots_own_daemon_is_not_asked(house: House, kerberos: Realm, upcall_user: Person) -> None:
    house.daemon(person("root"), spnego)
    assert mounting(person("root")).errno == REASONS["no-daemon"]
