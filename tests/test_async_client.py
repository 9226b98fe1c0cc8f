"""`upcall.AsyncClient`: concurrent requests over one connection, cancellation, time-outs, lost connections."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from upcall import AsyncClient, Client, NoBroker, PeerError, Refused, TimedOut, UsageError
from upcall.core.messages import Answer
from upcall.kernel.local import listen
from upcall.keys.store import Entry, KeyStore
from upcall.protocols.ecryptfs.packets import FileKey, Reply, pack_file_key, pack_reply, take_ask
from upcall.testing.played import PlayedDaemon
from upcall.testing.processes import PATIENCE, RunningBroker, RunningDaemon, in_child
from upcall.wire.envelope import MAX_MESSAGE, Envelope, pack_response, take_request

SECRET = b"0123456789abcdef"
SIGNATURE = "0123456789abcdef"


def answer_with(data: bytes) -> Answer:
    return Answer(pack_reply(Reply(0x41, 0, pack_file_key(FileKey(0, data)))))


def asked_with(request: Envelope) -> bytes:
    """What a request wants to have unwrapped."""
    return take_ask(request.body).content


class PlayedBroker:
    """A listener in the broker's place, which runs what a test specifies in a thread: one function for each
    connection, in order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._listener = listen(folder / "broker.sock", 0o666)
        self._listener.settimeout(PATIENCE)

    def serve(self, *connections: Callable[[socket.socket], None]) -> threading.Thread:
        def work() -> None:
            for serve in connections:
                accepted, _ = self._listener.accept()
                with accepted:
                    accepted.settimeout(PATIENCE)
                    serve(accepted)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def played(folder: Path) -> Iterator[PlayedBroker]:
    made = PlayedBroker(folder)
    yield made
    made.close()


def request_of(connection: socket.socket) -> Envelope:
    return take_request(connection.recv(MAX_MESSAGE))


def answer(connection: socket.socket, request: Envelope, body: bytes) -> None:
    connection.send(pack_response(request.seq, request.index, Answer(body)))


# --- what it is for ---------------------------------------------------------------------------------------


def test_what_it_wraps_it_unwraps_by_name_and_signature(
    broker: RunningBroker,
    daemon: RunningDaemon,
    signature: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    now = datetime.datetime.now(datetime.UTC)
    KeyStore().save(Entry("mine", "toy", signature, "none", "", now, blob=b"blob"))

    async def work() -> None:
        async with AsyncClient(str(broker.folder)) as client:
            assert await client.unwrap(signature, await client.wrap("mine", bytearray(SECRET))) == SECRET
            assert (await client.status())["broker"]["pid"] == broker.pid

    asyncio.run(work())


def test_hundreds_of_concurrent_requests_get_their_own_answers(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    async def there_and_back(client: AsyncClient, data: bytes) -> bool:
        return await client.unwrap(signature, await client.wrap(signature, data)) == data

    async def work() -> list[bool]:
        async with AsyncClient(broker.folder, timeout=60) as client:
            return await asyncio.gather(*(there_and_back(client, bytes([i]) * 16) for i in range(200)))

    assert asyncio.run(work()) == [True] * 200


def test_replies_in_another_order_reach_the_requests_they_belong_to(broker: RunningBroker) -> None:
    async def work(daemon: PlayedDaemon) -> list[bytes]:
        async with AsyncClient(broker.folder) as client:
            tasks = [asyncio.create_task(client.unwrap(SIGNATURE, bytes([i] * 20))) for i in range(1, 6)]
            requests = [await asyncio.to_thread(daemon.request) for _ in tasks]
            for request in reversed(requests):
                daemon.answer(request, answer_with(asked_with(request)[:7]))
            return await asyncio.gather(*tasks)

    with PlayedDaemon(broker.folder) as daemon:
        assert asyncio.run(work(daemon)) == [bytes([i] * 7) for i in range(1, 6)]


def test_no_more_requests_than_allowed_are_pending_at_a_time(broker: RunningBroker) -> None:
    async def work(daemon: PlayedDaemon) -> None:
        async with AsyncClient(broker.folder, concurrent=2) as client:
            tasks = [asyncio.create_task(client.unwrap(SIGNATURE, bytes([i]))) for i in range(1, 4)]
            requests = [await asyncio.to_thread(daemon.request) for _ in range(2)]
            await client_is_idle(broker)
            assert daemon.silent()
            daemon.answer(requests[0], answer_with(b"one"))
            requests.append(await asyncio.to_thread(daemon.request))
            for request in requests[1:]:
                daemon.answer(request, answer_with(b"other"))
            assert sorted(await asyncio.gather(*tasks)) == [b"one", b"other", b"other"]

    with PlayedDaemon(broker.folder) as daemon:
        asyncio.run(work(daemon))


async def client_is_idle(broker: RunningBroker) -> None:
    """Returns when the broker has passed on everything that was sent to it before."""
    await asyncio.to_thread(broker.status)


# --- cancellation and time-outs --------------------------------------------------------------------------


def test_the_late_reply_to_a_cancelled_request_is_dropped(broker: RunningBroker) -> None:
    async def work(daemon: PlayedDaemon) -> bytes:
        async with AsyncClient(broker.folder) as client:
            cancelled = asyncio.create_task(client.unwrap(SIGNATURE, b"cancelled"))
            late = await asyncio.to_thread(daemon.request)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            second = asyncio.create_task(client.unwrap(SIGNATURE, b"second"))
            request = await asyncio.to_thread(daemon.request)
            daemon.answer(late, answer_with(b"late"))
            daemon.answer(request, answer_with(b"right"))
            return await second

    with PlayedDaemon(broker.folder) as daemon:
        assert asyncio.run(work(daemon)) == b"right"


def test_a_cancelled_request_keeps_its_place_until_its_reply_arrives(broker: RunningBroker) -> None:
    async def work(daemon: PlayedDaemon) -> bytes:
        async with AsyncClient(broker.folder, concurrent=1) as client:
            cancelled = asyncio.create_task(client.unwrap(SIGNATURE, b"cancelled"))
            late = await asyncio.to_thread(daemon.request)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            second = asyncio.create_task(client.unwrap(SIGNATURE, b"second"))
            await client_is_idle(broker)
            assert daemon.silent()
            daemon.answer(late, answer_with(b"late"))
            daemon.answer(await asyncio.to_thread(daemon.request), answer_with(b"right"))
            return await second

    with PlayedDaemon(broker.folder) as daemon:
        assert asyncio.run(work(daemon)) == b"right"


def test_requests_that_are_cancelled_while_they_wait_for_their_turn_are_never_sent(broker: RunningBroker) -> None:
    async def work(daemon: PlayedDaemon) -> bytes:
        async with AsyncClient(broker.folder, concurrent=1) as client:
            first = asyncio.create_task(client.unwrap(SIGNATURE, b"first"))
            request = await asyncio.to_thread(daemon.request)
            waiting = [asyncio.create_task(client.unwrap(SIGNATURE, b"waiting")) for _ in range(50)]
            await asyncio.sleep(0)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            daemon.answer(request, answer_with(b"first"))
            assert await first == b"first"
            last = asyncio.create_task(client.unwrap(SIGNATURE, b"last"))
            request = await asyncio.to_thread(daemon.request)
            assert asked_with(request) == b"last"
            daemon.answer(request, answer_with(b"last"))
            return await last

    with PlayedDaemon(broker.folder) as daemon:
        assert asyncio.run(work(daemon)) == b"last"


def test_many_cancelled_at_random_never_mix_up_answers(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    async def work() -> int:
        right = 0
        async with AsyncClient(broker.folder, timeout=60) as client:
            for wave in range(20):
                data = [bytes([wave, i]) * 8 for i in range(20)]
                tasks = [asyncio.create_task(client.wrap(signature, one)) for one in data]
                for _ in range(wave):
                    await asyncio.sleep(0)
                for i, task in enumerate(tasks):
                    if (i + wave) % 3 == 0:
                        task.cancel()
                for one, wrapped in zip(data, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
                    if not isinstance(wrapped, BaseException):
                        assert await client.unwrap(signature, wrapped) == one
                        right += 1
        return right

    assert asyncio.run(work()) >= 20 * 13


def test_a_request_that_waits_too_long_for_its_turn_times_out(broker: RunningBroker) -> None:
    async def work() -> None:
        async with AsyncClient(broker.folder, concurrent=1) as client:
            first = asyncio.create_task(client.unwrap(SIGNATURE, b"first"))
            await asyncio.to_thread(daemon.request)
            client.timeout = 0.01
            with pytest.raises(TimedOut, match=r"within 0\.01 s"):
                await client.unwrap(SIGNATURE, b"second")
            first.cancel()

    with PlayedDaemon(broker.folder) as daemon:
        asyncio.run(work())


def test_a_broker_that_does_not_answer_times_out_and_its_late_reply_is_dropped(
    played: PlayedBroker, folder: Path
) -> None:
    timed_out = threading.Event()

    def serve(connection: socket.socket) -> None:
        late = request_of(connection)
        assert timed_out.wait(PATIENCE)
        answer(connection, late, b"late")
        answer(connection, request_of(connection), b"in time")

    async def work() -> bytes:
        async with AsyncClient(folder, timeout=0.01) as client:
            with pytest.raises(TimedOut):
                await client.ask("key", b"")
            timed_out.set()
            client.timeout = PATIENCE
            return await client.ask("key", b"")

    serving = played.serve(serve)
    assert asyncio.run(work()) == b"in time"
    serving.join()


def test_the_brokers_own_time_out_is_a_refusal(broker: RunningBroker) -> None:
    async def work() -> str:
        async with AsyncClient(broker.folder, timeout=0.05) as client:
            with pytest.raises(Refused) as raised:
                await client.unwrap(SIGNATURE, b"wrapped")
            return raised.value.reason

    with PlayedDaemon(broker.folder):
        assert asyncio.run(work()) == "timed-out"


# --- lost connections ------------------------------------------------------------------------------------


def test_it_connects_again_after_the_broker_has_ended_the_idle_connection(played: PlayedBroker, folder: Path) -> None:
    def once(connection: socket.socket) -> None:
        request = request_of(connection)
        answer(connection, request, bytes([request.seq]))

    async def work() -> list[bytes]:
        async with AsyncClient(folder) as client:
            return [await client.ask("key", b"") for _ in range(3)]

    serving = played.serve(once, once, once)
    assert asyncio.run(work()) == [b"\1"] * 3
    serving.join()


def test_a_request_that_was_not_read_is_sent_once_more(played: PlayedBroker, folder: Path) -> None:
    def unread(connection: socket.socket) -> None:
        while not connection.recv(1, socket.MSG_PEEK):
            pass

    async def work() -> bytes:
        async with AsyncClient(folder) as client:
            return await client.ask("key", b"")

    serving = played.serve(unread, lambda connection: answer(connection, request_of(connection), b"again"))
    assert asyncio.run(work()) == b"again"
    serving.join()


def test_a_request_that_is_never_read_is_no_broker(played: PlayedBroker, folder: Path) -> None:
    def unread(connection: socket.socket) -> None:
        connection.recv(1, socket.MSG_PEEK)

    async def work() -> None:
        async with AsyncClient(folder) as client:
            with pytest.raises(NoBroker):
                await client.ask("key", b"")

    serving = played.serve(unread, unread)
    asyncio.run(work())
    serving.join()


def test_requests_that_were_read_fail_when_the_broker_ends_and_are_not_repeated(
    played: PlayedBroker, folder: Path
) -> None:
    def read(connection: socket.socket) -> None:
        for _ in range(3):
            request_of(connection)

    async def work() -> list[type]:
        async with AsyncClient(folder) as client:
            failed = await asyncio.gather(*(client.ask("key", b"") for _ in range(3)), return_exceptions=True)
            return [type(error) for error in failed]

    serving = played.serve(read)
    assert asyncio.run(work()) == [NoBroker] * 3
    serving.join()


def test_a_malformed_reply_ends_the_connection_and_the_next_request_makes_another(
    played: PlayedBroker, folder: Path
) -> None:
    def malformed(connection: socket.socket) -> None:
        request_of(connection)
        connection.send(b"x")
        connection.recv(1)

    async def work() -> bytes:
        async with AsyncClient(folder) as client:
            with pytest.raises(PeerError):
                await client.ask("key", b"")
            return await client.ask("key", b"")

    serving = played.serve(malformed, lambda connection: answer(connection, request_of(connection), b"well"))
    assert asyncio.run(work()) == b"well"
    serving.join()


def test_requests_larger_than_the_sockets_buffer_are_all_sent(played: PlayedBroker, folder: Path) -> None:
    full = threading.Event()

    def serve(connection: socket.socket) -> None:
        assert full.wait(PATIENCE)
        for _ in range(30):
            request = request_of(connection)
            answer(connection, request, request.body[:1])

    async def work() -> list[bytes]:
        async with AsyncClient(folder, concurrent=32) as client:
            tasks = [asyncio.create_task(client.ask("key", bytes([i]) * 65_000)) for i in range(30)]
            await asyncio.sleep(0)
            tasks[-1].cancel()  # in the queue
            tasks.append(asyncio.create_task(client.ask("key", b"last")))
            await asyncio.sleep(0)
            full.set()
            return [got for got in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(got, bytes)]

    serving = played.serve(serve)
    assert asyncio.run(work()) == [*(bytes([i]) for i in range(29)), b"l"]
    serving.join()


# --- use that cannot work --------------------------------------------------------------------------------


def test_without_a_broker_entering_fails(folder: Path) -> None:
    async def work() -> None:
        async with AsyncClient(folder):
            pass

    with pytest.raises(NoBroker, match="No such file or directory"):
        asyncio.run(work())


def test_a_closed_client_says_so_and_so_do_its_waiting_requests(broker: RunningBroker) -> None:
    async def work(daemon: PlayedDaemon) -> None:
        client = AsyncClient(broker.folder)
        waiting = asyncio.create_task(client.unwrap(SIGNATURE, b"wrapped"))
        await asyncio.to_thread(daemon.request)
        await client.close()
        await client.close()
        for task in waiting, asyncio.create_task(client.status()):
            with pytest.raises(UsageError, match="closed"):
                await task

    with PlayedDaemon(broker.folder) as daemon:
        asyncio.run(work(daemon))


def test_a_client_is_of_use_in_one_event_loop_only(broker: RunningBroker) -> None:
    client = AsyncClient(broker.folder)

    async def first() -> None:
        await client.status()

    async def second() -> None:
        with pytest.raises(UsageError, match="another event loop"):
            await client.status()
        await client.close()

    with asyncio.Runner() as runner:
        runner.run(first())
        with asyncio.Runner() as other:
            other.run(second())


def test_a_forked_child_cannot_use_its_parents_client(broker: RunningBroker) -> None:
    async def work() -> None:
        async with AsyncClient(broker.folder) as client:
            assert in_child(lambda: used_in_a_child(client)) == "UsageError"

    asyncio.run(work())


def used_in_a_child(client: AsyncClient) -> str:
    # The child's copy of the running loop is no longer running there.
    asyncio.events._set_running_loop(None)
    try:
        asyncio.run(client.status())
    except UsageError as error:
        return type(error).__name__
    return "answered"


@pytest.mark.parametrize("concurrent", [0, -1, 33, 1.5, "2", None, True], ids=repr)
def test_a_hostile_number_of_requests_is_a_usage_error(folder: Path, concurrent: Any) -> None:
    with pytest.raises(UsageError, match="concurrent"):
        AsyncClient(folder, concurrent=concurrent)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("wrap", ("nosuch", SECRET)),
        ("wrap", (7, SECRET)),
        ("wrap", (SIGNATURE, "text")),
        ("wrap", (SIGNATURE, bytes(65))),
        ("unwrap", ("a/b", b"wrapped")),
        ("unwrap", (SIGNATURE, b"")),
        ("ask", ("\xe9", b"")),
        ("ask", ("key", None)),
    ],
    ids=range(8),
)
def test_hostile_arguments_are_usage_errors(
    broker: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, arguments: tuple[Any, ...]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    async def work() -> None:
        async with AsyncClient(broker.folder) as client:
            with pytest.raises(UsageError):
                await getattr(client, method)(*arguments)

    asyncio.run(work())


def test_the_number_of_descriptors_is_the_same_after_it_was_closed(broker: RunningBroker) -> None:
    async def work() -> int:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            async with AsyncClient(broker.folder) as client:
                await client.status()
        return len(os.listdir("/proc/self/fd")) - before

    assert asyncio.run(work()) == 0


def test_the_synchronous_client_and_this_one_refuse_alike(broker: RunningBroker) -> None:
    async def work() -> Refused:
        async with AsyncClient(broker.folder) as client:
            with pytest.raises(Refused) as raised:
                await client.wrap(SIGNATURE, SECRET)
            return raised.value

    with Client(broker.folder) as client, pytest.raises(Refused) as raised:
        client.wrap(SIGNATURE, SECRET)
    refused = asyncio.run(work())
    assert (refused.reason, refused.errno) == (raised.value.reason, raised.value.errno)
