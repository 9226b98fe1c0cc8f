"""Name servers that lie, stammer and keep silent: a refusal in time, or what an honest one says."""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from upcall_dns import DnsHandler

from upcall.core.errors import Refused
from upcall.core.messages import Requester
from upcall.protocols.request_key.dns_resolver import TYPE, ServerList, take_payload
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, take_instance
from upcall.testing.processes import PATIENCE, in_time
from upcall.wire.envelope import Envelope

HOST, OTHER = "127.0.0.1", "127.0.0.2"
SHORT = 0.6  # seconds for a request that nobody answers
NO = Instance(5, b"#dnserror=%d\0" % errno.ENODATA)
GOOD = Instance(60, b"192.0.2.1\0")

Query = dns.message.Message
Say = Callable[[Query], list[bytes]]


class Played:
    """A name server on UDP that sends what `say` makes of each query; it listens on no TCP."""

    def __init__(self, say: Say, host: str = HOST, port: int = 0) -> None:
        self._say = say
        self.asked: list[Query] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            data, sender = self._socket.recvfrom(65535)
            if not data:
                return
            query = dns.message.from_wire(data)
            self.asked.append(query)
            for answer in self._say(query):
                self._socket.sendto(answer, sender)

    def close(self) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(PATIENCE)
        self._socket.close()


Play = Callable[..., Played]


@pytest.fixture
def play() -> Iterator[Play]:
    running: list[Played] = []

    def play(say: Say, host: str = HOST, port: int = 0) -> Played:
        running.append(Played(say, host, port))
        return running[-1]

    yield play
    for one in running:
        one.close()


def ask(
    folder: Path, port: int, description: bytes = b"fs.test.", callout: bytes = b"", patience: float = PATIENCE
) -> Instance:
    file = folder / "resolv.conf"
    file.write_text(f"nameserver {HOST}\nnameserver {OTHER}\noptions timeout:1\n")
    deadline = int((time.monotonic() + patience) * 1e9)
    body = pack_ask(Ask(description, callout))
    made = DnsHandler(file, folder / "hosts", port)
    return take_instance(made.answer(Envelope(1, 0, TYPE, Requester(0, 0), deadline, body)))


def reason(folder: Path, port: int, patience: float = PATIENCE) -> str:
    with pytest.raises(Refused) as caught:
        in_time(lambda: ask(folder, port, patience=patience), "a refusal")
    return caught.value.reason


def said(query: Query, *records: str, rcode: int = 0, authority: tuple[str, ...] = ()) -> dns.message.Message:
    answer = dns.message.make_response(query)
    answer.set_rcode(dns.rcode.Rcode(rcode))
    for section, texts in ((answer.answer, records), (answer.authority, authority)):
        for text in texts:
            name, ttl, kind, value = text.split(" ", 3)
            section.append(dns.rrset.from_text(name, int(ttl), "IN", kind, value))
    return answer


def good(query: Query) -> dns.message.Message:
    return said(query, f"{query.question[0].name} 60 A 192.0.2.1")


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def looped(query: Query) -> bytes:
    """The name of the answer is a pointer to itself."""
    whole = dns.message.make_response(query).to_wire()
    head = changed(whole, 6, b"\0\1\0\0\0\0")[: 12 + len(query.question[0].name.to_wire() or b"") + 4]
    return head + struct.pack("!H", 0xC000 | len(head)) + struct.pack("!HHIH", 1, 1, 60, 4) + bytes(4)


BEFORE: dict[str, Callable[[Query], list[bytes]]] = {
    "nothing": lambda query: [],
    "an empty datagram": lambda query: [b""],
    "garbage": lambda query: [b"\xff" * 100],
    "another id": lambda query: [changed(good(query).to_wire(), 0, struct.pack("!H", query.id ^ 1))],
    "the query itself": lambda query: [query.to_wire()],
    "an answer to another question": lambda query: [
        changed(said(query, "other.test. 60 A 192.0.2.66").to_wire(), 13, b"xx")
    ],
    "half an answer": lambda query: [good(query).to_wire()[:-3]],
    "an answer with a tail": lambda query: [good(query).to_wire() + b"x"],
    "a compression loop": lambda query: [looped(query)],
    "too many records said": lambda query: [changed(good(query).to_wire(), 6, b"\xff\xff")],
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_junk_before_the_answer_is_skipped(play: Play, tmp_path: Path, before: Say) -> None:
    assert ask(tmp_path, play(lambda query: [*before(query), good(query).to_wire()]).port) == GOOD


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_junk_without_an_answer_is_refused_in_time(play: Play, tmp_path: Path, before: Say) -> None:
    assert reason(tmp_path, play(before).port, SHORT) == "no-name-server"


@pytest.mark.parametrize("rcode", [1, 2, 4, 5, 9])
def test_an_error_code_is_refused_as_name_server_failed(play: Play, tmp_path: Path, rcode: int) -> None:
    assert reason(tmp_path, play(lambda query: [said(query, rcode=rcode).to_wire()]).port) == "name-server-failed"


WRONG: dict[str, Callable[[Query], dns.message.Message]] = {
    "truncated, and nothing on TCP": lambda query: said(query),
    "NXDOMAIN with an answer": lambda query: said(query, "fs.test. 60 A 192.0.2.1", rcode=3),
    "aliases in a circle": lambda query: said(query, "fs.test. 60 CNAME b.test.", "b.test. 60 CNAME fs.test."),
    "YXDOMAIN": lambda query: said(query, rcode=6),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_answer_is_refused_as_name_server_failed(play: Play, tmp_path: Path, name: str) -> None:
    def say(query: Query) -> list[bytes]:
        answer = WRONG[name](query)
        answer.flags |= dns.flags.TC if name.startswith("truncated") else 0
        return [answer.to_wire()]

    assert reason(tmp_path, play(say).port) == "name-server-failed"


def soa(ttl: int, minimum: int) -> tuple[str, ...]:
    return (f"test. {ttl} SOA ns.test. root.test. 1 2 3 4 {minimum}",)


@pytest.mark.parametrize("rcode", [0, 3])
@pytest.mark.parametrize(
    ("authority", "expiry"),
    [(soa(40, 30), 30), (soa(10, 30), 10), (soa(90000, 90000), 300), (soa(0, 30), 1), ((), 5), (soa(7, 7)[:0], 5)],
)
def test_a_negative_answer_expires_by_its_soa_record_or_after_5_seconds(
    play: Play, tmp_path: Path, rcode: int, authority: tuple[str, ...], expiry: int
) -> None:
    server = play(lambda query: [said(query, rcode=rcode, authority=authority).to_wire()])
    for description, callout in ((b"fs.test.", b""), (b"fs.test.", b"list"), (b"afsdb:test", b"srv=1")):
        assert ask(tmp_path, server.port, description, callout) == NO._replace(expiry=expiry)


def test_a_referral_counts_as_a_negative_answer(play: Play, tmp_path: Path) -> None:
    server = play(lambda query: [said(query, authority=("test. 99 NS ns.test.",)).to_wire()])
    assert ask(tmp_path, server.port) == NO


def test_records_of_another_name_or_kind_do_not_count(play: Play, tmp_path: Path) -> None:
    answers = ("evil.test. 60 A 192.0.2.66", "fs.test. 60 TXT 192.0.2.66")
    assert ask(tmp_path, play(lambda query: [said(query, *answers).to_wire()]).port) == NO


def test_a_server_that_does_not_know_edns_is_asked_without(play: Play, tmp_path: Path) -> None:
    server = play(lambda query: [(said(query, rcode=1) if query.edns >= 0 else good(query)).to_wire()])
    assert ask(tmp_path, server.port) == GOOD
    assert [query.edns for query in server.asked] == [0, -1]
    assert server.asked[0].payload == 1232


def test_a_slow_server_is_asked_again_with_another_id(play: Play, tmp_path: Path) -> None:
    ids: list[int] = []

    def say(query: Query) -> list[bytes]:
        ids.append(query.id)
        return [good(query).to_wire()] if len(ids) == 2 else []

    assert ask(tmp_path, play(say).port) == GOOD
    assert ids[0] != ids[1]


@pytest.mark.parametrize("rcode", [2, 5, None])
def test_the_second_server_is_asked_when_the_first_fails(play: Play, tmp_path: Path, rcode: int | None) -> None:
    first = play(lambda query: [] if rcode is None else [said(query, rcode=rcode).to_wire()])
    second = play(lambda query: [good(query).to_wire()], OTHER, first.port)
    assert ask(tmp_path, second.port) == GOOD
    assert len(first.asked) == 1


def by_kind(query: Query) -> str:
    return str(query.question[0].rdtype.name)


def test_one_family_that_fails_does_not_hide_the_other(play: Play, tmp_path: Path) -> None:
    server = play(
        lambda query: [said(query, rcode=2).to_wire() if by_kind(query) == "AAAA" else good(query).to_wire()]
    )
    assert ask(tmp_path, server.port, callout=b"list") == GOOD
    server = play(lambda query: [said(query, rcode=2 if by_kind(query) == "AAAA" else 3).to_wire()])
    with pytest.raises(Refused, match="name-server-failed"):  # the other half is not known to be a no
        ask(tmp_path, server.port, callout=b"list")


def test_afsdb_records_are_used_if_srv_records_cannot_be_had(play: Play, tmp_path: Path) -> None:
    def say(query: Query, rcode: int = 0) -> list[bytes]:
        if by_kind(query) == "SRV":
            return [said(query, rcode=2).to_wire()]
        answer = good(query) if by_kind(query) == "A" else said(query, "cell.test. 44 AFSDB 1 db.test.", rcode=rcode)
        return [answer.to_wire()]

    assert ask(tmp_path, play(say).port, b"afsdb:cell.test", b"ipv4") == Instance(44, b"192.0.2.1\0")
    no = play(lambda query: [said(query, rcode=2 if by_kind(query) == "SRV" else 3).to_wire()])
    with pytest.raises(Refused, match="name-server-failed"):
        ask(tmp_path, no.port, b"afsdb:cell.test", b"ipv4")


def test_servers_with_impossible_host_names_are_left_out(play: Play, tmp_path: Path) -> None:
    names = ["a\\032b.test.", "-.test.", "DB.test.", "db.test.", *(f"db{number}.test." for number in range(20))]

    def say(query: Query) -> list[bytes]:
        records = [f"_afs3-vlserver._udp.cell.test. 60 SRV 1 1 {port} {name}" for port, name in enumerate(names, 1)]
        if by_kind(query) == "A":
            return [good(query).to_wire()]
        return [said(query, *(records if by_kind(query) == "SRV" else ())).to_wire()]

    found = take_payload(ask(tmp_path, play(say).port, b"afsdb:cell.test", b"srv=1").payload)
    assert isinstance(found, ServerList)
    assert [server.name for server in found.servers] == ["DB.test", *(f"db{number}.test" for number in range(14))]
    assert found.servers[0].port == 3


def test_a_cell_whose_servers_addresses_cannot_be_had_is_refused(play: Play, tmp_path: Path) -> None:
    def say(query: Query) -> list[bytes]:
        if by_kind(query) != "SRV":
            return [said(query, rcode=2).to_wire()]
        return [said(query, "_afs3-vlserver._udp.cell.test. 60 SRV 1 1 7003 db.test.").to_wire()]

    with pytest.raises(Refused, match="name-server-failed"):
        ask(tmp_path, play(say).port, b"afsdb:cell.test", b"srv=1")


def test_eight_requests_at_a_time_are_answered(play: Play, tmp_path: Path) -> None:
    server = play(lambda query: [good(query).to_wire()])
    found: list[Instance] = []
    threads = [threading.Thread(target=lambda: found.append(ask(tmp_path, server.port))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [GOOD] * 8
