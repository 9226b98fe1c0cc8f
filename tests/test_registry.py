"""One daemon per uid."""

from __future__ import annotations

from upcall.core.registry import Association, Registry


class NoLink:
    def send(self, data: bytes, /) -> bool:
        return True

    def close(self) -> None: ...


def daemon(uid: int, pid: int) -> Association:
    return Association(uid, pid, pid, NoLink(), 0.0)


def test_a_newer_daemon_replaces_the_older() -> None:
    registry = Registry()
    first, second = daemon(1000, 1), daemon(1000, 2)
    assert registry.helo(first) is None
    assert registry.helo(second) is first
    assert registry.get(1000) is second
    assert list(registry) == [second]


def test_removing_a_replaced_daemon_leaves_its_successor() -> None:
    registry = Registry()
    first, second = daemon(1000, 1), daemon(1000, 2)
    registry.helo(first)
    registry.helo(second)
    assert not registry.remove(first)
    assert registry.get(1000) is second
    assert registry.remove(second)
    assert not registry.remove(second)
    assert (registry.get(1000), len(registry)) == (None, 0)


def test_daemons_of_different_uids_do_not_replace_each_other() -> None:
    registry = Registry()
    one, other = daemon(1000, 1), daemon(1001, 2)
    assert registry.helo(one) is None
    assert registry.helo(other) is None
    for association in registry:  # may be changed while it is walked
        registry.remove(association)
    assert len(registry) == 0


def test_the_repr_names_uid_pid_and_portid() -> None:
    assert repr(daemon(1000, 7)) == "<Association uid=1000 pid=7 portid=7>"
