"""Defines the record that describes a type of keys. Each type is a file here, and a line in key_types.py. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.core.service import Service
from upcall.protocols.request_key.conf import RequestedKey

ROOT = 0


class Wanted(NamedTuple):
    """The part of a description that selects the daemon: the uid whose daemon must answer, and the pid of the
    requesting process (None: the description names none)."""

    uid: int
    pid: int | None


def of_the_system(take_description: Callable[[bytes], object]) -> Callable[[bytes], Wanted]:
    """Returns a `KeyType.wanted` for a type whose descriptions name no uid. It checks the description and selects
    root's daemon; the configuration may select another one. `take_description`: parses it, or raises PeerError."""

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
    is_uid: bool = False  # a uid; default: that of the process


def by_name(kind: str, take_description: Callable[[bytes], object]) -> Callable[[Mapping[str, str]], RequestedKey]:
    """Returns a `KeyType.described` for a type with the single option "name", whose value is the whole description.
    `take_description`: checks it, or raises PeerError."""

    def described(told: Mapping[str, str]) -> RequestedKey:
        name = told["name"].encode()
        take_description(name)
        return RequestedKey(kind.encode(), name)

    return described


class KeyType(NamedTuple):
    """Describes one key type: how its requests are parsed, checked, routed, configured and explained."""

    name: str  # the kernel's name of the type, and the name of its service
    about: str  # one line of the configuration's documentation
    wanted: Callable[[bytes], Wanted]  # parses a description; PeerError if the kernel would not write it
    check_request: Callable[[bytes], None]  # checks the body of an Ask; PeerError
    check_answer: Callable[[bytes, bytes], None]  # checks the body of an Instance, given that of the Ask; PeerError
    patience: float  # seconds until the broker refuses a request
    patterns: tuple[bytes, ...]  # description patterns for request-key's configuration: one line each
    typical: tuple[RequestedKey, ...]  # requests as the kernel makes them, for testing the configuration
    options: tuple[Option, ...]  # of `upcall explain`
    described: Callable[[Mapping[str, str]], RequestedKey]  # builds a request from the options' values; PeerError
    kernel: tuple[str, str, str]  # capability for people, kernel module, CONFIG_ option
    package: str  # the wheel and Debian package of its handler, which have one name
    # Its descriptions name no uid. Root's daemon answers (the machine's if `network`) unless the configuration names
    # another user.
    of_the_system: bool = False
    network: bool = True  # its handler parses network data
    machine: bool = False  # the configuration may let the machine's daemon answer for users without a daemon

    @property
    def service(self) -> Service:
        """The service of this type. 128 contexts, because all mounts make requests at once at boot, or when a server
        is reachable again."""
        return Service(
            self.name, self.patience, 128, 0, self.check_answer, self.check_request, local=False, network=self.network
        )

    def key(self, told: Mapping[str, str]) -> RequestedKey:
        """Builds the request that the kernel would make, from option values (name -> text) given on a command line.
        UsageError if an option is unknown, missing or malformed."""
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
