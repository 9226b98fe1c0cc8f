"""Measures eCryptfs files on a real kernel: upcall and ecryptfsd alternately, in one boot of the lab.

On the host, `rows` builds the peer and boots; in the guest, `python -m bench.files FOLDER` measures and leaves JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from upcall_rsa import signature_of
from upcall_rsa.blob import Blob, pack_blob

from bench import ecryptfsd
from bench.rows import Effort, Row, compared
from bench.stage import BenchError, Stage
from upcall.kernel import keyring
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.testing.lab import LabError, run, why_not
from upcall.testing.lab import stage as guest

_GROUP = "eCryptfs's files on a real kernel, emulated"
TIME_LIMIT = 400.0
GOALS = {"create": 8, "cold open": 3, "create x8": 15, "cold open x8": 5}
PROCESSES, EACH = 8, 20
ONE = 60  # files of a single process


def rows(_: Stage, effort: Effort) -> Iterator[Row]:
    """Measures operations per second: creating a file, and opening one that is not cached, by one process and by
    eight."""
    why = why_not()
    if why is not None:
        raise BenchError(f"the lab cannot run here: {why}")
    with tempfile.TemporaryDirectory(prefix="upcall-bench-") as folder:
        built, results = Path(folder) / "peer", Path(folder) / "results"
        try:
            ecryptfsd.build(built)
            line = [sys.executable, "-P", "-m", "bench.files", str(built), str(effort.rounds)]
            package = str(Path(__file__).resolve().parent.parent)
            result = run(line, cwd=built, timeout=TIME_LIMIT, results=results, env={"PYTHONPATH": package})
        except LabError as error:
            raise BenchError(str(error)) from error
        if result.returncode or result.kernel_faults:
            said = [*result.stderr.decode("utf-8", "replace").splitlines()[-12:], *result.kernel_faults]
            raise BenchError("in the guest: " + "\n".join(said))
        found = json.loads((results / "files.json").read_text())
    for name, goal in GOALS.items():
        ours, peer = found["ours"][name], found["peer"][name]
        yield compared(_GROUP, name, "files/s", ours, peer, "ecryptfsd, RSA-2048", at_least=goal)


# --- in the guest --------------------------------------------------------------------------------------------


class _Mount(NamedTuple):
    """The mount of one contender, and the user who opens files: requests go to the daemon of that uid."""

    who: guest.Person
    upper: Path


def _create(mount: _Mount, folder: str, count: int) -> float:
    """Creates files. Returns files per second."""

    def work() -> float:
        place = mount.upper / folder
        place.mkdir()
        begun = time.monotonic()
        for number in range(count):
            os.close(os.open(place / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        return time.monotonic() - begun

    return count / guest.do_as(mount.who, work)


def _open(mount: _Mount, folder: str, count: int) -> float:
    def work() -> float:
        begun = time.monotonic()
        for number in range(count):
            os.close(os.open(mount.upper / folder / str(number), os.O_RDONLY))
        return time.monotonic() - begun

    return count / guest.do_as(mount.who, work)


def _at_once(mount: _Mount, flags: int, folder: str, count: int) -> float:
    """Measures eight processes that start together, each with files of its own. Returns files per second."""

    def work() -> float:
        for process in range(PROCESSES):
            (mount.upper / f"{folder}.{process}").mkdir(exist_ok=True)
        waiting, go = os.pipe()
        children = []
        for process in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                _child(waiting, go, mount.upper / f"{folder}.{process}", flags, count)
            children.append(pid)
        begun = time.monotonic()
        os.close(go)
        failed = [child for child in children if os.waitpid(child, 0)[1]]
        if failed:
            raise RuntimeError(f"{len(failed)} of {PROCESSES} processes failed")
        return time.monotonic() - begun

    return PROCESSES * count / guest.do_as(mount.who, work)


def _child(waiting: int, go: int, place: Path, flags: int, count: int) -> NoReturn:
    try:
        os.close(go)
        os.read(waiting, 1)  # the pipe's end is the start signal
        for number in range(count):
            os.close(os.open(place / str(number), flags, 0o600))
    except OSError as error:
        print(f"{place}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _measure(mounts: dict[str, _Mount], rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in GOALS} for name in mounts}
    for number in range(rounds):
        for what in GOALS:
            if what.startswith("cold"):
                ecryptfsd.forget_files()
            for name in list(mounts) if number % 2 == 0 else reversed(list(mounts)):
                found[name][what].append(_one(mounts[name], what, f"round{number}"))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def _one(mount: _Mount, what: str, folder: str) -> float:
    if what == "create":
        return _create(mount, folder, ONE)
    if what == "cold open":
        return _open(mount, folder, ONE)
    creating = what == "create x8"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY if creating else os.O_RDONLY
    return _at_once(mount, flags, folder, EACH)


def _enrol(who: guest.Person, pem: bytes, passphrase: bytes) -> str:
    """Enrols the peer's key for another user, so that both do the same work."""
    key = serialization.load_pem_private_key(pem, passphrase)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError("the peer's key is not of RSA")
    signature = signature_of(key.public_key())

    def work() -> None:
        path = who.home / "key.pem"
        path.touch(0o600)
        path.write_bytes(pem)
        blob = pack_blob(Blob(str(path), None, passphrase))
        keyring.add_user_key(signature, pack_auth_tok(AuthTok(signature, "openssl", blob)))

    guest.do_as(who, work)
    return signature


def main(built: Path, rounds: int) -> None:
    """Measures in the guest: root's files with ecryptfsd, alice's with upcall, with the same RSA-2048 key."""
    root, alice = guest.person("root"), guest.person("alice")
    work = Path("/tmp/peer")
    work.mkdir()
    peer = ecryptfsd.start_peer(built, work)
    passphrase = (work / "passphrase").read_bytes().strip().removeprefix(b"openssl_passwd=")
    signature = _enrol(alice, (work / "key.pem").read_bytes(), passphrase)
    guest.start_broker()
    guest.start_daemon(alice)
    lower, upper = Path("/tmp/ours.lower"), Path("/tmp/ours")
    guest.mount(alice, lower, upper, signature)
    mounts = {"peer": _Mount(root, peer.upper), "ours": _Mount(alice, upper)}
    found = _measure(mounts, rounds)
    Path(os.environ["UPCALL_LAB_RESULTS"], "files.json").write_text(json.dumps(found))
    guest.unmount(upper)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
