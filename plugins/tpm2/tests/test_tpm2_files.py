"""Key files, blobs, PCRs and policies: bytes only, no TPM."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
import upcall_tpm2
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap
from hypothesis import given
from hypothesis import strategies as st
from upcall_tpm2.blob import Blob, pack_blob, take_blob
from upcall_tpm2.keyfile import BEGIN, END, OWNER, KeyFile, pack_key_file, take_key_file
from upcall_tpm2.sealed import (
    NO_DA,
    WITH_AUTH,
    Pcrs,
    pack_pcrs,
    pack_template,
    parse_pcrs,
    policy_of,
    take_pcrs,
    take_sealed,
)

from upcall.core.errors import ModuleFailed, PeerError, UsageError
from upcall.keys.private_file import fingerprint

VALUES = hashlib.sha256(bytes(64)).digest()
PRIVATE = b"\0\x04\xde\xad\xbe\xef"
BLOB = Blob("/home/ada/key.tss2", "device:/dev/tpmrm0", b"\0\x0b" + bytes(32))


def key_file(pin: bool = False, pcrs: Pcrs | None = None, parent: int = OWNER) -> KeyFile:
    values = VALUES if pcrs else b""
    # what a TPM makes of the template: `unique` is filled in
    public = pack_template(policy_of(pcrs, values, pin), pin)[:-2] + b"\0\x20" + bytes(range(32))
    return KeyFile(parent, len(public).to_bytes(2, "big") + public, PRIVATE, pin, pcrs, values)


KINDS = [
    key_file(),
    key_file(pin=True),
    key_file(pcrs=Pcrs("sha256", (7,))),
    key_file(pin=True, pcrs=Pcrs("sha384", tuple(range(24)))),
    key_file(parent=0x81000001),
]
whole = pytest.mark.parametrize("key", KINDS, ids=["plain", "pin", "pcr", "both", "parent"])


def pem(der: bytes) -> bytes:
    return b"\n".join((BEGIN, base64.b64encode(der), END, b""))


def der(text: bytes) -> bytes:
    return base64.b64decode(b"".join(text.split(b"\n")[1:-2]))


# --- key files -----------------------------------------------------------------------------------------------


@whole
def test_a_key_file_is_read_back_as_written(key: KeyFile) -> None:
    text = pack_key_file(key)
    assert take_key_file(text) == key
    assert take_key_file(text.replace(b"\n", b"\r\n")) == key
    assert all(len(line) <= 64 for line in text.splitlines())


def test_a_key_file_has_the_bytes_of_the_specification() -> None:
    """An unprotected key: OID 2.23.133.10.1.5, emptyAuth TRUE, parent 0x40000001."""
    assert der(pack_key_file(KINDS[0])).hex() == (
        "305806066781050a0105a0030101ff020440000001" + "0430" + KINDS[0].public.hex() + "0406" + PRIVATE.hex()
    ).replace("3058", f"30{len(der(pack_key_file(KINDS[0]))) - 2:02x}")


@whole
def test_a_key_file_cut_short_or_too_long_is_a_peer_error(key: KeyFile) -> None:
    data = der(pack_key_file(key))
    for size in range(len(data)):
        with pytest.raises(PeerError):
            take_key_file(pem(data[:size]))
    for junk in (b"\0", b"\x30\0"):
        with pytest.raises(PeerError):
            take_key_file(pem(data + junk))


@whole
def test_a_changed_key_file_is_refused_or_another_key(key: KeyFile) -> None:
    """No two files hold the same key in different bytes."""
    data = der(pack_key_file(key))
    for at in range(len(data)):
        for bit in range(8):
            changed = data[:at] + bytes((data[at] ^ 1 << bit,)) + data[at + 1 :]
            try:
                found = take_key_file(pem(changed))
            except PeerError:
                continue
            assert found != key
            assert der(pack_key_file(found)) == changed


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    for text in (data, pem(data), BEGIN + b"\n" + data + b"\n" + END):
        with pytest.raises(PeerError):
            take_key_file(text)


@pytest.mark.parametrize("parent", [0, 0x40000007, 0x80000000, 0x82000000, 0xFFFFFFFF])
def test_an_unknown_parent_is_refused(parent: int) -> None:
    with pytest.raises(PeerError, match="neither the owner's nor persistent"):
        take_key_file(pack_key_file(key_file(parent=parent)))


def with_attributes(key: KeyFile, change: int) -> KeyFile:
    public = bytearray(key.public)
    public[6:10] = (int.from_bytes(public[6:10], "big") ^ change).to_bytes(4, "big")
    return key._replace(public=bytes(public))


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        (KINDS[0], 0x2, "moved to another TPM"),
        (KINDS[0], 0x10, "moved to another TPM"),
        (KINDS[2], WITH_AUTH, "opened by its policy"),
        (KINDS[0], WITH_AUTH, "opened by its policy"),
        (KINDS[1], NO_DA, "guessed without end"),
        (KINDS[3], NO_DA, "guessed without end"),
    ],
)
def test_objects_that_protect_less_than_they_seem_to_are_refused(key: KeyFile, change: int, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        take_key_file(pack_key_file(with_attributes(key, change)))


def test_a_policy_that_is_not_the_objects_is_refused() -> None:
    for changed in (
        KINDS[2]._replace(pcrs=Pcrs("sha256", (8,))),
        KINDS[2]._replace(values=bytes(32)),
        KINDS[2]._replace(pcrs=None, values=b""),
        KINDS[0]._replace(pcrs=Pcrs("sha256", (7,)), values=VALUES),
        KINDS[3]._replace(pin=False),
    ):
        with pytest.raises(PeerError):
            take_key_file(pack_key_file(changed))


# --- PCRs and policies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("sha256:0", "00000001000b03010000"),
        ("sha256:7,11", "00000001000b03800800"),
        ("sha384:23", "00000001000c03000080"),
        ("sha512:8,0", "00000001000d03010100"),
    ],
)
def test_pcrs_are_parsed_packed_and_printed(text: str, packed: str) -> None:
    pcrs = parse_pcrs(text)
    assert pack_pcrs(pcrs).hex() == packed
    assert take_pcrs(bytes.fromhex(packed)) == pcrs
    assert parse_pcrs(str(pcrs)) == pcrs


@pytest.mark.parametrize(
    "packed",
    [
        "",
        "00000001000b038008",
        "00000001000b0380080000",
        "00000002000b03800800",
        "00000001000403800800",
        "00000001000b03000000",
        "00000001000b04800800",
    ],
)
def test_malformed_packed_pcrs_are_a_peer_error(packed: str) -> None:
    with pytest.raises(PeerError):
        take_pcrs(bytes.fromhex(packed))


@pytest.mark.parametrize("text", ["", "sha256", "sha256:", "sha256:-1", "sha256:1,", "sha256:1;2", "sha256:\u0661"])
def test_malformed_pcrs_in_a_setting_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pcrs(text)


def test_a_public_area_is_of_sealed_data_or_refused() -> None:
    public = KINDS[0].public
    assert take_sealed(public).name[:2] == b"\0\x0b"
    for wrong in (public[:-1], public + b"x", b"\0\x2e\0\x01" + public[4:], public[:2] + public[2:10] + b"\0\x05"):
        with pytest.raises(PeerError):
            take_sealed(wrong)


# --- blobs ---------------------------------------------------------------------------------------------------


def test_a_blob_is_read_back_and_one_of_another_length_refused() -> None:
    data = pack_blob(BLOB)
    assert take_blob(data) == BLOB
    for size in range(len(data)):
        with pytest.raises(PeerError):
            take_blob(data[:size])
    with pytest.raises(PeerError):
        take_blob(data + b"\0")


@given(st.binary(max_size=200))
def test_a_blob_of_garbage_is_a_peer_error(data: bytes) -> None:
    with pytest.raises(PeerError):
        take_blob(b"\x01" + data)


@pytest.mark.parametrize(
    "tcti",
    [
        "",
        "cmd:tpm2_send",
        "device",
        "device:dev/tpm0",
        "libtss2-tcti-device.so.0:/dev/tpmrm0",
        "/tmp/evil.so",
        "swtpm:host=h,port=1;x",
        "tabrmd:\n",
        "pcap:device:/dev/tpm0",
        "device:/" + "x" * 300,
        "device:/etc/shadow",
        "device:/dev/vda",
        "device:/dev/tpm0/../vda",
        "device:/dev/shm/tpm0",
        "device:/dev/tpm0\n",
        "device:/dev/tpm\x1b[2J",
        "swtpm:host=attacker.example,port=2321",
        "mssim:port=1,host=192.0.2.1",
        "swtpm:host=127.0.0.1,",
    ],
)
def test_a_tcti_that_runs_programs_loads_libraries_writes_files_or_leaves_the_machine_is_refused(tcti: str) -> None:
    with pytest.raises(UsageError):
        pack_blob(BLOB._replace(tcti=tcti))
    data = pack_blob(BLOB)
    old, new = (len(one).to_bytes(2, "big") + one for one in (BLOB.tcti.encode(), tcti.encode()))
    with pytest.raises(PeerError):
        take_blob(data.replace(old, new))


@pytest.mark.parametrize(
    "tcti",
    ["device:/dev/tpm0", "device:/dev/tpmrm12", "tabrmd:", "swtpm:", "mssim:port=2321", "swtpm:host=127.0.0.1,port=1"],
)
def test_a_tcti_of_a_tpm_of_this_machine_is_taken(tcti: str) -> None:
    blob = BLOB._replace(tcti=tcti)
    assert take_blob(pack_blob(blob)) == blob


@pytest.mark.parametrize(
    "blob", [BLOB._replace(path="key"), BLOB._replace(path="/" * 1025), BLOB._replace(parent=b"")]
)
def test_a_blob_that_could_not_be_read_back_is_not_written(blob: Blob) -> None:
    with pytest.raises(UsageError):
        pack_blob(blob)


@pytest.mark.parametrize("error", [ValueError("Must be at least 16 bytes"), InvalidUnwrap()])
def test_any_error_of_cryptography_at_a_wrapped_key_is_a_failure_of_the_module(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Versions of cryptography differ in what they raise for a wrapped key that was cut short."""

    def unwrap(secret: bytes, wrapped: bytes) -> bytes:
        raise error

    monkeypatch.setattr(upcall_tpm2, "aes_key_unwrap_with_padding", unwrap)
    handle = upcall_tpm2.Handle(bytearray(32), "/key", fingerprint(Path("/").stat()))
    with pytest.raises(ModuleFailed, match="did not wrap these 5 bytes"):
        handle.unwrap(b"short")
