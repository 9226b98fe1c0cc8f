"""Checks a module's attributes, and the keys that it makes."""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import API, MAX_BLOB, Changing, KeyImporter, KeyMaker, Parameter, PassphraseChanger
from upcall.keys.plugins import is_alias
from upcall.protocols.ecryptfs.packets import is_signature
from upcall.testing.subject import (
    CLEAN,
    FAILED,
    Check,
    ContractBroken,
    Made,
    NotApplicable,
    Subject,
    expect,
    failure,
    generate,
    refused,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def it_states_its_name_and_api(subject: Subject) -> None:
    module = subject.made.module
    expect(is_alias(module.name), f"its name {module.name!r} is not 1 to 16 printable ASCII characters")
    expect(module.api == API, f"it was written for version {module.api!r} of upcall.keymodule, this is {API}")


def its_parameters_are_described(subject: Subject) -> None:
    module = subject.made.maker or subject.made.module
    told = [*(module.parameters if isinstance(module, KeyMaker) else ())]
    imported = [*(module.import_parameters if isinstance(module, KeyImporter) else ())]
    if not isinstance(module, KeyMaker | KeyImporter):
        raise NotApplicable("it neither makes keys nor imports them")
    for parameters in (told, imported):
        _check_parameters(parameters)


def _check_parameters(parameters: Sequence[Parameter]) -> None:
    names = [one.name for one in parameters]
    expect(len(set(names)) == len(names), f"a parameter is there twice: {', '.join(names)}")
    for one in parameters:
        expect(_NAME.fullmatch(one.name), f"the parameter {one.name!r}: lower case, digits and '-' make a name")
        expect(one.help.strip() and one.help.isprintable(), f"the parameter {one.name!r}: its help is not one line")
        expect(not (one.secret and one.default), f"the parameter {one.name!r} is a secret, and has a default")
        good = not one.choices or one.default in (None, "", *one.choices)
        expect(good, f"the parameter {one.name!r}: the default {one.default!r} is none of its choices")


def its_signature_and_blob_fit_an_auth_token(subject: Subject) -> None:
    made = subject.made
    good = is_signature(made.signature)
    expect(good, f"the signature {made.signature!r} is not 16 hexadecimal digits, lower case")
    expect(isinstance(made.blob, bytes), f"the blob is a {type(made.blob).__name__}, not bytes")
    expect(len(made.blob) <= MAX_BLOB, f"the blob has {len(made.blob)} bytes, at most {MAX_BLOB} are allowed")


def its_blob_holds_no_secret(subject: Subject) -> None:
    """Reason: every process of the user can read an auth token."""
    made = subject.made
    for what, secret in (("passphrase", made.passphrase), ("PIN", made.pin)):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
            expect(not secret or form not in made.blob, f"the key's {what} stands in its blob")


def generate_never_overwrites_a_file(subject: Subject) -> None:
    maker = _writes_files(subject)
    path = subject.folder / f"there{maker.suffix}"
    path.write_bytes(b"somebody's only key")
    made = subject.made
    refused(
        "generate, where a file is already",
        (ModuleFailed, UsageError, FileExistsError),
        lambda: generate(maker, path, made.values, made.passphrase, made.pin),
    )
    expect(path.read_bytes() == b"somebody's only key", "generate was refused, but the file is another one now")


def what_it_writes_is_for_its_owner_only(subject: Subject) -> None:
    """Checks the modes of all created files, with umask 0."""
    _writes_files(subject)
    before = os.umask(0)
    try:
        made = subject.another()
    finally:
        os.umask(before)
    if made.file is None:
        raise ContractBroken(f"it has a suffix, {subject.maker().suffix!r}, but generate has not written making.path")
    for path in subject.folder.rglob("*"):
        _check_private(path)


def _check_private(path: Path) -> None:
    found = path.lstat()
    mode, most = stat.S_IMODE(found.st_mode), 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
    expect(not mode & ~most, f"generate has written {path.name} with mode {mode:04o}: {most:04o} is the most")


def another_key_cannot_unwrap_what_it_wrapped(subject: Subject) -> None:
    made, other = subject.made, subject.another()
    expect(made.signature != other.signature, "two keys have the same signature")
    wrapped = subject.open().wrap(b"0123456789abcdef")
    with Subject(other, subject.folder) as second:
        key = second.open()
        refused("unwrap, of what another key wrapped", FAILED, key.unwrap, wrapped)


def a_key_that_cannot_be_made_leaves_no_file(subject: Subject) -> None:
    """Makes a key with an invalid choice of a parameter. The module may also accept it."""
    maker, made = _writes_files(subject), subject.made
    wrong = {name: f"{value}?" for name, value in made.values.items()}
    if not wrong:
        raise NotApplicable("it has no parameters to choose wrongly")
    path = subject.folder / f"wrong{maker.suffix}"
    error = failure(
        "generate, with wrong choices",
        (*CLEAN, UsageError, OSError, ValueError),
        lambda: generate(maker, path, wrong, made.passphrase, made.pin),
    )
    expect(error is None or not path.exists(), f"generate failed ({type(error).__name__}), and left a key file behind")


def a_changed_passphrase_opens_the_same_key(subject: Subject) -> None:
    """Changes the passphrase or PIN of another key, so that a token's PIN is not changed for others: by the module's
    `change_passphrase`, and puts the new file in the old one's place as upcall does."""
    module = subject.made.module
    if not isinstance(module, PassphraseChanger):
        raise NotApplicable("it changes no passphrases")
    maker = _writes_files(subject)
    made = subject.another()
    word, pin = made.passphrase, made.pin
    if made.file is None or not (word if maker.takes_passphrase else pin):
        raise NotApplicable("this key has no passphrase")
    if not maker.takes_passphrase and not _asks_for_a_pin(subject, made):
        raise NotApplicable("it asks for no PIN")
    expect(isinstance(module, KeyImporter), "it changes passphrases of key files, and cannot import the new file")
    new, staged, before = bytes(reversed(word or pin)) + b"1", made.file.with_name(".new"), made.file.read_bytes()
    with Subject(made, subject.folder) as second:
        wrapped = second.open().wrap(b"0123456789abcdef")
    changing = Changing(staged, bytearray(new), "ask" if maker.takes_passphrase else "none", made.told())
    blob = module.change_passphrase(made.signature, made.blob, changing)
    expect(made.file.read_bytes() == before, "change_passphrase has changed the present file: upcall replaces it")
    expect(staged.exists(), "change_passphrase has not written `changing.path`")
    _check_private(staged)
    expect(new not in blob, "the new passphrase stands in the blob")
    staged.replace(made.file)
    changed = made._replace(blob=blob, passphrase=new) if word else made._replace(blob=blob, pin=new)
    with Subject(changed, subject.folder) as third:
        expect(third.open().unwrap(wrapped) == b"0123456789abcdef", "with the new passphrase it is another key")


def _asks_for_a_pin(subject: Subject, made: Made) -> bool:
    told = made.told()
    with Subject(made, subject.folder) as opened:
        opened.open(told)
    return bool(told.verdicts)


def _writes_files(subject: Subject) -> KeyMaker:
    maker = subject.maker()
    if not maker.suffix:
        raise NotApplicable("it writes no key files")
    return maker


CHECKS: tuple[Check, ...] = (
    it_states_its_name_and_api,
    its_parameters_are_described,
    its_signature_and_blob_fit_an_auth_token,
    its_blob_holds_no_secret,
    generate_never_overwrites_a_file,
    what_it_writes_is_for_its_owner_only,
    a_key_that_cannot_be_made_leaves_no_file,
    another_key_cannot_unwrap_what_it_wrapped,
    a_changed_passphrase_opens_the_same_key,
)
