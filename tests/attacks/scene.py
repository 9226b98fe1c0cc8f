"""Sets up attacks: a network namespace, root's broker, the victim's daemon, and load."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.attacks import raw
from tests.attacks.attacker import become
from upcall.broker.settings import BrokerSettings
from upcall.client import Client, NoBroker
from upcall.daemon.plugins import Module, Plugins
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.packets import CIPHER_AES_128, TAG_66, Ask, FileKey, pack_ask, pack_file_key
from upcall.testing.broker import BrokerForTests
from upcall.testing.daemon import DaemonForTests
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import ONLY_AGENT, PATIENCE, NotInTime, until
from upcall.testing.toy import TOY, make_toy_key

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
TREE = Path(os.environ.get("UPCALL_ATTACK_TREE", PROJECT))
BEFORE = TREE != PROJECT  # the code of another, vulnerable tree is attacked: only counts, asserts nothing
VICTIM, ATTACKER, STRANGER = 64301, 64302, 64303
IN_FLIGHT = 32  # the broker's limit for one uid
_CLONE_NEWNET = 0x40000000


def _runs_for_others(python: str) -> bool:
    try:
        found = subprocess.run(
            [python, "-c", "import upcall, cryptography"],
            env=surroundings(), cwd="/", preexec_fn=lambda: become(ATTACKER), check=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return False
    return found.returncode == 0


def surroundings() -> dict[str, str]:
    """Returns the environment in which Python imports the attacked code."""
    packages = TREE / ".venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    installed = [str(packages)] if packages.is_dir() else site.getsitepackages()
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join([str(TREE), *installed])}


@functools.cache
def python() -> str | None:
    """Returns a Python that other users can run and that imports the attacked code; None without one. The one that
    runs the tests may be in a private home folder."""
    candidates = (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}")
    return next(filter(_runs_for_others, candidates), None)


def tries(ordinary: int) -> int:
    return int(os.environ.get("UPCALL_ATTACK_TRIES", ordinary))


class Network:
    """A network namespace, so that attackers that bind all portids do not affect other sockets."""

    def __init__(self) -> None:
        ready, go = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                done = ctypes.CDLL(None).unshare(_CLONE_NEWNET)
                os.write(ready[1], b"y" if done == 0 else b"n")
                os.close(go[1])
                os.read(go[0], 1)
            finally:
                os._exit(0)
        try:
            if os.read(ready[0], 1) != b"y":
                raise NotInTime("no network namespace is to be had")
            self._fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for end in (*ready, *go):
                os.close(end)

    def enter(self) -> None:
        if ctypes.CDLL(None, use_errno=True).setns(self._fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    def close(self) -> None:
        os.close(self._fd)


class Process:
    """A process that runs a module of the attacked code."""

    def __init__(
        self, network: Network, log: Path, arguments: Sequence[str], uid: int = 0, run: Path | None = None,
        delays: Sequence[str] = (),
    ) -> None:  # fmt: skip
        def before() -> None:
            network.enter()
            if uid:
                become(uid)

        environment = {**surroundings(), **({"XDG_RUNTIME_DIR": str(run)} if run else {})}
        self._log = log
        with log.open("ab") as file:
            self._from = file.tell()
            self.process = subprocess.Popen(
                [python() or "", str(HERE / "delayed.py"), *delays, *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, cwd="/", preexec_fn=before,
            )  # fmt: skip
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_bytes()[self._from :].decode("utf-8", "replace")

    def logged(self, words: str, count: int = 1) -> None:
        until(lambda: self.log.count(words) >= count, f"{words!r} in {self._log}", 30)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def ended_by_itself(self, timeout: float) -> bool:
        """Returns whether the process ends within `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return not self.lives

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.lives:
            self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Keys:
    """One user's keys: a toy key in that user's files, and file keys that it has wrapped."""

    def __init__(self, home: Path, uid: int) -> None:
        self.home, self.uid = home, uid
        home.mkdir()
        (home / "run").mkdir(mode=0o700)
        name, blob = make_toy_key(home / "toy.key")
        self.signature = FolderKeyring(home / "keys").add(name, "slow", blob)
        self._key = TOY.open(name, blob, None)  # type: ignore[arg-type]  # it has no passphrase
        for path in (home, *home.rglob("*")):
            os.chown(path, uid, uid)
        home.chmod(0o700)

    def wrapped(self, count: int) -> dict[bytes, bytes]:
        """Returns clear key -> tag 64 packet, with a unique key in each packet."""
        found = {}
        for _ in range(count):
            clear = os.urandom(16)
            found[clear] = raw.unwrap(self.signature, self._key.wrap(pack_file_key(FileKey(CIPHER_AES_128, clear))))
        return found

    def to_wrap(self, count: int) -> dict[bytes, bytes]:
        """Returns clear key -> tag 66 packet, which contains the key in clear."""
        found = {}
        for _ in range(count):
            clear = os.urandom(16)
            file_key = pack_file_key(FileKey(CIPHER_AES_128, clear))
            found[clear] = pack_ask(Ask(TAG_66, self.signature, file_key))
        return found


class World:
    """A folder with a broker's folder, and the processes that use it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.above = Path(tempfile.mkdtemp(prefix="upcall-attack-"))
        self.above.chmod(0o755)
        self.folder = self.above / "broker"
        self.victim = Keys(self.above / "victim", VICTIM)

    def close(self) -> None:
        if "UPCALL_ATTACK_KEEP" not in os.environ:
            shutil.rmtree(self.above)

    def broker(self, *delays: str) -> Process:
        """Starts a broker, and waits until it is ready."""
        settings = BrokerForTests(BrokerSettings(self.folder))
        # Other trees are older, and have arguments NAME=VALUE.
        words = [f"folder={self.folder}", "related=no"] if BEFORE else [dumps(settings)]
        arguments = ["upcall.testing.broker", *words]
        made = Process(self.network, self.above / "broker.log", arguments, delays=delays)

        def ready() -> bool:
            if not made.lives:
                raise NotInTime(f"the broker has ended: {made.log}")
            with contextlib.suppress(NoBroker):
                return bool(self.status()["broker"]["pid"] == made.pid)
            return False

        until(ready, "a broker that answers", 30)
        return made

    def daemon(self, *delays: str, keys: Keys | None = None) -> Process:
        """Starts a daemon of the victim, or of the owner of `keys`. Does not wait for its registration."""
        keys = keys or self.victim
        plugins = Plugins((Module("slow", "slowkey:SLOW"),))
        settings = DaemonForTests(keys.home / "keys", ONLY_AGENT._replace(folder=self.folder, plugins=plugins))
        words = [f"folder={self.folder}", f"keys={settings.keys}", "module=slow=slowkey:SLOW", "ask=agent"]
        arguments = ["upcall.testing.daemon", *(words if BEFORE else [dumps(settings)])]
        log = self.above / f"daemon-{keys.uid}.log"
        return Process(self.network, log, arguments, keys.uid, keys.home / "run", delays)

    def status(self) -> dict[str, Any]:
        with Client(self.folder) as client:
            return client.status()

    def registered(self, uid: int) -> int | None:
        """Returns the pid of the registered daemon of a uid; None without one."""
        return next((one["pid"] for one in self.status()["daemons"] if one["uid"] == uid), None)

    def wait_registered(self, daemon: Process, uid: int = VICTIM) -> None:
        until(lambda: self.registered(uid) == daemon.pid, f"daemon {daemon.pid} registered", 30)

    def outcomes(self, name: str) -> int:
        """Returns the number of key requests with this outcome so far."""
        return int(self.status()["outcomes"].get("key", {}).get(name, 0))

    def until_outcomes(self, name: str, count: int) -> None:
        until(lambda: self.outcomes(name) >= count, f"{count} times {name}", 30)

    def connected(self, uid: int) -> Any:
        """Returns a connection of that uid (SO_PEERCRED reports the effective uid at connect(2))."""
        os.setegid(uid)
        os.seteuid(uid)
        try:
            return raw.connect(self.folder / "broker.sock", PATIENCE)
        finally:
            os.seteuid(0)
            os.setegid(0)


def answers(connection: Any, count: int) -> list[bytes]:
    """Returns the next `count` answers' bodies, b"" for a refusal. Fewer if the broker has ended."""
    found: list[bytes] = []
    while len(found) < count:
        try:
            data = connection.recv(raw.MOST)
        except ConnectionError:
            break
        if not data:
            break
        found.append(data[28:] if len(data) > 28 and data[25] == 0 else b"")
    return found


def leaked(clear: Sequence[bytes] | dict[bytes, bytes], got: Sequence[str]) -> int:
    """Returns how many of these keys the attacker received."""
    data = b"|".join(bytes.fromhex(one) for one in got)
    return sum(key in data for key in clear)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def serves(world: World, uid: int) -> None:
    """Asserts that many requests of the victim at once are all answered correctly."""
    keys = world.victim.wrapped(IN_FLIGHT)
    with world.connected(uid) as connection:
        for seq, packet in enumerate(keys.values()):
            connection.send(raw.request(seq, seq, VICTIM, packet))
        assert leaked(keys, [one.hex() for one in answers(connection, IN_FLIGHT)]) == IN_FLIGHT


class Score:
    """The counts of one attack: attempts and successes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tries = self.successes = self.keys = self.in_flight = self.binds = self.taken = 0

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.successes} of {self.tries} ({self.keys} of {self.in_flight} keys in flight, "
            f"{self.binds} binds tried, {self.taken} portids taken)"
        )

    def count(self, keys: int, in_flight: int, report: dict[str, Any]) -> None:
        self.tries += 1
        self.successes += keys > 0
        self.keys += keys
        self.in_flight += in_flight
        self.binds += report["tried"]
        self.taken += len(report["taken"])
