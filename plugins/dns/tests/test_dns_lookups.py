"""What a real name server on loopback is asked, and what the kernel is told of it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import dns.resolver
import pytest
from upcall_dns import DnsHandler, handler, names
from upcall_dns.dnsmasq import HOST, TTL, Dnsmasq, afsdb, missing

from upcall.core.errors import PeerError, Refused
from upcall.core.messages import Requester
from upcall.handler import Handler
from upcall.keys.plugins import load_handler
from upcall.protocols.request_key.dns_resolver import (
    FROM_DNS_A,
    FROM_DNS_AFSDB,
    FROM_DNS_SRV,
    FROM_NSS,
    GOOD,
    GOOD_WITH_BAD,
    TYPE,
    CellServer,
    ServerList,
    Text,
    check_answer,
    take_payload,
)
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, take_instance
from upcall.testing.processes import in_time
from upcall.wire.envelope import Envelope

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "dnsmasq is there")

Asking = Callable[..., Instance]

MANY = 100  # addresses: more than fit into a datagram
RECORDS = [
    "local=/test/",
    "local=/fs/six/",
    "host-record=fs.lab.test,192.0.2.1,300",
    "host-record=both.lab.test,192.0.2.2,2001:db8::2,200",
    "host-record=six.lab.test,2001:db8::6,150",
    "host-record=short.lab.test,192.0.2.3,20",
    "host-record=week.lab.test,192.0.2.4,604800",
    "host-record=now.lab.test,192.0.2.5,0",
    "host-record=fs2.other.test,192.0.2.22,100",
    "cname=alias.lab.test,fs.lab.test,30",
    "cname=chain.lab.test,alias.lab.test,77",
    "cname=dangling.lab.test,nothing.lab.test",
    "txt-record=text.lab.test,no address",
    "host-record=db1.cell.test,192.0.2.31,50",
    "host-record=db2.cell.test,192.0.2.32,2001:db8::32,60",
    "srv-host=_afs3-vlserver._udp.cell.test,db1.cell.test,7003,10,5",
    "srv-host=_afs3-vlserver._udp.cell.test,db2.cell.test,7100,20,6",
    afsdb("cell.test", "fs.lab.test"),
    afsdb("old.test", "db1.cell.test"),
    afsdb("old.test", "db2.cell.test"),
    afsdb("old.test", "fs.lab.test", subtype=2),
    afsdb("dce.test", "fs.lab.test", subtype=2),
    "srv-host=_afs3-vlserver._udp.half.test,gone.cell.test,7003",
    "srv-host=_afs3-vlserver._udp.half.test,db1.cell.test,7003",
    "srv-host=_afs3-vlserver._udp.void.test,gone.cell.test,7003",
    afsdb("void.test", "db1.cell.test"),
    "srv-host=_afs3-vlserver._udp.none.test",
]
HOSTS = """
# comment
192.0.2.101   printer.lab.test printer  # 192.0.2.102 fs.lab.test
2001:db8::101 printer.lab.test
192.0.2.103   FS3.lab.test
garbage       fs.lab.test
192.0.2.104
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dnsmasq]:
    folder = tmp_path_factory.mktemp("dnsmasq")
    many = folder / "many"
    many.write_text("".join(f"198.51.100.{number} many.lab.test\n" for number in range(1, MANY + 1)))
    with Dnsmasq(folder, *RECORDS, f"addn-hosts={many}") as running:
        yield running


def envelope(description: bytes, callout: bytes = b"", patience: float = 60.0) -> Envelope:
    deadline = int((time.monotonic() + patience) * 1e9)
    return Envelope(1, 0, TYPE, Requester(0, 0), deadline, pack_ask(Ask(description, callout)))


def conf(folder: Path, *lines: str, server: str = HOST) -> Path:
    file = folder / "resolv.conf"
    file.write_text("\n".join((f"nameserver {server}", *lines, "")))
    return file


@pytest.fixture
def ask(server: Dnsmasq, tmp_path: Path) -> Asking:
    """What the handler says, which the broker would let through."""
    hosts = tmp_path / "hosts"
    hosts.write_text(HOSTS)

    def ask(description: str, callout: str = "", *lines: str) -> Instance:
        asked = envelope(description.encode(), callout.encode())
        made = DnsHandler(conf(tmp_path, *(lines or ("search none.test",))), hosts, server.port)
        answer = made.answer(asked)
        check_answer(asked.body, answer)
        return take_instance(answer)

    return ask


def text(*items: str) -> bytes:
    return ",".join(items).encode() + b"\0"


NO = b"#dnserror=%d\0" % errno.ENODATA


def test_the_handler_is_found_by_its_name_and_spreads_names_over_four_lanes() -> None:
    assert load_handler("upcall_dns:handler", TYPE) is handler
    typed: Handler = handler
    assert typed.services == (TYPE,)
    lanes = {handler.lane(envelope(b"fs%d.test" % number)) for number in range(50)}
    assert len(lanes) == 4
    with pytest.raises(PeerError):
        handler.lane(envelope(b"")._replace(body=b"x"))


@pytest.mark.parametrize(
    ("description", "callout", "expiry", "payload"),
    [
        ("fs.lab.test", "", 300, text("192.0.2.1")),
        ("FS.Lab.Test", "", 300, text("192.0.2.1")),
        ("fs.lab.test.", "", 300, text("192.0.2.1")),
        ("a:fs.lab.test", "", 300, text("192.0.2.1")),
        ("both.lab.test", "", 200, text("192.0.2.2")),
        ("both.lab.test", "ipv6", 200, text("2001:db8::2")),
        ("aaaa:both.lab.test", "ipv6", 200, text("2001:db8::2")),
        ("six.lab.test", "ipv6 list", 150, text("2001:db8::6")),
        ("six.lab.test", "list", 150, text("2001:db8::6")),
        ("alias.lab.test", "", 30, text("192.0.2.1")),
        ("chain.lab.test", "", 30, text("192.0.2.1")),
        ("week.lab.test", "", 86400, text("192.0.2.4")),
        ("now.lab.test", "", 1, text("192.0.2.5")),
        ("six.lab.test", "", 5, NO),
        ("fs.lab.test", "ipv6", 5, NO),
        ("text.lab.test", "", 5, NO),
        ("dangling.lab.test", "", 5, NO),
        ("nothing.lab.test", "", 5, NO),
        ("nothing.lab.test", "list", 5, NO),
        ("192.0.2.77", "", 5, text("192.0.2.77")),
        ("2001:DB8:0::77", "ipv6", 5, text("2001:db8::77")),
        ("2001:db8::77", "", 5, NO),
        ("printer", "", 5, text("192.0.2.101")),
        ("printer.lab.test", "ipv6", 5, text("2001:db8::101")),
        ("fs3.lab.test", "", 5, text("192.0.2.103")),
    ],
)
def test_a_host_name_is_answered_with_address_and_expiry_or_a_negative_answer(
    ask: Asking, description: str, callout: str, expiry: int, payload: bytes
) -> None:
    assert ask(description, callout) == Instance(expiry, payload)


def test_a_list_has_both_families_unless_one_is_asked_for(ask: Asking) -> None:
    """Which comes first depends on what this machine can reach."""
    found = take_payload(ask("both.lab.test", "list").payload)
    assert isinstance(found, Text)
    assert sorted(found.items) == ["192.0.2.2", "2001:db8::2"]
    assert ask("both.lab.test", "ipv4 list").payload == text("192.0.2.2")
    assert take_payload(ask("both.lab.test", " ").payload) == Text(found.items[:1])


def test_an_answer_too_long_for_a_datagram_is_fetched_by_tcp(ask: Asking) -> None:
    found = take_payload(ask("many.lab.test", "list").payload)
    assert isinstance(found, Text)
    assert len(set(found.items)) == 64
    assert all(item.startswith("198.51.100.") for item in found.items)


def test_short_names_are_completed_from_the_search_list(ask: Asking) -> None:
    assert ask("fs", "", "search none.test lab.test").payload == text("192.0.2.1")
    assert ask("fs2", "", "search lab.test other.test") == Instance(100, text("192.0.2.22"))
    assert ask("fs", "", "domain lab.test").payload == text("192.0.2.1")
    assert ask("fs2.other", "", "search test", "options ndots:2").payload == text("192.0.2.22")
    assert ask("fs2.other", "", "search test").payload == text("192.0.2.22")
    assert ask("fs.", "", "search lab.test").payload == NO
    assert ask("six", "", "search lab.test other.test").payload == NO


def test_a_name_that_is_too_long_with_a_suffix_is_tried_without(ask: Asking) -> None:
    long = ".".join(["x" * 60] * 4)
    assert ask(f"{long}.test", "", f"search {'y' * 60}.test", "options ndots:9").payload == NO


V4, V6 = bytes([192, 0, 2, 31]), bytes.fromhex("20010db8000000000000000000000032")


@pytest.mark.parametrize(
    ("cell", "callout", "expiry", "payload"),
    [
        ("cell.test", "ipv4", 50, text("192.0.2.31+7003", "192.0.2.32+7100")),
        ("lab.test", "", 5, NO),
        ("cell.test", "ipv6", 5, text("2001:db8::32+7100")),
        ("old.test", "ipv4", 50, text("192.0.2.31", "192.0.2.32")),
        ("half.test", "ipv4", 5, text("192.0.2.31+7003")),
        ("void.test", "", 5, NO),
        ("none.test", "", TTL, NO),
        ("dce.test", "", TTL, NO),
        ("nothing.test", "srv=1", 5, NO),
        ("lab.test", "srv=1", 5, NO),
    ],
)
def test_an_afs_cell_is_answered_with_its_servers_addresses(
    ask: Asking, cell: str, callout: str, expiry: int, payload: bytes
) -> None:
    found = ask(f"afsdb:{cell}", callout)
    assert found.expiry == expiry
    if callout == "ipv4":  # dnsmasq turns the order of records over
        assert sorted(found.payload[:-1].split(b",")) == payload[:-1].split(b",")
    else:
        assert found.payload == payload


def servers_of(instance: Instance) -> ServerList:
    found = take_payload(instance.payload)
    assert isinstance(found, ServerList)
    return found._replace(servers=tuple(sorted(found.servers)))


def test_srv_1_is_answered_with_a_server_list(ask: Asking) -> None:
    found = servers_of(ask("afsdb:cell.test", "srv=1 ipv4"))
    db1 = CellServer("db1.cell.test", 10, 5, 7003, (V4,))
    db2 = CellServer("db2.cell.test", 20, 6, 7100, (bytes([192, 0, 2, 32]),))
    assert found == ServerList(FROM_DNS_SRV, GOOD, (db1, db2))
    found = servers_of(ask("afsdb:cell.test", "srv=1"))
    assert set(found.servers[1].addresses) == {*db2.addresses, V6}
    found = servers_of(ask("afsdb:half.test", "srv=1"))
    assert (found.status, [server.name for server in found.servers]) == (GOOD_WITH_BAD, ["db1.cell.test"])
    found = servers_of(ask("afsdb:old.test", "srv=1"))
    assert found.source == FROM_DNS_AFSDB
    assert found.servers[0] == CellServer("db1.cell.test", 0, 0, 7003, (V4,), FROM_DNS_A)


def test_an_address_of_a_server_in_etc_hosts_is_taken_from_there(server: Dnsmasq, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("192.0.2.99 DB1.cell.test\n")
    answer = DnsHandler(conf(tmp_path), tmp_path / "hosts", server.port).answer(envelope(b"afsdb:old.test", b"srv=1"))
    first = servers_of(take_instance(answer)).servers[0]
    assert (first.addresses, first.source) == ((bytes([192, 0, 2, 99]),), FROM_NSS)


@pytest.mark.parametrize("description", ["", "mx:lab.test", "fs lab", "afsdb:192.0.2.1", "bücher.test"])
def test_a_malformed_description_is_refused_without_asking(description: str, tmp_path: Path) -> None:
    with pytest.raises(PeerError):
        DnsHandler(conf(tmp_path, server="192.0.2.1")).answer(envelope(description.encode()))


def refusal(made: DnsHandler, description: bytes = b"fs.lab.test") -> Refused:
    """Not at the deadline, which is an hour away."""
    with pytest.raises(Refused) as caught:
        in_time(lambda: made.answer(envelope(description, patience=3600.0)), "a refusal")
    assert caught.value.why
    return caught.value


def test_a_name_server_that_refuses_is_refused_as_name_server_failed(server: Dnsmasq, tmp_path: Path) -> None:
    made = DnsHandler(conf(tmp_path), tmp_path / "hosts", server.port)
    refused = refusal(made, b"fs.example.com")
    assert (refused.reason, refused.errno) == ("name-server-failed", errno.EAGAIN)
    assert "REFUSED" in refused.why


def test_an_unreachable_name_server_is_refused_and_127_0_0_1_is_the_default(tmp_path: Path, server: Dnsmasq) -> None:
    for file in (conf(tmp_path, server="127.0.0.2"), tmp_path / "missing"):
        refused = refusal(DnsHandler(file, tmp_path / "hosts", 1))
        assert (refused.reason, refused.errno) == ("no-name-server", errno.ECONNREFUSED)
    without = tmp_path / "without"
    without.write_text("search lab.test\n")  # then it is 127.0.0.1, as resolv.conf(5) says
    answer = DnsHandler(without, tmp_path / "hosts", server.port).answer(envelope(b"fs"))
    assert take_instance(answer).payload == text("192.0.2.1")


@pytest.mark.parametrize("content", [b"nameserver nonsense\n", b"nameserver 127.0.0.1\nsearch a..b\n", b"\xff\n"])
def test_a_broken_resolv_conf_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "resolv.conf"
    file.write_bytes(content)
    refused = refusal(DnsHandler(file, tmp_path / "hosts"))
    assert refused.reason == "no-name-server"
    assert str(file) in refused.why


def test_one_name_server_of_two_is_enough(server: Dnsmasq, tmp_path: Path) -> None:
    file = conf(tmp_path, f"nameserver {HOST}", server="127.0.0.9")
    answer = DnsHandler(file, tmp_path / "hosts", server.port).answer(envelope(b"fs.lab.test"))
    assert take_instance(answer).payload == text("192.0.2.1")


def test_a_look_up_takes_until_shortly_before_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of dnspython, by a clock that stands still."""
    lifetimes: list[float] = []

    def resolve(*_: object, lifetime: float, **__: object) -> None:
        lifetimes.append(lifetime)
        raise dns.resolver.LifetimeTimeout(timeout=lifetime, errors=[])  # type: ignore[no-untyped-call]

    monkeypatch.setattr(names, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(dns.resolver.Resolver, "resolve", resolve)
    with pytest.raises(Refused, match="no-name-server"):
        DnsHandler(conf(tmp_path), tmp_path / "hosts").answer(
            envelope(b"fs.lab.test")._replace(deadline_ns=106_000_000_000)
        )
    assert lifetimes == [pytest.approx(5.9)]


def test_a_request_without_enough_time_left_is_refused(server: Dnsmasq, tmp_path: Path) -> None:
    made = DnsHandler(conf(tmp_path), tmp_path / "hosts", server.port)
    with pytest.raises(Refused, match="no-name-server"):
        made.answer(envelope(b"fs.lab.test", patience=0.05))


def test_explain_names_resolv_conf_and_with_contact_the_answer(server: Dnsmasq, tmp_path: Path) -> None:
    made = DnsHandler(conf(tmp_path), tmp_path / "hosts", server.port)
    body = pack_ask(Ask(b"fs.lab.test", b""))
    told = made.explain(body)
    assert (told["answer"], told["credential"], told["candidates"]) == ("would answer", None, [])
    assert str(tmp_path / "resolv.conf") in told["why"]
    assert "192.0.2.1" not in told["why"]
    assert "300 s, Text(items=('192.0.2.1',)" in made.explain(body, contact=True)["why"]
    told = made.explain(pack_ask(Ask(b"fs.example.com", b"")), contact=True)
    assert told["answer"] == "name-server-failed"
    with pytest.raises(PeerError):
        made.explain(pack_ask(Ask(b"mx:lab.test", b"")))
