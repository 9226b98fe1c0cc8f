"""Fuzzes request-key's configuration: root's files, also those of other packages.

Raises only BadLine. At most one line for each newline and each 4096 bytes. A chosen line names a program.
"""

from __future__ import annotations

from fuzz.target import holds, taken
from upcall.protocols.request_key import conf as wire
from upcall.protocols.request_key.install import our_file as ours

SEEDS = [
    b"create cifs.spnego * * /usr/sbin/cifs.upcall %k\n",
    b"#c\n\ncreate\tuser\tdebug:*\t*\t|/bin/cat %k %{user:x} %%d\n",
    b"create dns_resolver a*b * /sbin/key.dns_resolver %k %S\n" * 3,
    ours.render(ours.Ours(("cifs.spnego", "dns_resolver"), ("/usr/bin/upcall-request-key", "--x"), "0" * 64)),
]


def run(data: bytes) -> None:
    read = list(wire.lines("file", data))
    holds(len(read) <= data.count(b"\n") + len(data) // 4096 + 1, "too many lines")
    for kind in (b"cifs.spnego", b"user"):
        chosen = taken(wire.choose, read, wire.RequestedKey(kind, b"debug:x", b""), refuse=(wire.BadLine,))
        if chosen is not None:
            holds("/" in chosen.program, "a line without a program")
    for line in read:
        wire.narrower(line, b"user", b"debug:*")
    ours.take(data)
