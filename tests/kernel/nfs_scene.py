"""Provides nfsd with rpc.idmapd, NFSv4 mounts with id mapping, and who answers the kernel (upcall or nfsidmap).

Client and server are one kernel, and have a view each of who is called what: rpc.idmapd runs with a passwd and a
domain of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from upcall.kernel import keyring
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.id_resolver import TYPE
from upcall.testing.lab.fileserver import request_key_lines, unmount_soon
from upcall.testing.lab.guest import SYSTEM_PATH
from upcall.testing.lab.kerberos import replaced
from upcall.testing.lab.stage import PATIENCE, end, wait_until

PROGRAMS = {"rpc.nfsd": "nfs-kernel-server", "nfsidmap": "nfs-common", "keyctl": "keyutils", "gcc": "gcc"}
EXPORT = Path("/srv/nfs")
CONF = Path("/etc/idmapd.conf")
STALLED = Path("/run/stalled")  # while it is there, the name service "stall" answers nothing
DOMAIN, OTHER_DOMAIN = "lab.test", "other.test"
PEER = "create id_resolver * * /usr/sbin/nfsidmap -t 600 %k %d"
KNOWN_TO_THE_SERVER = {"carol": 5003, "stall1": 6001, "stall2": 6002}  # and to nobody else

_SETTINGS = "[General]\nDomain = {}\n[Mapping]\nNobody-User = nobody\nNobody-Group = nogroup\n"
_JOIN_SESSION = 1

# An NSS module without any user, which blocks for names that begin with "stall".
_STALL = r"""
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <string.h>
#include <unistd.h>
enum nss_status _nss_stall_getpwnam_r(const char *name, struct passwd *found, char *buffer, size_t size, int *error) {
    while (strncmp(name, "stall", 5) == 0 && access("/run/stalled", F_OK) == 0)
        usleep(20000);
    return NSS_STATUS_NOTFOUND;
}
"""

_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> list[str]:
    """Returns the missing packages."""
    return [package for program, package in PROGRAMS.items() if shutil.which(program, path=SYSTEM_PATH) is None]


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, timeout=4 * PATIENCE, stdout=subprocess.DEVNULL)


class Server:
    """nfsd, and rpc.idmapd, which maps the server's ids to names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idmapd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for module in ("nfsd", "nfs", "nfsv4"):
            run("modprobe", module)
        for module in ("nfsd", "nfs"):
            Path(f"/sys/module/{module}/parameters/nfs4_disable_idmapping").write_text("N")
        for kind, place in (("rpc_pipefs", "/run/rpc_pipefs"), ("nfsd", "/proc/fs/nfsd"), ("tmpfs", str(EXPORT))):
            Path(place).mkdir(parents=True, exist_ok=True)
            run("mount", "-t", kind, kind, place)
        EXPORT.chmod(0o755)
        run("exportfs", "-i", "-o", "rw,fsid=0,no_root_squash,insecure,no_subtree_check", f"127.0.0.1:{EXPORT}")
        self._processes.append(subprocess.Popen(["rpc.mountd", "-F", "-N", "3"], stderr=subprocess.DEVNULL))
        self.calls_people(DOMAIN)
        run("rpc.nfsd", "-N", "3", "-G", "10", "-L", "10", "-H", "127.0.0.1", "2")

    def calls_people(self, domain: str) -> None:
        """Sets the domain of names."""
        if self._idmapd is not None:
            end(self._idmapd)
        passwd, conf = self._folder / "passwd", self._folder / "idmapd.conf"
        people = "".join(f"{name}:x:{uid}:{uid}::/:/bin/sh\n" for name, uid in KNOWN_TO_THE_SERVER.items())
        passwd.write_text(Path("/etc/passwd").read_text() + people)
        conf.write_text(_SETTINGS.format(domain))
        script = f"mount --bind {passwd} /etc/passwd && exec rpc.idmapd -f -S -c {conf}"
        self._idmapd = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stderr=subprocess.DEVNULL)
        pid = self._idmapd.pid
        wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "rpc.idmapd\n", "rpc.idmapd")
        for cache in ("idtoname", "nametoid"):
            Path(f"/proc/net/rpc/nfs4.{cache}/flush").write_text("2147483647")

    def stop(self) -> None:
        run("rpc.nfsd", "0")
        for process in filter(None, (self._idmapd, *self._processes)):
            end(process)
        run("exportfs", "-ua")
        for place in (str(EXPORT), "/proc/fs/nfsd"):
            run("umount", place)


@contextlib.contextmanager
def furnished(folder: Path) -> Iterator[None]:
    """The client: its domain, and a name service that can be made to block."""
    (folder / "stall.c").write_text(_STALL)
    library = "/usr/lib/x86_64-linux-gnu/libnss_stall.so.2"
    run("gcc", "-shared", "-fPIC", "-o", library, folder / "stall.c")
    names = "passwd: files stall\ngroup: files\nhosts: files\n"
    with (
        replaced(CONF, lambda _: _SETTINGS.format(DOMAIN)),
        replaced(Path("/etc/nsswitch.conf"), lambda _: names),
    ):
        yield


@contextlib.contextmanager
def by_the_peer() -> Iterator[None]:
    """Installs the line of Debian's nfs-common, and no other: nfsidmap answers."""
    with request_key_lines(PEER):
        yield
    forget()


@contextlib.contextmanager
def by_us() -> Iterator[None]:
    """Installs upcall's line: the broker answers."""
    with request_key_lines(f"create id_resolver * * {' '.join(forwarder.command())} %k"):
        yield
    forget()


def forget() -> None:
    """Has the kernel's client request every name and id again."""
    run("nfsidmap", "-c")


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """Disables the attribute cache: each stat(2) fetches them again."""
    folder.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "nfs4", "-o", "vers=4.2,sec=sys,noac", "127.0.0.1:/", folder)
    try:
        yield folder
    finally:
        unmount_soon(folder)
        forget()


def requested(description: str) -> bytes | int:
    """Requests this key, without cached results. Returns its payload or the errno."""
    if _libc.syscall(250, _JOIN_SESSION, None, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "keyctl join")
    serial = _libc.syscall(249, TYPE.encode(), description.encode(), b"", keyring.SESSION_KEYRING)
    return keyring.read(serial) if serial >= 0 else ctypes.get_errno()


def is_running(program: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text() == f"{program}\n":
                return True
    return False


def owned_file(name: str, uid: int, gid: int = 0) -> Path:
    """Makes a file on the server."""
    path = EXPORT / name
    path.touch()
    os.chown(path, uid, gid)
    return path
