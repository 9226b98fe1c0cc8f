"""Builds ecryptfsd, the C daemon that upcall is compared with, and starts it in the lab.

    python bench/ecryptfsd.py build FOLDER     on the host, no root needed
    python bench/ecryptfsd.py prove FOLDER     boots the lab and reads a file through it

Debian's ecryptfs-utils lacks the openssl key module, so the module is compiled from Debian's source package, with a
few changes for OpenSSL 1.1 and 3. Everything stays in FOLDER: nothing is installed, and apt's configuration is not
changed. Needs a compiler and OpenSSL's headers.

With OpenSSL 3 most of ecryptfsd's time is reading its PEM file, twice for each request, which OpenSSL 1.1.1 does 25
times as fast. So it is also built with Debian 11's OpenSSL 1.1.1, which is downloaded and unpacked beside it."""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
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
SOURCE_FOLDER = "source"

OLDER = "openssl-1.1.1"  # folder of what is built with OpenSSL 1.1.1
OLDER_RELEASE = "bullseye"  # Debian 11, the last with OpenSSL 1.1.1
OLDER_VERSION = "1.1.1w-0+deb11u1"
OLDER_HASHES = {  # SHA-256, of amd64
    "libssl1.1": "aadf8b4b197335645b230c2839b4517aa444fd2e8f434e5438c48a18857988f7",
    "libssl-dev": "56aab36e214954ff19e55cb7ebc96921ebd6387c266c906649ad909933d455b7",
}

# Replacements for what OpenSSL 1.1.0 made opaque or removed.
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
        shutil.move(_source(work), dest / SOURCE_FOLDER)
    flags = [f"-L{dest / LIBRARIES}", "-l:libecryptfs.so.1", "-lcrypto"]
    _compile(dest / SOURCE_FOLDER, flags, dest / MODULE)  # last: its presence marks the rest as complete
    return dest


def build_older(built: Path) -> Path:
    """Builds the key module with OpenSSL 1.1.1, below `built`, which `build` has returned. Returns its folder, which
    has the module and `LIBRARIES`.

    Raises LabUnavailable if Debian 11's packages cannot be downloaded or are not the pinned ones."""
    dest = built / OLDER
    if (dest / MODULE).exists():
        return dest
    dest.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ecryptfsd-") as temporary:
        work = Path(temporary)
        say_on_stderr(f"downloading OpenSSL {OLDER_VERSION}")
        apt_get = _private_apt(work, _archive("deb", OLDER_RELEASE))
        _succeed([*apt_get, "download", *(f"{package}={OLDER_VERSION}" for package in OLDER_HASHES)], work)
        for package, wanted in OLDER_HASHES.items():
            file = next(work.glob(f"{package}_*.deb"))
            if hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
                raise LabUnavailable(f"{file.name} is not the pinned one: its SHA-256 is not {wanted}")
            packages.unpack(file, dest)
    flags = [f"-I{dest / 'usr/include'}", f"-I{dest / 'usr/include/x86_64-linux-gnu'}"]
    flags += [f"-L{built / LIBRARIES}", "-l:libecryptfs.so.1", f"-L{dest / LIBRARIES}", "-l:libcrypto.so.1.1"]
    _compile(built / SOURCE_FOLDER, flags, dest / MODULE)
    return dest


def _source(work: Path) -> Path:
    """Downloads the source package's tar file, whose hash apt checks, and unpacks it."""
    say_on_stderr(f"downloading the source of {SOURCE}")
    apt_get = _private_apt(work, _archive("deb-src"))
    _succeed([*apt_get, "source", "--download-only", "--tar-only", SOURCE], work)
    (work / "source").mkdir()
    archive = next(work.glob(f"{SOURCE}_*.orig.tar.*"))
    _succeed(["tar", "--extract", "--no-same-owner", "--file", str(archive), "--directory", "source"], work)
    return next((work / "source").iterdir())


def _private_apt(work: Path, archive: str) -> list[str]:
    """Returns an apt-get command with lists of its own, of `archive` (sources.list(5)) only, and updates them."""
    private = work / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (private / folder).mkdir(parents=True)
    sources = private / "private.sources"
    sources.write_text(archive)
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
    return apt_get


def _archive(kind: str, release: str | None = None) -> str:
    """Returns the system's Debian archives as sources.list(5) of `kind`, "deb" or "deb-src". `release`: that one
    instead of the system's own."""
    wanted = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(SIGNED_BY)"
    which = ["Created-By: Packages", "Origin: Debian", "Component: main"]
    which += ["Label: Debian"] if release else []  # not Debian-Security, which has other names of releases
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", wanted, *which], capture_output=True, text=True, check=True
    ).stdout
    if not found:
        raise LabUnavailable("apt's lists know no Debian archive: run `apt-get update` as root")
    stanzas = []
    for line in found.splitlines():
        uri, own, component, keys = line.split("\t")
        stanza = f"Types: {kind}\nURIs: {uri}\nSuites: {release or own}\nComponents: {component}\n"
        stanzas.append(stanza + (f"Signed-By: {keys}\n" if keys.startswith("/") else ""))
    return "\n".join(dict.fromkeys(stanzas))


def _compile(source: Path, libraries: list[str], module: Path) -> None:
    """Compiles the openssl key module. `libraries`: flags of the compiler."""
    code = source / "src/key_mod/ecryptfs_key_mod_openssl.c"
    text = code.read_text()
    for old, new in CHANGES.items():
        if old not in text:
            raise LabUnavailable(f"{code.name} is not what it was: it has no {old!r}")
        text = text.replace(old, new)
    # Lazy binding, because the module refers to a function that is not defined anywhere (and never called).
    flags = ["-D_GNU_SOURCE", "-O2", "-w", "-shared", "-fPIC", "-Wl,-z,lazy"]
    with tempfile.TemporaryDirectory(prefix="ecryptfsd-") as temporary:
        changed, made = Path(temporary) / code.name, Path(temporary) / module.name
        changed.write_text(text)
        _succeed(["gcc", *flags, f"-I{code.parent}", str(changed), "-o", str(made), *libraries], code.parent)
        shutil.move(made, module)


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


def new_key(passphrase: bytes, bits: int) -> bytes:
    """Returns a new RSA key as a PEM file under a passphrase, in the format that ecryptfs-manager writes."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(passphrase),
    )


def _mount_options(work: Path, bits: int) -> str:
    passphrase = secrets.token_hex(8)
    (work / "key.pem").write_bytes(new_key(passphrase.encode("ascii"), bits))
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
