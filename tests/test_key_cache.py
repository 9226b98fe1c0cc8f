"""Keys are opened, used, locked, expired and replaced by several threads at a time; modules and prompter are stubs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from upcall.core.errors import ModuleFailed, Refused
from upcall.core.messages import Requester
from upcall.daemon.secrets import Asker, NoPrompter
from upcall.keymodule import API, KeyModule, Secrets
from upcall.protocols.ecryptfs import key_cache
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.protocols.ecryptfs.key_secrets import KeySecrets, Serving
from upcall.protocols.ecryptfs.packets import TAG_66, Ask, FileKey, pack_ask, pack_file_key
from upcall.protocols.ecryptfs.passphrases import Passphrases
from upcall.testing.processes import PATIENCE
from upcall.wire.envelope import Envelope

KEY = "0123456789abcdef"
WRAP = Envelope(1, 1, "key", Requester(0, 0), 0, pack_ask(Ask(TAG_66, KEY, pack_file_key(FileKey(0, b"k" * 16)))))


class StubKeyring:
    """Auth tokens of the module "toy", by signature; the serial number of each is its index."""

    def __init__(self) -> None:
        self.blobs = {KEY: b"blob"}

    def find(self, description: str, /) -> int | None:
        return list(self.blobs).index(description) if description in self.blobs else None

    def read(self, serial: int, /) -> bytes:
        signature = list(self.blobs)[serial]
        return pack_auth_tok(AuthTok(signature, "toy", self.blobs[signature]))


class StubKey:
    def __init__(self, look: Callable[[], None]) -> None:
        self.closed, self._look = 0, look
        self.is_stale = False

    def wrap(self, key: bytes, /) -> bytes:
        return key

    def unwrap(self, wrapped: bytes, /) -> bytes:
        return wrapped

    def stale(self) -> bool:
        return self.is_stale

    def close(self) -> None:
        self._look()
        self.closed += 1


class StubModule:
    """Stops in `open` at each of its gates, one after the other."""

    name, api = "toy", API

    def __init__(self, source: str = "") -> None:
        self.keys: list[StubKey] = []
        self.gates: list[Stop] = []
        self.look: Callable[[], None] = lambda: None
        self._source = source  # of the passphrase; "": it has none
        self.passphrases: list[bytes] = []

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> StubKey:
        self.look()
        if self._source:
            self.passphrases.append(bytes(secrets.passphrase(self._source)))
        gate = self.gates.pop(0) if self.gates else None
        if gate is not None:
            gate.stop()
        if self.passphrases and self.passphrases[-1] == b"wrong":
            raise ModuleFailed("a wrong passphrase")
        self.keys.append(StubKey(self.look))
        return self.keys[-1]


class Stop:
    """A thread stops here until it is released."""

    def __init__(self) -> None:
        self.reached, self._released = threading.Event(), threading.Event()

    def stop(self) -> None:
        self.reached.set()
        assert self._released.wait(PATIENCE)

    def arrived(self) -> None:
        assert self.reached.wait(PATIENCE)

    def release(self) -> None:
        self._released.set()


class StubPrompter(NoPrompter):
    """A person who types `typed`, in a thread of its own as with the real one."""

    def __init__(self) -> None:
        self.typed = b"right"
        self.results: list[bool] = []
        self.look: Callable[[], None] = lambda: None

    def passphrase(
        self, signature: str, asker: Asker, kept: Callable[[], bytearray | None], tried: Callable[[bytearray], bool], /
    ) -> bytearray:
        with ThreadPoolExecutor(1) as prompt:
            self.results.append(prompt.submit(tried, bytearray(self.typed)).result(PATIENCE))
        found = kept()
        if found is None:
            raise Refused("locked")
        return found

    def lock(self) -> None:
        self.look()

    def unlock(self) -> None:
        self.look()


class Scene:
    def __init__(self, source: str = "") -> None:
        self.keyring, self.module, self.prompter = StubKeyring(), StubModule(source), StubPrompter()
        self.keys = KeyHandler(
            self.keyring, {"toy": self.loader(self.module)}, lambda *_: bytearray(b"fetched"), prompter=self.prompter
        )
        self.cache, self.opener = self.keys.cache, self.keys.opener

    def loader(self, module: StubModule) -> Callable[[], KeyModule]:
        def load() -> KeyModule:
            module.look()
            return module

        return load

    def gate(self) -> Stop:
        gate = Stop()
        self.module.gates.append(gate)
        return gate

    @property
    def closed(self) -> list[int]:
        """How often each handle was closed, in the order of their opening."""
        return [key.closed for key in self.module.keys]

    def outcome(self) -> str:
        try:
            self.keys.answer(WRAP)
        except Refused as refused:
            return refused.reason
        return "answered"

    def is_open(self) -> bool:
        return self.keys.answered_by(WRAP) == "toy"


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def asking() -> Scene:
    return Scene("ask")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [1000.0]
    monkeypatch.setattr(key_cache, "now", lambda: time[0])
    return time


def finished(future: Future[str]) -> str:
    return future.result(PATIENCE)


# --- locks ---------------------------------------------------------------------------------------------------


def lock_it(scene: Scene) -> None:
    scene.cache.lock(KEY)


def lock_all(scene: Scene) -> None:
    scene.cache.lock(None)


def lock_and_unlock_all(scene: Scene) -> None:
    scene.cache.lock(None, "suspend")
    scene.cache.unlock_all("suspend")


def lock_and_unlock_it(scene: Scene) -> None:
    scene.cache.lock(KEY)
    scene.cache.unlock_all()


LOCKS = [lock_it, lock_all, lock_and_unlock_all, lock_and_unlock_it]


def outcome_if_locked_while_opening(scene: Scene, pool: ThreadPoolExecutor, lock: Callable[[Scene], None]) -> str:
    gate = scene.gate()
    request = pool.submit(scene.outcome)
    gate.arrived()
    lock(scene)
    gate.release()
    return finished(request)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_key_that_is_locked_while_it_is_opened_is_closed_and_not_cached(
    scene: Scene, pool: ThreadPoolExecutor, lock: Callable[[Scene], None]
) -> None:
    assert outcome_if_locked_while_opening(scene, pool, lock) == "locked"
    assert scene.closed == [1]
    assert not scene.is_open()


def test_a_locked_key_is_refused_and_its_module_not_called(scene: Scene) -> None:
    assert scene.outcome() == "answered"
    assert scene.cache.lock(KEY) == 1
    assert (scene.outcome(), scene.closed) == ("locked", [1])
    assert scene.cache.status() == [{"signature": KEY, "locked": True}]
    scene.cache.unlock(KEY, bytearray())
    assert (scene.outcome(), scene.closed) == ("answered", [1, 0])


def test_locking_all_keys_for_a_cause_counts_keys_with_a_passphrase_too(scene: Scene) -> None:
    scene.cache.unlock("feedfeedfeedfeed", bytearray(b"typed"))
    assert scene.outcome() == "answered"
    assert scene.cache.lock(None, "suspend") == 2
    assert scene.cache.held() == ["suspend"]
    assert scene.cache.passphrase("feedfeedfeedfeed") is None


# --- two threads that open the same key ----------------------------------------------------------------------


def test_of_two_threads_that_open_a_key_both_use_the_first_handle(scene: Scene, pool: ThreadPoolExecutor) -> None:
    gates = [scene.gate(), scene.gate()]
    requests = [pool.submit(scene.opener.open, KEY) for _ in gates]
    for gate in gates:
        gate.arrived()
    for gate in gates:
        gate.release()
    first, second = (request.result(PATIENCE) for request in requests)
    assert first is second
    assert sorted(scene.closed) == [0, 1]


def test_a_key_with_a_changed_auth_token_replaces_one_that_another_thread_opened_before(
    scene: Scene, pool: ThreadPoolExecutor
) -> None:
    gates = [scene.gate(), scene.gate()]
    requests = []
    for gate, blob in zip(gates, (b"old", b"new"), strict=True):
        scene.keyring.blobs[KEY] = blob
        requests.append(pool.submit(scene.opener.open, KEY))
        gate.arrived()
    gates[0].release()
    old = requests[0].result(PATIENCE)
    gates[1].release()
    new = requests[1].result(PATIENCE)
    assert (old.token.blob, new.token.blob) == (b"old", b"new")
    assert scene.closed == [1, 0]
    assert scene.opener.open(KEY) is new


def test_a_stale_handle_is_closed_when_the_key_was_opened_again(scene: Scene) -> None:
    assert scene.outcome() == "answered"
    scene.module.keys[0].is_stale = True
    assert (scene.outcome(), scene.closed) == ("answered", [1, 0])


# --- reloads -------------------------------------------------------------------------------------------------


def test_a_key_whose_module_is_replaced_while_it_is_opened_is_opened_by_the_new_one(
    scene: Scene, pool: ThreadPoolExecutor
) -> None:
    gate, other = scene.gate(), StubModule()
    request = pool.submit(scene.outcome)
    gate.arrived()
    scene.cache.use({"toy": scene.loader(other)}, set())
    gate.release()
    assert finished(request) == "answered"
    assert scene.closed == [1]
    assert [key.closed for key in other.keys] == [0]


def test_a_key_whose_module_is_removed_while_it_is_opened_is_refused(scene: Scene, pool: ThreadPoolExecutor) -> None:
    gate = scene.gate()
    request = pool.submit(scene.outcome)
    gate.arrived()
    scene.cache.use({}, set())
    gate.release()
    assert (finished(request), scene.closed) == ("no-module", [1])


def test_a_reload_closes_keys_of_replaced_modules_only_and_keeps_passphrases(asking: Scene) -> None:
    asking.cache.unlock(KEY, bytearray(b"right"))
    assert asking.outcome() == "answered"
    asking.cache.use({"toy": asking.loader(StubModule())}, {"toy"})
    assert asking.closed == [0]
    asking.cache.use({"toy": asking.loader(asking.module)}, set())
    assert (asking.closed, asking.outcome()) == ([1], "answered")
    assert asking.prompter.results == []  # nobody was asked


# --- passphrases ---------------------------------------------------------------------------------------------


def test_a_typed_passphrase_opens_the_key_and_is_kept(asking: Scene) -> None:
    assert asking.outcome() == "answered"
    assert asking.cache.passphrase(KEY) == bytearray(b"right")
    assert asking.prompter.results == [True]


def test_a_wrong_passphrase_is_not_kept(asking: Scene) -> None:
    asking.prompter.typed = b"wrong"
    assert asking.outcome() == "locked"
    assert asking.cache.passphrase(KEY) is None
    assert asking.prompter.results == [False]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_passphrase_that_is_tried_while_the_key_is_locked_is_not_kept(
    asking: Scene, pool: ThreadPoolExecutor, lock: Callable[[Scene], None]
) -> None:
    assert outcome_if_locked_while_opening(asking, pool, lock) == "locked"
    assert asking.cache.passphrase(KEY) is None
    assert asking.closed == [1]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_module_that_was_opening_gets_no_passphrase_or_pin_after_its_key_was_locked(
    scene: Scene, lock: Callable[[Scene], None]
) -> None:
    """It may take its time before it asks: no prompt opens, and nothing that is typed is kept."""
    asked: list[str] = []
    told = KeySecrets(
        KEY, scene.cache.times_locked(KEY), Serving(), scene.cache, RecordingPrompter(asked), lambda *_: bytearray(),
        scene.opener.open,
    )  # fmt: skip
    told.touch("card", "Touch the card")
    lock(scene)
    told.touch("card", "Touch the card")
    with pytest.raises(Refused, match="locked"):
        told.passphrase("ask")
    with pytest.raises(Refused, match="locked"):
        told.pin("card", "PIN of the card")
    assert asked == ["touch"]


class RecordingPrompter(NoPrompter):
    """Opens a prompt unless the key is locked, as the real one does under its own lock."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray:
        if asker.locked():
            raise Refused("locked")
        self._asked.append("pin")
        return bytearray(b"1234")

    def touch(self, token: str, prompt: str, asker: Asker, /) -> None:
        self._asked.append("touch")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_passphrase_is_not_kept_if_the_key_is_locked_after_it_has_opened_it(
    scene: Scene, lock: Callable[[Scene], None]
) -> None:
    times = scene.cache.times_locked(KEY)
    lock(scene)
    with pytest.raises(Refused, match="locked"):
        scene.cache.keep_passphrase(KEY, bytearray(b"typed"), times)
    assert scene.cache.passphrase(KEY) is None


def test_a_typed_passphrase_does_not_replace_one_that_a_command_has_set_meanwhile(scene: Scene) -> None:
    times = scene.cache.times_locked(KEY)
    scene.cache.unlock(KEY, bytearray(b"of the command"))
    scene.cache.keep_passphrase(KEY, bytearray(b"typed"), times)
    assert scene.cache.passphrase(KEY) == bytearray(b"of the command")


def test_a_request_is_known_to_its_thread_while_it_is_served_and_not_held_longer(scene: Scene) -> None:
    """It holds a file key."""
    deadlines: list[float] = []
    scene.module.look = lambda: deadlines.append(scene.keys.deadline())
    scene.keys.answer(WRAP._replace(deadline_ns=3_000_000_000))
    assert set(deadlines) == {3.0}
    assert scene.keys.deadline() == 0.0


def test_keys_are_opened_ahead_without_prompts(asking: Scene) -> None:
    asking.keys.warm([KEY], ahead=True)
    assert not asking.is_open()
    assert asking.prompter.results == []
    asking.cache.unlock(KEY, bytearray(b"right"))
    asking.keys.warm([KEY], ahead=True)
    assert asking.is_open()


def test_a_passphrase_from_elsewhere_is_fetched() -> None:
    scene = Scene("elsewhere")
    assert scene.outcome() == "answered"
    assert scene.module.passphrases == [b"fetched"]
    assert scene.cache.passphrase(KEY) is None


def test_passphrases_are_moved_replaced_copied_and_wiped() -> None:
    kept, first, second = Passphrases(), bytearray(b"first"), bytearray(b"second")
    kept.keep(KEY, first)
    kept.keep(KEY, second)
    assert (first, second) == (bytearray(5), bytearray(6))
    copy = kept.get(KEY)
    assert copy == bytearray(b"second") and [*kept] == [KEY]
    copy[:] = bytes(6)
    assert kept.get(KEY) == bytearray(b"second")
    kept.wipe(KEY)
    kept.wipe(KEY)
    assert kept.get(KEY) is None and [*kept] == []


# --- keys that vanish, and time ------------------------------------------------------------------------------


def test_a_key_that_is_unlinked_while_it_is_opened_is_closed_by_the_next_request(
    scene: Scene, pool: ThreadPoolExecutor
) -> None:
    gate = scene.gate()
    request = pool.submit(scene.outcome)
    gate.arrived()
    scene.keyring.blobs.clear()
    assert scene.outcome() == "no-key"
    gate.release()
    assert finished(request) == "answered"  # it was there when the request came
    assert (scene.outcome(), scene.closed) == ("no-key", [1])
    assert not scene.is_open()


def test_a_key_that_is_forgotten_while_it_is_opened_is_cached(scene: Scene, pool: ThreadPoolExecutor) -> None:
    assert scene.outcome() == "answered"
    scene.module.keys[0].is_stale = True
    gate = scene.gate()
    request = pool.submit(scene.outcome)
    gate.arrived()
    scene.cache.forget(KEY)
    gate.release()
    assert finished(request) == "answered"
    assert scene.closed == [1, 0]  # the forgotten one is closed once only
    assert scene.is_open()


def test_keys_expire_with_their_passphrases_after_a_time_without_use(asking: Scene, clock: list[float]) -> None:
    asking.cache.unlock(KEY, bytearray(b"right"))
    assert asking.outcome() == "answered"
    assert asking.cache.expire() == ([], None)
    asking.cache.lock_after = 60.0
    clock[0] += 59
    assert asking.cache.expire() == ([], 1.0)
    assert asking.outcome() == "answered"  # which puts it off
    clock[0] += 59
    assert asking.cache.expire() == ([], 1.0)
    clock[0] += 1
    assert asking.cache.expire() == ([KEY], None)
    assert asking.closed == [1]
    assert asking.cache.passphrase(KEY) is None
    assert asking.cache.status() == []


def test_a_key_counts_as_just_used_when_the_time_without_use_is_set(scene: Scene, clock: list[float]) -> None:
    assert scene.outcome() == "answered"
    clock[0] += 1000
    scene.cache.lock_after = 60.0
    assert scene.cache.expire() == ([], 60.0)
    clock[0] += 59
    scene.cache.lock_after = 70.0  # which is no use
    assert scene.cache.expire() == ([], 11.0)
    clock[0] += 11
    assert scene.cache.expire() == ([KEY], None)


def test_a_key_that_was_opened_ahead_expires_though_no_request_has_used_it(scene: Scene, clock: list[float]) -> None:
    scene.cache.lock_after = 60.0
    scene.keys.warm([KEY], ahead=True)
    clock[0] += 60
    assert scene.cache.expire() == ([KEY], None)
    assert scene.closed == [1]


def test_an_overdue_key_is_not_used_even_if_it_has_not_expired_yet(asking: Scene, clock: list[float]) -> None:
    asking.cache.lock_after = 60.0
    asking.cache.unlock(KEY, bytearray(b"of the command"))
    assert asking.outcome() == "answered"
    clock[0] += 60
    assert asking.outcome() == "answered"
    assert asking.closed == [1, 0, 1]  # opened twice: with what was typed, and by the request
    assert asking.prompter.results == [True]  # the passphrase was wiped, too
    assert asking.cache.passphrase(KEY) == bytearray(b"right")


def test_a_key_that_is_being_opened_again_while_its_handle_expires_is_cached(
    scene: Scene, pool: ThreadPoolExecutor, clock: list[float]
) -> None:
    scene.cache.lock_after = 60.0
    assert scene.outcome() == "answered"
    scene.module.keys[0].is_stale = True
    gate = scene.gate()
    request = pool.submit(scene.outcome)
    gate.arrived()
    clock[0] += 60
    assert scene.cache.expire() == ([KEY], None)
    gate.release()
    assert finished(request) == "answered"
    assert scene.closed == [1, 0]
    assert scene.cache.expire() == ([], 60.0)


# --- the lock ------------------------------------------------------------------------------------------------


def test_nothing_foreign_is_called_while_the_lock_is_held(asking: Scene) -> None:
    calls = []

    def look() -> None:
        calls.append(1)
        assert not asking.cache._lock.locked()
        assert not asking.cache._modules._lock.locked()

    asking.module.look = asking.prompter.look = look
    loaders = {"toy": asking.loader(asking.module)}
    steps: list[tuple[Callable[[], object], int]] = [
        (asking.outcome, 4),  # loads, opens, and opens again with what was typed, which closes one of the two
        (lambda: asking.cache.unlock(KEY, bytearray(b"right")), 2),  # closes the handle, and tells the prompter
        (asking.outcome, 1),
        (lambda: asking.cache.use(loaders, set()), 1),
        (asking.outcome, 2),
        (lambda: asking.cache.lock(KEY), 2),
        (asking.cache.unlock_all, 1),
    ]
    for step, count in steps:
        calls.clear()
        step()
        assert len(calls) == count


def test_requests_with_an_open_key_take_no_lock(scene: Scene, pool: ThreadPoolExecutor) -> None:
    scene.cache.lock_after = 60.0
    assert scene.outcome() == "answered"
    with scene.cache._lock, scene.cache._modules._lock:
        assert finished(pool.submit(scene.outcome)) == "answered"
        assert scene.is_open()
