"""A daemon with a key module in a process of its own, beside one that it runs itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.violent import SECRET
from upcall.core.errors import Refused, UsageError
from upcall.daemon.plugins import Overrides
from upcall.process.control import DaemonControl
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import PATIENCE, RunningBroker, RunningDaemon, until

KEY = b"0123456789abcdef"
ISOLATED = {"violent": "tests.violent:VIOLENT"}
INLINE = {"toy": "upcall.testing.toy:TOY"}


class Scene:
    """A broker, a daemon, and keys of both modules; `other` is a key of the module that is run inline."""

    def __init__(self, broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, other: str) -> None:
        self.broker, self.daemon, self._keyring, self.other = broker, daemon, keyring, other
        self._count = 0

    def key(self, what: str) -> str:
        self._count += 1
        return self._keyring.add(f"{self._count:016x}", "violent", what.encode())

    def wrap(self, signature: str, timeout: float = PATIENCE) -> str:
        """What came of it: the reason, or "answered"."""
        with self.broker.client(timeout) as client:
            try:
                assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
            except Refused as refused:
                return refused.reason
        return "answered"

    def status(self) -> dict[str, Any]:
        """What the daemon says of the isolated module."""
        with DaemonControl() as control:
            rows = control.status()["keys"]
        found: dict[str, Any] = next(row for row in rows if row.get("isolated"))
        return found


@pytest.fixture
def scene(
    folder: Path, broker: RunningBroker, keyring: FolderKeyring, signature: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder.parent / "run"))
    path = [Path(__file__).parents[1]]
    with RunningDaemon(folder, folder.parent / "keys", INLINE, path, control=True, isolated=ISOLATED) as daemon:
        broker.registered(daemon.pid)
        yield Scene(broker, daemon, keyring, signature)


class Steady:
    """A requester that uses the other module all the time; `said` is what came of it."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.said = {"answered"}

    def _run(self) -> None:
        while not self._stop.is_set():
            self.said.add(self._scene.wrap(self._scene.other))

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("verb", ["abort", "segv", "scribble", "leak_descriptors", "raise", "text", "open_abort"])
def test_a_crash_fails_only_its_own_requests(scene: Scene, verb: str) -> None:
    good, bad = scene.key("peace"), scene.key(verb)
    assert scene.wrap(good) == "answered"
    with Steady(scene) as steady:
        for _ in range(3):
            assert scene.wrap(bad) == "module-broke"
            assert scene.wrap(good) == "answered"
    assert steady.said == {"answered"}
    assert scene.daemon.process.poll() is None
    assert SECRET not in scene.daemon.log


def test_a_hang_times_out_only_its_own_request(scene: Scene) -> None:
    good, bad = scene.key("peace"), scene.key("hang_with_everything")
    assert scene.wrap(good) == "answered"  # its process runs: what takes long now is the hang
    with Steady(scene) as steady:
        assert scene.wrap(bad, timeout=0.5) == "timed-out"
        scene.daemon.logged("why=hangs")
        assert scene.wrap(good) == "answered"
    assert steady.said == {"answered"}
    assert scene.status()["restarts"] == 1


def test_keys_of_other_modules_are_answered_while_one_hangs(scene: Scene) -> None:
    good, bad = scene.key("peace"), scene.key("hang_with_everything")
    assert scene.wrap(good) == "answered"
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(scene.wrap, bad)
        scene.broker.pending(1)
        assert [scene.wrap(scene.other) for _ in range(3)] == ["answered"] * 3
        assert not hanging.done(), "the others were answered first"
        os.kill(scene.status()["pid"], signal.SIGKILL)
        assert hanging.result(PATIENCE) == "module-broke"


def test_a_killed_isolated_process_is_restarted_by_the_next_request(scene: Scene) -> None:
    good = scene.key("peace")
    assert scene.wrap(good) == "answered"
    pid = scene.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    scene.daemon.logged("module-died")
    assert scene.wrap(good) == "answered"
    found = scene.status()
    assert found == {"module": "violent", "isolated": True, "pid": found["pid"], "restarts": 1, "breaker": "closed"}
    assert found["pid"] != pid


def test_a_module_that_keeps_crashing_is_refused_at_once(scene: Scene) -> None:
    bad = scene.key("open_abort")
    assert [scene.wrap(bad) for _ in range(3)] == ["module-broke"] * 3
    until(lambda: scene.wrap(bad) == "module-off", "it is left alone")
    assert scene.status()["breaker"] != "closed"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_isolated_process_ends_with_its_daemon(scene: Scene, how: signal.Signals) -> None:
    """Also when it hangs: the kernel kills it when the daemon is killed."""
    assert scene.wrap(scene.key("peace")) == "answered"
    pid = scene.status()["pid"]
    if how == signal.SIGKILL:
        os.kill(pid, signal.SIGSTOP)
    scene.daemon.signal(how)
    scene.daemon.wait()
    until(lambda: not Path(f"/proc/{pid}").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text(), "it ended")


def test_locking_the_last_key_ends_the_process(scene: Scene) -> None:
    good = scene.key("peace")
    assert scene.wrap(good) == "answered"
    with DaemonControl() as control:
        assert control.lock(good) == 1
    assert scene.status()["pid"] is None
    assert scene.wrap(good) == "locked"


# --- what nobody pays for who has no isolated modules --------------------------------------------------------


def test_a_daemon_with_inline_modules_only_imports_no_isolation_code() -> None:
    code = (
        "import sys, upcall.daemon.__main__\n"
        "print([name for name in sys.modules if 'isolation' in name or name in ('subprocess', 'multiprocessing')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_plugins_and_options_decide_which_modules_are_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    from upcall.daemon import plugin_discovery as finding
    from upcall.keymodule import GROUP
    from upcall.keys.plugins import Installed

    plugins = [Installed(name, GROUP, f"{name}:module", name == "two", "them", "1") for name in ("one", "two")]
    monkeypatch.setattr(finding, "installed", lambda: plugins)

    def isolated(overrides: Overrides) -> dict[str, bool]:
        found = finding.found(overrides)
        assert found.overrides == overrides  # for the next discovery
        assert [module.spec for module in found.modules] == ["one:module", "two:module"]
        return {module.alias: module.isolated for module in found.modules}

    assert isolated(Overrides()) == {"one": False, "two": True}
    assert isolated(Overrides(isolate=("one",))) == {"one": True, "two": True}
    assert isolated(Overrides(inline=("two",))) == {"one": False, "two": False}
    with pytest.raises(UsageError, match="no key module 'three'"):
        isolated(Overrides(inline=("three",)))
    with pytest.raises(UsageError, match="cannot be both"):
        isolated(Overrides(("one",), ("one",)))
