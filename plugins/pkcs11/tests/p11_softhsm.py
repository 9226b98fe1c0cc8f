"""SoftHSM with tokens in a folder of the test's own; what needs it runs in a process of its own.

The library reads its configuration when it is loaded, and looks for tokens when it is started.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LIBRARY = os.path.realpath("/usr/lib/softhsm/libsofthsm2.so")
PIN = b"4711-pin"
PATIENCE = 60.0  # seconds; SoftHSM takes ten for an RSA key on a busy machine

needs_softhsm = pytest.mark.skipif(
    shutil.which("softhsm2-util") is None or not Path(LIBRARY).exists(),
    reason="SoftHSM is not installed (Debian package softhsm2)",
)


class SoftHsm:
    """Tokens below `folder`. They are made, moved and deleted from outside, as hands would do it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tokens").mkdir()
        self.config = folder / "softhsm2.conf"
        self.config.write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
        self.places: dict[str, Path] = {}

    def uri(self, token: str, rest: str = ";object=key") -> str:
        return f"pkcs11:token={token}{rest}?module-path={LIBRARY}"

    def add(self, label: str) -> None:
        before = set((self.folder / "tokens").iterdir())
        self.tool("--init-token", "--free", "--label", label, "--so-pin", "87654321", "--pin", PIN.decode())
        (self.places[label],) = set((self.folder / "tokens").iterdir()) - before

    def remove(self, label: str) -> None:
        self.places[label].rename(self.folder / label)

    def put_back(self, label: str) -> None:
        (self.folder / label).rename(self.places[label])

    def tool(self, *arguments: str) -> None:
        subprocess.run(
            ["softhsm2-util", *arguments], env=self.environment(), check=True, capture_output=True, timeout=60
        )

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SOFTHSM2_CONF": str(self.config)}

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """Calls a function of a test module in a fresh interpreter; what it raises, fails the test."""
        told = pickle.dumps((work.__module__, work.__qualname__, (self, *arguments)))
        done = subprocess.run(
            [sys.executable, __file__],
            input=told,
            env={**self.environment(), "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            timeout=PATIENCE,
        )
        if done.returncode != 0:
            pytest.fail(done.stderr.decode(errors="replace"), pytrace=False)


class TypedPins:
    """Secrets with a person who types the same PIN again, a few times at most. Counts."""

    def __init__(self, pin: bytes = PIN, budget: int = 3) -> None:
        self.typed, self.budget = pin, budget
        self.asked: list[tuple[str, str]] = []
        self.verdicts: list[bool] = []
        self.touches = 0

    def passphrase(self, source: str, /) -> bytearray:
        raise AssertionError("a token has no passphrase")

    def pin(self, token: str, prompt: str, /) -> bytearray:
        from upcall.errors import Refused

        if self.verdicts.count(False) >= self.budget:
            raise Refused("pin-refused")
        self.asked.append((token, prompt))
        return bytearray(self.typed)

    def verdict(self, token: str, good: bool, /) -> None:
        self.verdicts.append(good)

    def touch(self, token: str, prompt: str, /) -> None:
        self.touches += 1


if __name__ == "__main__":
    import importlib

    sys.modules["p11_softhsm"] = sys.modules["__main__"]
    name, function, given = pickle.load(sys.stdin.buffer)
    getattr(importlib.import_module(name), function)(*given)
