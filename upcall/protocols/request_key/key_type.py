"""What upcall has to know of one type of keys. Each is a file beside this one, and a line in key_types.py. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError
from upcall.core.service import Service
from upcall.protocols.request_key.conf import Key

ROOT = 0


class Wanted(NamedTuple):
    """What a description says: whose daemon is to answer, and which process waits for it (None: it does not say)."""

    uid: int
    pid: int | None


class Option(NamedTuple):
    """An option of `upcall explain`, "--NAME": what a key of this type would be asked for with."""

    name: str
    metavar: str
    help: str
    required: bool = False
    is_uid: bool = False  # a number; the caller's if it is not given


class KeyType(NamedTuple):
    """One type of keys."""

    name: str  # as the kernel calls it, and the name of its service
    about: str  # in one line of the configuration's documentation
    wanted: Callable[[bytes], Wanted]  # of a description; PeerError if no kernel writes it so
    check_request: Callable[[bytes], None]  # of an Ask; PeerError
    check_answer: Callable[[bytes, bytes], None]  # of an Ask and an Instance; PeerError
    patience: float  # seconds until the broker refuses
    pattern: bytes  # of descriptions, in request-key's configuration
    typical: tuple[Key, ...]  # keys as the kernel asks for them, by which our line is tried
    options: tuple[Option, ...]  # of `upcall explain`
    described: Callable[[Mapping[str, str]], Key]  # of their values; PeerError
    kernel: tuple[str, str, str]  # what the kernel then can do, by which module, by which option
    # A daemon of root's (the machine's, if it parses what comes from the network) answers unless the configuration
    # names another user: its descriptions do not say whose.
    of_the_system: bool = False
    network: bool = True  # its handler parses what comes from the network
    machine: bool = False  # the machine's daemon may answer for a user who has none, if the configuration says so

    @property
    def service(self) -> Service:
        """128: a machine that boots, or whose server comes back, asks for everybody at once."""
        return Service(
            self.name, self.patience, 128, 0, self.check_answer, self.check_request, local=False, network=self.network
        )

    def key(self, told: Mapping[str, str]) -> Key:
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
