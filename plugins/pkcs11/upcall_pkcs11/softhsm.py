"""Runs SoftHSM for tests and measurements: tokens in a folder, and simulated PIN prompts.

SoftHSM reads its configuration when it is loaded, and searches for tokens when it is initialised. So code that uses
these tokens needs a process of its own with `environment()`; `run` starts one.
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

import pkcs11

from upcall.core.errors import Refused
from upcall.keymodule import Enrolled, Limits, Making, Secrets

LIBRARY = "/usr/lib/softhsm/libsofthsm2.so"
PIN = b"4711-pin"
PATIENCE = 120.0  # seconds; SoftHSM can take ten for an RSA key on a busy machine

_DEFAULT_LIMITS = Limits()


def missing() -> str:
    """Returns why SoftHSM cannot be used; "" if it can."""
    if shutil.which("softhsm2-util") is None or not Path(LIBRARY).exists():
        return "SoftHSM is not installed (Debian package softhsm2)"
    return ""


class SoftHsm:
    """Tokens below `folder`. Adding, removing and putting back tokens simulates what a person does with cards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = folder / "tokens"
        self._tokens.mkdir(mode=0o700)
        self.config = folder / "softhsm2.conf"
        self.config.write_text(f"directories.tokendir = {self._tokens}\nlog.level = ERROR\n")
        self.pin_file = folder / "pin"
        self.pin_file.touch(0o600)
        self.pin_file.write_bytes(PIN)
        self._places: dict[str, Path] = {}

    def uri(self, token: str, rest: str = ";object=key", with_pin: bool = False) -> str:
        """Returns the URI of an object. `with_pin`: the PIN is read from a file, without a prompt."""
        return f"pkcs11:token={token}{rest}?module-path={LIBRARY}" + (
            f"&pin-source=file:{self.pin_file}" if with_pin else ""
        )

    def add(self, label: str) -> None:
        """Makes a token, with the PIN `PIN`."""
        before = set(self._tokens.iterdir())
        self.tool("--init-token", "--free", "--label", label, "--so-pin", "87654321", "--pin", PIN.decode())
        (self._places[label],) = set(self._tokens.iterdir()) - before

    def remove(self, label: str) -> None:
        self._places[label].rename(self.folder / label)

    def put_back(self, label: str) -> None:
        (self.folder / label).rename(self._places[label])

    def tool(self, *arguments: str) -> None:
        command = ["softhsm2-util", *arguments]
        subprocess.run(command, env=self.environment(), check=True, capture_output=True, timeout=PATIENCE)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SOFTHSM2_CONF": str(self.config)}

    def run(self, work: Callable[..., None], *arguments: Any) -> str:
        """Calls a function of an importable module, with this object and the arguments, in a new interpreter.

        Returns its output. AssertionError with the traceback if it raises.
        """
        told = pickle.dumps((work.__module__, work.__qualname__, (self, *arguments)))
        folder = Path(str(sys.modules[work.__module__].__file__)).parent
        done = subprocess.run(
            [sys.executable, "-m", "upcall_pkcs11.softhsm"],
            input=told,
            env={**self.environment(), "PYTHONPATH": os.pathsep.join((str(folder), *sys.path))},
            capture_output=True,
            timeout=PATIENCE,
        )
        if done.returncode != 0:
            raise AssertionError(f"exit code {done.returncode}\n" + done.stderr.decode(errors="replace"))
        return done.stdout.decode()

    def new_key(
        self,
        kind: str = "ec",
        token: str = "one",  # noqa: S107 - a token's label
        label: str = "key",
        with_pin: bool = False,
        **values: Any,
    ) -> Enrolled:
        """Makes a key pair. Needs a process with `environment()`."""
        from upcall_pkcs11 import module

        return module.generate(making(self.uri(token, f";object={label}", with_pin), type=kind, **values))

    def session(self, token: str) -> pkcs11.Session:
        """Opens a read-write session with a login. Needs a process with `environment()`."""
        found = pkcs11.lib(os.path.realpath(LIBRARY)).get_tokens(token_label=token)  # the same name as in `load`
        return next(found).open(rw=True, user_pin=PIN.decode())


def making(
    uri: str, secrets: Secrets | None = None, *, limits: Limits = _DEFAULT_LIMITS, path: Path = Path(), **values: str
) -> Making:
    """Returns arguments for `generate` and `import_key`: the parameters' defaults, but RSA keys of 2048 bits."""
    from upcall_pkcs11 import module

    filled = {one.name: one.default or "" for one in module.parameters} | {"bits": "2048"} | values | {"uri": uri}
    return Making(path, filled, bytearray(), "ask", limits, secrets or TypedPins())


class TypedPins:
    """Implements Secrets: returns the same PIN until it was wrong `budget` times, and counts its calls."""

    def __init__(self, pin: bytes = PIN, budget: int = 3) -> None:
        self.typed, self.budget = pin, budget
        self.asked: list[tuple[str, str]] = []
        self.verdicts: list[bool] = []
        self.touches = 0

    def passphrase(self, source: str, /) -> bytearray:
        raise AssertionError("a token has no passphrase")

    def pin(self, token: str, prompt: str, /) -> bytearray:
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

    name, function, given = pickle.load(sys.stdin.buffer)  # noqa: S301 - from `run`
    getattr(importlib.import_module(name), function)(*given)
