"""Keys of type dns_resolver: what is asked for, both forms of the payload, and everything that is neither."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.forwarder.scene import server, servers
from upcall.core.errors import PeerError
from upcall.protocols.request_key import dns_resolver
from upcall.protocols.request_key.dns_resolver import (
    FROM_DNS_SRV,
    GOOD,
    CellServer,
    Options,
    Query,
    ServerList,
    Text,
    pack_servers,
    pack_text,
    take_callout,
    take_description,
    take_payload,
)
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, pack_instance

VECTORS = json.loads((Path(__file__).parent / "vectors" / "dns_resolver.json").read_text())
BOTH = (4, 6)


def said(rows: list[dict[str, str]]) -> list[object]:
    return [pytest.param(bytes.fromhex(row["payload"]), id=row["what"]) for row in rows]


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (b"fs.lab.test", Query("", "fs.lab.test")),
        (b"fs", Query("", "fs")),
        (b"FS.Lab.Test.", Query("", "FS.Lab.Test.")),
        (b"_afs3-vlserver._udp.lab.test", Query("", "_afs3-vlserver._udp.lab.test")),
        (b"a:fs.lab.test", Query("a", "fs.lab.test")),
        (b"aaaa:fs.lab.test", Query("aaaa", "fs.lab.test")),
        (b"afsdb:lab.test", Query("afsdb", "lab.test")),
        (b"192.0.2.1", Query("", "192.0.2.1")),
        (b"2001:db8::1", Query("", "2001:db8::1")),
        (b"::ffff:192.0.2.1", Query("", "::ffff:192.0.2.1")),
        (b"a:192.0.2.1", Query("a", "192.0.2.1")),
        (b"aaaa:2001:db8::1", Query("aaaa", "2001:db8::1")),
        (b"b::1", Query("", "b::1")),
        (b".".join([b"x" * 63] * 3 + [b"y" * 61]), Query("", ".".join(["x" * 63] * 3 + ["y" * 61]))),
    ],
)
def test_a_sound_description_is_read(text: bytes, query: Query) -> None:
    assert take_description(text) == query


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b".",
        b"fs..lab",
        b".fs",
        b"-fs.lab",
        b"fs-.lab",
        b"fs lab",
        b"fs\0lab",
        b"fs\n",
        b"fs,lab",
        b"fs%eth0",
        b"b\xc3\xbcro.lab",
        b"x" * 64,
        b".".join([b"x" * 63] * 4),
        b"a:",
        b"a::1",
        b":fs",
        b"mx:lab.test",
        b"srv:lab.test",
        b"A:fs.lab",
        b"a:a:fs.lab",
        b"afsdb:192.0.2.1",
        b"afsdb:2001:db8::1",
        b"127.1",
        b"1",
        b"192.0.2.256",
        b"192.0.2",
        b"192.0.2.1.",
        b"fs.lab.123",
        b"fe80::1%lo",
    ],
)
def test_an_impossible_host_name_is_a_peer_error(text: bytes) -> None:
    with pytest.raises(PeerError):
        take_description(text)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (b"", Options((4,), False, False)),
        (b" ", Options(BOTH, False, False)),
        (b"ipv4", Options((4,), False, False)),
        (b"ipv6", Options((6,), False, False)),
        (b"list", Options(BOTH, True, False)),
        (b"ipv6 list", Options((6,), True, False)),
        (b"ipv4 ipv6", Options((6,), False, False)),
        (b"srv=1", Options(BOTH, False, True)),
        (b"srv=2", Options(BOTH, False, False)),
        (b"list=x later=1.5 ipv4", Options((4,), False, False)),
    ],
)
def test_the_callout_chooses_families_and_lists(text: bytes, options: Options) -> None:
    assert take_callout(text, Query("", "fs")) == options
    assert take_callout(text, Query("afsdb", "lab.test")) == options._replace(
        several=True, families=options.families if text else BOTH
    )


@pytest.mark.parametrize("text", [b"ipv4,list", b"=", b"list\0", b"srv=1,2", b"\xff", b"list\tipv4", b"LIST"])
def test_a_malformed_callout_is_a_peer_error(text: bytes) -> None:
    with pytest.raises(PeerError):
        take_callout(text, Query("", "fs"))


@given(st.binary(max_size=300))
def test_any_bytes_are_taken_or_a_peer_error(junk: bytes) -> None:
    for take in (take_description, take_payload):
        with contextlib.suppress(PeerError):
            take(junk)
    with contextlib.suppress(PeerError):
        take_callout(junk, Query("", "fs"))


@pytest.mark.parametrize("payload", said(VECTORS["good"]))
def test_a_good_vector_is_read_and_written_the_same(payload: bytes) -> None:
    found = take_payload(payload)
    assert (pack_text(found) if isinstance(found, Text) else pack_servers(found)) == payload


@pytest.mark.parametrize("payload", said(VECTORS["bad"]))
def test_a_bad_vector_is_a_peer_error(payload: bytes) -> None:
    with pytest.raises(PeerError):
        take_payload(payload)


@pytest.mark.parametrize(
    "text", [b"x", b"192.0.2.1", b"192.0.2.1,2001:db8::1", b"#dnserror=1", b"a,b#dnserror=511", b"x" * 4095]
)
def test_sound_text_passes_the_check(text: bytes) -> None:
    dns_resolver.check_payload(text + b"\0")


@pytest.mark.parametrize(
    "payload",
    [
        b"192.0.2.1", b"192.0.2.1\n\0", b"192.0.2.1 \0", b"192.0.2.1\0\0", b"a\0b\0", b"\x7f\0", b"\x80\0", b",\0",
        b"a,\0", b",a\0", b"a,,b\0", b"a,#dnserror=3\0", b"#\0", b"a#\0", b"##\0", b"#dnserror=3#dnserror=3\0",
        b"#dnserror=0\0", b"#dnserror=512\0", b"#dnserror=\0", b"#dnserror\0", b"#dnserror=03\0", b"#dnserror=+3\0",
        b"#dnserror=1000\0", b"#dnserror=3 \0", b"#dnserror=-1\0", b"#other=3\0", b"#dnserror=3", b"a#dnserror=3#\0",
        b"x" * 4096 + b"\0", b"\0",
    ],
)  # fmt: skip
def test_malformed_text_is_a_peer_error(payload: bytes) -> None:
    with pytest.raises(PeerError):
        dns_resolver.check_payload(payload)


@pytest.mark.parametrize(
    "payload",
    [
        servers(), servers(server()), servers(server(), server(b"x", [])), servers(server(b"n" * 255)),
        servers(server(addresses=[bytes(4)] * 255)), servers(*[server()] * 255),
    ],
    ids=range(6),
)  # fmt: skip
def test_sound_server_lists_pass_the_check_and_those_cut_short_do_not(payload: bytes) -> None:
    dns_resolver.check_payload(payload)
    for cut in [*range(max(1, len(payload) - 60), len(payload)), *range(1, len(payload), 1 + len(payload) // 200)]:
        with pytest.raises(PeerError):
            dns_resolver.check_payload(payload[:cut])


def changed(payload: bytes, at: int, value: int) -> bytes:
    return payload[:at] + bytes([value]) + payload[at + 1 :]


ONE = servers(server())


@pytest.mark.parametrize(
    "payload",
    [
        ONE + b"\0", servers(server(), count=2), servers(server(), server(), count=1), servers(count=1),
        changed(ONE, 1, 1), changed(ONE, 2, 0), changed(ONE, 2, 2), changed(ONE, 3, 6), changed(ONE, 4, 8),
        changed(ONE, 14, 6), changed(ONE, 15, 8), changed(ONE, 16, 3), changed(ONE, 17, 1), changed(ONE, 17, 3),
        changed(ONE, 31, 2), changed(ONE, 18, 0), changed(ONE, 18, 32), changed(ONE, 7, 1), servers(server(b"")),
        servers(server(b"n" * 256)), b"\0", b"\0\0", b"\0\0\1", b"\0\0\1\0\0",
    ],
    ids=range(24),
)  # fmt: skip
def test_a_malformed_server_list_is_a_peer_error(payload: bytes) -> None:
    with pytest.raises(PeerError):
        dns_resolver.check_payload(payload)


def test_text_is_read_as_items_or_as_an_error_number() -> None:
    assert take_payload(b"192.0.2.1+7003,2001:db8::1\0") == Text(("192.0.2.1+7003", "2001:db8::1"))
    assert take_payload(b"#dnserror=61\0") == Text((), 61)
    assert pack_text(Text((), 61)) == b"#dnserror=61\0"


def test_a_server_list_is_packed_as_in_the_kernels_header() -> None:
    servers = ServerList(FROM_DNS_SRV, GOOD, (CellServer("db.test", 1, 2, 7003, (bytes([192, 0, 2, 1]), bytes(16))),))
    head = "00000104 0101" + "0700 0100 0200 5b1b 02 01 01 02"
    payload = bytes.fromhex(head) + b"db.test" + bytes.fromhex("00c0000201 01") + bytes(16)
    assert pack_servers(servers) == payload
    assert take_payload(payload) == servers


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_", min_size=1, max_size=255)
u16 = st.integers(0, 65535)
addresses = st.lists(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), max_size=5).map(tuple)
one_server = st.builds(
    CellServer, names, u16, u16, u16, addresses, st.integers(0, 5), st.integers(0, 7), st.integers(0, 2)
)
lists = st.builds(ServerList, st.integers(0, 5), st.integers(0, 7), st.lists(one_server, max_size=4).map(tuple))


@given(lists)
def test_any_server_list_is_read_back_and_one_of_another_length_refused(found: ServerList) -> None:
    payload = pack_servers(found)
    assert take_payload(payload) == found
    for wrong in (*(payload[:cut] for cut in range(len(payload))), payload + b"\0"):
        with pytest.raises(PeerError):
            take_payload(wrong)


def check(description: bytes, callout: bytes, payload: bytes, expiry: int = 60) -> None:
    asked = pack_ask(Ask(description, callout))
    dns_resolver.check_request(asked)
    dns_resolver.check_answer(asked, pack_instance(Instance(expiry, payload)))


SERVERS = pack_servers(ServerList(FROM_DNS_SRV, GOOD, ()))


@pytest.mark.parametrize(
    ("description", "callout", "payload"),
    [
        (b"fs.test", b"", b"192.0.2.1\0"),
        (b"fs.test", b"", b"#dnserror=61\0"),
        (b"fs.test", b"ipv6", b"2001:db8::1\0"),
        (b"fs.test", b"list", b"192.0.2.1,2001:db8::1\0"),
        (b"afsdb:test", b"", b"192.0.2.1+7003,2001:db8::1+7003\0"),
        (b"afsdb:test", b"ipv4", b"192.0.2.1,192.0.2.2\0"),
        (b"afsdb:test", b"srv=1", b"192.0.2.1,2001:db8::1+7003\0"),
        (b"afsdb:test", b"srv=1", b"#dnserror=61\0"),
        (b"afsdb:test", b"srv=1", SERVERS),
    ],
)
def test_an_answer_that_fits_its_request_passes(description: bytes, callout: bytes, payload: bytes) -> None:
    check(description, callout, payload)


@pytest.mark.parametrize(
    ("description", "callout", "payload"),
    [
        (b"fs.test", b"", b"192.0.2.1,192.0.2.2\0"),
        (b"fs.test", b"", b"2001:db8::1\0"),
        (b"fs.test", b"ipv6", b"192.0.2.1\0"),
        (b"fs.test", b"list", b"192.0.2.1,fs.test\0"),
        (b"fs.test", b"", b"192.0.2.1+7003\0"),
        (b"fs.test", b"srv=1", SERVERS),
        (b"afsdb:test", b"", SERVERS),
        (b"afsdb:test", b"ipv4", b"2001:db8::1+7003\0"),
        (b"afsdb:test", b"srv=1", b"192.0.2.1+70030000\0"),
        (b"fs.test", b"", b"192.0.2.1"),
    ],
)
def test_an_answer_that_does_not_fit_its_request_is_refused(
    description: bytes, callout: bytes, payload: bytes
) -> None:
    with pytest.raises(PeerError):
        check(description, callout, payload)


@pytest.mark.parametrize("expiry", [0, 86401, 1 << 31])
def test_an_expiry_out_of_bounds_is_refused(expiry: int) -> None:
    with pytest.raises(PeerError, match="1 to 86400"):
        check(b"fs.test", b"", b"192.0.2.1\0", expiry)


@pytest.mark.parametrize(("description", "callout"), [(b"mx:test", b""), (b"", b""), (b"fs.test", b"a,b")])
def test_a_malformed_request_is_a_peer_error(description: bytes, callout: bytes) -> None:
    with pytest.raises(PeerError):
        dns_resolver.check_request(pack_ask(Ask(description, callout)))
