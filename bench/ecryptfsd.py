"""Builds ecryptfsd, the C daemon that upcall is compared with, and starts it in the lab.

    python bench/ecryptfsd.py build FOLDER     on the host, no root needed
    python bench/ecryptfsd.py prove FOLDER     boots the lab and reads a file through it

Debian's ecryptfs-utils lacks the openssl key module, so the module is compiled from Debian's source package, with a
few changes for OpenSSL 3. Everything stays in FOLDER: nothing is installed, and apt's configuration is not changed.
Needs a compiler and OpenSSL's headers."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from upcall.testing.lab import LabError, LabUnavailable, packages, run
from upcall.testing.lab.machine import say_on_stderr

SOURCE = "ecryptfs-utils"
# The programs, and the libraries that the host need not have.
BINARIES = [
    "ecryptfs-utils",
    "libecryptfs1",
    "libkeyutils1",
    "libnspr4",
    "libnss3",
    "libsqlite3-0",
    "libssl3",
]
LIBRARIES = "usr/lib/x86_64-linux-gnu"
MODULE = "libecryptfs_key_mod_openssl.so"
MODULE_FOLDER = Path("/") / LIBRARIES / "ecryptfs"  # compiled into libecryptfs

# Replacements for what OpenSSL 1.1 made opaque or removed.
CHANGES = {
    "key->n": "RSA_get0_n(key)",
    "key->e": "RSA_get0_e(key)",
    "CRYPTO_malloc_init();": "",
}
NEEDED = {
    "/usr/bin/gcc": "gcc",
    "/usr/include/openssl/rsa.h": "libssl-dev",
    "/usr/include/stdio.h": "libc6-dev",
}
PATIENCE = 10.0  # seconds

# --- on the host ----------------------------------------------------------------------------------


def build(dest: Path) -> Path:
    """Puts the daemon, mount.ecryptfs and their libraries below `dest`, unless they are there. Returns `dest`.

    Raises LabUnavailable with what is missing."""
    if (dest / MODULE).exists():
        return dest
    packages.require_tools()
    if missing := [package for path, package in NEEDED.items() if not Path(path).exists()]:
        raise LabUnavailable(f"ecryptfsd must be compiled: apt-get install {' '.join(missing)}")
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ecryptfsd-") as temporary:
        work = Path(temporary)
        for package in packages.download(BINARIES, work, say_on_stderr):
            packages.unpack(package, dest)
        module = _compile(_source(work), dest, work)
        shutil.move(module, dest / MODULE)  # last: its presence marks the rest as complete
    return dest


def _source(work: Path) -> Path:
    """Downloads the source package's tar file, whose hash apt checks, and unpacks it."""
    say_on_stderr(f"downloading the source of {SOURCE}")
    private = work / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (private / folder).mkdir(parents=True)
    sources = private / "deb-src.sources"
    sources.write_text(_deb_src())
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": private / "lists",
        "Dir::Cache": private / "cache",
        "APT::Sandbox::User": "root",
    }
    apt_get = ["apt-get", "-q"]
    for name, value in settings.items():
        apt_get += ["-o", f"{name}={value}"]
    _succeed([*apt_get, "update"], work)
    _succeed([*apt_get, "source", "--download-only", "--tar-only", SOURCE], work)
    with tarfile.open(next(work.glob(f"{SOURCE}_*.orig.tar.*"))) as tar:
        tar.extractall(work / "source", filter="data")
    return next((work / "source").iterdir())


def _deb_src() -> str:
    """Returns apt lines for source packages from the system's Debian archives."""
    wanted = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(SIGNED_BY)"
    which = ["Created-By: Packages", "Origin: Debian", "Component: main"]
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", wanted, *which], capture_output=True, text=True, check=True
    ).stdout
    if not found:
        raise LabUnavailable("apt's lists know no Debian archive: run `apt-get update` as root")
    stanzas = []
    for line in dict.fromkeys(found.splitlines()):
        uri, release, component, keys = line.split("\t")
        stanza = f"Types: deb-src\nURIs: {uri}\nSuites: {release}\nComponents: {component}\n"
        stanzas.append(stanza + (f"Signed-By: {keys}\n" if keys.startswith("/") else ""))
    return "\n".join(stanzas)


def _compile(source: Path, dest: Path, work: Path) -> Path:
    code = source / "src/key_mod/ecryptfs_key_mod_openssl.c"
    text = code.read_text()
    for old, new in CHANGES.items():
        if old not in text:
            raise LabUnavailable(f"{code.name} is not what it was: it has no {old!r}")
        text = text.replace(old, new)
    code.write_text(text)
    module = work / MODULE
    # Lazy binding, because the module refers to a function that is not defined anywhere (and never called).
    flags = ["-D_GNU_SOURCE", "-O2", "-w", "-shared", "-fPIC", "-Wl,-z,lazy"]
    libraries = [f"-L{dest / LIBRARIES}", "-l:libecryptfs.so.1", "-lcrypto"]
    _succeed(["gcc", *flags, str(code), "-o", str(module), *libraries], work)
    return module


def _succeed(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise LabUnavailable(f"{command[0]} failed:\n{done.stderr.strip()}")


# --- in the guest ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A running ecryptfsd and its mount. `signature`: of its key, as the kernel reports it."""

    daemon: subprocess.Popen[bytes]
    lower: Path
    upper: Path
    signature: str

    def stop(self) -> None:
        """Unmounts and ends the daemon."""
        subprocess.run(["umount", str(self.upper)], check=True, timeout=PATIENCE)
        self.daemon.terminate()
        try:
            self.daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()


def start_peer(built: Path, work: Path, bits: int = 2048) -> Peer:
    """Starts ecryptfsd and mounts an eCryptfs with a new RSA key in the empty folder `work`. In the lab only.

    The key, under a passphrase as ecryptfsd wants it, is in `work`/key.pem; `work` must be on a filesystem
    that eCryptfs accepts below it (tmpfs is one). Raises RuntimeError when the daemon or the mount fails."""
    if "UPCALL_LAB" not in os.environ:
        raise RuntimeError("only in the lab: ecryptfsd's module goes into a folder of the system")
    MODULE_FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copy(built / MODULE, MODULE_FOLDER / MODULE)
    lower, upper = work / "lower", work / "upper"
    lower.mkdir()
    upper.mkdir()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(built / LIBRARIES)}
    daemon = subprocess.Popen([str(built / "usr/bin/ecryptfsd"), "-f"], env=environment, stdin=subprocess.DEVNULL)
    try:
        _wait_for_device(daemon)
        _mount(built, lower, upper, _mount_options(work, bits), environment)
        return Peer(daemon, lower, upper, _signature(upper))
    except BaseException:
        daemon.kill()
        daemon.wait()
        raise


def _wait_for_device(daemon: subprocess.Popen[bytes]) -> None:
    """Waits until the daemon has opened the device, by which the kernel registers it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and daemon.poll() is None:
        for descriptor in Path(f"/proc/{daemon.pid}/fd").iterdir():
            if descriptor.is_symlink() and descriptor.readlink() == Path("/dev/ecryptfs"):
                return
        time.sleep(0.05)
    raise RuntimeError(f"ecryptfsd did not open /dev/ecryptfs (its exit code: {daemon.poll()})")


def _mount_options(work: Path, bits: int) -> str:
    passphrase = secrets.token_hex(8)
    pem = rsa.generate_private_key(public_exponent=65537, key_size=bits).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(passphrase.encode()),
    )
    (work / "key.pem").write_bytes(pem)
    (work / "passphrase").write_text(f"openssl_passwd={passphrase}\n")
    for secret in ("key.pem", "passphrase"):
        (work / secret).chmod(0o600)
    options = [
        f"key=openssl:openssl_keyfile={work / 'key.pem'}:openssl_passwd_file={work / 'passphrase'}",
        "ecryptfs_cipher=aes",
        "ecryptfs_key_bytes=16",
        "ecryptfs_passthrough=n",
        "no_sig_cache",  # otherwise it asks whether to store the signature
        "verbosity=0",
    ]
    return ",".join(options)


def _mount(built: Path, lower: Path, upper: Path, options: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [str(built / "sbin/mount.ecryptfs"), str(lower), str(upper), "-o", options],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    if done.returncode != 0 or not upper.is_mount():
        raise RuntimeError(f"mount.ecryptfs failed: {done.stdout.strip()}")


def _signature(upper: Path) -> str:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, _, options, *_ = line.split()
        if place == str(upper):
            return dict(option.partition("=")[::2] for option in options.split(","))["ecryptfs_sig"]
    raise RuntimeError(f"{upper} is not mounted")


def forget_files() -> None:
    """Drops the kernel's caches of files that are not open, so that opening one makes a request again."""
    os.sync()
    # Once does not suffice: recently used inodes survive the first time.
    for _ in range(3):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def prove(built: Path) -> bool:
    """Returns whether a file written through the peer reads the same after dropping the caches. In the lab only."""
    with tempfile.TemporaryDirectory() as work:
        peer = start_peer(built, Path(work))
        secret = secrets.token_bytes(100_000)
        try:
            (peer.upper / "file").write_bytes(secret)
            forget_files()
            began = time.monotonic()
            same = (peer.upper / "file").read_bytes() == secret
            cold = time.monotonic() - began
            hidden = secret[:64] not in (peer.lower / "file").read_bytes()
        finally:
            peer.stop()
    print(f"key {peer.signature}; read back the same: {same}, in {cold:.3f} s; encrypted below: {hidden}")
    return same and hidden


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["build", "prove"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    if given.verb == "prove" and "UPCALL_LAB" in os.environ:
        return 0 if prove(folder) else os.EX_SOFTWARE
    try:
        build(folder)
        if given.verb == "build":
            print(folder)
            return 0
        # Runs in the folder, so that the guest shows it at any place.
        line = ["python", str(Path(__file__).resolve()), "prove", str(folder)]
        result = run(line, cwd=folder, timeout=120)
    except LabError as error:
        print(f"ecryptfsd: {error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.write(result.stdout.decode())
    sys.stderr.write("\n".join([result.stderr.decode(), *result.kernel_faults]))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
