"""Keys in a real token, SoftHSM's: made, taken in, used, lost and found again."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from p11_softhsm import LIBRARY, PIN, SoftHsm, TypedPins, needs_softhsm

from upcall.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import Enrolled, KeyImporter, KeyMaker, KeyModule, Limits, Making

pytestmark = needs_softhsm


@pytest.fixture
def hsm(tmp_path: Path) -> Iterator[SoftHsm]:
    hsm = SoftHsm(tmp_path)
    hsm.add("one")
    yield hsm


# --- in the child ---------------------------------------------------------------------------------------------


def making(uri: str, secrets: TypedPins, limits: Limits = Limits(), **values: str) -> Making:  # noqa: B008
    from upcall_pkcs11 import module

    filled = {one.name: one.default or "" for one in module.parameters} | {"bits": "2048"} | values | {"uri": uri}
    return Making(Path("/nowhere"), filled, bytearray(), "ask", limits, secrets)


def made(hsm: SoftHsm, kind: str = "ec", token: str = "one", **values: str) -> Enrolled:
    from upcall_pkcs11 import module

    return module.generate(making(hsm.uri(token), TypedPins(), type=kind, **values))


def fails(why: str, *, but_not: str = PIN.decode()) -> pytest.RaisesExc[ModuleFailed]:
    return pytest.RaisesExc(ModuleFailed, match=why, check=lambda error: but_not not in str(error))


def each_kind(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    typed: KeyModule = module
    assert isinstance(module, KeyMaker) and isinstance(module, KeyImporter) and typed.name == "pkcs11"
    for number, (kind, values, told) in enumerate(
        [
            ("rsa", {"bits": "2048"}, "RSA-2048 in one"),
            ("ec", {"curve": "p-256"}, "EC P-256 in one"),
            ("ec", {"curve": "p-384"}, "EC P-384 in one"),
        ]
    ):
        uri = hsm.uri("one", f";object=key{number}")
        enrolled = module.generate(making(uri, TypedPins(), type=kind, **values))
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
        again = module.import_key(making(uri, TypedPins()))
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


def attributes(hsm: SoftHsm) -> None:
    import pkcs11
    from pkcs11 import Attribute

    for kind in ("rsa", "ec"):
        from upcall_pkcs11 import module

        module.generate(making(hsm.uri("one", f";object={kind}"), TypedPins(), type=kind))
    with next(pkcs11.lib(LIBRARY).get_tokens(token_label="one")).open(user_pin=PIN.decode()) as session:
        keys = list(session.get_objects({Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY}))
        assert len(keys) == 2
        for key in keys:
            assert all(key[name] for name in (Attribute.TOKEN, Attribute.PRIVATE, Attribute.SENSITIVE))
            assert all(key[name] for name in (Attribute.ALWAYS_SENSITIVE, Attribute.NEVER_EXTRACTABLE))
            assert not key[Attribute.EXTRACTABLE] and not key[Attribute.SIGN]


def wrong_pin(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    enrolled = made(hsm)
    secrets = TypedPins(b"0000")
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    for count in (1, 2, 3):
        with fails("the PIN was wrong"):
            handle.unwrap(wrapped)
        assert len(secrets.asked) == count and secrets.verdicts == [False] * count
    with pytest.raises(Refused) as caught:
        handle.unwrap(wrapped)
    assert caught.value.reason == "pin-refused" and len(secrets.asked) == 3
    secrets.typed, secrets.verdicts = PIN, []
    assert handle.unwrap(wrapped) == b"file key"
    assert secrets.verdicts == [True] and "token=one" in secrets.asked[0][0] and "'one'" in secrets.asked[0][1]


def wrong_pin_by_four(hsm: SoftHsm) -> None:
    """Four requests come at once with a wrong PIN in the daemon's memory: the token sees it once."""
    from upcall_pkcs11 import module

    enrolled = made(hsm)
    gate = threading.Barrier(4)
    waiting = threading.Semaphore(0)

    class Slow(TypedPins):
        def pin(self, token: str, prompt: str, /) -> bytearray:
            for _ in range(3):
                assert waiting.acquire(timeout=20)
            return super().pin(token, prompt)

    secrets = Slow(b"0000")
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    told: list[str] = []

    def work() -> None:
        gate.wait(20)
        waiting.release()
        try:
            handle.unwrap(wrapped)
        except ModuleFailed as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(told) == 4
    assert 1 <= len(secrets.asked) <= 2  # a thread that was late to the queue asks for itself


def concurrent(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    first = made(hsm)
    second = module.generate(making(hsm.uri("one", ";object=rsa"), TypedPins(), type="rsa"))
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
        except BaseException as error:
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


def removed_and_returned(hsm: SoftHsm) -> None:
    import upcall_pkcs11.token
    from upcall_pkcs11 import module

    upcall_pkcs11.token.PROBE_EVERY = 0.0
    enrolled, secrets = made(hsm), TypedPins()
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


def returned_unseen(hsm: SoftHsm) -> None:
    """Out and in again between two requests: the next one finds it."""
    from upcall_pkcs11 import module

    enrolled, secrets = made(hsm), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    assert handle.unwrap(wrapped) == b"file key"
    hsm.remove("one")
    with fails("'one' .* is not there"):
        handle.unwrap(wrapped)
    hsm.put_back("one")
    assert handle.unwrap(wrapped) == b"file key"
    assert not handle.stale()


def removed_before_the_first_unwrap(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    enrolled, secrets = made(hsm), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"file key")
    hsm.remove("one")
    with fails("'one' .* is not there"):
        handle.unwrap(wrapped)
    assert secrets.verdicts.count(False) == 0
    hsm.put_back("one")
    assert handle.unwrap(wrapped) == b"file key"


def one_of_two_removed(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    enrolled = [made(hsm, token=token) for token in ("one", "two")]
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
    """By somebody else in the same process."""
    import upcall_pkcs11.token
    from upcall_pkcs11 import module

    foreign = ctypes.CDLL(LIBRARY)
    enrolled, secrets = made(hsm), TypedPins()
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


def ambiguous(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    made(hsm, token="one"), made(hsm, token="two")
    anywhere = f"pkcs11:object=key?module-path={LIBRARY}"
    with fails(r"more than one token fits:\n  pkcs11:token=.*;serial=.*;object=key.*\n  pkcs11:token="):
        module.import_key(making(anywhere, TypedPins()))
    with fails("more than one token fits"):
        module.generate(making(anywhere.replace("=key", "=new"), TypedPins()))
    module.generate(making(hsm.uri("two", ";object=key2;id=%07"), TypedPins(), type="ec"))
    assert module.import_key(making(anywhere.replace("=key", "=key2"), TypedPins())).description == "EC P-256 in two"
    assert b"id=%07" in module.import_key(making(hsm.uri("two", ";id=%07"), TypedPins())).blob
    with fails("there is no such private key"):
        module.import_key(making(hsm.uri("one", ";object=other"), TypedPins()))
    with fails("there is no such token"):
        module.import_key(making(hsm.uri("three"), TypedPins()))
    with fails("is there already"):
        module.generate(making(hsm.uri("one"), TypedPins(), type="ec"))
    with fails("is there already"):
        module.generate(making(hsm.uri("two", ";object=key3;id=%07"), TypedPins(), type="ec"))


def two_of_one_label(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    key = hsm.folder / "key.pem"
    import_pem(hsm, key, "one", "aa")
    import_pem(hsm, key, "one", "bb")
    with fails(r"more than one private key fits:\n  .*id=%AA.*\n  .*id=%BB"):
        module.import_key(making(hsm.uri("one"), TypedPins()))


def import_pem(hsm: SoftHsm, path: Path, token: str, ident: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if not path.exists():
        path.touch(0o600)
        pem = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(pem)
    words = ["--import", str(path), "--token", token, "--label", "key", "--id", ident, "--pin", PIN.decode()]
    hsm.tool(*words)


def moved_from_a_file(hsm: SoftHsm) -> None:
    """A key of the openssl module, put into a token, opens the same files under the same signature."""
    from upcall_pkcs11 import module

    upcall_rsa = pytest.importorskip("upcall_rsa", reason="upcall-rsa is not installed")
    path = hsm.folder / "key.pem"
    import_pem(hsm, path, "one", "0123")
    in_file = upcall_rsa.module.import_key(making("", TypedPins())._replace(path=path))
    in_token = module.import_key(making(hsm.uri("one"), TypedPins()))
    assert in_file.signature == in_token.signature
    old = upcall_rsa.module.open(in_file.signature, in_file.blob, TypedPins())
    new = module.open(in_token.signature, in_token.blob, TypedPins())
    for size in (1, 19, 67):
        clear = os.urandom(size)
        assert new.unwrap(old.wrap(clear)) == clear
        assert old.unwrap(new.wrap(clear)) == clear


def refused_at_enrolment(hsm: SoftHsm) -> None:
    import pkcs11
    from upcall_pkcs11 import module

    with fails("cannot unwrap by RSA_OAEP_SHA256"):
        module.generate(making(hsm.uri("one"), TypedPins(), type="rsa", hash="sha256"))
    made(hsm)  # nothing is left of the other
    with fails("cannot wrap 67 bytes into 100"):
        module.import_key(making(hsm.uri("one"), TypedPins(), Limits(67, 100)))
    with fails("the PIN was wrong"):
        module.import_key(making(hsm.uri("one"), TypedPins(b"0000")))
    with next(pkcs11.lib(LIBRARY).get_tokens(token_label="one")).open(rw=True, user_pin=PIN.decode()) as session:
        sign = pkcs11.MechanismFlag.SIGN
        session.generate_keypair(pkcs11.KeyType.RSA, 2048, store=True, label="sign", id=b"s", capabilities=sign)
        crypt = pkcs11.MechanismFlag.DECRYPT
        session.generate_keypair(pkcs11.KeyType.RSA, 1024, store=True, label="small", id=b"1", capabilities=crypt)
    for label, why in (("sign", "CKA_DECRYPT is false"), ("small", "RSA-1024, 2048 to 4096 bits")):
        with fails(why):
            module.import_key(making(hsm.uri("one", f";object={label}"), TypedPins()))
    for uri, why in (
        ("pkcs11:token=one;object=key", "needs .module-path"),
        (hsm.uri("one", ""), "needs object=LABEL"),
        (hsm.uri("one") + "&pin-value=1234", "pin-value"),
    ):
        with pytest.raises(UsageError, match=why):
            module.import_key(making(uri, TypedPins()))


def hidden_public_half(hsm: SoftHsm) -> None:
    """Without a public object the key is opened with a login. RSA only: of EC a private key does not tell it."""
    import pkcs11
    from upcall_pkcs11 import module

    for kind in ("rsa", "ec"):
        module.generate(making(hsm.uri("one", f";object={kind}"), TypedPins(), type=kind))
    with next(pkcs11.lib(LIBRARY).get_tokens(token_label="one")).open(rw=True, user_pin=PIN.decode()) as session:
        for thing in list(session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY})):
            thing.destroy()
    enrolled = module.import_key(making(hsm.uri("one", ";object=rsa"), TypedPins()))
    secrets = TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    assert len(secrets.asked) == 1
    assert handle.unwrap(handle.wrap(b"x")) == b"x"
    assert len(secrets.asked) == 1
    with fails("no public key of RSA, P-256 or P-384"):
        module.import_key(making(hsm.uri("one", ";object=ec"), TypedPins()))


def not_this_key(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    enrolled = made(hsm)
    with fails("is another key than that of the auth token"):
        module.open("0" * 16, enrolled.blob, TypedPins())
    with fails("pkcs11 blob"):
        module.open(enrolled.signature, enrolled.blob[:-1], TypedPins())
    with fails("the token does not show such a public key"):
        uri = b"object=key"
        blob = enrolled.blob.replace(uri, b"object=kex")
        ident = blob.index(b";id=") + 5
        module.open(enrolled.signature, blob[:ident] + b"F" + blob[ident + 1 :], TypedPins())


def libraries_that_are_none(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    junk = hsm.folder / "junk.so"
    junk.write_bytes(b"x")
    for path, mode, why in (
        (str(hsm.folder / "none.so"), 0, "cannot be loaded: No such file"),
        (str(hsm.folder), 0, "is a regular file"),
        (str(junk), 0o666, "others can write it"),
        (str(junk), 0o644, "cannot be used as a PKCS #11 library"),
    ):
        if mode:
            junk.chmod(mode)
        with fails(why):
            module.import_key(making(f"pkcs11:token=one;object=key?module-path={path}", TypedPins()))


def library_by_two_names(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    other = hsm.folder / "other.so"
    other.symlink_to(LIBRARY)
    enrolled = made(hsm)
    again = module.import_key(making(f"pkcs11:token=one;object=key?module-path={other}", TypedPins()))
    assert again.signature == enrolled.signature
    assert f"module-path={other}".encode() in again.blob  # not what the link leads to today


def pin_in_a_file(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    file = hsm.folder / "pin"
    file.touch(0o600)
    file.write_bytes(PIN + b"\n")
    secrets = TypedPins()
    uri = f"{hsm.uri('one')}&pin-source=file:{file}"
    enrolled = module.generate(making(uri, secrets, type="ec"))
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


def touch(hsm: SoftHsm) -> None:
    from upcall_pkcs11 import module

    enrolled, secrets = made(hsm, touch="yes"), TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    wrapped = handle.wrap(b"x")
    assert secrets.touches == 0
    handle.unwrap(wrapped), handle.unwrap(wrapped)
    assert secrets.touches == 2


def leading_zeros(hsm: SoftHsm) -> None:
    """One ECDH secret in 256 begins with a zero; a token that drops it must not lose the file."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from upcall_pkcs11 import module
    from upcall_pkcs11.schemes import Ecdh, _point

    enrolled = made(hsm)
    handle = module.open(enrolled.signature, enrolled.blob, TypedPins())
    public = load_pem_public_key(handle.export_public())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    ephemeral = ec.generate_private_key(public.curve)
    while ephemeral.exchange(ec.ECDH(), public)[0]:
        ephemeral = ec.generate_private_key(public.curve)
    point = _point(ephemeral.public_key())
    cipher, nonce = Ecdh(public)._cipher(ephemeral.exchange(ec.ECDH(), public), point)
    assert handle.unwrap(b"\x01" + point + cipher.encrypt(nonce, b"file key", b"\x01")) == b"file key"


def no_secret_is_kept(hsm: SoftHsm) -> None:
    """The buffer that the PIN came in is wiped, whether it was right or wrong."""
    from upcall_pkcs11 import module

    enrolled = made(hsm)
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


# --- the tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        each_kind,
        attributes,
        wrong_pin,
        wrong_pin_by_four,
        concurrent,
        removed_and_returned,
        returned_unseen,
        removed_before_the_first_unwrap,
        two_of_one_label,
        moved_from_a_file,
        refused_at_enrolment,
        hidden_public_half,
        not_this_key,
        libraries_that_are_none,
        library_by_two_names,
        pin_in_a_file,
        touch,
        leading_zeros,
        no_secret_is_kept,
    ],
    ids=lambda work: work.__name__,
)
def test_with_one_token(hsm: SoftHsm, work: object) -> None:
    hsm.run(work)  # type: ignore[arg-type]


@pytest.mark.parametrize("work", [one_of_two_removed, ambiguous], ids=lambda work: work.__name__)
def test_with_two_tokens(hsm: SoftHsm, work: object) -> None:
    hsm.add("two")
    hsm.run(work)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["C_CloseAllSessions", "C_Logout", "C_Finalize"])
def test_sessions_closed_by_others(hsm: SoftHsm, call: str) -> None:
    hsm.run(sessions_closed, call)
