"""Every way through upcall-request-key, for the C program (with sanitizers) and for its stand-in."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forwarder.scene import (
    DNS,
    KEY,
    PATIENCE,
    SPNEGO,
    Ended,
    Play,
    answered,
    played_words,
    playing,
    refused,
    spnego,
)
from upcall.core.messages import Requester
from upcall.protocols.request_key.messages import MAX_DESCRIBED, take_upcall

READING = [f"assume {KEY}", f"describe {KEY}", "authorisation", "callout"]


def rejection(code: int, seconds: int = 1) -> str:
    return f"reject {KEY} {seconds} {code}"


@pytest.fixture(params=["c", "stand-in"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def play(kind: str, folder: Path) -> Iterator[Play]:
    words = played_words(kind)
    if words is None:
        pytest.skip("there is no C compiler")
    yield Play(folder.parent, words, SPNEGO)


def exchange(play: Play, message: bytes) -> Ended:
    """One run in which the broker says this."""
    with playing(play.socket) as broker:
        process = play.start()
        broker.request()
        broker.send(message)
        return play.end(process)


# --- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["0"], ["-1"], ["+1"], ["01"], ["1 "], [" 1"], ["0x1"], ["1e3"], ["2147483648"], ["99999999999999999999"],
        [], [""], ["²"], ["\x80\xff"], ["1", "2"], ["-t", "0", "1"], ["-t", "61", "1"],
        ["-t", "1.5", "1"], ["-t", "", "1"], ["-t", "1"],
        ["1", "-t"], ["-s", "1"], ["1", "-s"], ["-s", "relative", "1"], ["-s", "/" + 107 * "x", "1"],
        ["-x", "1"], ["--", "1"], ["-t5", "1"], ["A" * 100_000], ["%s%n"],
    ],
    ids=lambda arguments: "+".join(arguments)[:20].encode("ascii", "backslashreplace").decode(),
)  # fmt: skip
def test_bad_usage_touches_no_key(play: Play, arguments: list[str]) -> None:
    ended = play.end(play.start_with(arguments))
    assert (ended.code, ended.calls, ended.out) == (64, [], "")
    assert ended.err.startswith("usage: upcall-request-key ")


@pytest.mark.parametrize(("option", "says"), [("--help", "usage: "), ("--version", "upcall-request-key 0.")])
def test_help_and_version_are_printed_without_touching_a_key(play: Play, option: str, says: str) -> None:
    ended = play.run(option)
    assert (ended.code, ended.calls, ended.err) == (0, [], "")
    assert ended.out.startswith(says)


def test_the_largest_serial_and_longest_path_are_accepted(play: Play) -> None:
    path = "/" + 106 * "x"
    ended = play.run("-t", 60, 2147483647, "-s", path)
    assert ended.code == 0
    assert ended.answer == f"reject 2147483647 1 {errno.ENOTCONN}"


def test_without_authority_nothing_else_is_done(play: Play) -> None:
    play.fail("assume", errno.EACCES)
    ended = play.run()
    assert (ended.code, ended.calls) == (77, READING[:1])
    assert "no authority" in ended.err


# --- the request ---------------------------------------------------------------------------------------------


def test_the_request_to_the_broker_carries_key_requester_deadline_and_texts(play: Play) -> None:
    play.write("callout", b"callout \xff\0 text")
    before = time.monotonic_ns()
    with playing(play.socket) as broker:
        process = play.start("-t", 7, "-s", play.socket, KEY)
        envelope = broker.request()
        after = time.monotonic_ns()
        broker.send(answered(spnego()))
        assert play.end(process).code == 0
    assert (envelope.seq, envelope.index, envelope.service) == (KEY, 0, "request-key")
    assert envelope.requester == Requester(0, process.pid)
    assert before + 7 * 10**9 <= envelope.deadline_ns <= after + 7 * 10**9
    assert take_upcall(envelope.body) == (KEY, 4242, SPNEGO, b"callout \xff\0 text")


def test_the_longest_description_and_callout_reach_the_broker(play: Play) -> None:
    described, callout = SPNEGO[:25] + b"d" * (MAX_DESCRIBED - 25), b"c" * 4095
    play.write("describe", described)
    play.write("callout", callout)
    with playing(play.socket) as broker:
        process = play.start()
        assert take_upcall(broker.request().body)[2:] == (described, callout)
        broker.send(answered(spnego()))
        assert play.end(process).answer.startswith("instantiate ")


@pytest.mark.parametrize(("name", "size"), [("describe", MAX_DESCRIBED + 1), ("describe", 9000), ("callout", 4096)])
def test_a_text_too_long_is_rejected_without_asking(play: Play, name: str, size: int) -> None:
    play.write(name, b"x" * size)
    ended = play.run()
    assert (ended.code, ended.answer) == (0, rejection(errno.EMSGSIZE))


@pytest.mark.parametrize("call", ["describe", "authorisation", "callout"])
def test_a_key_that_cannot_be_read_is_rejected_with_the_errno(play: Play, call: str) -> None:
    play.fail(call, errno.EKEYREVOKED)
    ended = play.run()
    assert (ended.code, ended.answer) == (0, rejection(errno.EKEYREVOKED))


# --- the answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "payload"),
    [(SPNEGO, spnego()), (SPNEGO, spnego(64, 32767 - 80)), (DNS, b"192.0.2.1,2001:db8::1\0"), (DNS, b"#dnserror=3\0")],
    ids=["spnego", "longest spnego", "addresses", "error of DNS"],
)
def test_an_answer_instantiates_the_key(play: Play, described: bytes, payload: bytes) -> None:
    play.write("describe", described)
    ended = exchange(play, answered(payload))
    assert ended == (0, "", "", [*READING, f"instantiate {KEY} {payload.hex()}"])


@pytest.mark.parametrize("expiry", [1, 600, 0xFFFFFFFF])
def test_the_expiry_is_set_while_there_is_authority(play: Play, expiry: int) -> None:
    ended = exchange(play, answered(spnego(), expiry))
    made = [f"set_timeout {KEY} {expiry}", f"instantiate {KEY} {spnego().hex()}"]
    assert (ended.code, ended.calls) == (0, READING + made)


@pytest.mark.parametrize(("gone", "more"), [(0, 0), (499_999_999, 0), (500_000_000, 1), (999_999_999, 1)])
@pytest.mark.parametrize(
    ("message", "call"),
    [
        (refused(errno.EACCES), lambda more: rejection(errno.EACCES, 1 + more)),
        (answered(spnego(), 5), lambda more: f"set_timeout {KEY} {5 + more}"),
        (answered(spnego(), 0xFFFFFFFF), lambda more: f"set_timeout {KEY} {0xFFFFFFFF}"),
    ],
    ids=["refused", "expires", "expires-last"],
)
def test_a_time_out_is_rounded_up_late_in_a_second(
    play: Play, message: bytes, call: Callable[[int], str], gone: int, more: int
) -> None:
    """The kernel counts the current second as a whole one: late in it, the key would expire early."""
    play.write("gone", str(gone).encode())
    assert call(more) in exchange(play, message).calls


def test_a_key_whose_expiry_cannot_be_set_is_rejected(play: Play) -> None:
    play.fail("set_timeout", errno.EACCES)
    ended = exchange(play, answered(spnego(), 5))
    assert (ended.code, ended.calls[4:]) == (0, [f"set_timeout {KEY} 5", rejection(errno.EACCES)])


def test_a_key_is_rejected_if_the_kernel_refuses_its_payload(play: Play) -> None:
    play.fail("instantiate", errno.EINVAL)
    ended = exchange(play, answered(spnego()))
    assert (ended.code, ended.answer) == (0, rejection(errno.EKEYREJECTED))


def test_a_rejection_that_fails_is_reported_by_exit_code_and_stderr(play: Play) -> None:
    play.fail("reject", errno.EPERM)
    ended = exchange(play, refused(errno.ENOKEY))
    assert (ended.code, ended.answer) == (70, rejection(errno.ENOKEY))
    assert "could not be rejected" in ended.err


@pytest.mark.parametrize(
    ("told", "code"),
    [(errno.ENOKEY, errno.ENOKEY), (1, 1), (511, 511), (512, errno.EIO), (516, errno.EIO), (517, 517), (4094, 4094),
     (4095, errno.EIO), (65535, errno.EIO), (0, errno.EIO)],
)  # fmt: skip
def test_a_refusal_reaches_the_kernel_with_its_errno(play: Play, told: int, code: int) -> None:
    ended = exchange(play, refused(told))
    assert ended == (0, "", "", [*READING, rejection(code)])


GOOD = answered(spnego())


@pytest.mark.parametrize(
    "message",
    [
        b"\0", GOOD[:27], GOOD[:-1], GOOD + b"\0", answered(spnego(), seq=KEY + 1), answered(b""),
        GOOD[:4] + b"\x66" + GOOD[5:], GOOD[:16] + b"\1" + GOOD[17:], GOOD[:24] + b"\2" + GOOD[25:],
        answered(spnego() + bytes(4)), answered(b"192.0.2.1\0"), answered(bytes(32768)), answered(bytes(60000)),
        refused(1)[:-1] + b"\n", refused(1, "x" * 64) + b"x",
    ],
    ids=range(15),
)  # fmt: skip
def test_a_malformed_answer_of_the_broker_rejects_the_key_with_eproto(play: Play, message: bytes) -> None:
    ended = exchange(play, message)
    assert ended == (0, "", "", [*READING, rejection(errno.EPROTO)])


@pytest.mark.parametrize("described", [b"id_new;0;0;39010000;x", b"cifs.spneg;0;0;39010000;x"])
def test_an_answer_for_a_type_without_a_rule_instantiates_the_key(play: Play, described: bytes) -> None:
    play.write("describe", described)
    ended = exchange(play, answered(b"\1"))
    assert (ended.code, ended.answer) == (0, f"instantiate {KEY} 01")


# --- the broker is not there, or not as it should be -----------------------------------------------------------


def listening_log(play: Play) -> socket.socket:
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(play.log))
    log.settimeout(PATIENCE)
    return log


def test_without_a_broker_the_key_is_rejected_and_logged(play: Play) -> None:
    with listening_log(play) as log:
        ended = play.run()
        line = log.recv(500).decode()
    assert ended == (0, "", "", [*READING, rejection(errno.ENOTCONN)])
    assert line.startswith("<83>upcall-request-key[")
    assert f"]: key {KEY} is rejected: no broker ({play.socket})" in line
    assert "spnego" not in line


def test_without_a_broker_or_a_log_the_key_is_rejected(play: Play) -> None:
    assert play.run().answer == rejection(errno.ENOTCONN)


def test_a_full_log_socket_does_not_delay_the_rejection(play: Play) -> None:
    with listening_log(play), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                filler.sendto(b"x", str(play.log))
        assert play.run().answer == rejection(errno.ENOTCONN)


def test_a_socket_without_a_listener_rejects_the_key(play: Play) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(play.socket))
        assert play.run().answer == rejection(errno.ENOTCONN)


def test_a_socket_of_another_user_is_sent_nothing(play: Play) -> None:
    play.write("uid", str(os.getuid() + 1).encode())
    with listening_log(play) as log, playing(play.socket) as broker:
        ended = play.run()
        assert broker.accept().recv(100) == b""
        assert b"the socket is not root's" in log.recv(500)
    assert ended.answer == rejection(errno.EPERM)


def test_a_broker_that_closes_the_connection_rejects_the_key(play: Play) -> None:
    with listening_log(play) as log, playing(play.socket) as broker:
        process = play.start()
        broker.request()
        broker.close()
        ended = play.end(process)
        assert b"the broker hung up" in log.recv(500)
    assert ended.answer == rejection(errno.ECONNRESET)


def test_a_connection_closed_before_the_request_rejects_the_key(play: Play) -> None:
    with playing(play.socket) as broker:
        process = play.start()
        broker.accept().close()
        ended = play.end(process)
    assert ended.answer == rejection(errno.ECONNRESET)


@pytest.mark.slow
def test_a_silent_broker_rejects_the_key_at_the_deadline(play: Play) -> None:
    with playing(play.socket) as broker:
        process = play.start("-s", play.socket, "-t", 1, KEY)
        deadline_ns = broker.request().deadline_ns
        ended = play.end(process)
        assert time.monotonic_ns() >= deadline_ns, "it gave up before the deadline that it has told"
    assert ended == (0, "", "", [*READING, rejection(errno.ETIMEDOUT)])


def test_the_forwarder_waits_for_a_busy_broker(play: Play) -> None:
    with playing(play.socket, backlog=0) as broker, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(str(play.socket))
        process = play.start()
        play.await_call("callout")
        broker.accept().close()
        broker.request()
        broker.send(answered(spnego()))
        assert play.end(process).answer.startswith("instantiate ")


@pytest.mark.slow
def test_a_broker_that_accepts_no_connection_rejects_the_key_at_the_deadline(play: Play) -> None:
    with playing(play.socket, backlog=0), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(str(play.socket))
        assert play.run("-s", play.socket, "-t", 1, KEY).answer == rejection(errno.ETIMEDOUT)


@pytest.mark.slow
def test_a_blocking_system_call_is_ended_by_the_timer(play: Play) -> None:
    (play.folder / "describe").unlink()
    os.mkfifo(play.folder / "describe")  # nobody ever writes
    assert play.run("-t", 1, KEY).answer == rejection(errno.ETIMEDOUT)


# --- signals -------------------------------------------------------------------------------------------------

ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1, signal.SIGTSTP]


@pytest.mark.parametrize("number", ENDING)
def test_an_ending_signal_rejects_the_key_before_exit(play: Play, number: int) -> None:
    with playing(play.socket) as broker:
        process = play.start()
        broker.request()
        process.send_signal(number)
        ended = play.end(process)
    assert ended == (0, "", "", [*READING, rejection(errno.ECANCELED)])


def test_sigalrm_rejects_the_key_as_timed_out(play: Play) -> None:
    with playing(play.socket) as broker:
        process = play.start()
        broker.request()
        process.send_signal(signal.SIGALRM)
        assert play.end(process).answer == rejection(errno.ETIMEDOUT)


@pytest.mark.parametrize("kind", ["c"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS])
def test_a_fault_signal_rejects_the_key_before_exit(play: Play, number: int) -> None:
    with playing(play.socket) as broker:
        process = play.start()
        broker.request()
        process.send_signal(number)
        assert play.end(process).answer == rejection(errno.EIO)


def test_a_signal_while_the_key_is_read_rejects_the_key(play: Play) -> None:
    (play.folder / "describe").unlink()
    os.mkfifo(play.folder / "describe")
    process = play.start()
    writer = os.open(play.folder / "describe", os.O_WRONLY)  # returns when the forwarder has opened it
    process.send_signal(signal.SIGTERM)
    ended = play.end(process)
    os.close(writer)
    assert (ended.code, ended.answer) == (0, rejection(errno.ECANCELED))


def test_signals_ignored_or_blocked_by_the_parent_still_reject_the_key(play: Play) -> None:
    def harden_against() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    with playing(play.socket) as broker:
        process = play.start(before=harden_against)
        broker.request()
        process.send_signal(signal.SIGTERM)
        assert play.end(process).answer == rejection(errno.ECANCELED)


HELD = [signal.SIGRTMIN, signal.SIGRTMIN + 3, signal.SIGRTMAX]


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, *HELD])
def test_harmless_signals_change_nothing(play: Play, number: int) -> None:
    with playing(play.socket) as broker:
        process = play.start()
        broker.request()
        process.send_signal(number)
        broker.send(answered(spnego()))
        assert play.end(process).answer.startswith("instantiate ")


@pytest.mark.parametrize("kind", ["c"], indirect=True)
@pytest.mark.parametrize("number", [32, 33])
def test_signals_that_libc_hides_change_nothing(play: Play, number: int) -> None:
    with playing(play.socket) as broker:
        process = play.start()
        broker.request()
        ctypes.CDLL(None).kill(process.pid, number)
        broker.send(answered(spnego()))
        assert play.end(process).answer.startswith("instantiate ")


# --- the process ---------------------------------------------------------------------------------------------


def test_without_standard_descriptors_the_key_is_instantiated(play: Play) -> None:
    with playing(play.socket) as broker:
        process = play.start(before=lambda: os.closerange(0, 3))
        broker.request()
        broker.send(answered(spnego()))
        assert play.end(process).answer.startswith("instantiate ")


def test_inherited_descriptors_are_closed_and_core_dumps_disabled(play: Play) -> None:
    def allow_cores() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)

    reader, writer = os.pipe()
    with playing(play.socket) as broker:
        process = play.start(keep=[writer], before=allow_cores)
        os.close(writer)
        broker.request()
        assert os.read(reader, 1) == b""
        limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
        broker.send(answered(spnego()))
        play.end(process)
    os.close(reader)
    assert next(line.split()[4:6] for line in limits if line.startswith("Max core")) == ["0", "0"]
