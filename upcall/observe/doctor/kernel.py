"""Checks the kernel: eCryptfs, keys, the upcalls of CIFS, DNS and NFS, quota warnings, netlink between processes."""

from __future__ import annotations

import errno
import gzip
import os
import stat
from collections.abc import Iterator

from upcall.core.errors import UsageError
from upcall.kernel import keyring
from upcall.kernel.genetlink import NoFamily, look_up
from upcall.kernel.netlink import NetlinkSocket
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.protocols.catalogue import PROTOCOLS

DEVICE = "/dev/ecryptfs"
QUOTA_FAMILY, QUOTA_GROUP = "VFS_DQUOT", "events"


def netlink(scene: Scene) -> Iterator[Finding]:
    """Checks that NETLINK_USERSOCK is available."""
    try:
        NetlinkSocket().close()
    except OSError as error:
        yield problem(
            f"NETLINK_USERSOCK is not available here: {error.strerror}",
            "broker and daemon need it; a sandbox may forbid it: allow AF_NETLINK",
        )
    else:
        yield ok("NETLINK_USERSOCK is available")


def keys(scene: Scene) -> Iterator[Finding]:
    """Checks that keyrings are available."""
    try:
        keyring.describe_raw(keyring.USER_KEYRING)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            yield problem(
                f"keyrings are not available: {error.strerror}",
                "it needs CONFIG_KEYS; containers often forbid keyctl(2): allow add_key, keyctl and request_key",
            )
            return
    yield ok("keyrings are available")


def ecryptfs(scene: Scene) -> Iterator[Finding]:
    """Checks the eCryptfs module, its messaging, and the device."""
    if "ecryptfs" not in scene.text("/proc/filesystems").split():
        if _installed(scene, "ecryptfs"):
            yield note("eCryptfs is not loaded", "load it, if it is to be served", "modprobe ecryptfs")
        else:
            yield note("this kernel has no eCryptfs")
        return
    minors = [line.split()[0] for line in scene.text("/proc/misc").splitlines() if line.split()[1:] == ["ecryptfs"]]
    if not minors:
        yield problem(
            "the kernel's eCryptfs asks no daemons",
            "public keys need a kernel that was built with CONFIG_ECRYPT_FS_MESSAGING",
        )
        return
    path = scene.at(DEVICE)
    try:
        found = path.lstat()
    except OSError:
        yield problem(f"{path} is not there", "make it", f"mknod -m 0600 {path} c 10 {minors[0]}")
        return
    if not stat.S_ISCHR(found.st_mode):
        yield problem(f"{path} is no device", "create it again", f"rm {path} && mknod -m 0600 {path} c 10 {minors[0]}")
    elif found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        why = "a process that opens it can corrupt the kernel's lists: it is for the broker alone"
        yield problem(f"{path} has mode {mode:04o}", why, f"chmod 0600 {path}")
    else:
        yield ok(f"eCryptfs asks daemons, by {path}")


def upcalls(scene: Scene) -> Iterator[Finding]:
    """Checks which upcalls of each protocol the kernel can make."""
    for title, module, option in (one for protocol in PROTOCOLS for one in protocol.kernel):
        setting = _built_with(scene, option)
        if setting == "n" or (setting == "" and not _installed(scene, module)):
            what = f"this kernel has no {option}" if setting else f"this kernel has no module {module}"
            yield note(what)
        else:
            yield ok(title)


def quota(scene: Scene) -> Iterator[Finding]:
    """Checks that the kernel reports quota warnings in this network namespace."""
    try:
        look_up(QUOTA_FAMILY, QUOTA_GROUP)
    except NoFamily as error:
        yield note(str(error), "quota warnings need CONFIG_QUOTA_NETLINK_INTERFACE and the first network namespace")
    except UsageError as error:
        yield note(str(error))
    else:
        yield ok("the kernel reports quota warnings over generic netlink")


def _installed(scene: Scene, module: str) -> bool:
    """Returns whether the module is loaded, built in, or can be loaded."""
    if scene.at(f"/sys/module/{module}").exists():
        return True
    folder = f"/lib/modules/{os.uname().release}"
    lines = (scene.text(f"{folder}/modules.builtin") + scene.text(f"{folder}/modules.dep")).splitlines()
    names = (line.partition(":")[0].rsplit("/", 1)[-1].partition(".ko")[0].replace("-", "_") for line in lines)
    return module in names


def _built_with(scene: Scene, option: str) -> str:
    """Returns the option of the kernel's configuration: "y", "m" or "n"; "" if unknown."""
    text = scene.text(f"/boot/config-{os.uname().release}")
    packed = scene.at("/proc/config.gz")
    if not text and packed.exists():
        try:
            text = gzip.decompress(packed.read_bytes()).decode("utf-8", "replace")
        except (OSError, EOFError):
            return ""
    if not text:
        return ""
    found = [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{option}=")]
    return found[0] if found else "n"
