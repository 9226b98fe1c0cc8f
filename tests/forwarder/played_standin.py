"""Runs the stand-in with a simulated host: `python3 -I -S played_standin.py STANDIN ARGUMENTS...`.

Reads and writes the same files as played_host.c.
"""

from __future__ import annotations

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("standin", sys.argv[1])
assert spec is not None and spec.loader is not None
standin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(standin)
PLAY = os.environ["UPCALL_PLAY"]


def read(name: str) -> bytes:
    with open(f"{PLAY}/{name}", "rb") as file:
        return file.read()


class PlayedHost(standin.Host):  # type: ignore[name-defined,misc]
    log_path = f"{PLAY}/log"

    def __init__(self) -> None:
        super().__init__()
        self.broker_uid = int(read("uid"))

    def assume_authority(self, key: int) -> None:
        self._record("assume", key)

    def describe(self, key: int) -> bytes:
        self._record("describe", key)
        return self._limited("describe", standin.MAX_DESCRIBED)

    def authorisation(self) -> int:
        self._record("authorisation")
        return 4242

    def read_callout(self) -> bytes:
        self._record("callout")
        return self._limited("callout", standin.MAX_CALLOUT)

    def set_timeout(self, key: int, seconds: int) -> None:
        self._record("set_timeout", key, seconds)

    def instantiate(self, key: int, payload: bytes) -> None:
        self._record("instantiate", key, payload.hex())

    def reject(self, key: int, seconds: int, code: int) -> None:
        self._record("reject", key, seconds, code)

    def gone_of_second(self) -> int:
        return int(read("gone"))

    def _limited(self, name: str, limit: int) -> bytes:
        """Reads a text. OSError if it is too long, as in Host."""
        text = read(name)
        if len(text) > limit:
            raise OSError(standin.errno.EMSGSIZE, "too long")
        return text

    def _record(self, call: str, *values: object) -> None:
        with open(f"{PLAY}/calls", "a") as file:
            file.write(" ".join(map(str, (call, *values))) + "\n")
        if os.path.exists(f"{PLAY}/fail-{call}"):
            raise OSError(int(read(f"fail-{call}")), call)


standin.main(sys.argv[2:], PlayedHost())
