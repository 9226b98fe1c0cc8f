"""Privilege dropping at start-up of broker and daemon: capabilities, system calls (seccomp), file access (Landlock).

Applies however they are started: in addition to the sandboxing of a systemd unit, or alone where PAM, an init script
or a person has started them. Done before other threads start, because Landlock and capabilities are per thread, and
before any peer can connect. Child processes cannot regain what was dropped.

What the kernel does not support is left out, and reported in the log, by `upcall status` and by `upcall doctor`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from upcall.kernel import capabilities, landlock, seccomp, syscalls
from upcall.kernel.landlock import EXECUTE, WRITE_FILE, Place
from upcall.kernel.process import add_groups

OFF: Final = "turned off by [hardening] in the configuration"
_INHERITED: Final = "the command of [daemon] start would hand it on to the daemons"

# Devices that a daemon may write to, as far as the user's permissions allow. Root could otherwise write to disks.
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "bus/usb")
_DEVICE_NAMES: Final = ("tty*[0-9]", "hvc[0-9]*", "tpm[0-9]*", "tpmrm[0-9]*", "hidraw[0-9]*")
# Groups of root's daemon: it writes to terminals and uses the TPM without capabilities.
_GROUPS: Final = ("tty", "tss")

_PROGRAMS: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/nix/store", "/gnu/store")
# Capabilities of a command that opens a session, or changes to a user, to start that user's daemon.
_BECOMING: Final = frozenset(
    {
        "AUDIT_CONTROL", "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "KILL", "SETGID",
        "SETPCAP", "SETUID", "SYS_RESOURCE",
    }
)  # fmt: skip

_BROKERS_NETLINK: Final = frozenset({seccomp.USERSOCK})
_QUOTAS_NETLINK: Final = frozenset({seccomp.GENERIC})
_DAEMONS_NETLINK: Final = frozenset(
    {seccomp.ROUTE, seccomp.UEVENT}
)  # getaddrinfo(3), libusb; a link's sockets are given
_BECOMINGS_NETLINK: Final = _BROKERS_NETLINK | _DAEMONS_NETLINK | {seccomp.AUDIT}


class Hardening(NamedTuple):
    """The restrictions in effect, in words for people."""

    seccomp: str  # "yes", or "no: " and why
    landlock: str  # the ABI version in use ("7"), or "no: " and why
    capabilities: str  # the remaining ones ("SETUID,SYS_ADMIN"), or "none"


class DaemonHardening(NamedTuple):
    """What the configuration says of a daemon."""

    wanted: bool = True  # whether it drops privileges at all
    network: bool = True  # False: it serves root's keys only, and gets no sockets of the Internet
    writable: tuple[Path, ...] = ()  # places that plugins need besides


def of_daemon(settings: DaemonHardening, records: str, folder: Path | None) -> Hardening:
    """`records`: where records of requests are written (upcall/observe/recorder.py). `folder`: this user's runtime
    folder."""
    if not settings.wanted:
        return _nothing()
    root = os.geteuid() == 0
    if root:
        add_groups(_GROUPS)
    left = capabilities.keep_only(())
    places = [*_for_everybody(root), *_recording(records), *_caches(os.environ), *map(Place, settings.writable)]
    if folder is not None:
        places += [Place(folder), Place(folder.parent / "systemd" / "ask-password"), Place(folder.parent / "krb5cc")]
    if root:
        places.append(Place(Path("/run/systemd/ask-password")))
    # Programs and sockets are restricted only by the user's permissions: session buses and displays use abstract
    # sockets.
    confined = _confined(lambda: landlock.restrict(places))
    families = seccomp.AND_INTERNET if settings.network else seccomp.UNIX_AND_NETLINK
    return Hardening(_filtered(seccomp.OF_DAEMON, families, _DAEMONS_NETLINK), confined, _said(left))


def of_broker(
    folder: Path,
    wanted: bool = True,
    records: str = "no",
    device: Path | None = None,
    start: Sequence[str] | None = None,
) -> Hardening:
    """`folder`: the broker's own. `wanted`: whether the configuration wants any. `device`: /dev/ecryptfs, if it is
    served. `start`: the command that starts daemons, if one does."""
    if not wanted:
        return _nothing()
    becoming = start is not None and hands_on(start)
    kept, calls = set[str](), dict(seccomp.OF_BROKER)
    if device is not None:
        kept = kept | {"SETUID"}
        calls |= {name: syscalls.IDS[name] for name in ("setresuid", "setfsuid")}
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
            kept.add("IPC_LOCK")  # all memory is locked (stay_in_memory): without this, what is new has no room
    if becoming:
        kept, calls = kept | _BECOMING, calls | seccomp.OF_DAEMON | syscalls.IDS | syscalls.OWNERS
    left = capabilities.keep_only(kept)
    confined = f"no: {_INHERITED}"
    if not becoming:
        places = _of_broker(folder, records, device, start)
        abstract = _manager_is_abstract()
        confined = _confined(lambda: landlock.restrict(places, programs=True, connect=False, abstract=abstract))
    families = seccomp.AND_INTERNET if becoming else seccomp.UNIX_AND_NETLINK
    netlink = _BECOMINGS_NETLINK if becoming else _BROKERS_NETLINK
    return Hardening(_filtered(calls, families, netlink), confined, _said(left))


def of_quota_source(state: Path, wanted: bool = True) -> Hardening:
    """`state`: where the state of quotas is kept. `wanted`: whether the configuration wants any.

    It starts Python, once, to look the kernel's family up. Names may come from a directory service of this machine,
    over local sockets."""
    if not wanted:
        return _nothing()
    left = capabilities.keep_only({"SYS_ADMIN"})  # other people's quotas
    with contextlib.suppress(OSError):  # then the state cannot be written, and the log says so
        state.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    places = [*_programs(), Place(state.parent), Place(Path("/dev/null"), WRITE_FILE)]
    confined = _confined(
        lambda: landlock.restrict(places, programs=True, connect=False, abstract=_manager_is_abstract())
    )
    calls = {**seccomp.OF_SOURCE, **syscalls.QUOTA}
    return Hardening(_filtered(calls, seccomp.UNIX_AND_NETLINK, _QUOTAS_NETLINK), confined, _said(left))


def of_mount_source(wanted: bool = True) -> Hardening:
    """`wanted`: whether the configuration wants any. Without Landlock, which forbids all mounting.

    Names of users may come from a directory service of this machine, over local sockets."""
    if not wanted:
        return _nothing()
    left = capabilities.keep_only({"SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID"})
    ids = {name: syscalls.IDS[name] for name in ("setresuid", "setresgid", "setfsuid", "setfsgid", "setgroups")}
    calls = {**seccomp.OF_BROKER, **ids, **syscalls.MOUNTS}
    filtered = _filtered(calls, seccomp.UNIX_AND_NETLINK, frozenset())
    return Hardening(filtered, "no: it forbids mounting", _said(left))


def done_listening(hardened: Hardening) -> None:
    """Refuses listen(2) from now on: the daemon's own socket is listening already. Landlock checks TCP ports only in
    bind(2), which listen(2) does without."""
    if hardened.seccomp == "yes":
        seccomp.refuse_listening()


def hands_on(start: Sequence[str]) -> bool:
    """Returns whether the command's processes inherit the dropped privileges: not those that systemd starts."""
    return os.path.basename(start[0]) != "systemctl"  # noqa: PTH119


def _manager_is_abstract() -> bool:
    """Returns whether the service manager has an abstract socket. Read before upcall.kernel.notify removes it."""
    return os.environ.get("NOTIFY_SOCKET", "").startswith("@")


def _nothing() -> Hardening:
    return Hardening(f"no: {OFF}", f"no: {OFF}", _said(capabilities.effective()))


def _said(left: Collection[str]) -> str:
    return ",".join(sorted(left)) or "none"


def _filtered(calls: Mapping[str, int], families: Collection[int], netlink: Collection[int]) -> str:
    if why := seccomp.why_not():
        return f"no: {why}"
    try:
        seccomp.install(calls, families, netlink)
    except OSError as error:
        return f"no: {error.strerror}"
    return "yes"


def _confined(restrict: Callable[[], int]) -> str:
    if why := landlock.why_not():
        return f"no: {why}"
    try:
        return str(restrict())
    except OSError as error:
        return f"no: {error.strerror}"


# --- places -------------------------------------------------------------------------------------------------


def _programs(*more: str) -> list[Place]:
    """Returns the places whose programs may be run: none that the process could have written."""
    roots = {*_PROGRAMS, sys.prefix, sys.base_prefix, *more}
    return [Place(Path(root), EXECUTE) for root in roots if root.startswith("/")]


def _of_broker(folder: Path, records: str, device: Path | None, start: Sequence[str] | None) -> list[Place]:
    places = _programs(os.path.dirname(start[0]) if start else "")  # noqa: PTH120
    places += [Place(folder), Place(Path("/dev/null"), WRITE_FILE), *_recording(records)]
    if device is not None:  # which comes with a kernel module: until it is there it has no inode to be known by
        places.append(Place(device if device.exists() else device.parent, WRITE_FILE))
    return places


def _for_everybody(root: bool) -> list[Place]:
    temporary = [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]  # noqa: S108 - not used here, only left open
    named = os.environ.get("TMPDIR", "")
    if named.startswith("/") and not _broad(Path(named)):
        temporary.append(Path(named))
    dev = Path("/dev")
    devices = [dev]
    if root:
        devices = [dev / name for name in _DEVICES]
        devices += [found for pattern in _DEVICE_NAMES for found in dev.glob(pattern)]
    return [*map(Place, temporary), *(Place(one, WRITE_FILE) for one in devices)]


def _recording(where: str) -> list[Place]:
    """Returns the folder, because the file is created again after rotation; only the file, if the folder contains the
    home folder."""
    if not where.startswith("/"):
        return []
    file = Path(where)
    if not _broad(file.parent):
        return [Place(file.parent)]
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o640))
    except OSError:
        return []  # the recorder reports it
    return [Place(file, WRITE_FILE)]


def _caches(environment: Mapping[str, str]) -> list[Place]:
    """Returns the user's credential cache, for service tickets. Otherwise each is requested again."""
    kind, colon, path = environment.get("KRB5CCNAME", "").partition(":")
    if not colon:
        kind, path = "FILE", kind
    cache = Path(path)
    if kind not in ("FILE", "DIR") or not cache.is_absolute():
        return []
    if kind == "DIR" or not _broad(cache.parent):
        return [] if kind == "DIR" and _broad(cache) else [Place(cache if kind == "DIR" else cache.parent)]
    return [Place(cache, WRITE_FILE)]


def _broad(folder: Path) -> bool:
    """Returns whether the path contains the home folder: an environment variable must not make that writable."""
    try:
        home = Path.home().resolve()
        return home.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return True
