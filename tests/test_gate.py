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


def test_what_the_kernel_asks_for() -> None:
    check_key(UPCALL, KEY, AUTHORISATION)
    assert wanted(KEY) == Wanted(0x3E9, 0x164)


def test_a_type_that_nobody_knows() -> None:
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
)
def test_keys_that_are_not_the_kernels(key: Described) -> None:
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
)
def test_authorisations_for_something_else(authorisation: Described) -> None:
    assert reason(KEY, authorisation) == "forged"


@pytest.mark.parametrize("user", [b"a;creduid=0x3ea", b"a;pid=0x1", b"a;creduid=0x0;user=root"])
def test_a_name_that_brings_fields_of_its_own(user: bytes) -> None:
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
)
def test_requesters(who: Who) -> None:
    check_requester(WANT, who, since=200)


@pytest.mark.parametrize(
    ("who", "reason"),
    [(Who(356, 0, 0, 201), "requester-gone"), (Who(356, 1002, 0, 100), "not-permitted")],
)
def test_requesters_that_cannot_be(who: Who, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        check_requester(WANT, who, since=200)
    assert caught.value.reason == reason


def test_names_are_nobodys() -> None:
    """The configuration says whose daemon looks them up, and no process is named that could be compared."""
    assert {"dns_resolver"} == OF_THE_SYSTEM
    key = Described("dns_resolver", 0, 0, 0x3B010000, b"afsdb:lab.test")
    assert gate.wanted(key) == Wanted(0, None)
    with pytest.raises(Refused, match="forged"):
        gate.wanted(key._replace(description=b"mx:lab.test"))


def test_every_type_has_a_service_that_no_process_can_ask_for() -> None:
    for kind in KEY_TYPES:
        assert not SERVICES[kind].local
    assert KEY_TYPES.keys() >= OF_THE_SYSTEM
