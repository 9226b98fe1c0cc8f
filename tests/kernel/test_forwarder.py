"""upcall-request-key under the real kernel and the real /sbin/request-key, before a played broker.

The keys are of type dns_resolver, which root may ask for by request_key(2); those of cifs.spnego only the kernel may.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.forwarder.scene import PlayedBroker, answered, playing, refused, server, servers
from tests.kernel.scene import Outcome, begin
from upcall.kernel import keyring
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.messages import Upcall, take_described, take_upcall
from upcall.testing.lab.stage import PATIENCE, Person, Task, wait_until

RULES = Path("/etc/request-key.d")
SESSION = keyring.SESSION_KEYRING
PARTS = (0.0, 0.45, 0.95)  # of a second: much is left of it, as little as must do, next to nothing
TICK = 0.1  # seconds: of the guest's clock, and of whoever looks at it
pytestmark = pytest.mark.skipif(
    not Path("/sbin/request-key").exists() or platform.machine() != "x86_64", reason="needs keyutils, and x86-64"
)

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def request_key(kind: bytes, description: bytes, callout: bytes = b"") -> int:
    """The serial; OSError with what the forwarder told the kernel."""
    serial: int = _libc.syscall(249, kind, description, callout, SESSION)
    if serial < 0:
        raise OSError(ctypes.get_errno(), "request_key")
    return serial


class Rule(NamedTuple):
    """A line of the guest's request-key.conf, and the socket that it names."""

    file: Path
    socket: Path
    words: list[str]

    def write(self, *options: object) -> None:
        words = [*self.words, "-s", self.socket, *options]
        line = f"create dns_resolver * * {' '.join(map(str, words))} %k\n"
        self.file.write_text(line + line.replace("dns_resolver", "cifs.spnego"))


@pytest.fixture(params=["c", "stand-in"])
def rule(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rule]:
    words = forwarder.command()
    if request.param == "stand-in":
        words = ["/usr/bin/python3", "-I", "-S", str(forwarder.STANDIN)]
    elif len(words) > 1:
        pytest.skip("there is no compiled forwarder")
    subprocess.run(["modprobe", "dns_resolver"], check=True, timeout=180)
    subprocess.run(["mount", "-t", "tmpfs", "rules", RULES], check=True, timeout=180)
    made = Rule(RULES / "upcall.conf", tmp_path / "broker", words)
    made.write()
    yield made
    subprocess.run(["umount", RULES], check=True, timeout=180)


@pytest.fixture
def broker(rule: Rule) -> Iterator[PlayedBroker]:
    with playing(rule.socket) as played:
        yield played


def name() -> bytes:
    """A description that nobody has asked for."""
    return b"host%d.lab.test" % next(_numbers)


def asking(who: Person, description: bytes, callout: bytes = b"") -> Task[Outcome]:
    """Somebody who wants the key, and has then its payload and its line in /proc/keys."""

    def work() -> tuple[bytes, str]:
        serial = request_key(b"dns_resolver", description, callout)
        lines = Path("/proc/keys").read_text().splitlines()
        return keyring.read(serial), next(line for line in lines if line.startswith(f"{serial:08x} "))

    return begin(who, work)


def got(outcome: Outcome) -> tuple[Any, Any]:
    assert outcome.errno == 0
    assert isinstance(outcome.value, tuple)
    return outcome.value


def told(broker: PlayedBroker, task: Task[Outcome]) -> tuple[int, Upcall]:
    """What the forwarder said: the sequence number, and the rest. `task`: who has the kernel ask, and must go on."""
    ready = select.select([broker.fileno(), task.fileno()], [], [], PATIENCE)[0]
    assert ready, "nobody asks"
    assert broker.fileno() in ready, f"nobody asks any more: {task.result()}"
    envelope = broker.request()
    assert envelope.service == "request-key"
    assert 0 < envelope.deadline_ns - time.monotonic_ns() < 10 * 10**9
    return envelope.seq, take_upcall(envelope.body)


def await_part(part: float) -> None:
    """Until that much of a second of the clock has gone. The kernel counts them whole, and this one, too."""
    time.sleep((part - time.time()) % 1)


def forwarder_pid(broker: PlayedBroker) -> int:
    assert broker.connection is not None
    credentials = broker.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("=iII", credentials)[0])


@pytest.mark.parametrize(
    "payload",
    [b"192.0.2.1,2001:db8::1\0", servers(server()), b"192.0.2.1#dnserror=5\0", b"#dnserror=5\0"],
    ids=["addresses", "servers", "both", "error"],
)
def test_a_key_is_made(root: Person, broker: PlayedBroker, payload: bytes) -> None:
    description = name()
    task = asking(root, description, b"ipv4 callout")
    seq, upcall = told(broker, task)
    described = take_described(upcall.described)
    assert (upcall.key, upcall.callout, described.type, described.description) == (
        seq, b"ipv4 callout", "dns_resolver", description,
    )  # fmt: skip
    assert upcall.authorisation not in (0, seq)
    broker.send(answered(payload, 0, seq))
    outcome = task.result()
    if b"dnserror" in payload:
        assert outcome.errno == 5  # the key is there, and says this to whoever reads it
        return
    read, line = got(outcome)
    assert read == (payload if payload[0] == 0 else payload[:-1])
    assert line.split()[3] == "perm"


def test_a_key_expires_when_the_broker_says(root: Person, broker: PlayedBroker) -> None:
    task = asking(root, name())
    seq, _ = told(broker, task)
    broker.send(answered(b"192.0.2.1\0", 3000, seq))
    assert got(task.result())[1].split()[3] in ("49m", "50m")


@pytest.mark.parametrize("part", PARTS)
def test_a_key_that_has_expired_is_asked_for_again(root: Person, broker: PlayedBroker, part: float) -> None:
    """Not before whoever asked has had it, although it is for a second."""
    description = name()

    def twice() -> bytes:
        request_key(b"dns_resolver", description)
        wait_until(lambda: keyring_lacks(description), "the end of the key")
        return keyring.read(request_key(b"dns_resolver", description))

    task = begin(root, twice)
    seq, _ = told(broker, task)
    await_part(part)
    broker.send(answered(b"192.0.2.1\0", 1, seq))
    broker.send(answered(b"192.0.2.2\0", 0, told(broker, task)[0]))
    assert task.result().value == b"192.0.2.2"


def keyring_lacks(description: bytes) -> bool:
    """request_key without a callout only searches."""
    found = _libc.syscall(249, b"dns_resolver", description, None, 0)
    return bool(found < 0 and ctypes.get_errno() in (errno.EKEYEXPIRED, errno.ENOKEY))


@pytest.mark.parametrize("code", [errno.ENOKEY, errno.EACCES, errno.EKEYREJECTED, errno.EAGAIN, 4094])
def test_a_refusal_reaches_the_caller(root: Person, broker: PlayedBroker, code: int) -> None:
    task = asking(root, name())
    broker.send(refused(code, seq=told(broker, task)[0]))
    assert task.result().errno == code


@pytest.mark.parametrize("part", PARTS)
def test_a_refusal_lasts_a_second_and_not_a_minute(root: Person, broker: PlayedBroker, part: float) -> None:
    """From half a second to one and a half; and whoever asked has heard it before, whenever in a second it came."""
    description = name()

    def until_found() -> tuple[list[tuple[float, int | None]], bytes]:
        """When it was refused, with what errno; the payload."""
        refusals = []
        while True:
            try:
                serial = request_key(b"dns_resolver", description)
            except OSError as error:
                refusals.append((time.monotonic(), error.errno))
                time.sleep(0.02)
            else:
                return refusals, keyring.read(serial)

    task = begin(root, until_found)
    seq, _ = told(broker, task)
    await_part(part)
    broker.send(refused(errno.EACCES, seq=seq))
    broker.send(answered(b"192.0.2.1\0", 0, told(broker, task)[0]))
    refusals, read = got(task.result())
    assert read == b"192.0.2.1"
    assert {code for _, code in refusals} == {errno.EACCES}
    assert refusals[-1][0] - refusals[0][0] < 1.5 + TICK


def test_nonsense_does_not_reach_the_kernel(root: Person, broker: PlayedBroker) -> None:
    task = asking(root, name())
    broker.send(answered(b"192.0.2.1\0", 0, told(broker, task)[0])[:-1])  # shorter than it says
    assert task.result().errno == errno.EPROTO


def test_without_a_broker_a_key_is_refused(root: Person, rule: Rule) -> None:
    assert asking(root, name()).result().errno == errno.ENOTCONN


def test_a_silent_broker_costs_the_deadline(root: Person, rule: Rule, broker: PlayedBroker) -> None:
    rule.write("-t", 1)
    task = asking(root, name())
    told(broker, task)
    assert task.result().errno == errno.ETIMEDOUT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, errno.ECANCELED), (signal.SIGALRM, errno.ETIMEDOUT)])
def test_a_signal_ends_the_forwarder_with_a_refusal(
    root: Person, broker: PlayedBroker, number: int, code: int
) -> None:
    task = asking(root, name())
    told(broker, task)
    os.kill(forwarder_pid(broker), number)
    assert task.result().errno == code


def test_a_forwarder_that_is_killed_is_no_key(root: Person, broker: PlayedBroker) -> None:
    """Nobody can answer then. The kernel refuses for a minute."""
    task = asking(root, name())
    told(broker, task)
    os.kill(forwarder_pid(broker), signal.SIGKILL)
    assert task.result().errno == errno.ENOKEY


def test_a_socket_of_another_user_is_told_nothing(root: Person, alice: Person, rule: Rule) -> None:
    rule.socket.parent.chmod(0o777)
    for above in rule.socket.parents:
        above.chmod(above.stat().st_mode | 0o011)

    def listen() -> bytes:
        with playing(rule.socket) as played:
            return played.accept().recv(100)

    liar = Task(alice, listen)
    wait_until(rule.socket.exists, "the socket")
    assert asking(root, name()).result().errno == errno.EPERM
    assert liar.result() == b""


def test_a_user_cannot_ask_for_a_cifs_spnego_key(root: Person, rule: Rule) -> None:
    """Kernels without the fix of CVE-2026-46243 let anybody ask; then there is an upcall, and here no broker."""
    subprocess.run(["modprobe", "cifs"], check=True, timeout=180)
    refused_by = begin(root, lambda: request_key(b"cifs.spnego", b"ver=0x2;host=x")).result().errno
    assert refused_by in (errno.EPERM, errno.EINVAL, errno.EACCES, errno.ENOTCONN)
