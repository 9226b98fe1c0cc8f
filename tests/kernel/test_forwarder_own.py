"""A daemon that asks the kernel, by request_key(2), for a key that the kernel would ask this daemon for."""

from __future__ import annotations

import errno
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.scene import House, attempt
from tests.kernel.test_forwarder import RULES, name, request_key
from upcall.core.errors import ModuleFailed
from upcall.kernel import keyring
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.dns_resolver import TYPE, Text, pack_text
from upcall.protocols.request_key.messages import Instance, pack_instance, take_ask
from upcall.testing.lab.stage import Person
from upcall.wire.envelope import Envelope

pytestmark = pytest.mark.skipif(
    not Path("/sbin/request-key").exists() or platform.machine() != "x86_64", reason="needs keyutils, and x86-64"
)
PAYLOAD = pack_text(Text(("192.0.2.1",)))


class Asking:
    """Looks one name up by asking the kernel for another, itself or in a child; the rest it knows."""

    services: tuple[str, ...] = (TYPE,)

    def lane(self, envelope: Envelope, /) -> str:
        return "names"

    def answer(self, envelope: Envelope, /) -> bytes:
        description = take_ask(envelope.body).description
        if description.startswith(b"asks-"):
            how, other = description.split(b"-")[1], name()
            code = _in_a_child(other) if how == b"child" else _code(other)
            raise ModuleFailed(f"asked, errno {code}")
        return pack_instance(Instance(60, PAYLOAD))


def _code(description: bytes) -> int:
    try:
        request_key(TYPE.encode(), description)
    except OSError as error:
        return error.errno or -1
    return 0


def _in_a_child(description: bytes) -> int:
    ran = subprocess.run(["keyctl", "request2", TYPE, description, "x", "@s"], capture_output=True, timeout=180)
    return errno.EDEADLK if b"deadlock" in ran.stderr else ran.returncode


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    subprocess.run(["modprobe", "dns_resolver"], check=True, timeout=180)
    subprocess.run(["mount", "-t", "tmpfs", "rules", RULES], check=True, timeout=180)
    (RULES / "upcall.conf").write_text(f"create {TYPE} * * {' '.join(forwarder.command())} %k\n")
    house = House()
    try:
        house.open()
        yield house
    finally:
        house.close()
        subprocess.run(["umount", RULES], check=True, timeout=180)


@pytest.mark.parametrize("how", ["itself", "child"])
def test_a_daemon_that_asks_itself_is_refused_and_named(house: House, root: Person, how: str) -> None:
    daemon = house.daemon(root, Asking)
    asked = attempt(root, lambda: request_key(TYPE.encode(), b"asks-%b-" % how.encode() + name()))
    assert asked.errno == errno.EIO, house.log()
    assert f"asked, errno {errno.EDEADLK}" in house.log("root")
    said = [line for line in house.log().splitlines() if "deadlock-refused" in line and f"daemon={daemon.pid}" in line]
    assert f"service={TYPE}" in said[0]
    assert how == "child" or f"pid={daemon.pid}" in said[0]
    answered = attempt(root, lambda: keyring.read(request_key(TYPE.encode(), name())))
    assert answered.value == PAYLOAD.rstrip(b"\0"), house.log()
