"""A file is created, mounted anew and read back with a key of each key module, as a daemon finds and runs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import upcall_passphrase
import upcall_pkcs11.softhsm
import upcall_tpm2
import upcall_tpm2.chip
import upcall_tpm2.swtpm
import upcall_x25519

from tests.kernel.scene import CONTENT, PASSPHRASE, attempt, creating, opening, vault
from upcall.kernel import keyring
from upcall.keymodule import Enrolled, KeyMaker, Limits, Making
from upcall.keys.enrolment import chosen
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.testing.lab.stage import Person, do_as, end, start_broker, start_daemon, wait_until
from upcall.testing.secrets import GivenSecrets

ROUNDS = 3


@pytest.fixture(scope="module", autouse=True)
def _broker() -> Iterator[None]:
    process = start_broker()
    try:
        yield
    finally:
        end(process)


def _made(module: KeyMaker, who: Person, given: dict[str, str], protected: bool) -> Enrolled:
    """A key in the person's home, the passphrase in a file beside it."""
    word = who.home / "word"
    word.touch(0o600)
    word.write_bytes(PASSPHRASE)
    path = who.home / f"{type(module).__module__}.key"
    passphrase, source = (bytearray(PASSPHRASE), f"file:{word}") if protected else (bytearray(), "none")
    return module.generate(
        Making(path, chosen(module.parameters, given), passphrase, source, Limits(), GivenSecrets())
    )


def _x25519(who: Person) -> Enrolled:
    return _made(upcall_x25519.module, who, {}, protected=True)


def _passphrase(who: Person) -> Enrolled:
    # Cheap, and without the limit of 0.5 s: this processor takes ten times as long as a real one, more beside others.
    upcall_passphrase.MAX_SECONDS = 60.0  # type: ignore[misc]
    return _made(upcall_passphrase.module, who, {"memory": "64", "passes": "1"}, protected=True)


def _pkcs11(who: Person) -> Enrolled:
    folder = who.home / ".config" / "softhsm2"  # where SoftHSM looks without being told
    folder.mkdir(parents=True)
    tokens = upcall_pkcs11.softhsm.SoftHsm(folder)
    tokens.add("lab")
    os.environ["SOFTHSM2_CONF"] = str(tokens.config)
    return tokens.new_key("ec", token="lab", with_pin=True)  # an RSA key takes this processor minutes


def _tpm2(tpm: upcall_tpm2.swtpm.SoftwareTpm) -> Callable[[Person], Enrolled]:
    return lambda who: _made(upcall_tpm2.module, who, {"tcti": tpm.tcti, "pcrs": "sha256:7"}, protected=False)


def _token(who: Person, alias: str, make: Callable[[Person], Enrolled]) -> str:
    def work() -> str:
        made = make(who)
        keyring.add_user_key(made.signature, pack_auth_tok(AuthTok(made.signature, alias, made.blob)))
        return made.signature

    return do_as(who, work)


def _files_work(who: Person, alias: str, make: Callable[[Person], Enrolled]) -> None:
    signature = _token(who, alias, make)
    daemon = start_daemon(who)
    try:
        with vault(who, signature) as files:
            paths = [files.upper / f"file-{number}" for number in range(ROUNDS)]
            # To load a module and its libraries can take an emulated processor longer than the kernel waits.
            wait_until(lambda: attempt(who, creating(files.upper / "first")).errno == 0, f"the key of {alias}")
            assert [attempt(who, creating(path)).errno for path in paths] == [0] * ROUNDS
            files.remount()
            assert [attempt(who, opening(path)).value for path in paths] == [CONTENT] * ROUNDS
    finally:
        end(daemon)
        do_as(who, lambda: keyring.unlink(keyring.find(signature) or 0))


def test_files_are_read_back_with_an_x25519_key(alice: Person) -> None:
    _files_work(alice, "x25519", _x25519)


def test_files_are_read_back_with_a_passphrase_key(alice: Person) -> None:
    _files_work(alice, "passphrase", _passphrase)


@pytest.mark.skipif(bool(upcall_pkcs11.softhsm.missing()), reason=upcall_pkcs11.softhsm.missing())
def test_files_are_read_back_with_a_pkcs11_key(alice: Person) -> None:
    """In a process of its own, as it is by default; the token is SoftHSM's."""
    _files_work(alice, "pkcs11", _pkcs11)


@pytest.mark.skipif(bool(upcall_tpm2.swtpm.missing()), reason=upcall_tpm2.swtpm.missing())
def test_files_are_read_back_with_a_tpm2_key(alice: Person) -> None:
    """In a process of its own, as it is by default; the TPM is swtpm's."""
    upcall_tpm2.chip.library()
    tpm = upcall_tpm2.swtpm.SoftwareTpm(Path("/tmp/tpm"))
    try:
        _files_work(alice, "tpm2", _tpm2(tpm))
    finally:
        tpm.kill()
