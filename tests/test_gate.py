"""The gate: which upcalls of request_key are let in."""

from __future__ import annotations

import pytest

from upcall.core.errors import Refused
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.request_key import origin_check as gate
from upcall.protocols.request_key.key_type import Wanted
from upcall.protocols.request_key.key_types import KEY_TYPES, OF_THE_SYSTEM
from upcall.protocols.request_key.messages import Described, Upcall
from upcall.protocols.request_key.origin_check import Who, check_key, check_requester, wanted

DESCRIPTION = b"ver=0x2;host=fs.lab.test;ip4=127.0.0.1;sec=krb5;uid=0x0;creduid=0x3e9;user=alice;pid=0x164"
KEY = Described("cifs.spnego", 0, 0, 0x39010000, DESCRIPTION)
UPCALL = Upcall(0x2F5C, 9, b"", b"")
AUTHORISATION = Described(".request_key_auth", 0, 0, 0x0B010000, b"2f5c")


def reason(key: Described = KEY, authorisation: Described = AUTHORISATION) -> str:
    with pytest.raises(Refused) as caught:
        check_key(UPCALL, key, authorisation)
    assert caught.value.why
    return caught.value.reason


def test_a_key_made_by_the_kernel_is_let_in() -> None:
    check_key(UPCALL, KEY, AUTHORISATION)
    assert wanted(KEY) == Wanted(0x3E9, 0x164)


def test_an_unknown_key_type_is_refused() -> None:
    assert reason(KEY._replace(type="user")) == "unknown-type"


@pytest.mark.parametrize(
    "key",
    [
        KEY._replace(uid=1001, gid=1001),  # request_key(2) by an ordinary user
        KEY._replace(uid=1001),
        KEY._replace(gid=100),
        KEY._replace(gid=-1),
        KEY._replace(permissions=0x3F3F0000),  # somebody has changed them
        KEY._replace(permissions=0x39010100),
        KEY._replace(permissions=0x39010001),
        KEY._replace(permissions=0x39000000),
    ],
    ids=[
        "owner and group",
        "owner",
        "group",
        "no group",
        "all rights",
        "view for the group",
        "view for others",
        "no view for the user",
    ],
)
def test_a_key_not_made_by_the_kernel_is_refused_as_forged(key: Described) -> None:
    assert reason(key) == "forged"


@pytest.mark.parametrize(
    "authorisation",
    [
        AUTHORISATION._replace(type="user"),
        AUTHORISATION._replace(uid=1001),
        AUTHORISATION._replace(description=b"2f5d"),
        AUTHORISATION._replace(description=b"2F5C"),
        AUTHORISATION._replace(description=b""),
    ],
    ids=["type", "owner", "another serial", "upper case", "empty"],
)
def test_an_authorisation_for_another_key_is_refused_as_forged(authorisation: Described) -> None:
    assert reason(KEY, authorisation) == "forged"


@pytest.mark.parametrize("user", [b"a;creduid=0x3ea", b"a;pid=0x1", b"a;creduid=0x0;user=root"])
def test_a_user_name_that_injects_fields_is_refused_as_forged(user: bytes) -> None:
    with pytest.raises(Refused) as caught:
        wanted(KEY._replace(description=DESCRIPTION.replace(b"alice", user)))
    assert caught.value.reason == "forged"


WANT = Wanted(1001, 356)


@pytest.mark.parametrize(
    "who",
    [
        Who(356, 0, 0, 100),  # mount as root, or a thread of the kernel
        Who(356, 1001, 1001, 100),  # a user of a share that is mounted for many
        Who(356, 1002, 1002, 100),  # whoever finds the connection broken
        Who(356, 1001, 0, 100),  # mount.cifs, set-user-id, for the one who runs it
        Who(350, 0, 0, 200),  # in the same tick
    ],
    ids=[
        "root or a kernel thread",
        "user of a multiuser mount",
        "user of a broken connection",
        "set-user-id mount",
        "started in the same tick",
    ],
)
def test_requesters_that_may_stand_behind_the_key_are_let_in(who: Who) -> None:
    check_requester(WANT, who, since=200)


@pytest.mark.parametrize(
    ("who", "reason"),
    [(Who(356, 0, 0, 201), "requester-gone"), (Who(356, 1002, 0, 100), "not-permitted")],
    ids=["started later", "set-user-id for another"],
)
def test_a_later_process_or_another_user_behind_the_key_is_refused(who: Who, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        check_requester(WANT, who, since=200)
    assert caught.value.reason == reason


def test_dns_keys_name_no_requester_and_are_checked_by_prefix() -> None:
    """The configuration says which daemon looks names up; the key names no process to compare."""
    assert "dns_resolver" in OF_THE_SYSTEM
    assert "cifs.spnego" not in OF_THE_SYSTEM
    key = Described("dns_resolver", 0, 0, 0x3B010000, b"afsdb:lab.test")
    assert gate.wanted(key) == Wanted(0, None)
    with pytest.raises(Refused, match="forged"):
        gate.wanted(key._replace(description=b"mx:lab.test"))


def test_every_key_type_has_a_service_closed_to_local_requesters() -> None:
    for kind in KEY_TYPES:
        assert not SERVICES[kind].local
    assert KEY_TYPES.keys() >= OF_THE_SYSTEM
