"""Implements a key module that tries to escape the daemon's hardening, and writes a report of each attempt's result.

Its auth token contains JSON: `home`, a folder to write to; `pid`, a process of the same user to inspect; `port`, of a
TCP listener; `report`, the report's path. `work` does all attempts, for tests without a daemon.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from upcall.keymodule import API, Secrets
from upcall.process.paths import user_folder

MASK: Final = 0x5A
KEYS: Final = Path(".ssh/authorized_keys")
_CLONE, _X32_GETPID, _TIOCSTI = 56, 0x40000000 | 39, 0x5412
# On x86_64, the only architecture with a filter (upcall/kernel/seccomp.py).
REFUSED: Final = {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "kcmp": 312,
    "pidfd_getfd": 438, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "unshare": 272, "setns": 308, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "fanotify_init": 300, "fanotify_mark": 301,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "personality": 135, "modify_ldt": 154, "lookup_dcookie": 212,
    "nfsservctl": 180, "sysfs": 139, "uselib": 134, "_sysctl": 156, "mbind": 237, "migrate_pages": 256,
    "move_pages": 279, "set_mempolicy": 238, "set_mempolicy_home_node": 450, "reboot": 169, "kexec_load": 246,
    "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176, "create_module": 174,
    "swapon": 167, "swapoff": 168, "acct": 163, "iopl": 172, "ioperm": 173, "syslog": 103, "vhangup": 153,
    "sethostname": 170, "setdomainname": 171, "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305,
    "adjtimex": 159, "setuid": 105, "setgid": 106, "setreuid": 113, "setregid": 114, "setresuid": 117,
    "setresgid": 119, "setgroups": 116, "setfsuid": 122, "setfsgid": 123, "capset": 126, "quotactl": 179,
    "quotactl_fd": 443, "execveat": 322, "memfd_create": 319,
    "io_setup": 206, "memfd_secret": 447, "chown": 92, "process_mrelease": 448,
}  # fmt: skip
UNKNOWN: Final = {"open_tree_attr": 467, "statmount": 457, "listmount": 458, "not yet": 600}
_NEWUSER_AND_SIGCHLD: Final = 0x10000000 | 17

_libc = ctypes.CDLL(None, use_errno=True)


def _called(number: int, *arguments: Any) -> int:
    """Makes a system call by its number."""
    words = [one if isinstance(one, bytes) else ctypes.c_long(one) for one in arguments]
    found = int(_libc.syscall(ctypes.c_long(number), *words))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _by_name(name: str, *arguments: Any) -> int:
    return _called(REFUSED[name], *arguments)


def _cloned(flags: int) -> None:
    """Makes the system call of fork(2)."""
    pid = _called(_CLONE, flags, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _bound(port: int, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_INET, kind) as made:
        made.bind(("127.0.0.1", port))


def _typed() -> None:
    with Path("/dev/null").open() as null:
        fcntl.ioctl(null, _TIOCSTI, b"x")


def _appended(file: Path) -> None:
    with file.open("a") as opened:
        opened.write("an evil key")


def _listed(folder: Path) -> None:
    """Lists a folder: reading is not restricted."""
    assert (folder / KEYS).read_bytes()


def _worked_in(folder: Path) -> None:
    """Does all usual operations on files."""
    here = folder / f"work.{os.getpid()}.{threading.get_ident()}"
    here.mkdir()
    for name in ("a", "b"):
        (here / name).write_text("x")
    (here / "b").write_text("y")
    (here / "a").rename(here / "c")
    (here / "d").symlink_to("c")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(here / "s"))
    for name in ("b", "c", "d", "s"):
        (here / name).unlink()
    here.rmdir()


def _ran() -> None:
    """Runs a program, a thread and a child process."""
    subprocess.run(["true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=60)
    thread = threading.Thread(target=os.getpid)
    thread.start()
    thread.join()
    _cloned(17)


def forbidden(home: Path, pid: int) -> Mapping[str, Callable[[], object]]:
    """Returns name -> action that the kernel must refuse, whatever the uid. If it does not, only `home` is
    affected."""
    return {
        # places
        "append to authorized_keys": lambda: _appended(home / KEYS),
        "make .profile": lambda: (home / ".profile").touch(),
        "replace .bashrc": lambda: (home / ".bashrc").rename(home / ".bashrc.old"),
        "remove .bashrc": lambda: (home / ".bashrc").unlink(),
        "make a folder": lambda: (home / ".config").mkdir(),
        "make a link": lambda: (home / ".bash_profile").symlink_to(".bashrc"),
        "listen in the home": lambda: socket.socket(socket.AF_UNIX).bind(str(home / "socket")),
        "open what is the system's": lambda: os.close(os.open("/etc/passwd", os.O_WRONLY | os.O_APPEND)),
        # other processes
        "ptrace": lambda: _by_name("ptrace", 0x4206, pid, 0, 0),
        "read another's memory": lambda: _by_name("process_vm_readv", pid, 0, 0, 0, 0, 0),
        "open another's memory": lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
        "take another's descriptor": lambda: _by_name("pidfd_getfd", -1, 0, 0),
        # the machine
        "mount": lambda: _by_name("mount", b"none", b"/nowhere", b"tmpfs", 0, 0),
        "unmount": lambda: _by_name("umount2", b"/nowhere", 0),
        "a namespace of its own": lambda: _by_name("unshare", 0x10000000),
        "a child in a namespace": lambda: _cloned(_NEWUSER_AND_SIGCHLD),
        "another's namespace": lambda: _by_name("setns", -1, 0),
        "bpf": lambda: _by_name("bpf", 0, 0, 0),
        "perf": lambda: _by_name("perf_event_open", 0, 0, 0, 0, 0),
        "io_uring": lambda: _by_name("io_uring_setup", 0, 0),
        "userfaultfd": lambda: _by_name("userfaultfd", 1),
        "a kernel module": lambda: _by_name("init_module", 0, 0, 0),
        "another personality": lambda: _by_name("personality", 0x0040000),
        "reboot": lambda: _by_name("reboot", 0, 0, 0, 0),
        "quotas": lambda: _by_name("quotactl", -1, 0, 0, 0),
        # rights
        "become root": lambda: _by_name("setresuid", 0, 0, 0),
        "other groups": lambda: _by_name("setgroups", 0, 0),
        "type into a terminal": _typed,
    }


def works(home: Path, port: int) -> Mapping[str, Callable[[], object]]:
    """Returns name -> action that must work."""
    return {
        "read in the home": lambda: _listed(home),
        "work in /tmp": lambda: _worked_in(Path("/tmp")),
        "work in the runtime folder": lambda: _worked_in(user_folder()),
        "run programs": _ran,
        "connect": lambda: socket.create_connection(("127.0.0.1", port), 5).close(),
        "bind UDP": lambda: _bound(0, socket.SOCK_DGRAM),
        "write to /dev/null": lambda: Path("/dev/null").write_bytes(b"x"),
    }


def since(home: Path, pid: int) -> Mapping[str, tuple[int, Callable[[], object]]]:
    """Returns name -> (version of Landlock, action that it refuses)."""
    return {
        "empty a file that can be read": (3, lambda: os.truncate(home / KEYS, 0)),
        "listen on TCP": (4, lambda: _bound(0)),
        "signal another process": (6, lambda: os.kill(pid, 0)),
    }


def _listened_unbound() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
        made.listen()
        assert made.getsockname()[1]


def _dumpable() -> None:
    if _libc.prctl(4, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


# System calls that succeed without a filter, and the daemon's filter's error for them.
HOLES: Final[Mapping[str, tuple[Callable[[], object], str]]] = {
    "a TCP port without bind": (_listened_unbound, "EPERM"),
    "dumps again": (_dumpable, "EPERM"),
    "MPTCP": (lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close(), "EPROTONOSUPPORT"),
    "raw packets": (lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close(), "ESOCKTNOSUPPORT"),
    "netlink of others": (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9).close(), "EPROTONOSUPPORT"),
}


def outcome(act: Callable[[], object]) -> str:
    """Runs an attempt. Returns "done", or the name of the error."""
    try:
        act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def families() -> dict[str, str]:
    """Returns the results of creating sockets of families that a daemon does not need."""
    names = ("AF_PACKET", "AF_ALG", "AF_VSOCK", "AF_CAN")
    return {name: outcome(lambda name=name: socket.socket(getattr(socket, name), socket.SOCK_DGRAM)) for name in names}  # type: ignore[misc]


def work(home: Path, pid: int, port: int) -> dict[str, Any]:
    """Does all attempts. Returns their results, and the state of this process."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    report: dict[str, Any] = {
        "forbidden": {name: outcome(act) for name, act in forbidden(home, pid).items()},
        "works": {name: outcome(act) for name, act in works(home, port).items()},
        "since": {name: outcome(act) for name, (_, act) in since(home, pid).items()},
        "families": families(),
        "core": list(resource.getrlimit(resource.RLIMIT_CORE)),
        "dumpable": int(_libc.prctl(3, 0, 0, 0, 0)),
        "status": {name: status[name].strip() for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapAmb")},
    }
    if os.uname().machine == "x86_64":
        report["forbidden"]["the other numbers of x86_64"] = outcome(lambda: _called(_X32_GETPID))
    report["holes"] = {name: outcome(act) for name, (act, _) in HOLES.items()}
    return report


class EscapingKey:
    def __init__(self, blob: bytes) -> None:
        self._told = json.loads(blob)

    def wrap(self, key: bytes, /) -> bytes:
        told = self._told
        report = work(Path(told["home"]), told["pid"], told["port"])
        Path(told["report"]).write_text(json.dumps(report))
        return self.unwrap(key)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        return bytes(byte ^ MASK for byte in wrapped)

    def stale(self) -> bool:
        return False


class EscapingModule:
    name = "escaping"
    api = API

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> EscapingKey:
        return EscapingKey(blob)


MODULE = EscapingModule()
