"""Defines the record that describes a type of keys. Each type is a file here, and a line in key_types.py. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.core.service import Service
from upcall.protocols.request_key.conf import RequestedKey

ROOT = 0


class Wanted(NamedTuple):
    """A parsed description: the uid whose daemon must answer, and the requesting process (None: not in it)."""

    uid: int
    pid: int | None


def of_the_system(take_description: Callable[[bytes], object]) -> Callable[[bytes], Wanted]:
    """`KeyType.wanted` of a type whose descriptions name no uid: root's daemon, or that of the configuration."""

    def wanted(description: bytes) -> Wanted:
        take_description(description)
        return Wanted(ROOT, None)

    return wanted


class Option(NamedTuple):
    """An option of `upcall explain`, "--NAME": a part of the description of a key of this type."""

    name: str
    metavar: str
    help: str
    required: bool = False
    is_uid: bool = False  # a number; the caller's if it is not given


def by_name(kind: str, take_description: Callable[[bytes], object]) -> Callable[[Mapping[str, str]], RequestedKey]:
    """`KeyType.described` of a type with one option, "name": the description as the kernel writes it."""

    def described(told: Mapping[str, str]) -> RequestedKey:
        name = told["name"].encode()
        take_description(name)
        return RequestedKey(kind.encode(), name)

    return described


class KeyType(NamedTuple):
    """One type of keys."""

    name: str  # as the kernel calls it, and the name of its service
    about: str  # in one line of the configuration's documentation
    wanted: Callable[[bytes], Wanted]  # of a description; PeerError if no kernel writes it so
    check_request: Callable[[bytes], None]  # of an Ask; PeerError
    check_answer: Callable[[bytes, bytes], None]  # of an Ask and an Instance; PeerError
    patience: float  # seconds until the broker refuses
    patterns: tuple[bytes, ...]  # of descriptions, in request-key's configuration: a line each
    typical: tuple[RequestedKey, ...]  # keys as the kernel asks for them, by which our line is tried
    options: tuple[Option, ...]  # of `upcall explain`
    described: Callable[[Mapping[str, str]], RequestedKey]  # of their values; PeerError
    kernel: tuple[str, str, str]  # what the kernel then can do, by which module, by which option
    # Its descriptions name no uid. Root's daemon answers (the machine's if `network`) unless the configuration names
    # another user.
    of_the_system: bool = False
    network: bool = True  # its handler parses network data
    machine: bool = False  # the machine's daemon may answer for a user who has none, if the configuration says so

    @property
    def service(self) -> Service:
        """The service of this type. 128 contexts: at boot, or when a server returns, all mounts ask at once."""
        return Service(
            self.name, self.patience, 128, 0, self.check_answer, self.check_request, local=False, network=self.network
        )

    def key(self, told: Mapping[str, str]) -> RequestedKey:
        """The key that a kernel would ask for, from options that a person gave. UsageError."""
        names = {option.name for option in self.options}
        if unknown := sorted(told.keys() - names):
            raise UsageError(f"--{unknown[0]} has no meaning for {self.name}")
        for option in self.options:
            if option.required and option.name not in told:
                raise UsageError(f"{self.name} needs --{option.name}")
        try:
            return self.described(told)
        except PeerError as error:
            raise UsageError(f"no kernel would ask for this: {error}") from None
