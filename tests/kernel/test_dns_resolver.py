"""Names for the real kernel: the same answers as key.dns_resolver(8), and keys that live as long as their records."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import pty
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_dns import DnsHandler
from upcall_dns.dnsmasq import Dnsmasq, afsdb

from tests.kernel.scene import House, Outcome, attempt
from upcall.core.messages import Requester
from upcall.kernel import keyring
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.dns_resolver import TYPE, ServerList, Text, check_answer, take_payload
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, take_instance
from upcall.testing.lab.kerberos import replaced
from upcall.testing.lab.stage import Person
from upcall.wire.envelope import Envelope

PEER = Path("/sbin/key.dns_resolver")
RULES = Path("/etc/request-key.d")
AFS = Path("/proc/fs/afs")
pytestmark = pytest.mark.skipif(
    not PEER.exists() or not Path("/usr/sbin/dnsmasq").exists() or platform.machine() != "x86_64",
    reason="needs keyutils and dnsmasq-base, and x86-64",
)

RECORDS = (
    "local=/test/",
    "no-round-robin",
    "host-record=fs.lab.test,192.0.2.1,300",
    "host-record=both.lab.test,192.0.2.2,2001:db8::2,200",
    "cname=alias.lab.test,fs.lab.test,3000",
    "srv-host=_afs3-vlserver._udp.cell.test,fs.lab.test,7003,1,2",
    "srv-host=_afs3-vlserver._udp.cell.test,both.lab.test,7100,2,2",
    "srv-host=_afs3-vlserver._udp.gone.test,nothing.lab.test,7003",
    afsdb("old.test", "both.lab.test"),
    "host-record=db1.afs.test,127.0.0.1,500",
    "host-record=db2.afs.test,127.0.0.5,500",
    "srv-host=_afs3-vlserver._udp.afs.test,db1.afs.test,7003,10,5",
    "srv-host=_afs3-vlserver._udp.afs.test,db2.afs.test,7100,20,6",
)
# In no order at all: near and far, reachable and not, of every kind that a rule knows.
EVERYWHERE = (
    "203.0.113.9 198.51.100.200 198.51.100.6 127.0.0.66 127.0.0.2 169.254.1.1 10.9.9.9 2001:db8:1::9 2001:db8:1::6",
    "2001:db8:ffff::1 fd00:1::9 fd99::1 2002:c000:201::1 ::1 2001::5 fe80::9",
)
OURS = ("198.51.100.7/24", "2001:db8:1::7/64", "fd00:1::7/64")
HOSTS = """127.0.0.1 localhost
::1 localhost ip6-localhost
192.0.2.101 printer.lab.test printer
192.0.2.102 Printer
2001:db8::101 printer
"""

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """The guest's own resolv.conf, hosts and addresses, and a name server; all as before afterwards."""
    with contextlib.ExitStack() as stack:
        resolv = "nameserver 127.0.0.1\nsearch lab.test\n"
        stack.enter_context(replaced(Path("/etc/resolv.conf"), lambda _: resolv))
        stack.enter_context(replaced(Path("/etc/hosts"), lambda _: HOSTS))
        for address in OURS:
            ip("addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
            stack.callback(ip, "addr", "del", address, "dev", "lo")
        for family in ("-4", "-6"):
            ip(family, "route", "add", "default", "dev", "lo")
            stack.callback(ip, family, "route", "del", "default", "dev", "lo")
        folder = Path(tempfile.mkdtemp())
        addresses = " ".join(EVERYWHERE).split()
        (folder / "hosts").write_text("".join(f"{address} all.lab.test\n" for address in addresses))
        stack.enter_context(Dnsmasq(folder, *RECORDS, f"addn-hosts={folder}/hosts", port=53))
        yield


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=180)


def ours(description: str, callout: str) -> Instance:
    body = pack_ask(Ask(description.encode(), callout.encode()))
    deadline = int((time.monotonic() + 60) * 1e9)
    answer = DnsHandler().answer(Envelope(1, 0, TYPE, Requester(0, 0), deadline, body))
    check_answer(body, answer)
    return take_instance(answer)


def as_text(payload: bytes) -> str | None:
    """What key.dns_resolver would write, which knows no server lists. None: there is no such name."""
    found = take_payload(payload)
    if isinstance(found, ServerList):
        addresses = [(address, server.port) for server in found.servers for address in server.addresses]
        families = {4: socket.AF_INET, 16: socket.AF_INET6}
        return ",".join(f"{socket.inet_ntop(families[len(one)], one)}+{port}" for one, port in addresses)
    assert isinstance(found, Text)
    assert found.error in (0, errno.ENODATA)
    return None if found.error else ",".join(found.items)


def theirs(description: str, callout: str) -> str | None:
    """What key.dns_resolver would put into the key. It speaks to terminals only."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(PEER, [str(PEER), "-D", "-v", description, callout])
    told = b""
    try:
        while chunk := os.read(terminal, 4096):
            told += chunk
    except OSError:
        pass  # it has ended
    os.close(terminal)
    os.waitpid(pid, 0)
    found = re.search(rb"instantiation data is '(.*)'", told)
    assert found or b"Reject the key with error 61" in told, told
    return found[1].decode() if found else None


@pytest.mark.parametrize(
    ("description", "callout"),
    [
        ("all.lab.test", ""),
        ("all.lab.test", "list"),
        ("all.lab.test", "ipv4 list"),
        ("all.lab.test", "ipv6 list"),
        ("all.lab.test", "ipv6"),
        ("all.lab.test", "unknown=1"),
        ("fs.lab.test", ""),
        ("fs.lab.test.", ""),
        ("fs", ""),
        ("fs", "list"),
        ("both.lab.test", ""),
        ("both.lab.test", "list"),
        ("both.lab.test", "ipv6"),
        ("a:both.lab.test", ""),
        ("aaaa:both.lab.test", ""),
        ("aaaa:both.lab.test", "ipv6"),
        ("alias.lab.test", ""),
        ("alias", "list"),
        ("printer", ""),
        ("printer", "list"),
        ("PRINTER.lab.test", "ipv4"),
        ("localhost", ""),
        ("localhost", "list"),
        ("localhost", "ipv6"),
        ("192.0.2.1", ""),
        ("192.0.2.1", "ipv6"),
        ("a:192.0.2.1", "list"),
        ("nothing.lab.test", ""),
        ("nothing.lab.test", "list"),
        ("fs.lab.test", "ipv6"),
        ("afsdb:cell.test", ""),
        ("afsdb:cell.test", "ipv4"),
        ("afsdb:cell.test", "ipv6"),
        ("afsdb:cell.test", "srv=1"),
        ("afsdb:old.test", ""),
        ("afsdb:old.test", "ipv6"),
        ("afsdb:gone.test", "srv=1"),
        ("afsdb:nothing.test", "srv=1"),
    ],
)
def test_the_same_answers_as_key_dns_resolver(description: str, callout: str) -> None:
    expected = theirs(description, callout)
    if description == "afsdb:cell.test":
        ours(description, callout)  # dnsmasq turns SRV records over with every query, and there are two
    assert as_text(ours(description, callout).payload) == expected


# --- through the kernel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answering(root: Person) -> Iterator[House]:
    """The whole way: request-key's rule, the forwarder, the broker, and root's daemon."""
    subprocess.run(["modprobe", "dns_resolver"], check=True, timeout=180)
    subprocess.run(["mount", "-t", "tmpfs", "rules", RULES], check=True, timeout=180)
    (RULES / "upcall.conf").write_text(f"create dns_resolver * * {' '.join(forwarder.command())} %k\n")
    house = House()
    try:
        house.open()
        house.daemon(root, DnsHandler)
        yield house
    finally:
        house.close()
        subprocess.run(["umount", RULES], check=True, timeout=180)


def key(description: str) -> tuple[range, str]:
    """(the seconds that it has left, what it says of its payload) by /proc/keys, which shows whole units."""
    lines = Path("/proc/keys").read_text().splitlines()
    fields = next(line.split(maxsplit=8) for line in lines if f" {description}" in line and "dns_resol" in line)
    unit = {"s": 1, "m": 60}[fields[3][-1]]
    left = int(fields[3][:-1]) * unit
    return range(left, left + unit), fields[8].rpartition(": ")[2]


def wanted(description: str, callout: str) -> tuple[bytes, range, float]:
    """The payload, the seconds that the key has left, and how long all this took."""
    begun = time.monotonic()
    serial = _libc.syscall(249, TYPE.encode(), description.encode(), callout.encode(), keyring.SESSION_KEYRING)
    if serial < 0:
        raise OSError(ctypes.get_errno(), "request_key")
    left, said = key(description)
    assert said
    return keyring.read(serial), left, time.monotonic() - begun


def told(description: str, callout: str) -> bytes:
    return (theirs(description, callout) or "").encode()


def ask(who: Person, description: str, callout: str = "") -> Outcome:
    return attempt(who, lambda: wanted(description, callout))


@pytest.mark.parametrize(
    ("description", "callout", "ttl"),
    [
        ("fs.lab.test", "", 300),
        ("alias.lab.test", "list", 300),
        ("both.lab.test", "list", 200),
        ("printer", "list", 5),
        ("afsdb:old.test", "", 120),
    ],
)
def test_a_key_of_roots_lives_as_long_as_its_record(
    answering: House, root: Person, description: str, callout: str, ttl: int
) -> None:
    """And the key lives as long as the record does, to the second that the kernel's clock is in."""
    outcome = ask(root, description, callout)
    assert outcome.errno == 0, answering.log()
    assert isinstance(outcome.value, tuple)
    payload, left, took = outcome.value
    assert payload == told(description, callout)
    assert left.stop > ttl - took - 1
    assert left.start <= ttl + 1


def test_a_no_is_remembered_as_an_answer(answering: House, root: Person) -> None:
    outcome = ask(root, "nobody.lab.test")
    assert outcome.errno == errno.ENODATA
    left, said = key("nobody.lab.test")
    assert (left.start < 60, said) == (True, str(-errno.ENODATA))


def test_only_the_kernel_is_answered(answering: House, alice: Person) -> None:
    assert ask(alice, "fs.lab.test").errno in (errno.EACCES, errno.ENOKEY)
    assert "forged" in answering.log()


@pytest.fixture
def afs(tmp_path: Path) -> Iterator[Path]:
    """A mount whose folders are cells, found when somebody looks."""
    subprocess.run(["modprobe", "kafs"], check=True, timeout=180)
    subprocess.run(["mount", "-t", "afs", "none", tmp_path, "-o", "dyn"], check=True, timeout=180)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True, timeout=180)


def test_afs_finds_its_servers(answering: House, root: Person, afs: Path) -> None:
    """It asks for a server list, and takes names, priorities, weights and ports from it. Nobody listens there."""
    outcome = attempt(root, lambda: os.listdir(afs / "afs.test"))
    assert outcome.errno == errno.ECONNREFUSED
    told = (AFS / "afs.test" / "vlservers").read_text()
    assert "# source SRV, status good" in told
    assert re.search(r"db1\.afs\.test \[p=10 w=5 s=A,good\]:\n > 127\.0\.0\.1:7003\n", told), told
    assert re.search(r"db2\.afs\.test \[p=20 w=6 s=A,good\]:\n > 127\.0\.0\.5:7100\n", told), told


def test_a_cell_that_is_not_there_is_not_found(answering: House, root: Person, afs: Path) -> None:
    assert attempt(root, lambda: os.listdir(afs / "nowhere.test")).errno == errno.ENOENT
    assert key("afsdb:nowhere.test")[1] == str(-errno.ENODATA)
