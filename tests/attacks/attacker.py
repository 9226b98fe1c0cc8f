"""Runs a function as another uid, in a child with two pipes: it receives words and sends JSON."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Self

PATIENCE = 30.0


class Told:
    """The child's side."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer

    def word(self, wait: bool = True) -> str:
        """Returns the next word; "" if there is none now; "end" if the test has closed the pipe."""
        if not wait and not select.select([self._reader], [], [], 0)[0]:
            return ""
        data = b""
        while not data.endswith(b"\n"):
            byte = os.read(self._reader, 1)
            if not byte:
                return "end"
            data += byte
        return data.decode().strip()

    def say(self, something: object) -> None:
        data = json.dumps(something).encode() + b"\n"
        while data:
            data = data[os.write(self._writer, data) :]

    @staticmethod
    def pause() -> None:
        """Blocks until the process is killed."""
        while True:
            signal.pause()


class Attacker:
    """A process of an ordinary uid."""

    def __init__(self, uid: int, function: Callable[[Told], None], enter: Callable[[], None] = lambda: None) -> None:
        """`enter`: called first, as root."""
        self.uid = uid
        from_us, self._to_child = os.pipe()
        self._from_child, to_us = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._to_child)
                os.close(self._from_child)
                enter()
                become(uid)
                function(Told(from_us, to_us))
                status = 0
            except BaseException:  # noqa: BLE001 - a forked child must not return into pytest
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        os.close(from_us)
        os.close(to_us)

    def tell(self, word: str) -> None:
        os.write(self._to_child, word.encode() + b"\n")

    def heard(self, timeout: float = PATIENCE) -> Any:
        """Waits for its next message. NotInTime."""
        data, deadline = b"", time.monotonic() + timeout
        while not data.endswith(b"\n"):
            if not select.select([self._from_child], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the attacker has said nothing within {timeout} s")
            chunk = os.read(self._from_child, 1)
            if not chunk:
                raise RuntimeError("the attacker has ended")
            data += chunk
        return json.loads(data)

    def asked(self, word: str, timeout: float = PATIENCE) -> Any:
        self.tell(word)
        return self.heard(timeout)

    def kill(self) -> None:
        """Kills the process. Its children run until they read "end" from the closed pipe."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._to_child)
        os.close(self._from_child)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
