"""People who lie to the kernel or to us: descriptions, answers, tickets and pids that are not what they seem."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator

import pytest

from tests.kernel.cifs_scene import (
    Blocking,
    Lying,
    begin_mounting,
    counts,
    mount_of,
    mounting,
    mountpoint,
    ours,
    spnego,
)
from tests.kernel.scene import House, attempt, begin, daemon_status, pending
from upcall.core.errors import REASONS
from upcall.core.messages import Answer
from upcall.process.paths import SYSTEM_FOLDER
from upcall.protocols.request_key.cifs_spnego import take_payload
from upcall.protocols.request_key.messages import Instance, pack_instance
from upcall.testing.lab.fileserver import FileServer, mount_here, unmount_soon
from upcall.testing.lab.kerberos import FILE_SERVER, Realm, default_ccache
from upcall.testing.lab.stage import PATIENCE, Person, do_as, person, wait_until
from upcall.testing.played import PlayedDaemon
from upcall.wire.envelope import pack_response, refusal

HEAD = struct.Struct("<IIII")


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """One for all of them: whoever replaces a daemon puts the real one back."""
    made = House()
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module", autouse=True)
def scene(house: House, share: FileServer, alice: Person, bob: Person) -> Iterator[None]:
    """We answer the kernel; alice and bob have a daemon each."""
    for who in (alice, bob):
        house.daemon(who, spnego)
    with ours():
        yield


@pytest.fixture(autouse=True)
def tickets(kerberos: Realm, alice: Person, bob: Person) -> Iterator[None]:
    """Alice and bob have a ticket each when a test begins."""
    for who in (alice, bob):
        kerberos.login(who)
    yield
    for who in (alice, bob):
        kerberos.logout(who)


def asked(who: Person) -> int:
    """How many requests this person's daemon has had."""
    status = daemon_status(who)
    return int(status["answered"]) + int(status["refused"])


# --- descriptions --------------------------------------------------------------------------------------------


def forged(victim: Person, pid: int = 1) -> str:
    return f"ver=0x2;host={FILE_SERVER};ip4=127.0.0.1;sec=krb5;uid=0x0;creduid={victim.uid:#x};pid={pid:#x}"


@pytest.mark.parametrize("callout", ["", "x"])
def test_a_description_that_no_kernel_wrote_gets_no_ticket(alice: Person, bob: Person, callout: str) -> None:
    """Newer kernels let nobody ask for such a key; where they do, we see whose key it is."""
    before = asked(bob)
    for who in (alice, person("root")):
        done = attempt(who, lambda: _keyctl("request2", "cifs.spnego", forged(bob), callout, "@s"))
        assert "request_key: " in str(done.value)
    assert asked(bob) == before


def test_a_forged_key_that_lies_there_already_is_not_used(share: FileServer, alice: Person) -> None:
    """Put there by who mounts, under the description that the kernel is going to look for."""

    def work() -> None:
        _keyctl("add", "cifs.spnego", forged(alice, os.getpid()), "what alice likes", "@s")
        folder = mountpoint()
        mount_here(folder, *mount_of(alice), f"uid={alice.uid}")
        unmount_soon(folder)

    before = asked(alice)
    assert begin(person("root"), work).result().errno == 0
    assert asked(alice) == before + 1


def _keyctl(*words: str) -> str:
    return subprocess.run(["keyctl", *words], stdout=-1, stderr=-2, text=True, timeout=180).stdout


@pytest.mark.parametrize("name", ["a;creduid={uid:#x}", "a;uid=0x0;creduid={uid:#x};pid=0x1", ";creduid={uid:#x}"])
def test_a_user_name_that_brings_a_field_of_its_own_is_refused(alice: Person, bob: Person, name: str) -> None:
    """The kernel copies it as it stands. cifs.upcall 7.0 mounts with bob's ticket then."""
    before = asked(alice), asked(bob)
    assert mounting(alice, f"user={name.format(uid=bob.uid)}").errno not in (0, errno.ETIMEDOUT)
    assert (asked(alice), asked(bob)) == before


def test_somebody_elses_user_name(share: FileServer, alice: Person, bob: Person) -> None:
    """`user=` is a wish: the ticket is alice's all the same, or there is none."""
    before = asked(bob)
    mounting(alice, f"user={bob.name}")
    assert asked(bob) == before


# --- answers -------------------------------------------------------------------------------------------------


def _cut(payload: bytes) -> bytes:
    return payload[:-1]


def _longer(payload: bytes) -> bytes:
    return payload + bytes(4)


def _no_key(payload: bytes) -> bytes:
    _, blob = take_payload(payload)
    return HEAD.pack(2, 0, 0, len(blob)) + blob


def _long_key(payload: bytes) -> bytes:
    _, blob = take_payload(payload)
    return HEAD.pack(2, 0, 65, len(blob)) + bytes(65) + blob


def _blob_beyond_the_end(payload: bytes) -> bytes:
    key, blob = take_payload(payload)
    return HEAD.pack(2, 0, len(key), len(blob) + 4096) + key + blob


def _lengths_that_wrap(payload: bytes) -> bytes:
    key, blob = take_payload(payload)
    return HEAD.pack(2, 0, len(key), 0xFFFFFFF0) + key + blob


def _no_blob(payload: bytes) -> bytes:
    key, _ = take_payload(payload)
    return HEAD.pack(2, 0, len(key), 0) + key


def _another_version(payload: bytes) -> bytes:
    return HEAD.pack(1, *HEAD.unpack_from(payload)[1:]) + payload[HEAD.size :]


def _flags(payload: bytes) -> bytes:
    return HEAD.pack(2, 1, *HEAD.unpack_from(payload)[2:]) + payload[HEAD.size :]


def _only_a_head(payload: bytes) -> bytes:
    return payload[: HEAD.size]


def _a_byte(_payload: bytes) -> bytes:
    return b"\2"


LIES = (
    _cut,
    _longer,
    _no_key,
    _long_key,
    _blob_beyond_the_end,
    _lengths_that_wrap,
    _no_blob,
    _another_version,
    _flags,
    _only_a_head,
    _a_byte,
)


def test_payloads_that_would_hurt_the_kernel_do_not_reach_it(house: House, alice: Person) -> None:
    """The kernel believes every length: without a key it crashes, beyond the end it sends its own memory."""
    for lie in LIES:
        house.daemon(alice, lambda lie=lie: Lying(lie))  # type: ignore[misc]
        outcome = mounting(alice)
        assert (lie.__name__, outcome.errno) == (lie.__name__, errno.EPROTO)
        house.daemon(alice, spnego)
    assert mounting(alice).errno == 0


def test_random_bytes_of_the_right_shape(house: House, alice: Person) -> None:
    """They pass us and the kernel, and not the server: alice can only hurt herself."""
    house.daemon(alice, lambda: Lying(lambda _: HEAD.pack(2, 0, 32, 512) + os.urandom(544)))
    assert mounting(alice).errno != 0
    house.daemon(alice, spnego)
    assert mounting(alice).errno == 0


def test_an_answer_that_was_given_before(house: House, share: FileServer, alice: Person) -> None:
    """A payload is good for one session: the second time the server says no, or it is alice's own session again."""
    kept: list[bytes] = []

    def replay(payload: bytes) -> bytes:
        kept.append(payload)
        return kept[0]

    house.daemon(alice, lambda: Lying(replay))
    assert mounting(alice).errno == 0
    assert mounting(alice).errno in (0, errno.EACCES, errno.EIO)
    house.daemon(alice, spnego)


def test_an_answer_that_is_given_twice(house: House, alice: Person) -> None:
    """The second time nobody owes it any more."""

    def work() -> None:
        with PlayedDaemon(SYSTEM_FOLDER) as alices:
            request = alices.request(PATIENCE)
            for _ in range(2):
                alices.answer(request, refusal("no-ticket"))
            wait_until(lambda: bool(daemon_status(alice)["rejected"]), "the second one to be dropped")

    task = begin(alice, work)
    wait_until(lambda: daemon_status(alice).get("pid") == task.pid, "the played daemon")
    assert mounting(alice).errno == errno.ENOKEY
    assert task.result().errno == 0
    house.daemon(alice, spnego)


def test_another_uids_daemon_answers(house: House, alice: Person, bob: Person) -> None:
    """Bob's process says what alice's daemon was asked, index and sequence number included, before she does."""
    gate = house.gate()
    house.daemon(alice, lambda: Blocking(gate))
    task = begin_mounting(alice)
    wait_until(lambda: pending(alice) == 1, "alice's request")
    (context,) = daemon_status(alice)["pending"]
    body = pack_instance(Instance(0, HEAD.pack(2, 0, 32, 64) + bytes(96)))

    def work() -> None:
        with PlayedDaemon(SYSTEM_FOLDER) as bobs:
            bobs.send(pack_response(context["seq"], context["index"], Answer(body)))
            wait_until(lambda: bool(daemon_status(bob)["rejected"]), "bob's answer to be dropped")

    do_as(bob, work)
    assert pending(alice) == 1
    gate.open()
    assert task.result().errno == 0
    for who in (alice, bob):
        house.daemon(who, spnego)


# --- tickets -------------------------------------------------------------------------------------------------


def test_a_ticket_that_somebody_else_has_put_there(
    kerberos: Realm, share: FileServer, alice: Person, bob: Person
) -> None:
    """Bob leaves his ticket under alice's name, for all to read: alice must not find herself to be bob."""
    default_ccache(alice).unlink()
    shutil.copyfile(default_ccache(bob), default_ccache(alice))
    os.chown(default_ccache(alice), bob.uid, bob.gid)
    default_ccache(alice).chmod(0o644)
    before = counts()["cache-refused"]
    assert mounting(alice).errno == REASONS["cache-refused"]
    assert counts()["cache-refused"] == before + 1


def test_a_link_to_somebody_elses_ticket(kerberos: Realm, alice: Person, bob: Person) -> None:
    default_ccache(alice).unlink()
    default_ccache(alice).symlink_to(default_ccache(bob))
    os.chown(default_ccache(alice), alice.uid, alice.gid, follow_symlinks=False)
    assert mounting(alice).errno == REASONS["cache-refused"]
