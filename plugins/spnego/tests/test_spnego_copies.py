"""Copies of caches in memory: when there is one, and that it never outlives what it is a copy of."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from upcall_spnego import SpnegoHandler, copies
from upcall_spnego.acceptor import accept
from upcall_spnego.copies import Copies
from upcall_spnego.krb5 import FCC_NOFILE, Context, Krb5Error
from upcall_spnego.mitkdc import Realm, asking

from upcall.core.errors import Refused
from upcall.protocols.request_key.cifs_spnego import take_payload
from upcall.protocols.request_key.messages import take_instance


def later() -> float:
    """As if what has just been written had been there for a while."""
    return time.time() + 10


@pytest.fixture
def settled(handler: SpnegoHandler) -> SpnegoHandler:
    handler.copies = Copies(later)
    return handler


def client(realm: Realm, handler: SpnegoHandler) -> str:
    """The principal that the server takes us for."""
    _, blob = take_payload(take_instance(handler.answer(asking())).payload)
    return accept(blob, realm.keytab).client


def looked(made: Copies, path: Path) -> str:
    """By what name its tickets are to be had."""
    with made, Context() as krb5:
        return made.look(krb5, f"FILE:{path}")[1]


def is_there(name: str) -> bool:
    with Context() as krb5:
        try:
            krb5.look(name)
        except Krb5Error as error:
            assert error.code == FCC_NOFILE
            return False
    return True


def test_a_copy_holds_what_the_file_does(realm: Realm, settled: SpnegoHandler, tmp_path: Path) -> None:
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    assert client(realm, settled) == "alice@LAB.TEST"  # which puts the server's ticket into the file
    with settled.copies, Context() as krb5:
        ours, name = settled.copies.look(krb5, f"FILE:{cache}")
        theirs = krb5.look(f"FILE:{cache}")
        assert name.startswith("MEMORY:")
        assert (ours.principal, ours.tickets) == (theirs.principal, theirs.tickets)
        assert len(ours.tickets) >= 2
    assert looked(settled.copies, cache) == name
    assert client(realm, settled) == "alice@LAB.TEST"


def test_an_unchanged_file_is_read_once(
    realm: Realm, settled: SpnegoHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but its times is looked at as long as these are the same."""
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    for _ in range(2):
        client(realm, settled)
    held = cache.stat()
    blank = bytes(held.st_size)
    cache.write_bytes(blank)
    monkeypatch.setattr(copies, "_stamp", lambda _: settled.copies._copies[str(cache)].stamp)
    assert client(realm, settled) == "alice@LAB.TEST"
    assert cache.read_bytes() == blank


def test_another_kinit_counts_at_once(realm: Realm, settled: SpnegoHandler, tmp_path: Path) -> None:
    cache = tmp_path / "default"
    for who in ("alice", "bob", "alice"):
        realm.kinit(who, f"FILE:{cache}")
        for _ in range(2):
            assert client(realm, settled) == f"{who}@LAB.TEST"


def test_kdestroy_counts_at_once(realm: Realm, settled: SpnegoHandler, tmp_path: Path) -> None:
    """The next request destroys the copy."""
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    client(realm, settled)
    name = looked(settled.copies, cache)
    assert is_there(name)
    cache.unlink()
    with pytest.raises(Refused) as refused:
        settled.answer(asking())
    assert refused.value.reason == "no-ticket"
    assert not is_there(name)


def test_a_cache_that_others_can_read_is_refused_although_there_is_a_copy(
    realm: Realm, settled: SpnegoHandler, tmp_path: Path
) -> None:
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    for _ in range(2):
        client(realm, settled)
    cache.chmod(0o644)
    with pytest.raises(Refused) as refused:
        settled.answer(asking())
    assert refused.value.reason == "cache-refused"


def test_a_cache_that_has_just_changed_is_not_copied(realm: Realm, handler: SpnegoHandler, tmp_path: Path) -> None:
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    client(realm, handler)
    assert looked(handler.copies, cache) == f"FILE:{cache}"
    os.utime(cache, (1, 1))  # it can be made to look old, but not to have been changed long ago
    assert looked(handler.copies, cache) == f"FILE:{cache}"


def test_a_copy_in_use_is_not_destroyed(realm: Realm, settled: SpnegoHandler, tmp_path: Path) -> None:
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    made = settled.copies
    with made:
        first = looked(made, cache)
        realm.kinit("bob", f"FILE:{cache}")
        second = looked(made, cache)
        assert first != second
        assert is_there(first)
    assert not is_there(first)
    assert is_there(second)


def test_the_number_of_copies_is_bounded(realm: Realm, settled: SpnegoHandler, tmp_path: Path) -> None:
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    content = (tmp_path / "default").read_bytes()
    made, names = settled.copies, []
    for number in range(copies.MOST + 3):
        cache = tmp_path / f"cache-{number}"
        cache.write_bytes(content)
        names.append(looked(made, cache))
    assert [is_there(name) for name in names] == [False] * 3 + [True] * copies.MOST


def test_concurrent_requests_are_answered_while_tickets_change(
    realm: Realm, settled: SpnegoHandler, tmp_path: Path
) -> None:
    """Each answer is alice's, whichever of her tickets it is made with."""
    cache = tmp_path / "default"
    realm.kinit("alice", f"FILE:{cache}")
    content = cache.read_bytes()
    over, answers, errors = threading.Event(), [], []

    def ask() -> None:
        while not over.is_set():
            try:
                answers.append(settled.answer(asking()))
            except Refused as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(40):
        fresh = tmp_path / "fresh"
        fresh.write_bytes(content)
        fresh.chmod(0o600)
        fresh.rename(cache)
        if number % 4 == 0:
            realm.kinit("alice", f"FILE:{fresh}")
            fresh.rename(cache)
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(answers) > 40
    assert len(settled.copies._useless) == 0
    assert len(settled.copies._copies) <= 1
