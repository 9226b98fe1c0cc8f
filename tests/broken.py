"""Implements a correct key module that can have one fault at a time, which its blobs name."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import API, MAX_KEY, Changing, Enrolled, Making, Parameter, Secrets
from upcall.keys.private_file import fingerprint, write_new
from upcall.testing.toy import ToyKey

_SAME = b"0123456789abcdef"
_chance = random.Random(1)


class Key:
    """Wraps as the toy module does, with one fault."""

    def __init__(self, path: Path, secret: bytes, fault: str, label: str) -> None:
        self._good, self._path, self._fault, self._label = ToyKey(path, secret, (0, 0)), path, fault, label
        self._found = fingerprint(path.stat())
        self._turn = threading.Lock()
        self._buffer = b""
        self._closed = False
        self._wrapped = 0

    def __repr__(self) -> str:
        return f"Key({self._label})"

    # --- wrap ----------------------------------------------------------------------------------------------

    def wrap(self, key: bytes, /) -> Any:
        if self._fault == "two threads share a buffer":
            return self._shared(key)
        with self._turn:
            self._check_open()
            return self._wrap(key)

    def _wrap(self, key: bytes) -> Any:
        self._wrapped += 1
        fault, size = self._fault, len(key)
        if not 1 <= size <= MAX_KEY:
            return self._wrap_odd(key)
        if fault == "forgets to answer" and size == 33:
            return None
        if fault == "answers with another type" and size == 33:
            return bytearray(self._good.wrap(key))
        if fault == "too long" and size == MAX_KEY:
            return self._good.wrap(key).ljust(513, b"\0")
        if fault == "clear inside":
            return self._good.wrap(key) + (key[:8] if size == MAX_KEY else b"")
        if fault == "not twice" and key == _SAME and self._wrapped == 2:
            raise ModuleFailed("this one I have wrapped already")
        if fault == "for this handle only" and key == b"for a new handle":
            return self._good.wrap(key)[:-1] + b"?"
        if fault == "other in a process of its own" and "upcall.daemon.isolation.serving" in sys.modules:
            return os.urandom(80)
        if fault == "raises without its file":
            self._path.stat()
        if fault == "closing breaks calls":
            return self._interrupted(key)
        if fault == "repeats after a fork":
            return self._salted(key)
        return self._good.wrap(key)

    def _wrap_odd(self, key: bytes) -> bytes:
        if self._fault == "hangs at nothing" and not key:
            threading.Event().wait()
        if self._fault == "raises at nothing" and not key:
            raise IndexError("index out of range")
        if self._fault == "shows the clear key":
            raise ModuleFailed(f"{key!r}: too long")
        raise ModuleFailed(f"{len(key)} bytes to wrap")

    def _shared(self, key: bytes) -> bytes:
        self._check_open()
        self._buffer = key
        time.sleep(0.001)
        return self._good.wrap(self._buffer)

    def _interrupted(self, key: bytes) -> bytes:
        self._turn.release()
        try:
            time.sleep(0.005)
        finally:
            self._turn.acquire()
        if self._closed:
            raise AttributeError("'NoneType' object has no attribute 'wrap'")
        return self._good.wrap(key)

    def _salted(self, key: bytes) -> bytes:
        nonce = _chance.randbytes(16)
        urandom, os.urandom = os.urandom, lambda size: nonce
        try:
            return self._good.wrap(key)
        finally:
            os.urandom = urandom

    # --- unwrap --------------------------------------------------------------------------------------------

    def unwrap(self, wrapped: bytes, /) -> Any:
        with self._turn:
            if self._closed and self._fault == "raises when it was closed":
                raise ValueError("I/O operation on closed file")
            self._check_open()
            return self._unwrap(wrapped)

    def _unwrap(self, wrapped: bytes) -> Any:
        fault = self._fault
        if fault == "hangs at garbage" and wrapped == b"x":
            threading.Event().wait()
        if fault == "raises at garbage" and wrapped == b"x":
            raise ValueError("unpack requires a buffer of 2 bytes")
        if fault == "leaves at garbage" and wrapped == b"x":
            raise SystemExit("hm")
        if fault == "takes what was changed" and len(wrapped) == 64:
            wrapped = self._with_its_own_mac(wrapped)
        if fault in ("too long", "clear inside"):
            wrapped = wrapped[: 16 + MAX_KEY + 32]
        key = self._good.unwrap(wrapped)
        return key[:-1] if fault == "too short" and len(key) == 33 else key

    def _with_its_own_mac(self, wrapped: bytes) -> bytes:
        """Unwraps without checking the last byte."""
        for byte in range(256):
            try:
                self._good.unwrap(wrapped[:-1] + bytes((byte,)))
            except ModuleFailed:
                continue
            return wrapped[:-1] + bytes((byte,))
        return wrapped

    # --- powers --------------------------------------------------------------------------------------------

    def stale(self) -> bool:
        if self._fault == "slowly stale":
            time.sleep(0.005)
        try:
            return self._fault != "never stale" and fingerprint(self._path.stat()) != self._found
        except OSError:
            return True

    def close(self) -> None:
        with self._turn:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ModuleFailed("it was closed")


class Module:
    """The module. `fault`: of its keys and its attributes."""

    name = "broken"
    suffix = ".broken"
    takes_passphrase = True

    def __init__(self, fault: str = "none") -> None:
        self._fault = fault
        self.api = API + (fault == "another version")
        help_text = "Two\nlines." if fault == "help of two lines" else "Anything."
        self.parameters: tuple[Parameter, ...] = (
            Parameter("Label" if fault == "upper case" else "label", help_text, "a label"),
            Parameter("word", "Not to be seen.", "hush" if fault == "secret with a default" else "", secret=True),
        )

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Any:
        if blob[:1] == b"\xff" and self._fault == "blob breaks it":
            blob.decode()
        told, _, _ = blob.partition(b"\n")
        fault, path, label = _take(told)
        if fault == "slow to open":
            time.sleep(0.02)
        if fault == "leaves a process" and os.fork() == 0:
            os._exit(0)
        if fault == "comes back twice":
            os.fork()
        return self._open(signature, Path(path), fault, label, secrets)

    def _open(self, signature: str, path: Path, fault: str, label: str, secrets: Secrets) -> Key:
        try:
            data = path.read_bytes()
        except OSError as error:
            if fault == "raises without its file at open" and path.with_name(path.name + ".away").exists():
                raise
            raise ModuleFailed(str(error)) from error
        except ValueError as error:
            raise ModuleFailed(str(error)) from error
        if len(data) != 64 or (signature.lower() != _signature(data) and fault != "any signature"):
            raise ModuleFailed(f"{path}: is not the key {signature}")
        secret = self._unlocked(data, fault, secrets)
        return Key(path, b"the same for all" if fault == "one key for all" else secret, fault, label)

    def _unlocked(self, data: bytes, fault: str, secrets: Secrets) -> bytes:
        word = _asked(fault, secrets)
        pin = secrets.pin("card", "PIN")
        try:
            if fault != "any passphrase" and hashlib.sha256(data[:32] + word).digest() != data[32:]:
                raise ModuleFailed(
                    f"wrong passphrase {word!r}" if fault == "shows the passphrase" else "wrong passphrase"
                )
            good = pin == b"141421"
            for _ in range(0 if fault == "keeps a wrong pin to itself" else 1 + (fault == "tries twice" and not good)):
                secrets.verdict("card", good)
            if not good:
                raise ModuleFailed("wrong PIN")
            return hashlib.sha256(b"secret" + data[:32]).digest()
        finally:
            pin[:] = bytes(len(pin))
            if fault != "keeps the passphrase":
                word[:] = bytes(len(word))

    def generate(self, making: Making, /) -> Enrolled:
        salt = os.urandom(32)
        data = salt + hashlib.sha256(salt + making.passphrase).digest()
        label = making.values.get("label", "")
        if label.endswith("?"):
            if self._fault == "leaves a file when it fails":
                _write(making.path, data)
            raise ModuleFailed(f"the label {label!r} is a question")
        if self._fault == "overwrites" and making.path.exists():
            making.path.write_bytes(data)
        else:
            _write(making.path, data)
        if self._fault == "readable by others":
            making.path.chmod(0o644)
        blob = "\0".join((self._fault, str(making.path), making.source, label)).encode() + b"\n"
        if self._fault == "passphrase in the blob":
            blob += making.passphrase
        if self._fault == "a long blob":
            blob += bytes(5000)
        signature = _signature(data)
        return Enrolled(signature.upper() if self._fault == "upper signature" else signature, blob, "broken")

    import_parameters: tuple[Parameter, ...] = ()
    changes = "passphrase"

    def import_key(self, making: Making, /) -> Enrolled:
        raise ModuleFailed("the checks import nothing")

    def change_passphrase(self, signature: str, blob: bytes, changing: Changing, /) -> bytes:
        fault, path, label = _take(blob.partition(b"\n")[0])
        self._open(signature, Path(path), fault, label, changing.secrets)
        data = Path(path).read_bytes()
        new = data[:32] + hashlib.sha256(data[:32] + changing.passphrase).digest()
        _write(changing.path, data if fault == "keeps the old passphrase" else new)
        return blob


def _asked(fault: str, secrets: Secrets) -> bytearray:
    if fault != "hides that it is locked":
        return secrets.passphrase("ask")
    try:
        return secrets.passphrase("ask")
    except Refused:
        raise ModuleFailed("no passphrase") from None


def _write(path: Path, data: bytes) -> None:
    try:
        write_new(path, data)
    except OSError as error:
        raise ModuleFailed(str(error)) from error


def _signature(data: bytes) -> str:
    return hashlib.sha256(b"signature" + data[:32]).hexdigest()[:16]  # without the passphrase, which may change


def _take(blob: bytes) -> tuple[str, str, str]:
    try:
        fault, path, _source, label = blob.decode().split("\0")
    except ValueError as error:  # includes UnicodeDecodeError
        raise ModuleFailed("the blob makes no sense") from error
    return fault, path, label


BROKEN = Module()
