"""Starts the processes of a soak: a broker, daemons of up to three uids, requesters, and disturbing processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.noop import ALIAS as NOOP
from bench.packets import new_signature, noop_wrap
from bench.quota import Sender
from bench.rsa import new_key
from bench.stage import BenchError, Client, Stage, plugins
from upcall.client import Client as Asking
from upcall.client import NoBroker
from upcall.daemon.settings import DaemonSettings
from upcall.keymodule import Limits, Making
from upcall.keys.enrolment import chosen
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.packets import SIGNATURE_LENGTH
from upcall.testing.secrets import GivenSecrets

QUIET, RESTLESS, STRANGER = 61001, 61002, 61003  # unused uids
_QUOTA_GROUP, _QUOTA_RATE = 30, 2000  # warnings a second
# Plugins for the soak, before the installed ones: a reload must find them again.
_PLUGINS = """[upcall.key_modules]
noop = bench.noop:module
apart = bench.noop:module
[upcall.isolated]
apart = bench.noop:module
[upcall.handlers]
dns_resolver = bench.soak.handlers:names
cifs.spnego = bench.soak.handlers:sessions
quota = bench.soak.handlers:told
"""
_PATIENCE = 20.0
_BULK = 500  # requests of a C client between two readings of the clock


class Scene:
    """The processes. `me`: the uid whose daemon has keys of every kind. As root there are two more uids: one with a
    quiet daemon, and one whose daemons are stopped, killed and replaced all the time."""

    def __init__(self, stage: Stage, seconds: float) -> None:
        self._stage, self._seconds = stage, seconds
        self.me, self.root = os.geteuid(), os.geteuid() == 0
        self.folder = stage.place()
        self.counts: dict[str, Counter[str]] = {}
        self._ends = time.monotonic() + seconds
        self._threads: list[threading.Thread] = []
        self.failed = ""
        self.may_refuse = {"files", self._bulk_of(RESTLESS)}  # their daemons are killed with pending requests

    # --- broker and daemons --------------------------------------------------------------------------------

    def open(self) -> dict[str, int]:
        """Starts all processes. Returns name -> pid of those to sample."""
        signatures = self._new_rsa(), self._new_x25519(), self._key("apart"), self._key(NOOP)
        files = {self.me: signatures[-1]}
        quiet = 0
        if self.root:
            files |= {uid: self._key(NOOP, uid) for uid in (QUIET, RESTLESS)}
            quiet = self._quiet()
        self._install()
        device = self._stage.folder / "device"
        kernel = self._talker("files", device, *(f"{uid}={signature}" for uid, signature in files.items()))
        self._stage.await_file(device, kernel)
        sender = Sender(self._stage) if self.root else None
        command = [sys.executable, "-P", "-m", "bench.soak.broker", str(self.folder), str(device)]
        broker = self._stage.start(command).pid
        self._stage.await_file(self.folder / "registration.sock", broker)
        ours = self._stage.start(
            [sys.executable, "-P", "-X", "upcall-environment", "-m", "upcall", "daemon", "--runtime", str(self.folder)]
        ).pid
        self._registered(self.me, ours)
        watched = {"broker": broker, self._name(self.me): ours}
        if sender is not None:
            self._registered(QUIET, quiet)
            watched |= {self._name(QUIET): quiet, "quota source": self._quota_source(sender)}
            self._during("warnings", lambda counts: self._warnings(sender, counts))
        self._talker("restless", self.folder, RESTLESS if self.root else -1, broker, ours)
        self._talker("keys", self.folder, *signatures)
        self._talker("visitors", self.folder, signatures[-1])
        self._talker("junk", self.folder, *((STRANGER,) if self.root else ()))
        if self.root:
            self._talker("forwarders", self.folder)
        for uid, signature in files.items():
            self._bulk(self._bulk_of(uid), uid, signature)
        return watched | {"key module, isolated": self._isolated(ours)}

    def _quota_source(self, sender: Sender) -> int:
        """Starts the quota source, and waits until it listens. Returns its pid."""
        words = [str(self.folder), str(_QUOTA_GROUP), str(sender.portid)]
        pid = self._stage.start([sys.executable, "-P", "-m", "bench.quotasource", *words]).pid
        end = time.monotonic() + _PATIENCE
        with Asking(self.folder) as asking:
            while not asking.status()["quota"].get("listening"):
                if time.monotonic() > end:
                    raise BenchError("the quota source does not listen")
                time.sleep(0.05)
        return pid

    def _install(self) -> None:
        """Installs the plugins for the processes that are started from now on."""
        site = self._stage.folder / "site"
        there = site / "upcall_soak-1.dist-info"
        there.mkdir(parents=True)
        (there / "METADATA").write_text("Metadata-Version: 2.1\nName: upcall-soak\nVersion: 1\n")
        (there / "entry_points.txt").write_text(_PLUGINS)
        os.environ["PYTHONPATH"] = str(site)

    def _name(self, uid: int) -> str:
        return {self.me: "daemon, all keys", QUIET: "daemon, one key", RESTLESS: "daemons that die"}[uid]

    def _bulk_of(self, uid: int) -> str:
        return f"bulk, {self._name(uid)}"

    def _new_rsa(self) -> str:
        return new_key(self._stage)[0][0][2 : 2 + SIGNATURE_LENGTH].decode("ascii")

    def _new_x25519(self) -> str:
        from upcall_x25519 import module

        path = self._stage.folder / "x25519.pem"
        enrolled = module.generate(
            Making(path, chosen(module.parameters, {}), bytearray(), "none", Limits(), GivenSecrets())
        )
        self._stage.add_key(enrolled.signature, "x25519", enrolled.blob)
        return enrolled.signature

    def _key(self, alias: str, uid: int | None = None) -> str:
        signature = new_signature()
        self._stage.add_key(signature, alias, uid=uid)
        return signature

    def _registered(self, uid: int, pid: int) -> None:
        end = time.monotonic() + _PATIENCE
        with Asking(self.folder) as asking:
            while not any((one["uid"], one["pid"]) == (uid, pid) for one in asking.status()["daemons"]):
                if time.monotonic() > end:
                    raise BenchError(f"the daemon {pid} of uid {uid} has not registered")
                time.sleep(0.02)

    def _quiet(self) -> int:
        """Starts the quiet daemon; by fork if its uid may not read the interpreter. Must run before threads are
        started."""
        modules = {NOOP: "bench.noop:module"}
        if not _runs_as(QUIET):
            return self._stage.daemon_as(QUIET, self.folder, modules)
        settings = dumps(DaemonSettings(self.folder, plugins=plugins(modules)))
        return self._stage.start(
            [sys.executable, "-P", "-X", "upcall-environment", "-m", "upcall.daemon", settings], QUIET
        ).pid

    def _isolated(self, daemon: int) -> int:
        """Waits for the process of the isolated key module. Returns its pid."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            for children in Path(f"/proc/{daemon}/task").glob("*/children"):
                for pid in children.read_text("ascii").split():
                    with contextlib.suppress(OSError):
                        if b"upcall.daemon.isolation" in Path(f"/proc/{pid}/cmdline").read_bytes():
                            return int(pid)
            time.sleep(0.02)
        raise BenchError("no isolated key module has been started")

    # --- requesters ----------------------------------------------------------------------------------------

    def _talker(self, kind: str, *arguments: object) -> int:
        module = "bench.soak.restless" if kind == "restless" else "bench.soak.traffic"
        words = [sys.executable, "-P", "-m", module, kind, str(self._seconds), *map(str, arguments)]
        process = self._stage.start(words, talks=True)
        self.counts[kind] = Counter()
        thread = threading.Thread(target=self._read, args=(kind, process), daemon=True)
        thread.start()
        self._threads.append(thread)
        return process.pid

    def _read(self, kind: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.counts[kind] = Counter(json.loads(line))

    def _bulk(self, name: str, uid: int, signature: str) -> None:
        """Makes requests as fast as they are answered, by a client in C."""
        drive = self._stage.client("drive-broker", self.folder / "broker.sock", uid).ready()
        drive.body(*noop_wrap(signature))
        self._during(name, lambda counts: self._drive(drive, counts))

    def _drive(self, drive: Client, counts: Counter[str]) -> None:
        found = drive.sample(_BULK, 4, 15.0)
        counts["sent"] += _BULK
        counts["answered"] += found.answered - found.refused - found.wrong  # `answered` counts all messages
        counts["refused"] += found.refused
        counts["wrong"] += found.wrong
        counts["lost"] += _BULK - found.answered

    def _warnings(self, sender: Sender, counts: Counter[str]) -> None:
        sender.send(_QUOTA_GROUP, _QUOTA_RATE, _QUOTA_RATE)
        counts["warnings"] += _QUOTA_RATE

    def _during(self, name: str, turn: Callable[[Counter[str]], None]) -> None:
        """Calls `turn` repeatedly, in a thread, until the time is over."""
        counts = self.counts[name] = Counter()

        def run() -> None:
            try:
                while time.monotonic() < self._ends:
                    turn(counts)
            except (BenchError, OSError, NoBroker, ValueError) as error:
                self.failed = f"{name}: {error}"

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def wait(self, patience: float = 60.0) -> None:
        """Waits until all processes have reported their final counts."""
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                raise BenchError("somebody who asks has not come to an end")

    def status(self) -> dict[str, object]:
        with contextlib.suppress(NoBroker, TimeoutError), Asking(self.folder) as asking:
            return asking.status()
        return {}


def _runs_as(uid: int) -> bool:
    """Returns whether this uid may read the interpreter and this code."""
    try:
        words = [sys.executable, "-c", "import bench.soak.traffic"]
        return subprocess.run(words, user=uid, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False
