"""SIDs and ids on a mount with cifsacl, by a real winbindd: the same whether cifs.idmap answers the kernel or we.

The winbindd is that of a standalone server: it knows Unix users and groups, those of its own passdb and the well-known
SIDs, and has no domain controller to ask. The kernel lets nobody read keys of this type: the helper's payloads are
taken from it by a library in the place of libkeyutils.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_idmap.cifs import CifsIdmap

from tests.kernel.cifs_scene import counts, mount_of, mountpoint
from tests.kernel.scene import House, attempt
from upcall.core.errors import Refused
from upcall.core.messages import Requester
from upcall.kernel import keyring
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.cifs_idmap import (
    TYPE,
    Sid,
    check_answer,
    take_description,
    take_payload_id,
    take_payload_sid,
)
from upcall.protocols.request_key.messages import Ask, pack_ask, take_instance
from upcall.testing.lab.fileserver import PEER, FileServer, mounted, request_key_lines
from upcall.testing.lab.guest import SYSTEM_PATH
from upcall.testing.lab.kerberos import Realm
from upcall.testing.lab.stage import PATIENCE, Person, end, wait_until
from upcall.wire.envelope import Envelope

PLUGIN = Path("/etc/cifs-utils/idmap-plugin")
HELPER = Path("/usr/sbin/cifs.idmap")
PROGRAMS = ("winbindd", "wbinfo", "smbpasswd", "gcc")
pytestmark = pytest.mark.skipif(
    not (PLUGIN.exists() and HELPER.exists() and all(shutil.which(name, path=SYSTEM_PATH) for name in PROGRAMS)),
    reason="needs winbind, samba, cifs-utils with its idmap-plugin, and gcc",
)
THE_MOUNTS = 1234  # the uid and gid of what nobody can translate
WITH_ACL = ("cifsacl", f"uid={THE_MOUNTS}", f"gid={THE_MOUNTS}", "noforceuid", "noforcegid")

# What cifs.idmap calls to learn what is wanted, and to answer.
_KEYS = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int keyctl_describe_alloc(int key, char **text) { *text = strdup(getenv("TOLD")); return strlen(*text); }
long keyctl_instantiate(int key, const void *payload, size_t size, int ring) {
    FILE *file = fopen(getenv("ANSWER"), "wb");
    fwrite(payload, 1, size, file);
    return fclose(file);
}
long keyctl_set_timeout(int key, unsigned seconds) { return 0; }
"""
_IDMAP = "idmap config * : backend = tdb\nidmap config * : range = 100000-199999\n"

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module", autouse=True)
def winbind(share: FileServer) -> Iterator[Path]:
    """A winbindd beside the file server; bob has an account in their passdb, alice is only Unix's."""
    config = share.folder / "winbind.conf"
    config.write_text(share.config.read_text().replace("[global]\n", f"[global]\n{_IDMAP}"))
    Path("/run/samba").mkdir(exist_ok=True)
    Path("/etc/resolv.conf").write_text("nameserver 127.0.0.1\n")  # where nobody listens: it need not wait
    words = ["smbpasswd", "-c", str(config), "-s", "-a", "bob"]
    subprocess.run(words, input=b"secret\nsecret\n", check=True, timeout=180, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(
        ["winbindd", "-F", "-s", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # It starts other programs for its first answers: minutes, in a slow guest.
        wait_until(lambda: _ok("wbinfo", "--unix-ids-to-sids=u5002"), "winbindd", 12 * PATIENCE)
        yield config
    finally:
        end(process)


@pytest.fixture(scope="module")
def house(root: Person) -> Iterator[House]:
    made = House()
    try:
        made.open()
        made.daemon(root, CifsIdmap)
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def by_the_peer() -> Iterator[None]:
    with request_key_lines(PEER, f"create cifs.idmap * * {HELPER} %k"):
        yield
    forget()


@contextlib.contextmanager
def by_us() -> Iterator[None]:
    with request_key_lines(PEER, f"create cifs.idmap * * {' '.join(forwarder.command())} %k"):
        yield
    forget()


def forget() -> None:
    """Has the kernel's client ask anew for every SID and id."""
    for line in Path("/proc/keys").read_text().splitlines():
        if ".cifs_idmap" in line:
            subprocess.run(["keyctl", "clear", str(int(line.split()[0], 16))], check=True, timeout=180)


def _ok(*words: str) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(words, capture_output=True, timeout=180)
        return done.returncode == 0 and b"NOT MAPPED" not in done.stdout
    return False


def output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=180).stdout.strip()


# --- every answer, side by side ------------------------------------------------------------------------------------


def test_every_answer_is_that_of_cifs_idmap(winbind: Path, tmp_path: Path, alice: Person, bob: Person) -> None:
    (tmp_path / "keys.c").write_text(_KEYS)
    keys = tmp_path / "keys.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", keys, tmp_path / "keys.c"], check=True, timeout=180)
    bobs = output("wbinfo", f"--unix-ids-to-sids=u{bob.uid}")
    domain = bobs.rpartition("-")[0]
    assert domain.startswith("S-1-5-21-")
    sids = [bobs, f"{domain}-513", f"S-1-22-1-{alice.uid}", "S-1-22-2-50", "S-1-22-1-77777", "S-1-5-32-544",
            "S-1-1-0", "S-1-5-18", "S-1-5-21-1-2-3-1000", "S-1-5", "S-1-0x100000000-1"]  # fmt: skip
    ids = [0, 50, alice.uid, bob.uid, 77777, 100000, 4294967294]
    asked = [f"{kind}:{sid}" for sid in sids for kind in ("os", "gs")]
    asked += [f"{kind}:{number}" for number in ids for kind in ("oi", "gi")]
    handler = CifsIdmap()
    table = {name: (theirs(keys, tmp_path / "answer", name), ours(handler, name)) for name in asked}
    for name, (peer, we) in table.items():
        print(f"{name:<52} {peer or 'refused'!s:<50} {we or 'refused'}{'' if peer == we else '  <- different'}")
    assert {name: we for name, (_, we) in table.items()} == {name: peer for name, (peer, _) in table.items()}
    assert table[f"os:{bobs}"] == (bob.uid, bob.uid)
    assert table[f"os:S-1-22-1-{alice.uid}"] == (alice.uid, alice.uid)
    assert sum(peer is None for peer, _ in table.values()) not in (0, len(table))


def meaning(description: str, payload: bytes) -> int | str:
    """cifs.idmap leaves what was on its stack behind a SID."""
    if isinstance(take_description(description.encode()).subject, Sid):
        return take_payload_id(payload)
    used = 8 + 4 * payload[1]
    return str(take_payload_sid(payload[:used] + bytes(68 - used)))


def theirs(keys: Path, answer: Path, description: str) -> int | str | None:
    answer.unlink(missing_ok=True)
    told = {"LD_PRELOAD": str(keys), "TOLD": f"cifs.idmap;0;0;39010000;{description}", "ANSWER": str(answer)}
    subprocess.run([HELPER, "1"], env=os.environ | told, timeout=180, capture_output=True)
    return meaning(description, answer.read_bytes()) if answer.exists() else None


def ours(handler: CifsIdmap, description: str) -> int | str | None:
    body = pack_ask(Ask(description.encode(), b""))
    deadline = int((time.monotonic() + 60) * 1e9)
    try:
        answer = handler.answer(Envelope(1, 0, TYPE, Requester(0, 0), deadline, body))
    except Refused:
        return None
    check_answer(body, answer)
    return meaning(description, take_instance(answer).payload)


# --- on a mount ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["peer", "ours"])
def answering(request: pytest.FixtureRequest, house: House) -> Iterator[str]:
    with by_the_peer() if request.param == "peer" else by_us():
        yield request.param


def test_files_belong_to_the_same_people(
    answering: str, share: FileServer, kerberos: Realm, alice: Person, bob: Person
) -> None:
    """Alice's by a SID of Unix users, bob's by one of the server's passdb, a number that nobody has by a Unix one."""
    for name, uid in (("alices", alice.uid), ("bobs", bob.uid), ("numbers", 77777)):
        (share.files / name).touch()
        os.chown(share.files / name, uid, 50)
    kerberos.login(alice)
    try:
        before = counts()["answered"]
        options = mount_of(alice, *WITH_ACL)
        with mounted(mountpoint(), *options) as folder:
            found = {name: os.stat(folder / name) for name in ("alices", "bobs", "numbers")}
        assert {name: (one.st_uid, one.st_gid) for name, one in found.items()} == {
            "alices": (alice.uid, 50),
            "bobs": (bob.uid, 50),
            "numbers": (77777, 50),
        }
        assert (counts()["answered"] > before) == (answering == "ours")
    finally:
        kerberos.logout(alice)


def test_what_nobody_translates_is_the_mounts_own(
    house: House, share: FileServer, kerberos: Realm, root: Person, alice: Person
) -> None:
    """The daemon finds no plugin and refuses: the ids of the mount count."""
    (share.files / "alices").touch()
    os.chown(share.files / "alices", alice.uid, 50)
    house.others.pop().end()
    house.daemon(root, lambda: CifsIdmap(Path("/nonexistent/idmap-plugin")))
    kerberos.login(alice)
    try:
        with by_us(), mounted(mountpoint(), *mount_of(alice, *WITH_ACL)) as folder:
            found = os.stat(folder / "alices")
            assert (found.st_uid, found.st_gid) == (THE_MOUNTS, THE_MOUNTS)
        assert "no-name-service" in house.log()
    finally:
        kerberos.logout(alice)


# --- whom upcall answers -------------------------------------------------------------------------------------------


def test_no_process_can_ask_for_such_a_key(house: House, alice: Person) -> None:
    """Newer kernels refuse it themselves (EPERM); upcall does where they do not."""

    def work() -> int:
        serial = _libc.syscall(249, TYPE.encode(), f"oi:{alice.uid}".encode(), b"", keyring.SESSION_KEYRING)
        return 0 if serial >= 0 else ctypes.get_errno()

    with by_us():
        before = house.log()
        assert attempt(alice, work).value in (errno.EPERM, errno.EACCES, errno.ENOKEY)
        assert "answered" not in house.log()[len(before) :]
