"""Measures quota warnings: the cost of one, and how many are lost.

On the host the kernel is simulated: the same warnings over multicast, without the slowdown of emulation. In the lab's
guest (User-mode Linux, one processor, slow system calls) the real kernel warns (ext4), and quota_nld is compared, too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.packets import NOOP_MODULES, new_signature, noop_wrap
from bench.rows import Effort, Row, by_turns, compared
from bench.stage import BenchError, Stage, cpu_us
from upcall.client import Client, NoBroker
from upcall.kernel.netlink import NETLINK_USERSOCK
from upcall.testing.lab import LabError, run, why_not
from upcall.testing.lab import stage as guest

RATE = 10_000  # warnings per second
_OURS, _THEIRS = 30, 31  # multicast groups
_PATIENCE = 20.0
TIME_LIMIT = 400.0


# --- on the host -------------------------------------------------------------------------------------------------


class Sender:
    """The simulated kernel: a process that sends warnings."""

    def __init__(self, stage: Stage) -> None:
        self._process = stage.start([str(stage.folder / "peer"), "quota-send"], talks=True)
        self.portid = int(_line(self._process).split()[1])

    def send(self, group: int, count: int, rate: int = RATE) -> None:
        self.begin(group, count, rate)
        self.end()

    def begin(self, group: int, count: int, rate: int = RATE) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group} {count} {rate}\n".encode("ascii"))
        self._process.stdin.flush()

    def end(self) -> None:
        if _line(self._process) != b"done\n":
            raise BenchError("the played kernel has stumbled")


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    """Measures with the simulated kernel."""
    if os.geteuid() != 0:
        raise BenchError("only root may send to a netlink group")
    sender = Sender(stage)
    folder = stage.place()
    stage.broker(folder)
    source = stage.start(
        [sys.executable, "-P", "-m", "bench.quotasource", str(folder), str(_OURS), str(sender.portid)]
    )
    reader = stage.start(
        [str(stage.folder / "peer"), "quota-read", str(NETLINK_USERSOCK), str(_THEIRS), str(sender.portid)], talks=True
    )
    _line(reader)
    _until(lambda: _status(folder).get("listening"), "the source listens")
    count = int(RATE * max(1.0, 4 * effort.seconds))

    def ours() -> float:
        before = _status(folder)["received"]
        return _cost(
            source.pid,
            lambda: sender.send(_OURS, count),
            lambda: _until(lambda: _status(folder)["received"] - before >= count, "all received"),
            count,
        )

    def theirs() -> float:
        return _cost(reader.pid, lambda: sender.send(_THEIRS, count), lambda: time.sleep(0.05), count)

    found = by_turns({"ours": ours, "peer": theirs}, effort.rounds)
    status = _status(folder)
    group = f"quota warnings, {RATE:,}/s"
    yield compared(group, "processor time per warning", "us", found["ours"], found["peer"], "a reader in C", at_most=3)
    lost = status["lost"]
    yield Row(group, f"lost of {status['received'] + lost:,}", "messages", lost, goal="none", met=lost == 0)
    sender.send(_OURS, 200_000, 10_000_000)
    _until(lambda: _accounted(sender, folder) >= status["received"] + 200_000, "a burst")
    lost = _status(folder)["lost"]
    yield Row(group, "lost of 200,000 sent at once", "messages", lost, note="as fast as one processor can send")
    yield from _beside(stage, effort, sender, folder)


def _accounted(sender: Sender, folder: Path) -> int:
    """Returns how many messages the source has counted, including lost ones. Sends one more, which reveals lost
    ones."""
    sender.send(_OURS, 1)
    found = _status(folder)
    return int(found["received"] + found["lost"])


def _cost(pid: int, send: Callable[[], None], settle: Callable[[], object], count: int) -> float:
    """Returns the processor time per warning, in microseconds."""
    before = cpu_us(pid)
    send()
    settle()
    return (cpu_us(pid) - before) / count


def _beside(stage: Stage, effort: Effort, sender: Sender, folder: Path) -> Iterator[Row]:
    """Measures the round trip of another user's requests meanwhile."""
    signature = new_signature()
    stage.add_key(signature)
    stage.daemon(folder, NOOP_MODULES)
    client = stage.client("drive-broker", folder / "broker.sock", os.geteuid()).ready()
    client.body(*noop_wrap(signature)).await_daemon().run(200)

    def idle() -> float:
        return client.run(effort.messages).p50

    def flooded() -> float:
        sender.begin(_OURS, RATE * 2)
        found = client.run(effort.messages).p50
        sender.end()
        return found

    found = by_turns({"idle": idle, "flooded": flooded}, effort.rounds)
    yield compared(
        f"quota warnings, {RATE:,}/s", "another's round trip p50", "us", found["flooded"], found["idle"], "idle",
        at_most=2,
    )  # fmt: skip


def _status(folder: Path) -> dict[str, Any]:
    try:
        with Client(folder) as client:
            found: dict[str, Any] = client.status()["quota"]
            return found
    except NoBroker:
        return {}


def _until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + _PATIENCE
    while not true():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {_PATIENCE} s")
        time.sleep(0.05)


# --- in the guest ------------------------------------------------------------------------------------------------


def kernel_rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    """Measures with the real kernel."""
    why = why_not("uml")
    if why is not None:
        raise BenchError(f"the lab cannot run here: {why}")
    if shutil.which("quota_nld") is None:
        raise BenchError("there is no quota_nld; its Debian package is quota")
    with tempfile.TemporaryDirectory(prefix="upcall-bench-") as folder:
        line = [sys.executable, "-P", "-m", "bench.quota", str(stage.folder / "peer"), str(effort.rounds)]
        package = str(Path(__file__).resolve().parent.parent)
        try:
            shutil.copy(stage.folder / "peer", Path(folder) / "peer")
            line[4] = str(Path(folder) / "peer")
            result = run(
                line,
                cwd=Path(folder),
                timeout=TIME_LIMIT,
                results=Path(folder),
                env={"PYTHONPATH": package},
                kernel="uml",
            )
        except LabError as error:
            raise BenchError(str(error)) from error
        if result.returncode or result.kernel_faults:
            said = [*result.stderr.decode("utf-8", "replace").splitlines()[-12:], *result.kernel_faults]
            raise BenchError("in the guest: " + "\n".join(said))
        found = json.loads((Path(folder) / "quota.json").read_text())
    group = f"quota warnings of the real kernel (ext4, user-mode Linux), {found['rate']:,.0f}/s"
    cost = found["cost"]
    yield compared(group, "processor time per warning", "us", cost["ours"], cost["nld"], "quota_nld")
    yield compared(group, "  the same", "us", cost["ours"], cost["c"], "a reader in C")
    lost = found["lost"]
    yield Row(group, f"lost of {found['received']:,}", "messages", lost, goal="none", met=lost == 0)


def main(peer: str, rounds: int) -> None:
    """Measures in the guest: each of the three listeners alone, with the same flood."""
    from tests.kernel.quota_scene import QuotaHouse, disk

    root, alice = guest.person("root"), guest.person("alice")
    work = Path(tempfile.mkdtemp())
    work.chmod(0o755)
    local = work / "reader"
    shutil.copy(peer, local)
    count, rates = 1500, []
    (work / "house").mkdir()
    house = QuotaHouse(work / "house")
    with disk("ext4", work) as drive:
        drive.limit("u", alice.uid, files=(1, 0))
        guest.do_as(alice, (drive.point / "first").touch)
        file = str(drive.point / "second")

        def flood() -> None:
            line = [str(local), "quota-flood", file, str(count), "0"]
            done = subprocess.run(
                line, user=alice.uid, group=alice.gid, extra_groups=[], capture_output=True, check=True
            )
            rates.append(2 * count / int(done.stdout) * 1e9)

        from upcall.kernel.genetlink import look_up

        group = look_up("VFS_DQUOT", "events").group
        starts: dict[str, list[str]] = {
            "c": [str(local), "quota-read", "16", str(group), "0"],
            "nld": ["quota_nld", "-F", "-D"],
        }

        def alone(name: str) -> float:
            with subprocess.Popen(starts[name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                time.sleep(1.0)  # neither reports when it listens
                cost = _cost(process.pid, flood, lambda: time.sleep(0.5), 2 * count)
                process.send_signal(signal.SIGKILL)
            return cost

        status: dict[str, Any] = {"received": 0, "lost": 0}

        def ours() -> float:
            house.open(root)
            assert house.source is not None
            cost = _cost(house.source.pid, flood, lambda: time.sleep(0.5), 2 * count)
            found = (guest.broker_status() or {})["quota"]
            status["received"] += found["received"]
            status["lost"] += found["lost"]
            house.end()
            return cost

        cost = by_turns({"ours": ours, "nld": lambda: alone("nld"), "c": lambda: alone("c")}, min(rounds, 3), None)
        house.close()
    found = {"cost": cost, "rate": sum(rates) / len(rates), **status}
    Path("/results/quota.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
