"""`upcall request-key` on a system with Debian's own lines: whom the kernel and the real /sbin/request-key ask.

Real keys are of type dns_resolver, for which root may ask; for cifs.spnego, whose keys only the kernel may ask for, it
is request-key's own word (-d runs nothing and says what it would run).
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.install.key_makers import standing, standing_of_type
from upcall.protocols.request_key.install.lines import install, plan, uninstall
from upcall.protocols.request_key.install.our_file import COPY, FILE
from upcall.protocols.request_key.install.system import System
from upcall.protocols.request_key.key_types import KEY_TYPES

REQUEST_KEY = "/sbin/request-key"
PROGRAM = Path("/usr/local/libexec/marks-and-rejects")
CIFS = "create  cifs.spnego    * * /usr/sbin/cifs.upcall %k\n"  # as Debian's cifs-utils has it
SESSION = -3
pytestmark = pytest.mark.skipif(
    not Path(REQUEST_KEY).exists() or platform.machine() != "x86_64", reason="needs keyutils, and x86-64"
)

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file in which our program leaves a line for each key; it rejects them all with ETIME. For a minute: the
    second that a clock is in can be over before the kernel has looked."""
    found = tmp_path / "mark"
    PROGRAM.parent.mkdir(exist_ok=True)
    PROGRAM.write_text(f'#!/bin/sh\necho "$# $1" >> {found}\nexec /bin/keyctl reject "$1" 60 {errno.ETIME} 0\n')
    PROGRAM.chmod(0o755)
    subprocess.run(["modprobe", "dns_resolver"], check=True, timeout=180)
    spnego = Path("/etc/request-key.d/cifs.spnego.conf")
    if not spnego.exists():
        spnego.write_text(CIFS)
    yield found
    PROGRAM.unlink()


def request_key() -> int:
    """The errno that the kernel gives for a name that nobody has asked for."""
    name = b"upcall%d.invalid" % next(_numbers)
    serial: int = _libc.syscall(249, b"dns_resolver", name, b"", SESSION)
    return 0 if serial > 0 else ctypes.get_errno()


def would_run(key: RequestedKey) -> str:
    """The command that request-key chooses."""
    describe = f"{key.type.decode()};0;0;39010000;{key.description.decode()}"
    words = [REQUEST_KEY, "-d", "-n", "-v", "-D", describe, "create", "77", *"00000", key.callout.decode()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    return done.stderr.partition("execute_program(")[2].partition("\n")[0]


def test_keys_come_to_us_and_go_back(mark: Path) -> None:
    system = System()
    before = standing_of_type(system, "dns_resolver")
    assert before.line is not None and before.line.program == "/sbin/key.dns_resolver"
    assert request_key() != errno.ETIME and not mark.exists()
    done = install(system, plan(system, list(KEY_TYPES), [str(PROGRAM)], copy=False))
    assert done == [f"{FILE}: written"]
    assert request_key() == errno.ETIME
    count, serial = mark.read_text().split()
    assert count == "1" and int(serial) > 0
    for name, kind in KEY_TYPES.items():
        for key in kind.typical:
            assert f"'{PROGRAM} %k'" in would_run(key)
            assert standing(system, key).ours
        assert not standing_of_type(system, name).problems
    assert uninstall(system) == [f"{FILE}: removed"]
    assert request_key() != errno.ETIME
    assert len(mark.read_text().splitlines()) == 1
    assert "/usr/sbin/cifs.upcall %k" in would_run(KEY_TYPES["cifs.spnego"].typical[0])


def test_only_cifs_leaves_names_to_keyutils(mark: Path) -> None:
    system = System()
    install(system, plan(system, ["cifs.spnego"], [str(PROGRAM)], copy=False))
    assert request_key() != errno.ETIME and not mark.exists()
    assert str(PROGRAM) in would_run(KEY_TYPES["cifs.spnego"].typical[0])
    uninstall(system)


def test_a_program_in_a_users_folder_is_copied(mark: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "upcall-request-key"
    theirs.write_bytes(PROGRAM.read_bytes())
    system = System()
    done = install(system, plan(system, ["dns_resolver"], [str(theirs)], copy=True))
    assert done == [f"{COPY}: written", f"{FILE}: written"]
    theirs.write_text("#!/bin/sh\nexit 1\n")
    assert request_key() == errno.ETIME and mark.exists()
    uninstall(system)
    assert not Path(COPY).parent.exists()


def test_a_bad_line_of_somebody_else_stops_everybody(mark: Path) -> None:
    """Why `install` refuses to add to a configuration that request-key cannot read."""
    system = System()
    install(system, plan(system, ["dns_resolver"], [str(PROGRAM)], copy=False))
    bad = Path("/etc/request-key.d/bad.conf")
    bad.write_text("create\n")
    try:
        assert request_key() == errno.ENOKEY and not mark.exists()
        assert standing_of_type(system, "dns_resolver").problems == (
            f"{bad}: line 1: ends at its operation; request-key gives up on it",
        )
    finally:
        bad.unlink()
    uninstall(system)
