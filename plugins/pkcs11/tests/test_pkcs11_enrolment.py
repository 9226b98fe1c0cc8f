"""Keys in a real token, SoftHSM's: made there, taken in, and refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")

import pkcs11
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pkcs11 import Attribute
from upcall_pkcs11 import module
from upcall_pkcs11.softhsm import LIBRARY, PIN, SoftHsm, TypedPins, making, missing

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import Changing, Limits

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    hsm = SoftHsm(tmp_path)
    hsm.add("one")
    return hsm


# --- what is done ------------------------------------------------------------------------------------------------


def fails(why: str) -> pytest.RaisesExc[ModuleFailed]:
    return pytest.RaisesExc(ModuleFailed, match=why, check=lambda error: PIN.decode() not in str(error))


def an_ambiguous_missing_or_taken_name_is_refused(hsm: SoftHsm) -> None:
    hsm.new_key(token="one"), hsm.new_key(token="two")
    anywhere = f"pkcs11:object=key?module-path={LIBRARY}"
    with fails(r"more than one token fits:\n  pkcs11:token=.*;serial=.*;object=key.*\n  pkcs11:token="):
        module.import_key(making(anywhere))
    with fails("more than one token fits"):
        module.generate(making(anywhere.replace("=key", "=new")))
    module.generate(making(hsm.uri("two", ";object=key2;id=%07"), type="ec"))
    assert module.import_key(making(anywhere.replace("=key", "=key2"))).description == "EC P-256 in two"
    assert b"id=%07" in module.import_key(making(hsm.uri("two", ";id=%07"))).blob
    with fails("there is no such private key"):
        module.import_key(making(hsm.uri("one", ";object=other")))
    with fails("there is no such token"):
        module.import_key(making(hsm.uri("three")))
    with fails("is there already"):
        module.generate(making(hsm.uri("one"), type="ec"))
    with fails("is there already"):
        module.generate(making(hsm.uri("two", ";object=key3;id=%07"), type="ec"))


def two_keys_of_one_label_are_refused(hsm: SoftHsm) -> None:
    key = hsm.folder / "key.pem"
    import_pem(hsm, key, "one", "aa")
    import_pem(hsm, key, "one", "bb")
    with fails(r"more than one private key fits:\n  .*id=%AA.*\n  .*id=%BB"):
        module.import_key(making(hsm.uri("one")))


def import_pem(hsm: SoftHsm, path: Path, token: str, ident: str) -> None:

    if not path.exists():
        path.touch(0o600)
        pem = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(pem)
    words = ["--import", str(path), "--token", token, "--label", "key", "--id", ident, "--pin", PIN.decode()]
    hsm.tool(*words)


def a_key_moved_from_a_file_keeps_its_signature(hsm: SoftHsm) -> None:
    """A key of the openssl module, put into a token, opens the same files under the same signature."""
    upcall_rsa = pytest.importorskip("upcall_rsa", reason="upcall-rsa is not installed")
    path = hsm.folder / "key.pem"
    import_pem(hsm, path, "one", "0123")
    in_file = upcall_rsa.module.import_key(making("", path=path))
    in_token = module.import_key(making(hsm.uri("one")))
    assert in_file.signature == in_token.signature
    old = upcall_rsa.module.open(in_file.signature, in_file.blob, TypedPins())
    new = module.open(in_token.signature, in_token.blob, TypedPins())
    for size in (1, 19, 67):
        clear = os.urandom(size)
        assert new.unwrap(old.wrap(clear)) == clear
        assert old.unwrap(new.wrap(clear)) == clear


def keys_that_cannot_unwrap_file_keys_are_refused(hsm: SoftHsm) -> None:
    with fails("cannot unwrap by RSA_OAEP_SHA256"):
        module.generate(making(hsm.uri("one"), type="rsa", hash="sha256"))
    hsm.new_key()  # nothing is left of the other
    with fails("cannot wrap 67 bytes into 100"):
        module.import_key(making(hsm.uri("one"), limits=Limits(67, 100)))
    with fails("the PIN was wrong"):
        module.import_key(making(hsm.uri("one"), TypedPins(b"0000")))
    with hsm.session("one") as session:
        sign = pkcs11.MechanismFlag.SIGN
        session.generate_keypair(pkcs11.KeyType.RSA, 2048, store=True, label="sign", id=b"s", capabilities=sign)
        crypt = pkcs11.MechanismFlag.DECRYPT
        session.generate_keypair(pkcs11.KeyType.RSA, 1024, store=True, label="small", id=b"1", capabilities=crypt)
    for label, why in (("sign", "CKA_DECRYPT is false"), ("small", "RSA-1024, 2048 to 4096 bits")):
        with fails(why):
            module.import_key(making(hsm.uri("one", f";object={label}")))
    for uri, why in (
        ("pkcs11:token=one;object=key", "needs .module-path"),
        (hsm.uri("one", ""), "needs object=LABEL"),
        (hsm.uri("one") + "&pin-value=1234", "pin-value"),
    ):
        with pytest.raises(UsageError, match=why):
            module.import_key(making(uri))


def a_hidden_public_half_is_read_with_a_login(hsm: SoftHsm) -> None:
    """RSA only: the private object of an EC key does not have the public half."""
    for kind in ("rsa", "ec"):
        hsm.new_key(kind, label=kind)
    with hsm.session("one") as session:
        for thing in list(session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY})):
            thing.destroy()
    enrolled = module.import_key(making(hsm.uri("one", ";object=rsa")))
    secrets = TypedPins()
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    assert len(secrets.asked) == 1
    assert handle.unwrap(handle.wrap(b"x")) == b"x"
    assert len(secrets.asked) == 1
    with fails("no public key of RSA, P-256 or P-384"):
        module.import_key(making(hsm.uri("one", ";object=ec")))


def a_blob_of_another_key_is_refused(hsm: SoftHsm) -> None:
    enrolled = hsm.new_key()
    with fails("is another key than that of the auth token"):
        module.open("0" * 16, enrolled.blob, TypedPins())
    with fails("pkcs11 blob"):
        module.open(enrolled.signature, enrolled.blob[:-1], TypedPins())
    with fails("the token does not show such a public key"):
        uri = b"object=key"
        blob = enrolled.blob.replace(uri, b"object=kex")
        ident = blob.index(b";id=") + 5
        other = b"0" if blob[ident : ident + 1] == b"F" else b"F"
        module.open(enrolled.signature, blob[:ident] + other + blob[ident + 1 :], TypedPins())


def generated_keys_cannot_be_extracted_and_do_not_sign(hsm: SoftHsm) -> None:
    for kind in ("rsa", "ec"):
        hsm.new_key(kind, label=kind)
    with hsm.session("one") as session:
        keys = list(session.get_objects({Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY}))
        assert len(keys) == 2
        for key in keys:
            assert all(key[name] for name in (Attribute.TOKEN, Attribute.PRIVATE, Attribute.SENSITIVE))
            assert all(key[name] for name in (Attribute.ALWAYS_SENSITIVE, Attribute.NEVER_EXTRACTABLE))
            assert not key[Attribute.EXTRACTABLE] and not key[Attribute.SIGN]


def a_path_that_is_no_library_is_refused(hsm: SoftHsm) -> None:
    junk = hsm.folder / "junk.so"
    junk.write_bytes(b"x")
    for path, mode, why in (
        (str(hsm.folder / "none.so"), 0, "cannot be loaded: No such file"),
        (str(hsm.folder), 0, "is a regular file"),
        (str(junk), 0o666, "others can write to it"),
        (str(junk), 0o644, "cannot be used as a PKCS #11 library"),
    ):
        if mode:
            junk.chmod(mode)
        with fails(why):
            module.import_key(making(f"pkcs11:token=one;object=key?module-path={path}"))


def a_library_in_a_folder_that_others_can_change_is_refused(hsm: SoftHsm) -> None:
    """They could exchange it between the check and the loading."""
    shared = hsm.folder / "shared"
    (shared / "below").mkdir(parents=True)
    shared.chmod(0o777)
    library = shared / "below/lib.so"
    library.write_bytes(Path(LIBRARY).read_bytes())
    link = hsm.folder / "link.so"
    link.symlink_to(library)
    for path in (library, link):
        with fails(f"{shared} has mode 0777: others can write to it"):
            module.import_key(making(f"pkcs11:token=one;object=key?module-path={path}"))


def a_library_keeps_the_path_that_it_was_named_by(hsm: SoftHsm) -> None:
    other = hsm.folder / "other.so"
    other.symlink_to(LIBRARY)
    enrolled = hsm.new_key()
    again = module.import_key(making(f"pkcs11:token=one;object=key?module-path={other}"))
    assert again.signature == enrolled.signature
    assert f"module-path={other}".encode() in again.blob  # not what the link leads to today


def the_pin_of_a_token_is_changed_for_all_its_keys(hsm: SoftHsm) -> None:
    enrolled, other = hsm.new_key(label="one"), hsm.new_key(label="two")
    new = bytearray(b"another-pin")
    secrets = TypedPins()
    assert module.change_passphrase(enrolled.signature, enrolled.blob, changing(new, secrets)) == enrolled.blob
    assert secrets.verdicts == [True]
    for key in (enrolled, other):
        handle = module.open(key.signature, key.blob, TypedPins(bytes(new)))
        assert handle.unwrap(handle.wrap(b"x" * 16)) == b"x" * 16
        handle.close()
    secrets = TypedPins()
    with fails("the PIN was wrong"):
        module.change_passphrase(enrolled.signature, enrolled.blob, changing(new, secrets))
    assert secrets.verdicts == [False]


def a_pin_that_the_token_does_not_take_is_refused(hsm: SoftHsm) -> None:
    enrolled = hsm.new_key()
    with pytest.raises(UsageError, match="does not take a PIN of 2 characters"):
        module.change_passphrase(enrolled.signature, enrolled.blob, changing(bytearray(b"12"), TypedPins()))
    handle = module.open(enrolled.signature, enrolled.blob, TypedPins())
    assert handle.unwrap(handle.wrap(b"x" * 16)) == b"x" * 16
    handle.close()


def a_pin_in_a_file_is_not_changed(hsm: SoftHsm) -> None:
    enrolled = hsm.new_key(with_pin=True)
    with pytest.raises(UsageError, match=f"its PIN is read from {hsm.pin_file}"):
        module.change_passphrase(enrolled.signature, enrolled.blob, changing(bytearray(b"another"), TypedPins()))


def changing(new: bytearray, secrets: TypedPins) -> Changing:
    return Changing(Path(), new, "none", secrets)


# --- the tests: each runs in a process of its own -----------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        two_keys_of_one_label_are_refused,
        a_key_moved_from_a_file_keeps_its_signature,
        keys_that_cannot_unwrap_file_keys_are_refused,
        a_hidden_public_half_is_read_with_a_login,
        a_blob_of_another_key_is_refused,
        generated_keys_cannot_be_extracted_and_do_not_sign,
        a_path_that_is_no_library_is_refused,
        a_library_in_a_folder_that_others_can_change_is_refused,
        a_library_keeps_the_path_that_it_was_named_by,
        the_pin_of_a_token_is_changed_for_all_its_keys,
        a_pin_that_the_token_does_not_take_is_refused,
        a_pin_in_a_file_is_not_changed,
    ],
    ids=lambda work: work.__name__,
)
def test_enrolment_with_one_token(hsm: SoftHsm, work: Callable[[SoftHsm], None]) -> None:
    hsm.run(work)


@pytest.mark.parametrize("work", [an_ambiguous_missing_or_taken_name_is_refused], ids=lambda work: work.__name__)
def test_enrolment_with_two_tokens(hsm: SoftHsm, work: Callable[[SoftHsm], None]) -> None:
    hsm.add("two")
    hsm.run(work)
