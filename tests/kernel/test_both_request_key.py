"""The kernel starts /sbin/request-key in the guest's root, for whoever asks for a key that is not there."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.kernel import keyring
from upcall.testing.lab.stage import Person, do_as, person

PROGRAM = Path("/sbin/request-key")
REQUEST_KEY = 249  # x86_64, the only processor that the lab has

# Instantiates the key with what it was started with, or does nothing. KEYCTL_ASSUME_AUTHORITY, KEYCTL_INSTANTIATE.
HELPER = f"""#!{sys.executable} -IS
import ctypes, os, sys
keyctl = ctypes.CDLL(None).syscall
key, seen = int(sys.argv[2]), " ".join(sys.argv[1:5] + [str(os.getuid())]).encode()
assert keyctl(250, 16, key) > 0
if "{{answers}}" == "yes":
    assert keyctl(250, 12, key, seen, len(seen), 0) == 0
"""

_request_key = ctypes.CDLL(None, use_errno=True)["syscall"]
_request_key.restype = ctypes.c_long


def request_key(description: str) -> bytes:
    """Asks for a "user" key with callout information; gives the payload that the helper chose."""
    serial = _request_key(REQUEST_KEY, b"user", description.encode(), b"callout", keyring.PROCESS_KEYRING)
    if serial < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), description)
    return keyring.read(serial)


@pytest.fixture
def own_program() -> Iterator[Path]:
    """Room for a /sbin/request-key of the test's own; the guest may have one from its host."""
    before = PROGRAM.with_name("request-key.before")
    if PROGRAM.exists():
        PROGRAM.rename(before)
    try:
        yield PROGRAM
    finally:
        PROGRAM.unlink(missing_ok=True)
        if before.exists():
            before.rename(PROGRAM)


def install(program: Path, answers: str) -> None:
    program.write_text(HELPER.replace("{answers}", answers))
    program.chmod(0o755)


@pytest.mark.parametrize("name", ["root", "alice"])
def test_the_kernel_runs_it_for_everybody(own_program: Path, name: str) -> None:
    who: Person = person(name)
    install(own_program, "yes")
    words = do_as(who, lambda: request_key(f"upcall-lab:{name}")).decode().split()
    operation, _key, *numbers = words
    assert (operation, [*map(int, numbers)]) == ("create", [who.uid, who.gid, 0])


def test_without_it_there_is_no_key(own_program: Path) -> None:
    with pytest.raises(OSError, match="upcall-lab:nobody") as refused:
        do_as(person("alice"), lambda: request_key("upcall-lab:nobody"))
    assert refused.value.errno == errno.ENOENT


def test_a_program_that_does_not_answer_is_a_refusal(own_program: Path) -> None:
    install(own_program, "no")
    with pytest.raises(OSError, match="upcall-lab:silent") as refused:
        do_as(person("alice"), lambda: request_key("upcall-lab:silent"))
    assert refused.value.errno == errno.ENOKEY
