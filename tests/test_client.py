"""`upcall.Client`: names of keys, time-outs, threads, forks, and hostile arguments: each ends in an UpcallError."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from upcall import Client, NoBroker, PeerError, Refused, TimedOut, UpcallError, UsageError
from upcall.core.messages import Answer
from upcall.kernel.local import listen
from upcall.keys.store import Entry, KeyStore
from upcall.protocols.ecryptfs.packets import FileKey, Reply, pack_file_key, pack_reply
from upcall.testing.played import PlayedDaemon
from upcall.testing.processes import PATIENCE, RunningBroker, RunningDaemon, in_child
from upcall.wire.envelope import MAX_BODY, MAX_MESSAGE, pack_response, take_request

SECRET = b"0123456789abcdef"
SIGNATURE = "0123456789abcdef"


def answer_with(data: bytes) -> Answer:
    return Answer(pack_reply(Reply(0x41, 0, pack_file_key(FileKey(0, data)))))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyStore:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return KeyStore()


def enrol(store: KeyStore, name: str, signature: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    store.save(Entry(name, "toy", signature, "none", "", now, blob=b"blob"))


@pytest.fixture
def silent_broker(folder: Path) -> Iterator[socket.socket]:
    """A listener in the broker's place, which the test has accept."""
    folder.mkdir()
    with listen(folder / "broker.sock", 0o666) as listener:
        listener.settimeout(PATIENCE)
        yield listener


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# --- what it is for ---------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_name_and_by_its_signature(
    broker: RunningBroker, daemon: RunningDaemon, signature: str, store: KeyStore
) -> None:
    enrol(store, "mine", signature)
    with Client(broker.folder) as client:
        assert client.unwrap("mine", client.wrap(signature, SECRET)) == SECRET
        assert client.unwrap(signature, client.wrap("mine", SECRET)) == SECRET


def test_the_folder_may_be_text(broker: RunningBroker) -> None:
    with Client(str(broker.folder)) as client:
        assert client.status()["broker"]["pid"] == broker.pid


@pytest.mark.parametrize("data", [bytearray(SECRET), memoryview(SECRET)], ids=["bytearray", "memoryview"])
def test_data_may_be_of_any_type_of_bytes(
    broker: RunningBroker, daemon: RunningDaemon, signature: str, data: bytes
) -> None:
    with Client(broker.folder) as client:
        assert client.unwrap(signature, bytearray(client.wrap(signature, data))) == SECRET


def test_threads_may_share_a_client(broker: RunningBroker, daemon: RunningDaemon, signature: str) -> None:
    wrong: list[object] = []

    def work(client: Client, data: bytes) -> None:
        for _ in range(20):
            if (got := client.unwrap(signature, client.wrap(signature, data))) != data:
                wrong.append(got)

    with Client(broker.folder) as client, ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda i: work(client, bytes([i]) * 16), range(8)):
            pass
    assert wrong == []


def test_a_forked_child_has_a_connection_of_its_own(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, Client(broker.folder) as client:
        answers: list[bytes] = []
        waiting = in_thread(lambda: answers.append(client.unwrap(SIGNATURE, b"parent")))
        parents = daemon.request()

        serving = in_thread(lambda: daemon.answer(daemon.request(), answer_with(b"for the child")))
        assert in_child(lambda: client.unwrap(SIGNATURE, b"child").decode()) == "for the child"
        serving.join()
        daemon.answer(parents, answer_with(b"for the parent"))
        waiting.join()
    assert answers == [b"for the parent"]


def test_a_late_reply_is_not_taken_for_the_next_requests(silent_broker: socket.socket, folder: Path) -> None:
    def serve() -> None:
        connection, _ = silent_broker.accept()
        with connection:
            connection.settimeout(PATIENCE)
            late, next_one = (take_request(connection.recv(MAX_MESSAGE)) for _ in range(2))
            connection.send(pack_response(late.seq, 0, Answer(b"late")))
            connection.send(pack_response(next_one.seq, 0, Answer(b"in time")))

    serving = in_thread(serve)
    with Client(folder, timeout=0.01) as client:
        with pytest.raises(TimedOut, match=r"within 0\.01 s"):
            client.ask("key", b"")
        client.timeout = PATIENCE
        assert client.ask("key", b"") == b"in time"
    serving.join()


# --- failures --------------------------------------------------------------------------------------------


def test_without_a_broker_the_error_names_its_socket(folder: Path) -> None:
    with pytest.raises(NoBroker, match=r"broker\.sock: No such file or directory$"):
        Client(folder)


def test_a_time_out_is_both_an_upcall_error_and_pythons_own() -> None:
    assert issubclass(TimedOut, UpcallError)
    assert issubclass(TimedOut, TimeoutError)


def test_without_a_daemon_a_request_is_refused_with_the_reason(broker: RunningBroker) -> None:
    with Client(broker.folder) as client, pytest.raises(Refused) as raised:
        client.wrap(SIGNATURE, SECRET)
    assert raised.value.reason == "no-daemon"


def test_a_broker_that_ends_while_it_is_asked_is_no_broker(broker: RunningBroker) -> None:
    with PlayedDaemon(broker.folder) as daemon, Client(broker.folder) as client:
        errors: list[UpcallError] = []

        def ask() -> None:
            try:
                client.wrap(SIGNATURE, SECRET)
            except UpcallError as error:
                errors.append(error)

        waiting = in_thread(ask)
        daemon.request()
        broker.kill()
        waiting.join()
        with pytest.raises(NoBroker, match="has ended"):
            client.wrap(SIGNATURE, SECRET)
    assert [type(error) for error in errors] == [NoBroker]


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 60_000], ids=["cut", "list", "not text", "deep"])
def test_a_malformed_status_is_a_peer_error(silent_broker: socket.socket, folder: Path, body: bytes) -> None:
    def serve() -> None:
        connection, _ = silent_broker.accept()
        with connection:
            connection.settimeout(PATIENCE)
            request = take_request(connection.recv(MAX_MESSAGE))
            connection.send(pack_response(request.seq, 0, Answer(body)))

    serving = in_thread(serve)
    with Client(folder) as client, pytest.raises(PeerError, match="status"):
        client.status()
    serving.join()


def test_a_closed_client_says_so(broker: RunningBroker) -> None:
    client = Client(broker.folder)
    client.close()
    client.close()
    with pytest.raises(UsageError, match="closed"):
        client.status()


# --- hostile arguments -----------------------------------------------------------------------------------


class Odd:
    """A path whose text is none."""

    def __fspath__(self) -> Any:
        return b"\xff"

    def __repr__(self) -> str:
        return "Odd()"


@pytest.mark.parametrize(
    "folder",
    ["", "\0", "/a\0b", "x" * 5000, "/" + "x" * 200, "\ud800", b"/run", 7, 1.5, [], Odd(), "/dev/null", "/etc/passwd"],
    ids=lambda folder: repr(folder)[:20],
)
def test_a_hostile_folder_is_an_upcall_error(folder: Any) -> None:
    with pytest.raises((UsageError, NoBroker)):
        Client(folder)


@pytest.mark.parametrize("uid", [-1, 2**32 - 1, 2**70, 1.0, "0", True, b"0", []], ids=repr)
def test_a_hostile_uid_is_a_usage_error(folder: Path, uid: Any) -> None:
    with pytest.raises(UsageError, match="is not a uid"):
        Client(folder, uid)


@pytest.mark.parametrize(
    "timeout", [0, -3, float("nan"), float("inf"), 1e10, 10**400, "1", None, True, b"", []], ids=lambda v: repr(v)[:20]
)
def test_a_hostile_time_out_is_a_usage_error_whenever_it_is_set(broker: RunningBroker, timeout: Any) -> None:
    with pytest.raises(UsageError, match="a time-out of"):
        Client(broker.folder, timeout=timeout)
    with Client(broker.folder) as client:
        client.timeout = timeout
        with pytest.raises(UsageError, match="a time-out of"):
            client.status()


@pytest.mark.parametrize(
    "key",
    ["", "..", "../x", "a/b", "\0", "x" * 100_000, "nosuch", "\ud800", b"default", None, 7, SIGNATURE.upper()],
    ids=lambda key: repr(key)[:20],
)
def test_a_hostile_name_of_a_key_is_a_usage_error(broker: RunningBroker, store: KeyStore, key: Any) -> None:
    with Client(broker.folder) as client:
        with pytest.raises(UsageError):
            client.wrap(key, SECRET)
        with pytest.raises(UsageError):
            client.unwrap(key, SECRET)


def released() -> memoryview:
    view = memoryview(SECRET)
    view.release()
    return view


@pytest.mark.parametrize(
    "data", [b"", bytes(65), "text", None, 7, [1, 2], released()], ids=lambda data: type(data).__name__
)
def test_data_of_the_wrong_type_or_size_is_a_usage_error_without_the_data(broker: RunningBroker, data: Any) -> None:
    with Client(broker.folder) as client, pytest.raises(UsageError) as raised:
        client.wrap(SIGNATURE, data)
    assert "text" not in str(raised.value)


@pytest.mark.parametrize("wrapped", [b"", bytes(513), "text", None])
def test_wrapped_data_of_the_wrong_type_or_size_is_a_usage_error(broker: RunningBroker, wrapped: Any) -> None:
    with Client(broker.folder) as client, pytest.raises(UsageError):
        client.unwrap(SIGNATURE, wrapped)


@pytest.mark.parametrize(
    ("service", "body"),
    [
        ("", b""),
        ("x" * 65, b""),
        ("\xe9", b""),
        (b"key", b""),
        (None, b""),
        ("key", "text"),
        ("key", bytes(MAX_BODY + 1)),
    ],
    ids=range(7),
)
def test_a_hostile_service_or_body_is_a_usage_error(broker: RunningBroker, service: Any, body: Any) -> None:
    with Client(broker.folder) as client, pytest.raises(UsageError):
        client.ask(service, body)


def test_a_keys_entry_that_cannot_be_read_is_a_usage_error_in_words(broker: RunningBroker, store: KeyStore) -> None:
    enrol(store, "mine", SIGNATURE)
    (store.directory / "mine.toml").chmod(0o666)
    with Client(broker.folder) as client, pytest.raises(UpcallError) as raised:
        client.wrap("mine", SECRET)
    assert "mine.toml" in str(raised.value)
    assert "Errno" not in str(raised.value)


def test_a_malformed_entry_of_a_key_is_a_peer_error(broker: RunningBroker, store: KeyStore) -> None:
    enrol(store, "mine", SIGNATURE)
    (store.directory / "mine.toml").write_text("module = 7")
    with Client(broker.folder) as client, pytest.raises(PeerError):
        client.wrap("mine", SECRET)


def test_a_runtime_folder_of_which_nothing_is_there_is_an_upcall_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "upcall").write_text("a file in the folder's place")
    with pytest.raises(UpcallError) as raised:
        Client()
    assert "Errno" not in str(raised.value)
    assert os.fspath(tmp_path) in str(raised.value)
