"""Sessions by the tickets of a real KDC, proved by a real acceptor."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import pytest
from upcall_spnego import SpnegoHandler
from upcall_spnego.acceptor import Accepted, accept
from upcall_spnego.mitkdc import SERVER, Realm, asking
from upcall_spnego.negtoken import KRB5, MS_KRB5, take_negtokeninit

from upcall.core.errors import Refused
from upcall.kernel.keyring import join_session_and_link_user_keyring
from upcall.process import machine
from upcall.protocols.request_key.cifs_spnego import take_payload
from upcall.protocols.request_key.messages import take_instance
from upcall.testing.processes import in_child

MACHINE = 997


def proved(realm: Realm, answer: bytes) -> Accepted:
    """What the server makes of it; its key is ours."""
    expiry, payload = take_instance(answer)
    key, blob = take_payload(payload)
    found = accept(blob, realm.keytab)
    assert expiry == 0
    assert found.key == key
    return found


def test_a_server_accepts_the_session_of_the_tickets_user(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    found = proved(realm, handler.answer(asking()))
    assert found.client == "alice@LAB.TEST"
    assert len(found.key) == 32
    assert found.flags & 0x02 == 0  # GSS_C_MUTUAL_FLAG


@pytest.mark.parametrize(("sec", "mechanism"), [("krb5", KRB5), ("mskrb5", MS_KRB5)])
def test_each_sec_option_gives_its_name_of_the_mechanism(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, sec: str, mechanism: str
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    answer = handler.answer(asking(sec=sec))
    mechanisms, token = take_negtokeninit(take_payload(take_instance(answer).payload)[1])
    assert mechanisms == (mechanism,)
    assert token.startswith(b"\x60")
    assert proved(realm, answer).client == "alice@LAB.TEST"


def test_each_session_has_a_key_of_its_own(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    assert len({proved(realm, handler.answer(asking())).key for _ in range(3)}) == 3


@pytest.mark.parametrize("host", [SERVER.upper(), f"{SERVER}."])
def test_a_host_in_capitals_or_with_a_final_dot_is_accepted(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, host: str
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    proved(realm, handler.answer(asking(host=host)))


def test_a_short_name_gets_the_resolvers_domain(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    found = [(0, 0, 0, "other.lab.test", ("127.0.0.1", 0))]  # its own name for the host is not taken
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    proved(realm, handler.answer(asking(host=SERVER.partition(".")[0])))


# --- where tickets are ----------------------------------------------------------------------------------------


def test_a_folder_of_caches_gives_the_cache_of_the_user_in_the_request(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that mount was told of, though another is the primary one."""
    (tmp_path / "caches").mkdir(mode=0o700)
    name = f"DIR:{tmp_path}/caches"
    monkeypatch.setenv("KRB5CCNAME", name)
    realm.kinit("alice", name)
    realm.kinit("bob", f"DIR::{tmp_path}/caches/tktbob")
    assert proved(realm, handler.answer(asking(user="nobody"))).client == "alice@LAB.TEST"
    assert proved(realm, handler.answer(asking(user="bob"))).client == "bob@LAB.TEST"
    assert proved(realm, handler.answer(asking(user="bob@lab.test"))).client == "bob@LAB.TEST"
    assert proved(realm, handler.answer(asking(user=None))).client == "alice@LAB.TEST"


def test_a_ticket_in_the_kernels_keyring_is_used(
    realm: Realm, handler: SpnegoHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRB5CCNAME", "KEYRING:session:upcall-test")

    def work() -> str:
        join_session_and_link_user_keyring()  # ends with this child, and the tickets with it
        realm.kinit("alice", "KEYRING:session:upcall-test")
        return proved(realm, handler.answer(asking())).client

    assert in_child(work) == "alice@LAB.TEST"


def test_a_cache_of_a_pam_module_is_used_if_there_is_no_default_one(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.kinit("bob", f"FILE:{tmp_path}/krb5cc_{os.geteuid()}_x8Kf2a")
    assert proved(realm, handler.answer(asking())).client == "bob@LAB.TEST"
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    assert proved(realm, handler.answer(asking(user="bob"))).client == "alice@LAB.TEST"


def test_an_expired_cache_gives_way_to_a_valid_one(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.expired("alice", f"FILE:{tmp_path}/default")
    realm.kinit("bob", f"FILE:{tmp_path}/krb5cc_{os.geteuid()}")
    assert proved(realm, handler.answer(asking())).client == "bob@LAB.TEST"


def test_a_new_kinit_counts_at_once(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    assert proved(realm, handler.answer(asking())).client == "alice@LAB.TEST"
    realm.kinit("bob", f"FILE:{tmp_path}/default")
    assert proved(realm, handler.answer(asking())).client == "bob@LAB.TEST"
    (tmp_path / "default").unlink()
    with pytest.raises(Refused, match="no-ticket"):
        handler.answer(asking())


def test_the_users_own_keytab_is_used_and_its_tickets_are_kept(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.client_keytab(tmp_path / "client.keytab", "bob")
    asked = realm.asked()
    for _ in range(3):
        assert proved(realm, handler.answer(asking())).client == "bob@LAB.TEST"
    assert realm.asked() - asked <= 3  # AS, once more with preauthentication perhaps, TGS; then all is at hand


@pytest.mark.skipif(os.geteuid() != 0, reason="the machine's keytab is root's")
def test_others_are_answered_by_the_machines_keytab_and_never_by_roots_tickets(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For root itself, a ticket of root's comes before the keytab."""
    realm.administer("add_principal -randkey FS$")
    realm.client_keytab(tmp_path / "machine.keytab", "alice", f"host/{SERVER}", "FS$")
    assert proved(realm, handler.answer(asking())).client == "FS$@LAB.TEST"
    assert proved(realm, handler.answer(asking(user=f"host/{SERVER}"))).client == f"host/{SERVER}@LAB.TEST"
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    assert proved(realm, handler.answer(asking())).client == "alice@LAB.TEST"
    assert proved(realm, handler.answer(asking(creduid=5001, user="alice"))).client == "FS$@LAB.TEST"
    (tmp_path / "machine.keytab").unlink()
    with pytest.raises(Refused, match="no-ticket"):
        handler.answer(asking(creduid=5001))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_only_the_machines_daemon_answers_for_others_by_the_machines_keytab(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a uid of its own; any other daemon answers for its own uid only."""
    (folder := Path(tempfile.mkdtemp(prefix="upcall-", dir="/tmp"))).chmod(0o755)
    try:
        realm.client_keytab(folder / "keytab", f"host/{SERVER}")
        os.chown(folder / "keytab", MACHINE, 0)
        monkeypatch.setenv("KRB5_KTNAME", f"FILE:{folder}/keytab")
        monkeypatch.setenv("KRB5CCNAME", f"FILE:{folder}/none")
        (folder / "krb5.conf").write_text(Path(os.environ["KRB5_CONFIG"]).read_text())
        monkeypatch.setenv("KRB5_CONFIG", f"{folder}/krb5.conf")

        def answered(creduid: int) -> str:
            try:
                return SpnegoHandler(prefix=f"{folder}/krb5cc").answer(asking(creduid=creduid)).hex()
            except Refused as error:
                return error.reason

        monkeypatch.setattr(machine, "uid", lambda: MACHINE)
        for creduid in (0, 5001):
            answer = bytes.fromhex(in_child(functools.partial(answered, creduid), MACHINE))
            assert proved(realm, answer).client == f"host/{SERVER}@LAB.TEST"
        monkeypatch.setattr(machine, "uid", lambda: 0)
        assert in_child(lambda: answered(0), MACHINE) == "not-permitted"
        assert in_child(lambda: answered(MACHINE), MACHINE) == "no-ticket"
    finally:
        shutil.rmtree(folder)


# --- many at a time, and for long -----------------------------------------------------------------------------


def test_sixty_four_requests_at_a_time_get_keys_of_their_own(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    """From an empty cache on, so that many of them go to the KDC."""
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    answers: list[bytes] = []
    start = threading.Barrier(64)

    def work() -> None:
        start.wait(60)
        answers.append(handler.answer(asking()))

    threads = [threading.Thread(target=work) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({proved(realm, one).key for one in answers}) == 64


def test_answers_and_refusals_leak_neither_descriptors_nor_memory(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    """Descriptors and memory, over 2000 answers and 500 refusals; prints what one answer takes."""
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    good, bad, took = asking(), asking(sec="iakerb"), []
    for _ in range(300):
        handler.answer(good)
    gc.collect()  # what earlier tests of this process have left
    descriptors, memory = _descriptors(), _resident()
    for number in range(2000):
        begun = time.perf_counter()
        handler.answer(good)
        took.append(time.perf_counter() - begun)
        if number % 4 == 0:
            with pytest.raises(Refused):
                handler.answer(bad)
    print(f"\nwarm answer: p50 {statistics.median(took) * 1e3:.3f} ms, least {min(took) * 1e3:.3f} ms")
    assert _descriptors() <= descriptors
    assert _resident() - memory < 1 << 20


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
