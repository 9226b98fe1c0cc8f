"""Packs and parses eCryptfs's public-key messages: frames of /dev/ecryptfs, and the packets inside them. Pure.

Source: fs/ecryptfs/{ecryptfs_kernel.h, miscdev.c, keystore.c} of Linux 6.1; include/linux/ecryptfs.h.
A frame is `type u8, seq u32 big-endian, length (1 or 2 bytes), struct ecryptfs_message`. HELO and QUIT end
after seq, and so does a REQUEST whose waiter has timed out: it must never be answered.
`struct ecryptfs_message` is `index u32, data_len u32, data`, in native byte order.

Packets (`len` is a packet length of 1 or 2 bytes, `key` is cipher code u8, file key, checksum u16 big-endian):

    tag 64  0x40 len signature(16) len encrypted-key     kernel: decrypt this
    tag 65  0x41 status len key                          answer; a failure is 0x41 0xff
    tag 66  0x42 len signature(16) len key               kernel: encrypt this
    tag 67  0x43 status len encrypted-key                answer; a failure is 0x43 0xff
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from upcall.core.errors import PeerError

HELO, QUIT, REQUEST, RESPONSE, NOTICE = 100, 101, 102, 103, 104

TAG_64, TAG_65, TAG_66, TAG_67 = 0x40, 0x41, 0x42, 0x43
ANSWER_TO = {TAG_64: TAG_65, TAG_66: TAG_67}
STATUS_OK, STATUS_FAILED = 0x00, 0xFF

SIGNATURE_LENGTH = 16  # ECRYPTFS_SIG_SIZE_HEX
MAX_KEY = 64  # ECRYPTFS_MAX_KEY_BYTES
MAX_WRAPPED = 512  # ECRYPTFS_MAX_ENCRYPTED_KEY_BYTES
MAX_READ = 547  # the longest frame that the kernel hands out
MAX_WRITE = 531  # the longest frame that it accepts
PACKET_LENGTH_MAX = 8383  # the greatest length that two bytes can encode

CIPHER_OPAQUE = 0x00  # not a code of the kernel: marks a key that did not come from eCryptfs
CIPHER_AES_128, CIPHER_AES_192, CIPHER_AES_256 = 0x07, 0x08, 0x09
AES_SIZES = {CIPHER_AES_128: 16, CIPHER_AES_192: 24, CIPHER_AES_256: 32}
# RFC 2440 9.2 codes that fs/ecryptfs/crypto.c supports: 3DES, CAST5, Blowfish, AES, Twofish, CAST6
CIPHER_CODES = frozenset({0x02, 0x03, 0x04, 0x07, 0x08, 0x09, 0x0A, 0x0B})

_FRAME = struct.Struct(">BI")
_MESSAGE = struct.Struct("=II")
_ASK_HEAD = struct.Struct(">BB16sB")  # tag, length, signature, first byte of the content's length


# --- packet lengths ------------------------------------------------------------------------------------------


def pack_length(size: int) -> bytes:
    """Packs a packet length: one byte below 192, two up to 8383 (ecryptfs_write_packet_length). PeerError above."""
    if 0 <= size < 192:
        return bytes((size,))
    if size <= PACKET_LENGTH_MAX and size > 0:
        return bytes((((size - 192) >> 8) + 192, (size - 192) & 0xFF))
    raise PeerError("packet length", f"{size} does not fit two bytes")


def take_length(data: bytes, at: int, what: str) -> tuple[int, int]:
    """Parses the packet length at offset `at`. Returns it and the offset behind it (ecryptfs_parse_packet_length).
    PeerError. `what`: the packet, for the error."""
    if at >= len(data):
        raise PeerError(what, "ends before its length", at)
    first = data[at]
    if first < 192:
        return first, at + 1
    if first > 223:
        raise PeerError(what, f"length byte {first:#04x} is not of one or two bytes", at)
    if at + 1 >= len(data):
        raise PeerError(what, "ends within its length", at)
    return ((first - 192) << 8) + data[at + 1] + 192, at + 2


def _take_counted(data: bytes, at: int, what: str) -> tuple[bytes, int]:
    size, start = take_length(data, at, what)
    if start + size > len(data):
        raise PeerError(what, f"says {size} bytes, {len(data) - start} are there", at)
    return data[start : start + size], start + size


# --- frames --------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One read from, or write to, /dev/ecryptfs. `index` and `data` are None in a frame that ends after `seq`."""

    type: int
    seq: int
    index: int | None = None  # type: ignore[assignment]  # not tuple.index
    data: bytes | None = None


def pack_frame(frame: Frame) -> bytes:
    """Packs a frame. PeerError if a value does not fit the kernel's field widths."""
    if frame.data is None or frame.index is None:
        return _FRAME.pack(frame.type, frame.seq)
    return _pack_whole(frame.type, frame.seq, frame.index, frame.data)


def pack_response_frame(seq: int, index: int, packet: bytes) -> bytes:
    """Packs the frame of a RESPONSE. PeerError if a value does not fit the kernel's field widths."""
    return _pack_whole(RESPONSE, seq, index, packet)


def _pack_whole(kind: int, seq: int, index: int, data: bytes) -> bytes:
    size = len(data)
    return b"".join((_FRAME.pack(kind, seq), pack_length(8 + size), _MESSAGE.pack(index, size), data))


def take_frame(data: bytes) -> Frame:
    """Parses a frame that fills `data`. PeerError if it is malformed, or its lengths contradict each other."""
    there = len(data)
    if there < 5:
        raise PeerError("frame", f"{there} bytes, at least 5 are needed")
    kind, seq = _FRAME.unpack_from(data)
    if there == 5:
        return Frame(kind, seq)
    size, at = data[5], 6
    if size >= 192:
        size, at = take_length(data, 5, "frame")
    if at + size != there:
        raise PeerError("frame", f"says {size} bytes, {there - at} are there", 5)
    if size < 8:
        raise PeerError("frame", f"{size} bytes hold no struct ecryptfs_message", at)
    index, length = _MESSAGE.unpack_from(data, at)
    if length != size - 8:
        raise PeerError("frame", f"data_len {length}, {size - 8} bytes are there", at + 4)
    return tuple.__new__(Frame, (kind, seq, index, data[at + 8 :]))  # as Frame(...), in half the time


# --- signatures ----------------------------------------------------------------------------------------------


def is_signature(text: str) -> bool:
    """Returns whether this has the format of a key's signature: 16 hexadecimal digits, lower case."""
    return len(text) == SIGNATURE_LENGTH and not text.strip("0123456789abcdef")


# --- the packets ---------------------------------------------------------------------------------------------


class Ask(NamedTuple):
    """A packet of tag 64 (decrypt) or 66 (encrypt). `signature`: of the key. `content`: the file key, encrypted in a
    tag 64, in clear and secret in a tag 66."""

    tag: int
    signature: str
    content: bytes

    def __repr__(self) -> str:
        return f"Ask(tag={self.tag:#04x}, signature={self.signature!r}, content=<{len(self.content)} bytes>)"


class Reply(NamedTuple):
    """A packet of tag 65 or 67. `status`: 0 for success; otherwise `content` is empty. `content` is secret in a tag
    65."""

    tag: int
    status: int
    content: bytes

    def __repr__(self) -> str:
        return f"Reply(tag={self.tag:#04x}, status={self.status}, content=<{len(self.content)} bytes>)"


def pack_ask(ask: Ask) -> bytes:
    signature = ask.signature.encode("ascii")
    return b"".join(
        (
            bytes((ask.tag,)),
            pack_length(len(signature)),
            signature,
            pack_length(len(ask.content)),
            ask.content,
        )
    )


def take_ask(data: bytes) -> Ask:
    """Parses a packet of tag 64 or 66 that fills `data`. PeerError if it is malformed."""
    if at := _content_at(data):  # the code below finds the error in others
        return tuple.__new__(Ask, (data[0], data[2:18].decode("ascii"), data[at:]))  # as Ask(...), in half the time
    if not data:
        raise PeerError("request packet", "is empty")
    tag = data[0]
    if tag not in ANSWER_TO:
        raise PeerError("request packet", f"tag {tag:#04x} is neither 0x40 nor 0x42", 0)
    what = f"tag {tag} packet"
    signature, at = _take_counted(data, 1, what)
    if len(signature) != SIGNATURE_LENGTH or signature.strip(b"0123456789abcdef"):
        raise PeerError(what, "the signature is not 16 hexadecimal digits", 2)
    content, end = _take_counted(data, at, what)
    if end != len(data):
        raise PeerError(what, f"{len(data) - end} bytes too many", end)
    return Ask(tag, signature.decode("ascii"), content)


def check_ask(data: bytes) -> None:
    """Checks a packet of tag 64 or 66 that fills `data`. PeerError if it is malformed."""
    if not _content_at(data):
        take_ask(data)


def _content_at(data: bytes) -> int:
    """Returns where the content of a valid packet of tag 64 or 66 begins; 0 if it may be malformed. PeerError."""
    at = _ASK_HEAD.size
    if len(data) < at:
        return 0
    tag, size, signature, count = _ASK_HEAD.unpack_from(data)
    if count >= 192:
        count, at = take_length(data, at - 1, "request packet")
    fits = tag in ANSWER_TO and size == SIGNATURE_LENGTH and at + count == len(data)
    return at if fits and not signature.strip(b"0123456789abcdef") else 0


def pack_reply(reply: Reply) -> bytes:
    if reply.status != STATUS_OK:
        return bytes((reply.tag, reply.status))
    return pack_success(reply.tag, reply.content)


def pack_success(tag: int, content: bytes) -> bytes:
    """Packs a packet of tag 65 or 67 that grants a request."""
    size = len(content)
    if size < 192:  # as pack_length, in a third of the time
        return bytes((tag, STATUS_OK, size)) + content
    return bytes((tag, STATUS_OK)) + pack_length(size) + content


def take_reply(data: bytes) -> Reply:
    """Parses a packet of tag 65 or 67 that fills `data`. PeerError if it is malformed."""
    if len(data) < 2:
        raise PeerError("answer packet", f"{len(data)} bytes, at least 2 are needed")
    tag, status = data[0], data[1]
    if tag not in (TAG_65, TAG_67):
        raise PeerError("answer packet", f"tag {tag:#04x} is neither 0x41 nor 0x43", 0)
    what = f"tag {tag} packet"
    if status != STATUS_OK:
        if len(data) != 2:
            raise PeerError(what, "a failure carries nothing", 2)
        return Reply(tag, status, b"")
    content, end = _take_counted(data, 2, what)
    if end != len(data):
        raise PeerError(what, f"{len(data) - end} bytes too many", end)
    return Reply(tag, status, content)


def pack_failure(asked: bytes) -> bytes:
    """Returns the failure packet for a request: the kernel then returns EIO at once. Works for unknown tags, too."""
    return bytes((ANSWER_TO.get(asked[0], TAG_65) if asked else TAG_65, STATUS_FAILED))


# --- the file key inside ------------------------------------------------------------------------------------


class FileKey(NamedTuple):
    """The content of tags 65 and 66: the cipher's RFC 2440 code and the file's key, which is secret."""

    cipher: int
    key: bytes

    def __repr__(self) -> str:
        return f"FileKey(cipher={self.cipher:#04x}, key=<{len(self.key)} bytes>)"


def pack_file_key(file_key: FileKey) -> bytes:
    """Packs `code u8, key, checksum u16 big-endian`. The checksum is the sum of the key's bytes."""
    key = file_key.key
    return b"".join((bytes((file_key.cipher,)), key, (sum(key) & 0xFFFF).to_bytes(2, "big")))


def take_file_key(data: bytes) -> FileKey:
    """Parses a file key that fills `data`. PeerError if size, checksum or cipher are wrong."""
    check_file_key(data)
    return FileKey(data[0], data[1:-2])


def check_file_key(data: bytes) -> None:
    """Checks a file key that fills `data`. PeerError if size, checksum or cipher are wrong."""
    if len(data) < 4:
        raise PeerError("file key", f"{len(data)} bytes, at least 4 are needed")
    cipher, key = data[0], data[1:-2]
    if len(key) > MAX_KEY:
        raise PeerError("file key", f"{len(key)} bytes, at most {MAX_KEY} are allowed", 1)
    if sum(key) & 0xFFFF != (data[-2] << 8) + data[-1]:
        raise PeerError("file key", "the checksum does not fit", len(data) - 2)
    if cipher != CIPHER_OPAQUE and cipher not in CIPHER_CODES:
        raise PeerError("file key", f"unknown cipher code {cipher:#04x}", 0)
    if AES_SIZES.get(cipher, len(key)) != len(key):
        raise PeerError("file key", f"{len(key)} bytes are no key for cipher code {cipher:#04x}", 0)


def check_answer(asked: bytes, answer: bytes) -> None:
    """Checks the packet of an answer. PeerError unless it is a valid, successful answer to the packet `asked`, which
    has passed check_ask.

    The kernel checks less: it accepts an encrypted key of any size, including 0, and writes it into the file's header.
    The file is then lost (fs/ecryptfs/keystore.c, parse_tag_67_packet).
    """
    if len(answer) < 4 or answer[1] != STATUS_OK or not _fits(asked, answer):
        _find_fault(asked, answer)


def _fits(asked: bytes, answer: bytes) -> bool:
    """Returns True only if `_find_fault` finds none; in a third of its time for nearly all valid answers."""
    tag, size, at = answer[0], answer[2], 3
    if size >= 192:
        size, at = take_length(answer, 2, "answer packet")
    if at + size != len(answer):
        return False
    if tag == TAG_65:
        if asked[0] != TAG_64:
            return False
        check_file_key(answer[at:])
        return True
    if tag != TAG_67 or len(asked) < 30 or asked[0] != TAG_66 or asked[18] != len(asked) - 19:
        return False
    return asked[18] <= size <= MAX_WRAPPED and asked[20:-2] not in answer


def _find_fault(asked: bytes, answer: bytes) -> None:
    reply = take_reply(answer)
    if ANSWER_TO.get(asked[0]) != reply.tag:
        raise PeerError("answer packet", f"tag {reply.tag:#04x} is no answer to tag {asked[0]:#04x}", 0)
    if reply.status != STATUS_OK:
        raise PeerError("answer packet", f"status {reply.status:#04x}", 1)
    if reply.tag == TAG_65:
        check_file_key(reply.content)
        return
    content = take_ask(asked).content
    if not len(content) <= len(reply.content) <= MAX_WRAPPED:
        raise PeerError(
            "tag 67 packet",
            f"a wrapped key of {len(reply.content)} bytes, {len(content)} to {MAX_WRAPPED} are allowed",
            2,
        )
    key = content[1:-2]
    if len(key) >= 8 and key in reply.content:  # shorter keys may occur by chance
        raise PeerError("tag 67 packet", "the wrapped key holds the key in clear", 2)
