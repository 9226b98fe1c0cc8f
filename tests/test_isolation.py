"""Key modules in processes of their own: real processes, which crash, hang, leak and lie."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.violent import SECRET
from upcall.core.errors import ModuleFailed, Refused, UpcallError
from upcall.daemon.isolation import child
from upcall.daemon.isolation.child import CONCURRENT
from upcall.daemon.isolation.module import IsolatedModule
from upcall.keymodule import Closable, KeyModule, Public, Watched
from upcall.testing.contract import KeyModuleContract, Made
from upcall.testing.gate import Gate
from upcall.testing.processes import PATIENCE, until
from upcall.testing.secrets import GivenSecrets
from upcall.testing.toy import TOY, make_toy_key

SIGNATURE = "0123456789abcdef"
KEY = b"a file key"


class Scene:
    """An isolated module, its log, and the patience of the requests that the test makes."""

    def __init__(self, spec: str, memory: int = 0) -> None:
        self.patience = PATIENCE
        self.log: list[str] = []
        self.module = IsolatedModule("it", spec, lambda: time.monotonic() + self.patience, self._note, memory)

    def _note(self, event: str, /, **fields: object) -> None:
        self.log.append(f"{event} {fields}")

    def open(self, what: str, secrets: Any = None, signature: str = SIGNATURE) -> Any:
        return self.module.open(signature, what.encode(), secrets or GivenSecrets())

    @property
    def pid(self) -> int | None:
        found = self.module.report()["pid"]
        assert found is None or isinstance(found, int)
        return found

    def failures(self) -> int:
        return sum(line.startswith("module-died") for line in self.log)

    def failed(self, times: int) -> None:
        until(lambda: self.failures() == times, f"{times} failures in the log")


Make = Callable[..., Scene]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    made: list[Scene] = []

    def start(spec: str = "tests.violent:VIOLENT", memory: int = 0) -> Scene:
        made.append(Scene(spec, memory))
        return made[-1]

    yield start
    for scene in made:
        scene.module.close()


@pytest.fixture
def scene(make: Make) -> Scene:
    return make()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE", 0.2)


def outcome(call: Callable[[], object]) -> str:
    """What came of a call, in a word."""
    try:
        call()
    except Refused as refused:
        return refused.reason
    except UpcallError as error:
        return type(error).__name__
    return "done"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# --- the same face -------------------------------------------------------------------------------------------


@pytest.fixture(params=["inline", "isolated"])
def toy(request: pytest.FixtureRequest, make: Make) -> KeyModule:
    return TOY if request.param == "inline" else make("upcall.testing.toy:TOY").module


class TestTheContract(KeyModuleContract):
    @pytest.fixture(autouse=True)
    def start(self, make: Make) -> None:
        self.module = make("upcall.testing.toy:TOY").module

    def make(self, tmp_path: Path) -> Made:
        path = tmp_path / "key"
        return Made(self.module, *make_toy_key(path), file=path)


def test_a_toy_key_in_a_child_unwraps_what_it_wrapped_and_refuses_garbage(toy: KeyModule, tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key")
    handle = toy.open(signature, blob, GivenSecrets())
    for size in (1, 16, 67):
        clear = os.urandom(size)
        wrapped = handle.wrap(clear)
        assert isinstance(wrapped, bytes)
        assert handle.unwrap(wrapped) == clear
    for garbage in (b"", b"x", wrapped[:-1], bytes(8000), bytes(200_000)):
        with pytest.raises(ModuleFailed):
            handle.unwrap(garbage)
    assert not isinstance(handle, Public)


def test_a_passphrase_reaches_the_child_and_is_wiped_right_or_wrong(toy: KeyModule, tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key", b"right")
    told = GivenSecrets(b"right")
    assert toy.open(signature, blob, told).wrap(b"x")
    assert told.wiped()
    wrong = GivenSecrets(b"wrong")
    with pytest.raises(ModuleFailed, match="the passphrase does not fit") as caught:
        toy.open(signature, blob, wrong)
    assert wrong.wiped()
    assert "right" not in str(caught.value)
    with pytest.raises(Refused, match="locked"):
        toy.open(signature, blob, GivenSecrets())


def test_errors_from_the_child_keep_their_kind(toy: KeyModule, tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key")
    with pytest.raises(ModuleFailed, match=f"is not the key {SIGNATURE}"):
        toy.open(SIGNATURE, blob, GivenSecrets())
    for nonsense in (b"", b"\0", b"\xff" * 100, bytes(4096)):
        with pytest.raises(ModuleFailed):
            toy.open(signature, nonsense, GivenSecrets())


def test_a_key_is_stale_once_its_file_is_gone(toy: KeyModule, tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key")
    handle = toy.open(signature, blob, GivenSecrets())
    assert isinstance(handle, Watched)
    assert handle.stale() is False
    (tmp_path / "key").unlink()
    assert handle.stale() is True


def test_a_hundred_threads_share_one_key(toy: KeyModule, tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key")
    handle = toy.open(signature, blob, GivenSecrets())

    def turn(number: int) -> bool:
        clear = number.to_bytes(4) * 8
        return handle.unwrap(handle.wrap(clear)) == clear

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(turn, range(300)))


def test_a_key_in_a_child_has_the_optional_methods_of_its_module(scene: Scene, tmp_path: Path) -> None:
    handle = scene.open("peace")
    assert isinstance(handle, Public)
    assert isinstance(handle, Closable)
    assert isinstance(handle, Watched)
    assert int(handle.export_public()) == scene.pid
    (tmp_path / "there").touch()
    watching = scene.open(f"watching {tmp_path / 'there'}")
    assert not watching.stale()
    (tmp_path / "there").unlink()
    assert watching.stale()
    assert not handle.stale()


def test_closing_the_last_key_ends_the_process(scene: Scene, tmp_path: Path) -> None:
    one, two = scene.open(f"close_marks {tmp_path / 'closed'}"), scene.open("peace")
    pid = scene.pid
    assert pid
    one.close()
    assert (tmp_path / "closed").exists()
    assert outcome(lambda: one.wrap(KEY)) == "ModuleFailed"
    assert scene.pid == pid
    two.close()
    two.close()
    until(lambda: gone(pid), "the process ended")
    assert outcome(lambda: scene.open("peace").wrap(KEY)) == "done"
    assert scene.failures() == 0


# --- what the daemon is asked --------------------------------------------------------------------------------


def test_a_pin_asked_for_by_the_child_is_delivered_and_wiped(scene: Scene) -> None:
    told = GivenSecrets(pins={"token": b"1234"})
    assert scene.open("pin", told).wrap(KEY) == b"1234"
    assert told.wiped()
    assert told.verdicts == [("token", True)]
    assert told.touches == ["token"]
    assert outcome(lambda: scene.open("pin", GivenSecrets()).wrap(KEY)) == "locked"
    assert outcome(lambda: scene.open("pin_elsewhere", told).wrap(KEY)) == "done"


def test_a_prompt_is_answered_in_the_requests_thread_without_blocking_others(scene: Scene) -> None:
    """A user who thinks about a PIN delays no other request."""
    asked, leave, threads = threading.Event(), threading.Event(), []

    class Slow(GivenSecrets):
        def pin(self, token: str, prompt: str, /) -> bytearray:
            threads.append(threading.get_ident())
            asked.set()
            assert leave.wait(PATIENCE)
            return bytearray(b"1234")

    handle, other = scene.open("pin", Slow()), scene.open("peace")
    results: list[bytes] = []
    thread = threading.Thread(target=lambda: results.append(handle.wrap(KEY)))
    thread.start()
    assert asked.wait(PATIENCE)
    assert other.unwrap(other.wrap(KEY)) == KEY
    leave.set()
    thread.join(PATIENCE)
    assert results == [b"1234"]
    assert threads == [thread.ident]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Refused("prompting"), "prompting"),
        (ModuleFailed("no such file"), "ModuleFailed"),
        (OSError(SECRET), "module-broke"),
    ],
    ids=["Refused", "ModuleFailed", "OSError"],
)
def test_a_prompt_that_fails_refuses_its_request_with_the_reason(scene: Scene, error: Exception, said: str) -> None:
    class Failing(GivenSecrets):
        def passphrase(self, source: str, /) -> bytearray:
            assert source == "ask"
            raise error

    assert outcome(lambda: scene.open("passphrase ask", Failing()).wrap(KEY)) == said


# --- modules that do not behave ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("raise", "module-broke"),
        ("leave", "module-broke"),
        ("text", "module-broke"),
        ("huge", "module-broke"),
        ("fail", "ModuleFailed"),
        ("refuse", "locked"),
    ],
)
def test_an_error_in_the_module_fails_its_request_and_keeps_the_process(make: Make, verb: str, said: str) -> None:
    scene = make(memory=200 << 20)
    handle, other = scene.open(verb), scene.open("peace")
    pid = scene.pid
    assert outcome(lambda: handle.wrap(KEY)) == said
    assert other.unwrap(other.wrap(KEY)) == KEY
    assert scene.pid == pid
    assert scene.failures() == 0
    assert SECRET not in "".join(scene.log)


@pytest.mark.parametrize("verb", ["open_raise", "open_none"])
def test_an_error_in_open_is_refused_and_other_keys_work(scene: Scene, verb: str) -> None:
    assert outcome(lambda: scene.open(verb)) == "module-broke"
    assert scene.open("peace").wrap(KEY)


def test_a_missing_module_is_refused_by_name(make: Make) -> None:
    with pytest.raises(ModuleFailed, match="No module named 'nowhere'"):
        make("nowhere:module").open("")


@pytest.mark.parametrize("verb", ["abort", "segv", "exit_now", "scribble"])
def test_a_crash_fails_its_request_at_once_and_a_new_process_serves_the_next(scene: Scene, verb: str) -> None:
    handle, other = scene.open(verb), scene.open("peace")
    assert not other.stale()
    assert outcome(lambda: handle.wrap(KEY)) == "module-broke"  # at its deadline it would be "timed-out"
    assert other.stale()
    assert outcome(lambda: other.wrap(KEY)) == "module-broke"  # who does not look whether it is stale
    again = scene.open("peace")
    assert again.unwrap(again.wrap(KEY)) == KEY
    scene.failed(1)


def test_a_crash_refuses_all_requests_in_the_process(scene: Scene, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        doors = [Gate(tmp_path / str(number)) for number in range(3)]
        verbs = ("abort_at_gate", "gate", "gate")
        keys: list[Any] = [scene.open(f"{verb} {door.path}") for verb, door in zip(verbs, doors, strict=True)]
        calls = [pool.submit(outcome, functools.partial(key.wrap, KEY)) for key in keys]
        visitors = [door.arrived() for door in doors]
        visitors[0].release()
        assert [call.result(PATIENCE) for call in calls] == ["module-broke"] * 3
        for door in doors:
            door.close()


def test_leaked_descriptors_exhaust_only_the_child(scene: Scene) -> None:
    handle, other = scene.open("leak_descriptors"), scene.open("peace")
    before = len(os.listdir("/proc/self/fd"))
    assert outcome(lambda: handle.wrap(KEY)) == "module-broke"  # OSError: too many open files
    assert len(os.listdir("/proc/self/fd")) <= before
    scene.failed(1)  # it can open nothing any more: the next request gets a new one
    assert other.stale()
    assert scene.open("peace").wrap(KEY)


def test_leaked_memory_exhausts_only_the_child(make: Make) -> None:
    scene = make(memory=200 << 20)
    handle = scene.open("leak_memory")
    assert outcome(lambda: handle.wrap(KEY)) == "module-broke"  # MemoryError
    scene.failed(1)
    assert scene.open("peace").wrap(KEY)


def test_output_of_a_module_is_discarded(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    assert scene.open("shout").wrap(KEY)
    assert capfd.readouterr() == ("", "")


def test_a_forked_child_of_a_module_answers_no_request(scene: Scene) -> None:
    handle = scene.open("fork")
    assert [outcome(lambda: handle.wrap(KEY)) for _ in range(3)] == ["done"] * 3
    assert scene.failures() == 0


def test_processes_forked_by_a_module_end_with_it(scene: Scene, tmp_path: Path) -> None:
    said = outcome(lambda: scene.open(f"fork_and_stay {tmp_path / 'pid'}").wrap(KEY))
    assert said == "module-broke"  # and not "timed-out", although the socket is still open there
    left = int((tmp_path / "pid").read_text())
    until(lambda: gone(left) or ") Z" in Path(f"/proc/{left}/stat").read_text(), "what was left behind ended")


def test_a_process_killed_between_two_requests_is_restarted(scene: Scene) -> None:
    handle = scene.open("peace")
    pid = scene.pid
    assert pid
    assert not handle.stale()
    os.kill(pid, signal.SIGKILL)
    until(handle.stale, "the handle knows")
    assert scene.open("peace").wrap(KEY)
    assert scene.pid != pid
    assert scene.module.report()["restarts"] == 1


def test_the_child_runs_with_limits_no_new_privileges_and_null_streams(scene: Scene) -> None:
    found = scene.open("environment").wrap(KEY).decode().splitlines()
    assert "NoNewPrivs:\t1" in found
    assert "Max core file size 0 0 bytes" in found
    assert "Max open files 256 256 files" in found
    assert "dumpable 0" in found
    assert found[-3:] == ["/dev/null"] * 3


# --- hangs, and modules that keep breaking -------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["hang", "hang_with_everything", "stop"])
@pytest.mark.usefixtures("impatient")
def test_a_hanging_request_times_out_and_its_process_is_killed(scene: Scene, verb: str) -> None:
    handle = scene.open(verb)
    pid = scene.pid
    assert pid
    scene.patience = 0.1
    assert outcome(lambda: handle.wrap(KEY)) == "timed-out"
    scene.failed(1)
    assert handle.stale()
    until(lambda: gone(pid), "the process was killed")
    scene.patience = PATIENCE
    assert scene.open("peace").wrap(KEY)
    assert "hangs" in "".join(scene.log)


@pytest.mark.usefixtures("impatient")
def test_a_hang_does_not_fail_the_other_requests_in_its_process(scene: Scene, gate: Gate) -> None:
    hanging, waiting = scene.open("hang"), scene.open(f"gate {gate.path}")
    pid = scene.pid
    assert pid
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(outcome, lambda: waiting.wrap(KEY))
        visitor = gate.arrived()
        scene.patience = 0.05
        assert outcome(lambda: hanging.wrap(KEY)) == "timed-out"
        scene.failed(1)
        scene.patience = PATIENCE
        assert scene.open("peace").wrap(KEY)  # in a process beside it
        assert scene.pid != pid
        assert not gone(pid)
        visitor.release()
        assert call.result(PATIENCE) == "done"
    until(lambda: gone(pid), "the process that hangs was killed")


def test_a_late_answer_stops_the_watch_and_keeps_the_process(scene: Scene, gate: Gate) -> None:
    before = set(threading.enumerate())
    handle = scene.open(f"gate {gate.path}")
    scene.patience = 0.05
    assert outcome(lambda: handle.wrap(KEY)) == "timed-out"
    gate.arrived().release()
    scene.patience = PATIENCE
    assert handle.unwrap(b"x")
    until(
        lambda: not any(t.name.startswith("Thread-") for t in {*threading.enumerate()} - before),
        "nobody looks after it",
    )
    assert not handle.stale()
    assert scene.failures() == 0


def test_requests_beyond_the_childs_concurrency_are_refused_as_busy(scene: Scene, gate: Gate) -> None:
    handle = scene.open(f"gate {gate.path}")
    with ThreadPoolExecutor(CONCURRENT) as pool:
        calls = [pool.submit(outcome, lambda: handle.wrap(KEY)) for _ in range(CONCURRENT)]
        visitors = [gate.arrived() for _ in range(CONCURRENT)]
        scene.patience = 0.05
        assert outcome(lambda: handle.wrap(KEY)) == "busy"
        for visitor in visitors:
            visitor.release()
        assert {call.result(PATIENCE) for call in calls} == {"done"}


def test_a_module_that_keeps_crashing_is_turned_off_and_retried_later(scene: Scene, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.touch()

    def request() -> str:
        return outcome(lambda: scene.open(f"abort_or_not {bad}").wrap(KEY))

    assert [request() for _ in range(3)] == ["module-broke"] * 3
    until(lambda: request() == "module-off", "it is left alone")  # each failure more makes that longer
    assert scene.module.report()["breaker"] != "closed"
    bad.unlink()
    until(lambda: request() == "done", "it was tried again")
    assert scene.module.report()["breaker"] == "closed"
    assert [request() for _ in range(3)] == ["done"] * 3


def test_a_key_that_keeps_crashing_does_not_turn_off_other_keys(scene: Scene) -> None:
    said: list[str] = []

    def turned_off() -> bool:
        said.append(outcome(lambda: scene.open("abort", signature="f" * 16).wrap(KEY)))
        assert outcome(lambda: scene.open("peace").wrap(KEY)) == "done"
        return said[-1] == "module-off"

    until(turned_off, "the key that breaks it is left alone")
    assert said[:3] == ["module-broke"] * 3


def test_a_module_that_keeps_crashing_in_open_is_turned_off(scene: Scene) -> None:
    assert [outcome(lambda: scene.open("open_abort")) for _ in range(3)] == ["module-broke"] * 3
    until(lambda: outcome(lambda: scene.open("open_abort")) == "module-off", "it is left alone")
