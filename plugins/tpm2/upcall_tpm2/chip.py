"""Seals and unseals keys in a TPM, and reads the state of its lock-out.

Secrets pass through a session that is salted with the storage key and encrypts the first parameter, so neither key nor
PIN can be read on the TPM's bus. A conversation is one connection. Only one is open at a time per process: /dev/tpm0
and swtpm accept only one, and a TPM handles one command at a time in any case.

Numbers and response codes: TCG "TPM 2.0 Library", part 2. Calls: tpm2-tss (ESAPI), by way of tpm2-pytss.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from upcall.core.errors import ModuleFailed
from upcall_tpm2.keyfile import OWNER, KeyFile
from upcall_tpm2.sealed import STORAGE, STORAGE_TEMPLATE, Pcrs, pack_template, policy_of

KEY = 32  # bytes that are sealed

# TPM_RC, without the number of the handle, parameter or session that a format-one code carries
_FORMAT_ONE = 0x080
_RC_VALUE, _RC_HIERARCHY, _RC_HANDLE, _RC_AUTH_FAIL, _RC_POLICY_FAIL = 0x084, 0x085, 0x08B, 0x08E, 0x09D
_RC_INTEGRITY, _RC_BAD_AUTH, _RC_PCR_CHANGED, _RC_LOCKOUT = 0x09F, 0x0A2, 0x128, 0x921
_LAYER, _TCTI_LAYER = 16, 10  # TSS2_RC: bits of the code; the layer that reports it is above them
_LAYERS_OF_TPM = (0, 11, 12)  # the TPM and two kinds of resource manager: these use the TPM's own codes

# TPM_PT
_PERMANENT, _LOCKOUT_COUNTER, _MAX_AUTH_FAIL, _LOCKOUT_INTERVAL = 0x200, 0x20E, 0x20F, 0x210
_IN_LOCKOUT = 1 << 9  # TPMA_PERMANENT
_CAP_TPM_PROPERTIES = 6

# The current step: determines the meaning of a response code
_PRIMARY, _PERSISTENT, _UNSEALING = "the storage primary key", "the persistent storage key", "unsealing"
_CHANGING = "changing the PIN"
_LOADING, _LOADING_OURS = "loading a key", "loading our key"  # ours: made under this storage key

_turn = threading.Lock()


class Lockout(NamedTuple):
    """The state of the TPM's dictionary attack protection. It counts the wrong PINs of all keys and users together."""

    locked: bool
    wrong: int
    allowed: int
    interval: int  # seconds after which the count decreases by one

    def check(self, where: str) -> None:
        """ModuleFailed during the lock-out: the TPM would not check a PIN."""
        if self.locked:
            raise _locked_out(where, self.interval)


class WrongPin(ModuleFailed):
    """The TPM checked the PIN, and counted it as wrong."""


def library() -> Any:
    """Returns the module tpm2-pytss. ModuleFailed if it or its libraries are not installed."""
    os.environ.setdefault("TSS2_LOG", "all+NONE")  # otherwise it writes all errors to stderr
    try:
        return importlib.import_module("tpm2_pytss")
    except Exception as error:  # noqa: BLE001 - older versions fail in many ways with a newer cryptography
        raise ModuleFailed(
            "the TPM library tpm2-pytss is missing, or cannot be loaded: pip install 'upcall-tpm2[tss]', which needs "
            "apt-get install libtss2-dev libtss2-tcti-device0 gcc pkg-config python3-dev "
            f"({type(error).__name__}: {error})"
        ) from None


class Chip:
    """One conversation with a TPM, opened by `conversation`. Methods raise ModuleFailed."""

    def __init__(self, tss: Any, esys: Any, stack: contextlib.ExitStack, where: str) -> None:
        self._tss, self._esys, self._stack, self._where = tss, esys, stack, where

    def lockout(self) -> Lockout:
        with self._doing("asking for the lock-out"):
            told = self._esys.get_capability(_CAP_TPM_PROPERTIES, _PERMANENT, 32)  # its parts do not keep it alive
            found = {int(one.property): int(one.value) for one in told[1].data.tpmProperties}
        locked = bool(found.get(_PERMANENT, 0) & _IN_LOCKOUT)
        counts = (found.get(number, 0) for number in (_LOCKOUT_COUNTER, _MAX_AUTH_FAIL, _LOCKOUT_INTERVAL))
        return Lockout(locked, *counts)

    def storage_key(self, number: int) -> tuple[Any, bytes]:
        """Returns a storage key and its name: the owner's primary key, or the one at a persistent handle."""
        if number != OWNER:
            with self._doing(_PERSISTENT):
                handle = self._esys.tr_from_tpmpublic(number)
                public = self._esys.read_public(handle)[0]
            if int(public.publicArea.objectAttributes) & STORAGE != STORAGE:
                raise ModuleFailed(f"{self._where}: what stands at {number:#x} is no storage key")
        else:
            template = self._unmarshal("TPM2B_PUBLIC", STORAGE_TEMPLATE)
            with self._doing(_PRIMARY):
                handle = self._esys.create_primary(self._tss.TPM2B_SENSITIVE_CREATE(), template)[0]
            self._flush_later(handle)
        return handle, bytes(self._esys.tr_get_name(handle))

    def seal(self, parent: int, key: bytearray, pcrs: Pcrs | None, pin: bytearray | None) -> tuple[KeyFile, bytes]:
        """Seals a key to the PCRs' present values. Returns the sealed key and the storage key's name."""
        tss, esys = self._tss, self._esys
        values = hashlib.sha256(b"".join(map(self._pcr, _each(pcrs)))).digest() if pcrs else b""
        storage, name = self.storage_key(parent)
        session = self._session(storage, tss.TPM2_SE.HMAC)
        template = self._unmarshal(
            "TPM2B_PUBLIC", pack_template(policy_of(pcrs, values, pin is not None), pin is not None)
        )
        secret = tss.TPMS_SENSITIVE_CREATE(
            userAuth=tss.TPM2B_AUTH(bytes(pin or b"")), data=tss.TPM2B_SENSITIVE_DATA(bytes(key))
        )
        with self._doing("sealing"):
            made = esys.create(storage, tss.TPM2B_SENSITIVE_CREATE(secret), template, session1=session)
        _wipe(secret.data.buffer)
        esys.flush_context(session)
        private, public = (bytes(part.marshal()) for part in made[:2])
        return KeyFile(parent, public, private, pin is not None, pcrs, values), name

    def unseal(self, sealed: KeyFile, trusted: bytes | None, pin: bytearray | None) -> tuple[bytearray, bytes]:
        """Unseals a key. Returns it, for the caller to wipe, and the storage key's name, which must equal `trusted`
        unless that is None. WrongPin."""
        storage, name, loaded = self._load(sealed, trusted, pin)
        session = self._session(storage, self._tss.TPM2_SE.POLICY if sealed.pcrs else self._tss.TPM2_SE.HMAC)
        self._flush_later(session)
        if sealed.pcrs is not None:
            self._fulfil(sealed.pcrs, sealed.values, session, sealed.pin)
        with self._doing(_UNSEALING, pcrs=sealed.pcrs):
            found = self._esys.unseal(loaded, session1=session)
        key = bytearray(found.buffer)
        _wipe(found.buffer)
        if len(key) != KEY:
            _wipe(key)
            raise ModuleFailed(f"{self._where}: what was sealed has not the {KEY} bytes of a key")
        return key, name

    def change_pin(self, sealed: KeyFile, trusted: bytes, pin: bytearray, new: bytearray) -> KeyFile:
        """Returns the same sealed key with another PIN. `trusted`: the storage key's name. WrongPin."""
        storage, _, loaded = self._load(sealed, trusted, pin)
        session = self._session(storage, self._tss.TPM2_SE.HMAC)
        self._flush_later(session)
        with self._doing(_CHANGING):
            made = self._esys.object_change_auth(loaded, storage, self._tss.TPM2B_AUTH(bytes(new)), session1=session)
        return sealed._replace(private=bytes(made.marshal()))

    def _load(self, sealed: KeyFile, trusted: bytes | None, pin: bytearray | None) -> tuple[Any, bytes, Any]:
        """Loads a sealed key. Returns the storage key, its name, and the key, which has the PIN for its next use."""
        storage, name = self.storage_key(sealed.parent)
        if trusted is not None and name != trusted:
            raise self._foreign()
        with self._doing(_LOADING if trusted is None else _LOADING_OURS):
            public = self._tss.TPM2B_PUBLIC.unmarshal(sealed.public)[0]
            private = self._tss.TPM2B_PRIVATE.unmarshal(sealed.private)[0]
            loaded = self._esys.load(storage, private, public)
        self._flush_later(loaded)
        if pin is not None:
            self._esys.tr_set_auth(loaded, bytes(pin))
        return storage, name, loaded

    def _fulfil(self, pcrs: Pcrs, values: bytes, session: Any, pin: bool) -> None:
        with self._doing("the policy", pcrs=pcrs):
            selection = self._tss.TPML_PCR_SELECTION.parse(str(pcrs))
            self._esys.policy_pcr(session, self._tss.TPM2B_DIGEST(values), selection)
            if pin:
                self._esys.policy_auth_value(session)

    def _session(self, storage: Any, kind: Any) -> Any:
        tss = self._tss
        aes = tss.TPMT_SYM_DEF.parse("aes128cfb")
        with self._doing("a session"):
            session = self._esys.start_auth_session(storage, tss.ESYS_TR.NONE, kind, aes, tss.TPM2_ALG.SHA256)
            flags = tss.TPMA_SESSION
            self._esys.trsess_set_attributes(session, flags.DECRYPT | flags.ENCRYPT | flags.CONTINUESESSION)
        return session

    def _pcr(self, pcr: str) -> bytes:
        with self._doing("reading PCRs"):
            values = self._esys.pcr_read(self._tss.TPML_PCR_SELECTION.parse(pcr))[2]
        if len(values) != 1:
            raise ModuleFailed(f"{self._where}: has no PCR {pcr}")
        return bytes(values[0])

    def _unmarshal(self, shape: str, content: bytes) -> Any:
        sized = len(content).to_bytes(2, "big") + content
        return getattr(self._tss, shape).unmarshal(sized)[0]

    def _flush_later(self, handle: Any) -> None:
        """Registers an object for flushing at the end. Without a resource manager a TPM has room for three objects,
        and keeps them until they are flushed."""
        self._stack.callback(self._flush, handle)

    def _flush(self, handle: Any) -> None:
        with contextlib.suppress(self._tss.TSS2_Exception):  # a TPM that has gone holds no objects
            self._esys.flush_context(handle)

    @contextlib.contextmanager
    def _doing(self, what: str, pcrs: Pcrs | None = None) -> Iterator[None]:
        """A context that translates response codes at this step to ModuleFailed."""
        try:
            yield
        except self._tss.TSS2_Exception as error:
            failed: Any = error
        else:
            return
        self._explain(what, int(failed.rc), str(failed), pcrs)

    def _explain(self, what: str, rc: int, words: str, pcrs: Pcrs | None) -> NoReturn:
        if rc >> _LAYER == _TCTI_LAYER:
            raise ModuleFailed(f"{self._where}: the TPM has gone away ({words})")
        code = (rc & 0xBF if rc & _FORMAT_ONE else rc & 0xFFFF) if rc >> _LAYER in _LAYERS_OF_TPM else 0
        if code == _RC_LOCKOUT:
            raise _locked_out(self._where, None)
        if pcrs is not None and code in (_RC_VALUE, _RC_POLICY_FAIL, _RC_PCR_CHANGED):
            raise ModuleFailed(f"{self._where}: the PCRs {pcrs} are not what they were when the key was sealed")
        if what in (_UNSEALING, _CHANGING) and code in (_RC_AUTH_FAIL, _RC_BAD_AUTH):
            raise WrongPin(f"{self._where}: wrong PIN")
        if what == _LOADING_OURS and code == _RC_INTEGRITY:
            raise ModuleFailed(f"{self._where}: the sealed part of the key file is damaged")
        if what == _LOADING and code == _RC_INTEGRITY:
            raise self._foreign()
        if what == _PRIMARY and code in (_RC_AUTH_FAIL, _RC_BAD_AUTH, _RC_HIERARCHY):
            raise ModuleFailed(
                f"{self._where}: the owner hierarchy is disabled or has a password; use a persistent storage key, if "
                "there is one: --param parent=81000001"
            )
        if what == _PERSISTENT and code == _RC_HANDLE:
            raise ModuleFailed(f"{self._where}: {what} that is to be the parent is not there")
        raise ModuleFailed(f"{self._where}: {what} has failed: {words}")

    def _foreign(self) -> ModuleFailed:
        return ModuleFailed(f"{self._where}: another TPM sealed this key, or this TPM was cleared since")


@contextlib.contextmanager
def conversation(tcti: str) -> Iterator[Chip]:
    """A context with an open conversation. ModuleFailed if the TPM is missing, or this user may not use it."""
    _check_device(tcti)  # first: the library takes a while to load
    tss = library()
    with _turn, contextlib.ExitStack() as stack:
        try:
            esys = stack.enter_context(tss.ESAPI(tcti))
        except tss.TSS2_Exception as error:
            raise ModuleFailed(f"{tcti}: no TPM can be reached there ({error})") from None
        yield Chip(tss, esys, stack, tcti)


def _check_device(tcti: str) -> None:
    """ModuleFailed with the reason if a TPM device cannot be opened: the library gives no reason."""
    kind, _, name = tcti.partition(":")
    if kind != "device":
        return
    try:
        found = Path(name).stat()
    except OSError:
        raise ModuleFailed(f"{tcti}: there is no TPM here, or its driver is not loaded") from None
    if not stat.S_ISCHR(found.st_mode):
        raise ModuleFailed(f"{tcti}: is not a device")
    if not os.access(name, os.R_OK | os.W_OK):
        raise ModuleFailed(f"{tcti}: is closed to us; on Debian, the group tss may use it: adduser USER tss")


def _locked_out(where: str, interval: int | None) -> ModuleFailed:
    again = f"; it forgets one every {interval} s, so try again after that" if interval else ""
    return ModuleFailed(f"{where}: the TPM is locked out after too many wrong PINs, of this key or others{again}")


def _each(pcrs: Pcrs) -> list[str]:
    return [str(Pcrs(pcrs.bank, (index,))) for index in pcrs.indexes]


def _wipe(buffer: bytearray | memoryview) -> None:
    """Overwrites a buffer with zeros. Copies made by the library or the interpreter remain."""
    buffer[:] = bytes(len(buffer))
