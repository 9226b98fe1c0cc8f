"""Fuzzes configuration files: users' own, which root's tools read, too.

Never raises: `problems` lists the errors with their places. Only checked values remain. A user's file never changes a
setting of the system.
"""

from __future__ import annotations

from pathlib import Path

from fuzz.target import holds, same
from upcall.config.errors import ConfigError
from upcall.config.files import Source
from upcall.config.keys import find
from upcall.config.layers import Said, laid_over, nested
from upcall.config.lines import dotted, lines, spelled
from upcall.config.table import SYSTEM, USERS

SEEDS = [
    b'[log]\nrequests = true\nto = "journal"\n[plugins]\nallow = ["a", \'b\']\n',
    b'[keys]\nlock-after = 60\n[quota.handlers."x y"]\na.b = {c = 1, "d" = [1, 2]}\n',
    b"x = " + b"[" * 3000,
    b"x = " + b"9" * 5000,
    b'x = """\n""""\'\'\n[[a]]\n[[a.b]]\n',
    b"d = 1979-05-27T07:32:00Z\nf = nan\ni = 0xFFFFFFFFFFFFFFFFFF\n",
]


def run(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    files = [Said(Source(Path("/etc/x.toml"), scope), text) for scope in (SYSTEM, USERS)]
    for said in files:
        holds(all(isinstance(one, ConfigError) and str(one) for one in said.problems), "a problem without words")
        for path in said.values:
            key = find(path)
            holds(key is not None and (key.scope != SYSTEM or said.source.scope == SYSTEM), "set by a user")
    laid_over(files)
    nested(files)
    for path, line in lines(text).items():
        holds(1 <= line <= text.count("\n") + 1, "a line that is not there")
        same(dotted(spelled(path)), path)
