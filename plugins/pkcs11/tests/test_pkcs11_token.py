"""Keys in a real token, SoftHSM's: used by many, logged in to, lost and found again."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")

import pkcs11
import upcall_pkcs11.token
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from upcall_pkcs11 import module
from upcall_pkcs11.schemes import Ecdh, _point
from upcall_pkcs11.softhsm import LIBRARY, PIN, SoftHsm, TypedPins, making, missing

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import KeyImporter, KeyMaker, KeyModule
from upcall.testing.processes import in_child

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    hsm = SoftHsm(tmp_path)
    hsm.add("one")
    return hsm


# --- what is done ------------------------------------------------------------------------------------------------


def fails(why: str) -> pytest.RaisesExc[ModuleFailed]:
    return pytest.RaisesExc(ModuleFailed, match=why, check=lambda error: PIN.decode() not in str(error))


def each_kind_of_key_wraps_and_unwraps(hsm: SoftHsm) -> None:
    typed: KeyModule = module
    assert isinstance(module, KeyMaker) and isinstance(module, KeyImporter) and typed.name == "pkcs11"
    kinds: list[tuple[str, dict[str, Any], str]] = [
        ("rsa", {"bits": "2048"}, "RSA-2048 in one"),
        ("ec", {"curve": "p-256"}, "EC P-256 in one"),
        ("ec", {"curve": "p-384"}, "EC P-384 in one"),
    ]
    for number, (kind, values, told) in enumerate(kinds):
        uri = hsm.uri("one", f";object=key{number}")
        enrolled = module.generate(making(uri, type=kind, **values))
        assert enrolled.description == told
        secrets = TypedPins()
        handle = module.open(enrolled.signature, enrolled.blob, secrets)
        wrapped = [handle.wrap(os.urandom(size)) for size in (1, 19, 67)]
        assert secrets.asked == []
        assert max(map(len, wrapped)) <= 512
        for size in (1, 19, 67):
            clear = os.urandom(size)
            assert handle.unwrap(handle.wrap(clear)) == clear
        assert len(secrets.asked) == 1 and secrets.verdicts == [True]
        assert handle.export_public().startswith(b"-----BEGIN PUBLIC KEY-----")
        assert not handle.stale()
        again = module.import_key(making(uri))
        assert again == enrolled
        damaged = bytes([wrapped[2][0]]) + bytes(b ^ 1 for b in wrapped[2][1:])
        for bad in (damaged, wrapped[2][:-1], wrapped[2] + b"x", b"", bytes(len(wrapped[2])), bytes(1000)):
            with fails("this key did not wrap these"):
                handle.unwrap(bad)
        for size in (0, 68):
            with fails("bytes to wrap"):
                handle.wrap(bytes(size))
        assert len(secrets.asked) == 1 and not handle.stale()
        handle.close()
        assert handle.stale()


def a_wrong_pin_is_reported_each_time_it_is_tried(hsm: SoftHsm) -> None:
    enrolled = hsm.new_key()
    secrets = TypedPins(b"0000")
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    for count in (1, 2, 3):
        with fails("the PIN was wrong, and few tries are left"):
            handle.unwrap(wrapped)
        assert len(secrets.asked) == count and secrets.verdicts == [False] * count
    with pytest.raises(Refused) as caught:
        handle.unwrap(wrapped)
    assert caught.value.reason == "pin-refused" and len(secrets.asked) == 3
    secrets.typed, secrets.verdicts = PIN, []
    assert handle.unwrap(wrapped) == b"file key"
    assert secrets.verdicts == [True] and "token=one" in secrets.asked[0][0] and "'one'" in secrets.asked[0][1]


def a_wrong_pin_is_not_tried_by_each_of_four_requests(hsm: SoftHsm) -> None:
    """The daemon has the PIN in its memory, and the four requests come at once."""
    enrolled = hsm.new_key()
    gate = threading.Barrier(4)
    waiting = threading.Semaphore(0)

    class Slow(TypedPins):
        def pin(self, token: str, prompt: str, /) -> bytearray:
            for _ in range(4 if not self.asked else 0):
                assert waiting.acquire(timeout=60)
            return super().pin(token, prompt)

    secrets = Slow(b"0000")
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    told: list[str] = []

    def work() -> None:
        gate.wait(60)
        waiting.release()
        try:
            handle.unwrap(wrapped)
        except ModuleFailed as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(told) == 4
    assert 1 <= len(secrets.asked) <= 2  # a thread that was late to the queue asks for itself


def four_threads_share_one_login(hsm: SoftHsm) -> None:
    first = hsm.new_key()
    second = hsm.new_key("rsa", label="rsa")
    secrets = TypedPins()
    handles = [module.open(one.signature, one.blob, secrets) for one in (first, second)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        handle = handles[number % 2]
        try:
            for _ in range(40):
                clear = os.urandom(40)
                assert handle.unwrap(handle.wrap(clear)) == clear
                handle.stale()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test fails with it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert errors == [] and not any(thread.is_alive() for thread in threads)
    assert len(secrets.asked) == 1  # a login is for the whole token
    handles[0].close()
    assert handles[1].unwrap(handles[1].wrap(b"x")) == b"x"
    assert len(secrets.asked) == 1
    handles[1].close()


def a_key_is_stale_until_its_token_is_back(hsm: SoftHsm) -> None:
    upcall_pkcs11.token.PROBE_EVERY = 0.0
    enrolled, secrets = hsm.new_key(), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    assert handle.unwrap(wrapped) == b"file key"
    assert not handle.stale()
    hsm.remove("one")
    assert handle.stale()
    with fails("'one' .* is not there"):
        handle.unwrap(wrapped)
    with fails("object=key.*the token is not there"):
        module.open(enrolled.signature, enrolled.blob, secrets)
    hsm.put_back("one")
    anew = module.open(enrolled.signature, enrolled.blob, secrets)
    assert anew.unwrap(wrapped) == b"file key"
    assert not anew.stale()
    assert len(secrets.asked) == 2 and False not in secrets.verdicts


def a_token_that_was_back_unseen_is_found_again(hsm: SoftHsm) -> None:
    """Out and in again between two requests: the next one finds it."""
    enrolled, secrets = hsm.new_key(), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    assert handle.unwrap(wrapped) == b"file key"
    hsm.remove("one")
    with fails("'one' .* is not there"):
        handle.unwrap(wrapped)
    hsm.put_back("one")
    assert handle.unwrap(wrapped) == b"file key"
    assert not handle.stale()


def a_token_removed_before_the_first_unwrap_costs_no_try(hsm: SoftHsm) -> None:
    enrolled, secrets = hsm.new_key(), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    hsm.remove("one")
    with fails("'one' .* is not there"):
        handle.unwrap(wrapped)
    assert secrets.verdicts.count(False) == 0
    hsm.put_back("one")
    assert handle.unwrap(wrapped) == b"file key"


def a_removed_token_leaves_the_other_usable(hsm: SoftHsm) -> None:
    enrolled = [hsm.new_key(token=token) for token in ("one", "two")]
    handles = [module.open(one.signature, one.blob, TypedPins()) for one in enrolled]
    wrapped = [handle.wrap(b"file key") for handle in handles]
    assert [handle.unwrap(it) for handle, it in zip(handles, wrapped, strict=True)] == [b"file key"] * 2
    hsm.remove("one")
    with fails("'one' .* is not there"):
        handles[0].unwrap(wrapped[0])
    assert handles[1].unwrap(wrapped[1]) == b"file key"
    with fails("this key did not wrap these"):
        handles[1].unwrap(wrapped[0])


def sessions_closed(hsm: SoftHsm, call: str) -> None:
    """By other code in the same process."""
    foreign = ctypes.CDLL(LIBRARY)  # the same one: dlopen knows it
    enrolled, secrets = hsm.new_key(), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    assert handle.unwrap(wrapped) == b"file key"
    (token,) = upcall_pkcs11.token._tokens.values()
    session = token._session
    assert session is not None
    argument = {
        "C_CloseAllSessions": session.token.slot.slot_id,
        "C_Logout": session.handle,  # type: ignore[attr-defined]
        "C_Finalize": 0,
    }[call]
    assert getattr(foreign, call)(ctypes.c_ulong(argument)) == 0
    assert handle.unwrap(wrapped) == b"file key"
    assert len(secrets.asked) == 2 and secrets.verdicts == [True, True]


def a_wrong_pin_in_a_file_is_tried_once(hsm: SoftHsm) -> None:
    file, secrets = hsm.pin_file, TypedPins()
    file.write_bytes(PIN + b"\n")
    enrolled = module.generate(making(hsm.uri("one", with_pin=True), secrets, type="ec"))
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    assert handle.unwrap(wrapped) == b"file key"
    handle.close()
    file.write_bytes(b"0000")
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    with fails("the PIN was wrong"):
        handle.unwrap(wrapped)
    for _ in range(5):
        with fails("pin: the PIN in it is wrong"):  # the token is not asked again
            handle.unwrap(wrapped)
    file.write_bytes(PIN)
    assert handle.unwrap(wrapped) == b"file key"
    handle.close()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    file.chmod(0o644)
    with fails("mode 0644 lets others in"):
        handle.unwrap(wrapped)
    assert secrets.asked == [] and secrets.verdicts == []


def each_unwrap_asks_for_a_touch(hsm: SoftHsm) -> None:
    enrolled, secrets = hsm.new_key(touch="yes"), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"x")
    assert secrets.touches == 0
    handle.unwrap(wrapped), handle.unwrap(wrapped)
    assert secrets.touches == 2


def an_ecdh_secret_with_a_leading_zero_unwraps(hsm: SoftHsm) -> None:
    """One ECDH secret in 256 begins with a zero; a token that drops it must not lose the file."""

    enrolled = hsm.new_key()
    handle = module.open(enrolled.signature, enrolled.blob, TypedPins())
    public = load_pem_public_key(handle.export_public())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    ephemeral = ec.generate_private_key(public.curve)
    while ephemeral.exchange(ec.ECDH(), public)[0]:
        ephemeral = ec.generate_private_key(public.curve)
    point = _point(ephemeral.public_key())
    cipher, nonce = Ecdh(public)._cipher(ephemeral.exchange(ec.ECDH(), public), point)
    assert handle.unwrap(b"\x01" + point + cipher.encrypt(nonce, b"file key", b"\x01")) == b"file key"


def a_fork_opens_keys_of_its_own(hsm: SoftHsm) -> None:
    """A fork does not use what its parent has opened, opens keys itself, and logs its parent out of nothing."""
    enrolled, secrets = hsm.new_key(), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    assert handle.unwrap(wrapped) == b"file key"

    def child() -> str:
        with fails("belongs to the process that opened it"):
            handle.unwrap(wrapped)
        handle.close()
        return module.open(enrolled.signature, enrolled.blob, TypedPins()).unwrap(wrapped).hex()

    assert bytes.fromhex(in_child(child)) == b"file key"
    assert handle.unwrap(wrapped) == b"file key"
    assert len(secrets.asked) == 1


def the_buffer_of_the_pin_is_wiped(hsm: SoftHsm) -> None:
    """Whether the PIN was right or wrong."""
    enrolled = hsm.new_key()
    given: list[bytearray] = []

    class Watching(TypedPins):
        def pin(self, token: str, prompt: str, /) -> bytearray:
            given.append(super().pin(token, prompt))
            return given[-1]

    secrets = Watching(b"0000")
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"x")
    with fails("the PIN was wrong"):
        handle.unwrap(wrapped)
    secrets.typed = PIN
    handle.unwrap(wrapped)
    assert [bytes(pin) for pin in given] == [bytes(4), bytes(len(PIN))]
    assert PIN not in enrolled.blob and PIN.decode() not in repr(handle)


# --- the tests: each runs in a process of its own -----------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        each_kind_of_key_wraps_and_unwraps,
        a_wrong_pin_is_reported_each_time_it_is_tried,
        a_wrong_pin_is_not_tried_by_each_of_four_requests,
        four_threads_share_one_login,
        a_key_is_stale_until_its_token_is_back,
        a_token_that_was_back_unseen_is_found_again,
        a_token_removed_before_the_first_unwrap_costs_no_try,
        a_wrong_pin_in_a_file_is_tried_once,
        each_unwrap_asks_for_a_touch,
        an_ecdh_secret_with_a_leading_zero_unwraps,
        a_fork_opens_keys_of_its_own,
        the_buffer_of_the_pin_is_wiped,
    ],
    ids=lambda work: work.__name__,
)
def test_use_with_one_token(hsm: SoftHsm, work: Callable[[SoftHsm], None]) -> None:
    hsm.run(work)


@pytest.mark.parametrize("work", [a_removed_token_leaves_the_other_usable], ids=lambda work: work.__name__)
def test_use_with_two_tokens(hsm: SoftHsm, work: Callable[[SoftHsm], None]) -> None:
    hsm.add("two")
    hsm.run(work)


@pytest.mark.parametrize("call", ["C_CloseAllSessions", "C_Logout", "C_Finalize"])
def test_a_key_logs_in_again_after_others_closed_its_sessions(hsm: SoftHsm, call: str) -> None:
    hsm.run(sessions_closed, call)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (0, ""),
        (pkcs11.TokenFlag.USER_PIN_COUNT_LOW, ", and few tries are left"),
        (
            pkcs11.TokenFlag.USER_PIN_COUNT_LOW | pkcs11.TokenFlag.USER_PIN_FINAL_TRY,
            ", and one try is left before the token locks it",
        ),
        (pkcs11.TokenFlag.USER_PIN_LOCKED, ", and is locked now: the token's own tool unlocks it"),
    ],
)
def test_a_wrong_pin_says_what_the_token_says_of_further_tries(
    flags: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = object.__new__(upcall_pkcs11.token.Token)
    monkeypatch.setattr(token, "_find", lambda: SimpleNamespace(flags=flags))
    assert token._tries_left() == said


def test_a_token_that_is_gone_says_nothing_of_further_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise ModuleFailed("it was taken out")

    token = object.__new__(upcall_pkcs11.token.Token)
    monkeypatch.setattr(token, "_find", gone)
    assert token._tries_left() == ""
