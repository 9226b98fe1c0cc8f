"""Every refusal, by a real KDC: its reason, the errno that mount gives, and words for the log."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
from upcall_spnego import SpnegoHandler, explain, gssapi, krb5
from upcall_spnego.krb5 import Context
from upcall_spnego.mitkdc import FOREIGN, SERVER, UNKNOWN, Realm, asking
from upcall_spnego.refusals import _REASONS
from upcall_spnego.waiting import AT_MOST, OVERLONG, Waiting

from upcall.core.errors import ModuleFailed, PeerError, Refused
from upcall.protocols.request_key.messages import take_ask
from upcall.testing.processes import until
from upcall.wire.envelope import Envelope

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a file of somebody else's takes root to make")


def refused(handler: SpnegoHandler, envelope: Envelope, reason: str, code: int, *words: str) -> None:
    """`explain` says the same, unless only a KDC could tell."""
    with pytest.raises(Refused) as caught:
        handler.answer(envelope)
    assert (caught.value.reason, caught.value.errno) == (reason, code)
    for word in words:
        assert word in caught.value.why
    told = handler.explain(envelope.body, contact=True)
    assert told["answer"] == reason
    assert "key" not in told


# --- tickets ------------------------------------------------------------------------------------------------


def test_a_request_without_a_ticket_is_refused(handler: SpnegoHandler) -> None:
    refused(handler, asking(), "no-ticket", errno.ENOKEY, "default")


def test_an_expired_ticket_is_refused_without_asking_the_kdc(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.expired("alice", f"FILE:{tmp_path}/default")
    asked = realm.asked()
    refused(handler, asking(), "ticket-expired", errno.EKEYEXPIRED, "alice@LAB.TEST")
    assert realm.asked() == asked


def test_a_damaged_cache_is_refused_as_no_ticket(handler: SpnegoHandler, tmp_path: Path) -> None:
    (tmp_path / "default").touch(0o600)
    (tmp_path / "default").write_bytes(b"\5\4\0\xff" + bytes(100))
    refused(handler, asking(), "no-ticket", errno.ENOKEY)


def test_a_server_that_the_realm_does_not_know_is_refused(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    refused(handler, asking(host=UNKNOWN), "unknown-service", errno.EKEYREJECTED, UNKNOWN, "alice@LAB.TEST")


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_in_the_place_of_a_name_is_refused(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, host: str
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    refused(handler, asking(host=host), "unknown-service", errno.EKEYREJECTED, host)


def test_a_realm_that_no_ticket_leads_to_is_refused(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    refused(handler, asking(host=FOREIGN), "wrong-realm", errno.EKEYREJECTED, "ELSEWHERE.TEST")


def test_a_realm_without_a_known_kdc_is_refused(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a ticket from it, so it exists."""
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    text = (realm.folder / "krb5.conf").read_text()
    (tmp_path / "krb5.conf").write_text(text.replace("  kdc = ", "  admin_server = "))
    monkeypatch.setenv("KRB5_CONFIG", str(tmp_path / "krb5.conf"))
    refused(handler, asking(), "kdc-unreachable", errno.EAGAIN, "LAB.TEST")


def test_a_service_that_gets_no_tickets_is_refused(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.administer("add_principal -randkey -allow_tgs_req cifs/locked.lab.test")
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    refused(handler, asking(host="locked.lab.test"), "kdc-refused", errno.EKEYREJECTED, "cifs/locked.lab.test")


# --- the KDC ------------------------------------------------------------------------------------------------


def test_a_clock_skew_is_refused(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian package faketime)")
    realm.kinit("alice", f"FILE:{tmp_path}/default", 10 * 3600)
    realm.stop()
    realm.start(LD_PRELOAD=str(library), FAKETIME="+2h")
    try:
        refused(handler, asking(), "clock-skew", errno.EKEYREJECTED, "Clock skew too great")
    finally:
        realm.stop()
        realm.start()


def test_a_kdc_that_is_gone_refuses_only_requests_that_need_it(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.administer(f"add_principal -randkey cifs/known.{SERVER}")
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    handler.answer(asking())
    realm.stop()
    try:
        refused(handler, asking(host=f"known.{SERVER}"), "kdc-unreachable", errno.EAGAIN, "LAB.TEST")
        handler.answer(asking())  # what is at hand takes no KDC
    finally:
        realm.start()


def test_a_kdc_that_hangs_delays_only_requests_that_need_it(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path
) -> None:
    realm.administer(f"add_principal -randkey cifs/slow.{SERVER}")
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    handler.answer(asking())
    answers: list[bytes] = []
    waiting = threading.Thread(target=lambda: answers.append(handler.answer(asking(host=f"slow.{SERVER}"))))
    with realm.paused():
        waiting.start()
        until(lambda: handler.waiting.count("LAB.TEST") == 1, "a request that waits for the KDC")
        handler.answer(asking())
        assert waiting.is_alive()
    waiting.join(60)
    assert len(answers) == 1
    assert handler.waiting.count("LAB.TEST") == 0


def test_many_overlong_waits_for_a_kdc_refuse_further_requests_at_once() -> None:
    now = 0.0
    waiting = Waiting(lambda: now)
    held = [waiting.for_kdc("LAB.TEST") for _ in range(AT_MOST + 5)]
    for one in held:
        one.__enter__()  # a burst is no sign of anything
    now = OVERLONG + 0.1
    with pytest.raises(Refused, match="kdc-unreachable"), waiting.for_kdc("LAB.TEST"):
        pass
    with waiting.for_kdc("OTHER.TEST"):
        pass
    for one in held[: len(held) - AT_MOST + 1]:
        one.__exit__(None, None, None)
    with waiting.for_kdc("LAB.TEST"):
        pass


# --- what others could have planted -------------------------------------------------------------------------


@pytest.fixture
def planted(realm: Realm, tmp_path: Path) -> Path:
    """A good cache; each test makes it a bad one."""
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    return tmp_path / "default"


def test_a_cache_that_is_a_symbolic_link_is_refused(handler: SpnegoHandler, planted: Path, tmp_path: Path) -> None:
    planted.rename(tmp_path / "elsewhere")
    planted.symlink_to(tmp_path / "elsewhere")
    refused(handler, asking(), "cache-refused", errno.EACCES, "a symbolic link")


def test_a_cache_that_others_can_read_is_refused(handler: SpnegoHandler, planted: Path) -> None:
    planted.chmod(0o644)
    refused(handler, asking(), "cache-refused", errno.EACCES, "mode 0644 lets others in")


def test_a_cache_that_is_a_pipe_is_refused_without_hanging(handler: SpnegoHandler, planted: Path) -> None:
    planted.unlink()
    os.mkfifo(planted, 0o600)
    refused(handler, asking(), "cache-refused", errno.EACCES, "not a regular file")


def test_a_cache_that_others_can_replace_is_refused(handler: SpnegoHandler, planted: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    refused(handler, asking(), "cache-refused", errno.EACCES, "lets others replace")
    tmp_path.chmod(0o1777)
    assert handler.answer(asking())


@needs_root
def test_a_cache_of_another_uid_is_refused(handler: SpnegoHandler, planted: Path) -> None:
    os.chown(planted, 5002, 5002)
    refused(handler, asking(), "cache-refused", errno.EACCES, "belongs to uid 5002")


@needs_root
def test_a_cache_in_a_folder_of_another_uid_is_refused(handler: SpnegoHandler, planted: Path, tmp_path: Path) -> None:
    os.chown(tmp_path, 5002, 5002)
    refused(handler, asking(), "cache-refused", errno.EACCES, "belongs to uid 5002, who could replace")
    os.chown(tmp_path, 0, 0)


@needs_root
def test_caches_planted_by_another_uid_are_refused_and_the_users_own_is_found(
    realm: Realm, handler: SpnegoHandler, planted: Path, tmp_path: Path
) -> None:
    """Any number of them."""
    for number in range(100):
        other = tmp_path / f"krb5cc_0_{number:03}"
        shutil.copyfile(planted, other)
        os.chown(other, 5002, 5002)
    planted.unlink()
    refused(handler, asking(), "cache-refused", errno.EACCES, "belongs to uid 5002")
    realm.kinit("bob", f"FILE:{tmp_path}/krb5cc_0_own")
    told = handler.explain(asking().body)
    assert told["credential"]["principal"] == "bob@LAB.TEST"


def test_a_cache_in_a_folder_of_caches_that_others_can_write_is_refused(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caches").mkdir(mode=0o700)
    monkeypatch.setenv("KRB5CCNAME", f"DIR:{tmp_path}/caches")
    realm.kinit("alice", f"DIR:{tmp_path}/caches")
    (tmp_path / "caches" / "tkt").chmod(0o660)
    refused(handler, asking(), "cache-refused", errno.EACCES, "mode 0660")


def test_a_keytab_that_others_can_write_is_refused(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.client_keytab(tmp_path / "client.keytab", "bob")
    (tmp_path / "client.keytab").chmod(0o660)
    refused(handler, asking(), "cache-refused", errno.EACCES, "client.keytab", "mode 0660")


# --- what does not concern tickets --------------------------------------------------------------------------


def test_iakerb_is_refused_as_no_mechanism(handler: SpnegoHandler) -> None:
    refused(handler, asking(sec="iakerb"), "no-mechanism", errno.EKEYREJECTED, "sec=iakerb")


def test_a_request_for_another_uid_is_not_permitted(handler: SpnegoHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 5001)
    refused(handler, asking(creduid=5002), "not-permitted", errno.EPERM, "uid 5002")


@pytest.mark.parametrize("module", [krb5, gssapi])
def test_requests_are_refused_without_the_library(
    module: object, realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    monkeypatch.setattr(module, "NAME", "libnothing-upcall.so.9")
    krb5.library.cache_clear()
    gssapi.library.cache_clear()
    refused(handler, asking(), "no-library", errno.ENOPKG, "libnothing-upcall.so.9")
    monkeypatch.undo()
    krb5.library.cache_clear()
    gssapi.library.cache_clear()


def test_a_malformed_krb5_conf_is_a_module_failure_with_the_reason(
    handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "krb5.conf").write_text("[libdefaults\n")
    monkeypatch.setenv("KRB5_CONFIG", str(tmp_path / "krb5.conf"))
    with pytest.raises(ModuleFailed, match="Improper format"):
        handler.answer(asking())
    told = handler.explain(asking().body, contact=True)
    assert told["answer"] == "module-failed"
    assert "Improper format" in told["why"]


def test_a_malformed_request_is_a_peer_error(handler: SpnegoHandler) -> None:
    good = asking()
    for body in (b"", good.body[:-1], good.body + b"x", good.body.replace(b"creduid", b"kreduid")):
        for call in (handler.lane, handler.answer):
            with pytest.raises(PeerError):
                call(good._replace(body=body))
        with pytest.raises(PeerError):
            handler.explain(body)


def test_requests_for_one_server_share_a_lane() -> None:
    handler = SpnegoHandler()
    assert handler.lane(asking()) == handler.lane(asking(host=SERVER.upper(), user="bob"))
    assert handler.lane(asking()) != handler.lane(asking(host=UNKNOWN))


def test_the_codes_are_those_that_the_library_means() -> None:
    words = {
        "ticket-expired": "expired",
        "unknown-service": "Server not found in Kerberos database",
        "clock-skew": ("Clock skew", "not yet valid"),
        "wrong-realm": ("realm", "Realm"),
        "kdc-unreachable": ("Cannot contact", "Cannot resolve", "not available"),
        "no-ticket": ("No ", "not found", "does not", "no credential", "isn't", "empty"),
    }
    with Context() as context:
        for code, reason in _REASONS.items():
            if code > 0:
                continue  # of GSS-API's own table
            wanted = words[reason]
            said = context._words(code)
            assert any(one in said for one in ((wanted,) if isinstance(wanted, str) else wanted)), (code, reason, said)


# --- explain ------------------------------------------------------------------------------------------------


def test_explain_asks_the_kdc_only_with_contact(
    realm: Realm, handler: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcall_spnego.handler", handler)
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    asked = realm.asked()
    told = explain(take_ask(asking().body).description)
    assert realm.asked() == asked
    assert (told["answer"], told["server"]) == ("would answer", f"cifs/{SERVER}@LAB.TEST")
    assert told["credential"] == told["candidates"][0]
    assert told["credential"]["principal"] == "alice@LAB.TEST"
    assert told["credential"]["expires"] > 1_700_000_000
    told = handler.explain(asking().body, contact=True)
    assert realm.asked() == asked + 1
    assert told["key"] == 32
    assert told["blob"] > 500


def test_explain_says_why_the_other_caches_were_not_used(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    realm.expired("alice", f"FILE:{tmp_path}/default")
    own = f"{tmp_path}/krb5cc_{os.geteuid()}"
    realm.kinit("bob", f"FILE:{own}")
    shutil.copyfile(own, f"{own}_open")
    told = handler.explain(asking().body)
    verdicts = {one["name"].rpartition("/")[2].rpartition("_")[2]: one["verdict"] for one in told["candidates"]}
    assert verdicts == {
        str(os.geteuid()): "fits",
        "default": "ticket-expired: the ticket of alice@LAB.TEST has expired",
        "open": "cache-refused: mode 0644 lets others in",
    }
