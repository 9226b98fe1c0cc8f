"""Keys in a TPM in software: made, opened again after a reboot, and refused, each time with the reason."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import upcall_tpm2
from upcall_tpm2 import module, signature_of
from upcall_tpm2.blob import Blob, pack_blob, take_blob
from upcall_tpm2.chip import Chip, Lockout, conversation, library
from upcall_tpm2.keyfile import KeyFile, pack_key_file, take_key_file
from upcall_tpm2.swtpm import SoftwareTpm, missing

from upcall.core.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import (
    API,
    Changing,
    Closable,
    Enrolled,
    KeyHandle,
    KeyImporter,
    KeyMaker,
    KeyModule,
    Limits,
    Making,
    Watched,
)
from upcall.keys.enrolment import chosen, prove
from upcall.keys.plugins import load
from upcall.testing.secrets import GivenSecrets

Generate = Callable[..., Enrolled]
PIN = b"2718"
KEY = b"0123456789abcdef"
HANDLE = 0x81000001
KINDS: list[dict[str, str]] = [{}, {"pin": "yes"}, {"pcrs": "sha256:7,11"}, {"pcrs": "sha256:7", "pin": "yes"}]


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    if what := missing():
        pytest.skip(what)
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key.tss2"


@pytest.fixture
def told(path: Path) -> GivenSecrets:
    """Gives the right PIN."""
    return GivenSecrets(pins={f"tpm2 {path}": PIN})


@pytest.fixture
def making(tpm: SoftwareTpm, path: Path, told: GivenSecrets) -> Making:
    values = chosen(module.parameters, {"tcti": tpm.tcti})
    return Making(path, values, bytearray(), "none", Limits(), told)


@pytest.fixture
def generate(making: Making) -> Generate:
    def generate(**values: str) -> Enrolled:
        return module.generate(making._replace(values={**making.values, **values}))

    return generate


def open_key(key: Enrolled, told: GivenSecrets) -> KeyHandle:
    return module.open(key.signature, key.blob, told)


def refusal(key: Enrolled, told: GivenSecrets) -> str:
    """Why it cannot be opened; not after the time-out, which says something else."""
    with pytest.raises(ModuleFailed) as caught:
        open_key(key, told)
    assert told.wiped()
    return str(caught.value)


def with_tpm(tpm: SoftwareTpm, method: str, *arguments: Any) -> Any:
    with library().ESAPI(tpm.tcti) as esys:
        return getattr(esys, method)(*arguments)


def lockout(tpm: SoftwareTpm) -> Lockout:
    with conversation(tpm.tcti) as chip:
        return chip.lockout()


def extend(tpm: SoftwareTpm, pcr: int) -> None:
    tss = library()
    digests = tss.TPML_DIGEST_VALUES([tss.TPMT_HA(hashAlg=tss.TPM2_ALG.SHA256, digest=tss.TPMU_HA(sha256=b"x" * 32))])
    with tss.ESAPI(tpm.tcti) as esys:
        esys.pcr_extend(tss.ESYS_TR(pcr), digests)


def test_the_module_makes_and_imports_keys_without_passphrases() -> None:
    assert load("upcall_tpm2:module") is module
    assert isinstance(module, KeyMaker)
    assert isinstance(module, KeyImporter)
    typed: KeyModule = module
    assert (typed.name, typed.api, module.takes_passphrase) == ("tpm2", API, False)


# --- making and opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", KINDS, ids=str)
def test_a_key_opens_again_after_a_reboot(
    tpm: SoftwareTpm, generate: Generate, path: Path, told: GivenSecrets, making: Making, values: dict[str, str]
) -> None:
    key = generate(**values)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert take_blob(key.blob)[:2] == (str(path), tpm.tcti)
    first = open_key(key, told)
    prove(first, Limits())
    assert len(first.wrap(bytes(67))) == 80
    tpm.restart()
    assert open_key(key, told).unwrap(first.wrap(KEY)) == KEY
    assert module.import_key(making) == key
    assert told.wiped()
    assert all(good for _, good in told.verdicts)


def test_a_key_does_not_unwrap_what_another_wrapped(generate: Generate, path: Path, told: GivenSecrets) -> None:
    key = generate()
    wrapped = open_key(key, told).wrap(KEY)
    path.unlink()
    other = generate()
    assert other.signature != key.signature
    with pytest.raises(ModuleFailed, match="did not wrap these 24 bytes"):
        open_key(other, told).unwrap(wrapped)
    assert "holds the key" in refusal(key, told)


def test_the_description_names_pin_and_pcrs(generate: Generate) -> None:
    assert generate(pin="yes", pcrs="sha256:11,7").description == "TPM, AES-256, PIN, PCRs sha256:7,11"


def test_nothing_is_left_in_the_tpm(tpm: SoftwareTpm, generate: Generate, told: GivenSecrets) -> None:
    """swtpm has room for three objects and three sessions."""
    key = generate(pcrs="sha256:7", pin="yes")
    for _ in range(5):
        open_key(key, told)
    tss = library()
    for first in (tss.TPM2_HT.TRANSIENT, tss.TPM2_HT.LOADED_SESSION):
        _, found = with_tpm(tpm, "get_capability", tss.TPM2_CAP.HANDLES, int(first) << 24, 10)
        assert len(found.data.handles) == 0


def test_a_persistent_storage_key_can_be_the_parent(tpm: SoftwareTpm, generate: Generate, told: GivenSecrets) -> None:
    with pytest.raises(ModuleFailed, match="storage key that is to be the parent is not there"):
        generate(parent=f"{HANDLE:x}")
    with conversation(tpm.tcti) as chip:
        chip._esys.evict_control(library().ESYS_TR.OWNER, chip.storage_key(0x40000001)[0], HANDLE)
    key = generate(parent=f"{HANDLE:x}")
    tpm.restart()
    prove(open_key(key, told), Limits())
    with_tpm(tpm, "hierarchy_change_auth", library().ESYS_TR.OWNER, "owner's")
    prove(open_key(key, told), Limits())


def test_an_owner_hierarchy_with_a_password_is_refused_with_the_reason(
    tpm: SoftwareTpm, generate: Generate, told: GivenSecrets
) -> None:
    key = generate()
    with_tpm(tpm, "hierarchy_change_auth", library().ESYS_TR.OWNER, "owner's")
    assert "owner hierarchy is disabled or has a password" in refusal(key, told)


def test_many_threads_open_and_use_keys(generate: Generate, told: GivenSecrets) -> None:
    key, wrong = generate(), []
    shared = open_key(key, told)

    def work() -> None:
        try:
            handle = open_key(key, told)
            for _ in range(200):
                clear = os.urandom(67)
                if shared.unwrap(handle.wrap(clear)) != clear:
                    wrong.append("another key came back")
        except BaseException as error:  # noqa: BLE001 - the test fails with it
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_closed_key_is_wiped_and_wraps_nothing(generate: Generate, told: GivenSecrets) -> None:
    handle = open_key(generate(), told)
    assert isinstance(handle, Closable)
    assert isinstance(handle, upcall_tpm2.Handle)
    wrapped, secret = handle.wrap(KEY), handle._key
    assert secret is not None
    assert any(secret)
    handle.close()
    handle.close()
    assert not any(secret)
    with pytest.raises(ModuleFailed, match="has been locked"):
        handle.wrap(KEY)
    with pytest.raises(ModuleFailed, match="has been locked"):
        handle.unwrap(wrapped)


def test_a_key_is_stale_when_its_file_changes(generate: Generate, path: Path, told: GivenSecrets) -> None:
    handle = open_key(generate(), told)
    assert isinstance(handle, Watched)
    assert not handle.stale()
    path.touch()
    assert handle.stale()
    path.unlink()
    assert handle.stale()


def test_an_existing_file_is_not_overwritten(generate: Generate, path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(ModuleFailed, match="is there already"):
        generate()
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pcrs": "sha1:7"}, "sha256, sha384, sha512 are possible"),
        ({"pcrs": "7"}, "like sha256:7,11"),
        ({"pcrs": "sha256:24"}, "0 to 23"),
        ({"pcrs": "sha256:7,7"}, "each once"),
        ({"tcti": "cmd:touch /tmp/x"}, "a TPM is at"),
        ({"tcti": "/tmp/evil.so"}, "a TPM is at"),
        ({"parent": "40000001"}, "81000000"),
        ({"parent": "srk"}, "81000000"),
    ],
)
def test_bad_settings_for_a_new_key_are_refused(
    generate: Generate, path: Path, values: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        generate(**values)
    assert not path.exists()


def test_a_caller_with_too_little_room_is_refused(making: Making) -> None:
    with pytest.raises(UsageError, match="a key of 67 bytes becomes 80, and there is room for 79"):
        module.generate(making._replace(limits=Limits(67, 79)))


@pytest.mark.parametrize("pin", [b"123", b"x" * 33])
def test_a_new_pin_of_a_bad_length_is_refused_and_wiped(making: Making, path: Path, pin: bytes) -> None:
    told = GivenSecrets(pins={f"tpm2 {path}": pin})
    with pytest.raises(UsageError, match=r"PIN of (3|33) bytes"):
        module.generate(making._replace(values={**making.values, "pin": "yes"}, secrets=told))
    assert told.wiped()
    assert not path.exists()


def test_a_missing_bank_of_pcrs_is_refused_by_its_name(tpm: SoftwareTpm, generate: Generate) -> None:
    tss = library()
    with tss.ESAPI(tpm.tcti) as esys:
        nothing = tss.TPML_PCR_SELECTION.unmarshal(bytes.fromhex("00000001 000d 03 000000"))[0]
        esys.pcr_allocate(nothing)
    tpm.restart()
    with pytest.raises(ModuleFailed, match="has no PCR sha512:7"):
        generate(pcrs="sha512:7")


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_key_does_not_open_until_changed_pcrs_are_as_before(
    tpm: SoftwareTpm, generate: Generate, told: GivenSecrets
) -> None:
    key = generate(pcrs="sha256:7,11")
    extend(tpm, 10)
    open_key(key, told)
    extend(tpm, 11)
    assert "PCRs sha256:7,11 are not what they were" in refusal(key, told)
    tpm.restart()
    open_key(key, told)


def test_changed_pcrs_do_not_cost_a_try(tpm: SoftwareTpm, generate: Generate, told: GivenSecrets) -> None:
    key = generate(pcrs="sha256:7", pin="yes")
    extend(tpm, 7)
    assert "are not what they were" in refusal(key, told)
    assert lockout(tpm).wrong == 0
    assert told.verdicts == []


def test_wrong_pins_are_counted_until_the_tpm_locks_out(
    tpm: SoftwareTpm, generate: Generate, path: Path, told: GivenSecrets
) -> None:
    tss = library()
    with tss.ESAPI(tpm.tcti) as esys:
        esys.dictionary_attack_parameters(2, 77, 77)
    key, free = generate(pin="yes"), path.with_name("free.tss2")
    guess = GivenSecrets(pins={f"tpm2 {path}": b"wrong"})
    said = ["wrong PIN, 1 more before the TPM locks", "the TPM is locked out now; it forgets one every 77 s"]
    for count in (1, 2):
        assert refusal(key, guess).endswith(said[count - 1])
        assert lockout(tpm).wrong == count
    assert guess.verdicts == [(f"tpm2 {path}", False)] * 2
    asked = len(told.given)
    words = refusal(key, told)
    assert "locked out after too many wrong PINs" in words
    assert "forgets one every 77 s" in words
    assert len(told.given) == asked, "nobody is asked for a PIN that the TPM would not look at"
    assert lockout(tpm) == Lockout(True, 2, 2, 77)
    path.rename(free)
    open_key(generate(), told)  # a key without a PIN does not care
    free.replace(path)
    with tss.ESAPI(tpm.tcti) as esys:
        esys.dictionary_attack_lock_reset()
    open_key(key, told)
    assert told.verdicts == [(f"tpm2 {path}", True)]


@pytest.mark.parametrize("pin", [b"", b"x" * 33])
def test_a_pin_of_a_bad_length_is_not_tried(tpm: SoftwareTpm, generate: Generate, path: Path, pin: bytes) -> None:
    key = generate(pin="yes")
    assert "wrong PIN" in refusal(key, GivenSecrets(pins={f"tpm2 {path}": pin}))
    assert lockout(tpm).wrong == 0


def test_a_key_whose_pin_cannot_be_had_is_refused_as_locked(generate: Generate) -> None:
    key = generate(pin="yes")
    with pytest.raises(Refused, match="locked"):
        open_key(key, GivenSecrets())


def test_open_keys_outlast_a_lost_tpm_and_others_open_when_it_is_back(
    tpm: SoftwareTpm, generate: Generate, told: GivenSecrets
) -> None:
    key = generate()
    opened = open_key(key, told)
    tpm.shutdown()
    tpm.kill()
    assert "no TPM can be reached there" in refusal(key, told)
    assert opened.unwrap(opened.wrap(KEY)) == KEY
    tpm.start()
    open_key(key, told)


@pytest.fixture
def stopped(tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> Iterator[SoftwareTpm]:
    """A TPM that can be made to say nothing."""
    yield tpm
    os.kill(tpm.pid, signal.SIGCONT)


def test_a_silent_tpm_is_given_up_and_a_late_secret_is_wiped(
    stopped: SoftwareTpm, generate: Generate, told: GivenSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = generate(pin="yes")
    late: list[bytearray] = []
    unseal = Chip.unseal

    def unseal_and_tell(*arguments: Any) -> Any:
        found = unseal(*arguments)
        late.append(found[0])
        return found

    monkeypatch.setattr(Chip, "unseal", unseal_and_tell)
    monkeypatch.setattr(Chip, "lockout", lambda chip: stop_and_look(chip, stopped))
    with monkeypatch.context() as patient:
        patient.setattr(upcall_tpm2, "PATIENCE", 0.3)
        assert "no answer within 0.3 s" in refusal(key, told)
    os.kill(stopped.pid, signal.SIGCONT)
    for thread in threading.enumerate():
        if thread.name == "tpm2":
            thread.join(60)
    assert len(late) == 1
    assert not any(late[0]), "what comes too late is wiped"
    assert told.verdicts == []
    monkeypatch.undo()
    assert lockout(stopped).wrong == 0, "the PIN was not wiped under the hands of the TPM"
    open_key(key, told)


def stop_and_look(chip: Chip, tpm: SoftwareTpm) -> Lockout:
    """The TPM stops between telling how many tries are left and looking at the PIN."""
    os.kill(tpm.pid, signal.SIGSTOP)
    return Lockout(False, 0, 3, 1000)


def test_a_missing_device_is_refused_by_its_name(making: Making) -> None:
    with pytest.raises(ModuleFailed, match="device:/dev/tpm987: there is no TPM here"):
        module.generate(making._replace(values={**making.values, "tcti": "device:/dev/tpm987"}))


def test_a_key_of_another_tpm_is_refused(
    tpm: SoftwareTpm, generate: Generate, told: GivenSecrets, making: Making, tmp_path: Path
) -> None:
    key = generate()
    with SoftwareTpm(tmp_path / "other") as other:
        elsewhere = key._replace(blob=pack_blob(take_blob(key.blob)._replace(tcti=other.tcti)))
        assert "another TPM sealed this key, or this TPM was cleared" in refusal(elsewhere, told)
        values = {**making.values, "tcti": other.tcti}
        with pytest.raises(ModuleFailed, match="another TPM sealed this key"):
            module.import_key(making._replace(values=values))


def test_a_key_of_a_cleared_tpm_is_refused(tpm: SoftwareTpm, generate: Generate, told: GivenSecrets) -> None:
    key = generate()
    with_tpm(tpm, "clear", library().ESYS_TR.LOCKOUT)
    assert "this TPM was cleared since" in refusal(key, told)


def test_a_damaged_sealed_part_is_refused(generate: Generate, path: Path, told: GivenSecrets) -> None:
    key = generate()
    found = take_key_file(path.read_bytes())
    private = found.private[:-1] + bytes((found.private[-1] ^ 1,))
    path.write_bytes(pack_key_file(found._replace(private=private)))
    assert "sealed part of the key file is damaged" in refusal(key, told)


@pytest.mark.parametrize("text", [b"", b"junk", bytes(100), b"x" * 9000])
def test_a_damaged_or_too_long_file_is_refused(
    generate: Generate, path: Path, told: GivenSecrets, text: bytes
) -> None:
    key = generate()
    path.write_bytes(text)
    assert ("is damaged" if len(text) < 9000 else "at most 8192 are allowed") in refusal(key, told)


def test_a_file_that_others_can_read_is_refused(generate: Generate, path: Path, told: GivenSecrets) -> None:
    key = generate()
    path.chmod(0o644)
    assert "lets others in" in refusal(key, told)


def test_sealed_data_that_is_no_key_is_not_imported(tpm: SoftwareTpm, making: Making, path: Path) -> None:
    with conversation(tpm.tcti) as chip:
        made, _ = chip.seal(0x40000001, bytearray(b"short"), None, None)
    path.touch(0o600)
    path.write_bytes(pack_key_file(made))
    with pytest.raises(ModuleFailed, match="has not the 32 bytes of a key"):
        module.import_key(making)


def test_a_missing_library_is_refused_with_what_to_install(making: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tpm2_pytss", None)
    with pytest.raises(ModuleFailed, match=r"tpm2-pytss is missing.*upcall-tpm2\[tss\].*libtss2-dev"):
        module.generate(making)


def test_no_secret_is_in_a_repr_the_blob_or_the_file(generate: Generate, told: GivenSecrets, path: Path) -> None:
    key = generate(pin="yes")
    handle = open_key(key, told)
    assert isinstance(handle, upcall_tpm2.Handle)
    assert handle._key is not None
    shown = f"{handle!r} {key!r} {module!r}".encode() + key.blob + path.read_bytes()
    assert PIN not in shown
    assert bytes(handle._key) not in shown
    assert isinstance(signature_of(take_key_file(path.read_bytes())), str)


def test_a_blob_of_another_storage_key_is_refused(generate: Generate, told: GivenSecrets) -> None:
    """A device on the bus that answers in the TPM's place has another storage key."""
    key = generate()
    blob: Blob = take_blob(key.blob)
    swapped = blob._replace(parent=blob.parent[:-1] + bytes((blob.parent[-1] ^ 1,)))
    assert "another TPM" in refusal(key._replace(blob=pack_blob(swapped)), told)


def test_a_key_file_of_the_tpm_is_written_back_the_same(generate: Generate, path: Path) -> None:
    generate(pcrs="sha256:0,23", pin="yes")
    key: KeyFile = take_key_file(path.read_bytes())
    assert pack_key_file(key) == path.read_bytes()


# --- another PIN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"pin": "yes"}, {"pcrs": "sha256:7", "pin": "yes"}], ids=["PIN", "PIN and PCRs"])
def test_another_pin_opens_the_same_key(
    generate: Generate, told: GivenSecrets, path: Path, kind: dict[str, str]
) -> None:
    key = generate(**kind)
    wrapped = open_key(key, told).wrap(KEY)
    before, new = path.read_bytes(), path.with_name("new")
    changing = Changing(new, bytearray(b"31415"), "none", told)
    assert module.change_passphrase(key.signature, key.blob, changing) == key.blob
    assert path.read_bytes() == before
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    new.replace(path)
    again = module.open(key.signature, key.blob, GivenSecrets(pin=b"31415"))
    assert again.unwrap(wrapped) == KEY
    with pytest.raises(ModuleFailed, match="wrong PIN"):
        open_key(key, told)


def test_a_wrong_pin_changes_nothing(generate: Generate, told: GivenSecrets, path: Path) -> None:
    key, new = generate(pin="yes"), path.with_name("new")
    wrong = GivenSecrets(pin=b"0000")
    with pytest.raises(ModuleFailed, match="wrong PIN"):
        module.change_passphrase(key.signature, key.blob, Changing(new, bytearray(b"31415"), "none", wrong))
    assert wrong.verdicts == [(f"tpm2 {path}", False)]
    assert not new.exists()
    open_key(key, told)


def test_a_key_without_a_pin_and_a_pin_that_is_too_short_are_refused(
    generate: Generate, told: GivenSecrets, path: Path
) -> None:
    new = path.with_name("new")
    key = generate()
    with pytest.raises(ModuleFailed, match="was made without a PIN"):
        module.change_passphrase(key.signature, key.blob, Changing(new, bytearray(b"31415"), "none", told))
    path.unlink()
    key = generate(pin="yes")
    with pytest.raises(UsageError, match="a PIN of 2 bytes"):
        module.change_passphrase(key.signature, key.blob, Changing(new, bytearray(b"12"), "none", told))
    assert not new.exists()
