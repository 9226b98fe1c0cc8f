"""The device by hand: what the kernel does with answers that are late, doubled or not asked for."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.scene import CONTENT, House, attempt, creating, keys, opening, vault
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.device import Miscdev
from upcall.testing.lab.stage import Person

KEY = keys()["rsa2048"]


@pytest.fixture
def empty_house() -> Iterator[House]:
    made = House()
    try:
        yield made
    finally:
        made.close()


def _written(device: Miscdev, frame: bytes) -> int:
    """The errno of writing it; 0 if the kernel took it."""
    try:
        device.write(frame)
    except OSError as error:
        return error.errno or -1
    return 0


def _response(asked: wire.Frame, content: bytes, seq: int = 0, index: int = 0) -> bytes:
    """An answer to it; `seq` and `index` are added to those asked with."""
    return wire.pack_frame(wire.Frame(wire.RESPONSE, asked.seq + seq, (asked.index or 0) + index, content))


def _take(device: Miscdev) -> wire.Frame:
    frame = wire.take_frame(device.read())
    assert frame.data is not None
    return frame


def _by_hand(house: House, who: Person, root: Person, play: Callable[[Miscdev], object]) -> Callable[[], object]:
    """Starts somebody who plays the daemon of `who` on the device; gives what waits for the end of the play."""
    ready = house.gate()

    def work() -> object:
        device = Miscdev(who.uid)
        ready.open()
        return play(device)

    task = house.run(root, work)
    ready.wait()
    return lambda: task.result()


def _fail(device: Miscdev) -> None:
    asked = _take(device)
    device.write(_response(asked, wire.pack_failure(asked.data or b"")))


def test_the_kernel_refuses_wrong_and_doubled_answers(empty_house: House, alice: Person, root: Person) -> None:
    def play(device: Miscdev) -> list[int]:
        asked = _take(device)
        failure = wire.pack_failure(asked.data or b"")
        found = [
            _written(device, _response(asked, failure, seq=1)),
            _written(device, _response(asked, failure, index=1)),
            _written(device, _response(asked, failure, index=32)),
            _written(device, _response(asked, failure)[:4]),
            _written(device, _response(asked, failure) + b"x"),
            _written(device, _response(asked, bytes(520))),
            _written(device, _response(asked, failure)),
            _written(device, _response(asked, failure)),
        ]
        _fail(device)  # the next one is served as if nothing had been
        return found

    with vault(alice, KEY.signature) as files:
        ended = _by_hand(empty_house, alice, root, play)
        for name in ("one", "two"):
            assert attempt(alice, creating(files.upper / name)).errno == errno.EIO
        assert ended() == [errno.EINVAL] * 6 + [0, errno.EINVAL]


def test_the_kernel_refuses_a_late_answer(empty_house: House, alice: Person, root: Person) -> None:
    """What the broker's patience of 2.5 s is for: after 3 s the kernel knows nothing of it."""
    late = empty_house.gate()

    def play(device: Miscdev) -> int:
        asked = _take(device)
        late.wait()
        found = _written(device, _response(asked, wire.pack_failure(asked.data or b"")))
        _fail(device)
        return found

    with vault(alice, KEY.signature) as files:
        ended = _by_hand(empty_house, alice, root, play)
        assert attempt(alice, creating(files.upper / "one")).errno != 0
        late.open()
        assert attempt(alice, creating(files.upper / "two")).errno == errno.EIO
        assert ended() == errno.EINVAL


def test_a_request_that_was_read_too_late_has_no_message(empty_house: House, alice: Person, root: Person) -> None:
    """It can be read later: five bytes without a message, which must not be answered."""
    late, drained = empty_house.gate(), empty_house.gate()

    def play(device: Miscdev) -> bytes:
        late.wait()
        stale = device.read()
        drained.open()
        _fail(device)
        return stale

    with vault(alice, KEY.signature) as files:
        ended = _by_hand(empty_house, alice, root, play)
        assert attempt(alice, creating(files.upper / "one")).errno != 0
        late.open()
        drained.wait()  # a second request before that would be linked twice: a BUG
        assert attempt(alice, creating(files.upper / "two")).errno == errno.EIO
        stale = ended()
        assert isinstance(stale, bytes)
        assert len(stale) == 5
        assert wire.take_frame(stale).data is None


def test_the_kernel_takes_one_device_for_each_uid(house: House, alice: Person, bob: Person, root: Person) -> None:
    """Our broker holds alice's device: nobody else gets it; bob's is free."""
    house.daemon(alice)

    def open_both() -> tuple[int, int]:
        try:
            Miscdev(alice.uid)
            first = 0
        except OSError as error:
            first = error.errno or -1
        device = Miscdev(bob.uid)
        device.close()
        return first, 0

    assert house.run(root, open_both).result() == (errno.EINVAL, 0)
    with vault(alice, KEY.signature) as files:
        assert attempt(alice, opening(files.cold(1)[0])).value == CONTENT


def test_the_device_is_closed_to_users(house: House, alice: Person) -> None:
    refused = attempt(alice, lambda: Miscdev(alice.uid))
    assert refused.errno == errno.EACCES
