"""Runs a file server in the lab's guest: a standalone smbd that authenticates users by Kerberos, and its mounts.

with realm() as lab, server(lab) as share, request_key_lines(PEER):
    with mounted(share.unc, Path("/mnt"), sec="krb5", multiuser=True): ...
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from upcall.kernel import libc
from upcall.testing.lab.guest import SYSTEM_PATH
from upcall.testing.lab.kerberos import FILE_SERVER, HOST, PEOPLE, KerberosFailed, Realm, listening
from upcall.testing.lab.stage import PATIENCE, Task, do_as, end, person, unmount, wait_until

SHARE = "files"
PORT = 445
PEER = "create cifs.spnego * * /usr/sbin/cifs.upcall %k"
RULES = Path("/etc/request-key.d")

# Debian packages that must be installed on the host.
PROGRAMS = {
    "krb5kdc": "krb5-kdc",
    "kadmin.local": "krb5-admin-server",
    "kinit": "krb5-user",
    "smbd": "samba",
    "mount.cifs": "cifs-utils",
    "keyctl": "keyutils",
}

# Modules that the kernel loads for the first mount, which takes seconds in a slow guest.
_MODULES = ("cifs", "nls_utf8", "cmac", "ctr", "gcm", "ccm", "aes_generic", "ghash_generic", "sha512_generic")

_SMB_CONF = """\
[global]
security = user
server role = standalone server
workgroup = LAB
netbios name = FS
realm = {realm}
kerberos method = dedicated keytab
dedicated keytab file = {keytab}
passdb backend = tdbsam:{folder}/passdb.tdb
private dir = {folder}/private
lock directory = {folder}/lock
state directory = {folder}/state
cache directory = {folder}/cache
pid directory = {folder}
ncalrpc dir = {folder}/ncalrpc
bind interfaces only = yes
interfaces = 127.0.0.1/8
smb ports = {port}
disable netbios = yes
disable spoolss = yes
load printers = no
printing = bsd
printcap name = /dev/null
server min protocol = SMB3
server smb encrypt = {encrypt}
username map = {folder}/users
map to guest = never
log level = 1
log file = {folder}/log
max log size = 0
[{share}]
path = {files}
read only = no
create mask = 0644
"""


class FileServer:
    """smbd with one share, SHARE, with a folder for each user. `files`: the shared folder. Made by `server`.

    The machine's own principal is mapped to root."""

    def __init__(self, realm: Realm, folder: Path, encrypt: str = "required") -> None:
        self.realm, self.folder = realm, folder
        self.files = folder / "files"
        for name in ("private", "lock", "state", "cache", "ncalrpc"):
            (folder / name).mkdir(mode=0o755)
        self.files.mkdir()
        self.files.chmod(0o1777)
        for who in map(person, PEOPLE):
            (self.files / who.name).mkdir(mode=0o700)
            os.chown(self.files / who.name, who.uid, who.gid)
        (folder / "users").write_text(f"root = LAB\\host/{HOST}\n")
        self.config = folder / "smb.conf"
        self.config.write_text(
            _SMB_CONF.format(
                realm=realm.name,
                keytab=realm.server_keytab,
                folder=folder,
                files=self.files,
                share=SHARE,
                port=PORT,
                encrypt=encrypt,
            )
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts smbd, and waits until it accepts connections."""
        with (self.folder / "out").open("ab") as output:
            process = self._process = subprocess.Popen(  # it calls setsid(2), so it must not lead a group
                ["smbd", "-F", "-s", str(self.config)],
                env=self.realm.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(lambda: process.poll() is not None or listening(PORT), "smbd", 2 * PATIENCE)
        if process.poll() is not None:
            raise KerberosFailed(f"smbd: {self.log()}")

    def stop(self) -> None:
        """Ends smbd and its children, one for each connection."""
        if self._process is not None:
            end(self._process)
            self._process = None
            wait_until(lambda: not listening(PORT), "smbd to end")

    def restart(self) -> None:
        """Restarts smbd. All connections break, and the next access makes a new session."""
        self.stop()
        self.start()

    def drop_connections(self) -> None:
        """Breaks all connections, without restarting the server."""
        self.realm.run(["smbcontrol", "-s", str(self.config), "smbd", "kill-client-ip", "127.0.0.1"])

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def missing() -> list[str]:
    """Returns the missing packages for a realm and a file server."""
    return [package for program, package in PROGRAMS.items() if shutil.which(program, path=SYSTEM_PATH) is None]


@contextlib.contextmanager
def server(realm: Realm, encrypt: str = "required") -> Iterator[FileServer]:
    """Runs a file server, and loads the kernel's modules. `encrypt`: as in smb.conf(5): required, desired, off."""
    subprocess.run(["modprobe", "-a", *_MODULES], stderr=subprocess.DEVNULL, timeout=2 * PATIENCE)  # some are built in
    with tempfile.TemporaryDirectory(prefix="smbd-") as folder:
        Path(folder).chmod(0o755)
        made = FileServer(realm, Path(folder), encrypt)
        made.start()
        try:
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def request_key_lines(*lines: str) -> Iterator[None]:
    """A context in which request-key's folder contains only these lines."""
    hidden = [(path, path.with_name(path.name + ".away")) for path in sorted(RULES.glob("*.conf"))]
    for path, away in hidden:
        path.rename(away)
    ours = RULES / "lab.conf"
    ours.write_text("".join(f"{line}\n" for line in lines))
    try:
        yield
    finally:
        ours.unlink(missing_ok=True)
        for path, away in hidden:
            away.rename(path)


# --- mounts --------------------------------------------------------------------------------------------------


def mount_here(mountpoint: Path, *options: str, host: str = FILE_SERVER, share: str = SHARE) -> None:
    """Calls mount(2) in this process; may block without a time-out. OSError of the kernel.

    Not by mount.cifs, which tries other names and addresses, and reports errors by texts of its own."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    source = f"//{host}/{share}"
    told = ",".join(["ip=127.0.0.1", f"unc={source.replace('/', chr(92))}", "vers=3.1.1", "sec=krb5", *options])
    libc.call("mount", source.encode(), str(mountpoint).encode(), b"cifs", 0, told.encode(), about=str(mountpoint))


def mount_cifs(mountpoint: Path, *options: str, host: str = FILE_SERVER, patience: float = PATIENCE) -> int:
    """Calls mount(2) in a child. Returns 0 or the errno. TimeoutError after `patience` seconds."""

    def work() -> int:
        try:
            mount_here(mountpoint, *options, host=host)
        except OSError as error:
            return error.errno or -1
        return 0

    return Task(person("root"), work).result(patience)


@contextlib.contextmanager
def mounted(mountpoint: Path, *options: str, host: str = FILE_SERVER) -> Iterator[Path]:
    """A context with a mount, which is unmounted at its end. OSError of mount(2)."""
    do_as(person("root"), lambda: mount_here(mountpoint, *options, host=host), patience=PATIENCE)
    try:
        yield mountpoint
    finally:
        unmount_soon(mountpoint)


def unmount_soon(mountpoint: Path) -> None:
    """Unmounts; waits while processes use the mount."""
    wait_until(lambda: _unmounted(mountpoint), f"unmounting {mountpoint}")


def _unmounted(mountpoint: Path) -> bool:
    try:
        unmount(mountpoint)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
