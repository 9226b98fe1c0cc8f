"""upcall-request-key in Python, for machines without a compiler. Slower than forward.c, decide.c and host.c.

Run as `python3 -I -S standin.py [-s SOCKET] [-t SECONDS] KEY`: only the standard library can be imported, not even
this package. Behaves as the opening comment of forward.c specifies, with two exceptions: a fault of the interpreter
(SIGSEGV and the like) is not answered, and copies that Python makes cannot be wiped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import struct
import sys
import time

TYPE_CHECKING = False  # importing typing would take a sixth of the whole time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    Arguments = tuple[int, str, int]  # key, path of the socket, seconds
    Decision = tuple[int, int, bytes]  # errno to reject the key with, or 0: then expiry in seconds, payload

NAME, RELEASE = "upcall-request-key", "0.1.0"
USAGE = f"usage: {NAME} [-s SOCKET] [-t SECONDS] KEY\n"
ANSWERED, BAD_USAGE, UNANSWERED, NO_AUTHORITY = 0, 64, 70, 77
MAX_DESCRIBED, MAX_CALLOUT, MAX_PAYLOAD, MAX_REASON = 4095 + 64, 4095, 32767, 64
MAX_SERIAL, MAX_SECONDS, MAX_PATH = 0x7FFFFFFF, 60, 107
REJECTED_FOR = 1  # seconds

REQUEST_HEAD = struct.Struct("=IHHII II BBHIIQ")
UPCALL_HEAD = struct.Struct("=iiHH")
RESPONSE_HEAD = struct.Struct("=IHHII II BBH")
SERVICE = b"request-key"
REQUEST, RESPONSE, BEFORE_DATA, VERSION = 102, 103, 24, 1
INSTANCE_HEAD = struct.Struct("=I")
MAX_RESPONSE = RESPONSE_HEAD.size + INSTANCE_HEAD.size + MAX_PAYLOAD
PEER = struct.Struct("=iII")  # struct ucred


# --- the host ------------------------------------------------------------------------------------------------


class Host:
    """The key system calls, the broker's uid and the log's path. Tests pass another implementation to `main`. Calls
    raise OSError."""

    broker_uid = 0
    log_path = "/dev/log"
    _AUTHORISATION_KEY = -7
    _REALTIME_COARSE = 5  # CLOCK_REALTIME_COARSE: the clock of ktime_get_real_seconds(), with the tick's resolution

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._syscall = self._libc["syscall"]
        self._syscall.restype = ctypes.c_long
        self._syscall.argtypes = [ctypes.c_long] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_long]
        machine = os.uname().machine if sys.maxsize > 1 << 32 else ""
        self._keyctl = {"x86_64": 250, "aarch64": 219, "riscv64": 219}.get(machine, -1)  # ENOSYS

    def assume_authority(self, key: int) -> None:
        self._call(16, key)

    def describe(self, key: int) -> bytes:
        """Returns the key's description, without the NUL."""
        return self._text(6, key, MAX_DESCRIBED + 1)[:-1]

    def authorisation(self) -> int:
        return self._call(0, self._AUTHORISATION_KEY)

    def read_callout(self) -> bytes:
        return self._text(11, self._AUTHORISATION_KEY, MAX_CALLOUT)

    def set_timeout(self, key: int, seconds: int) -> None:
        self._call(15, key, seconds)

    def instantiate(self, key: int, payload: bytes) -> None:
        self._call(12, key, payload, len(payload))

    def reject(self, key: int, seconds: int, code: int) -> None:
        self._call(19, key, seconds, code)

    def gone_of_second(self) -> int:
        """Returns the nanoseconds since the last full second of the clock by which keys expire."""
        return time.clock_gettime_ns(self._REALTIME_COARSE) % 10**9

    def harden(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE

    def _text(self, operation: int, key: int, limit: int) -> bytes:
        buffer = ctypes.create_string_buffer(limit + 1)
        size = self._call(operation, key, buffer, len(buffer))
        if size > limit:
            raise OSError(errno.EMSGSIZE, "too long")
        text = buffer.raw[:size]
        ctypes.memset(buffer, 0, len(buffer))
        return text

    def _call(self, operation: int, key: int, first: object = 0, second: int = 0) -> int:
        result: int = self._syscall(self._keyctl, operation, key, first, second, 0)
        if result < 0:
            raise OSError(ctypes.get_errno(), "keyctl")
        return result


# --- what to do with the answer: decide.c ---------------------------------------------------------------------


def decide(described: bytes, seq: int, message: bytes) -> Decision:
    """Decides how to answer the key. `described`: the key's description, which begins with "type;". `message`: the
    broker's message; rejected with EPROTO unless it is exactly one response to `seq`."""
    size = len(message)
    if not RESPONSE_HEAD.size <= size <= MAX_RESPONSE:
        return _refused(errno.EPROTO)
    length, kind, _, found, _, index, rest, version, status, code = RESPONSE_HEAD.unpack_from(message)
    if (length, kind, found, index, rest, version) != (size, RESPONSE, seq, 0, size - BEFORE_DATA, VERSION):
        return _refused(errno.EPROTO)
    body = message[RESPONSE_HEAD.size :]
    if status != 0:
        shown = len(body) <= MAX_REASON and all(0x20 <= c < 0x7F for c in body)
        return _refused(rejectable(code) if shown else errno.EPROTO)
    if len(body) <= INSTANCE_HEAD.size:
        return _refused(errno.EPROTO)
    payload = body[INSTANCE_HEAD.size :]
    if described.startswith(b"cifs.spnego;") and not is_spnego(payload):
        return _refused(errno.EPROTO)
    return 0, INSTANCE_HEAD.unpack_from(body)[0], payload


def _refused(code: int) -> Decision:
    return code, 0, b""


def rejectable(code: int) -> int:
    """Returns `code` if KEYCTL_REJECT accepts it, otherwise EIO. 512 to 516 are ERESTARTSYS and similar codes."""
    return code if 1 <= code < 4095 and not 512 <= code <= 516 else errno.EIO


def as_counted(seconds: int, gone: int) -> int:
    """Returns the time-out to pass to the kernel for `seconds`. `gone`: nanoseconds since the clock's last full
    second.

    The kernel counts whole seconds, the current one included. Rounding keeps the error within half a second, and the
    result above 0.
    """
    return min(seconds + (gone >= 500_000_000), 0xFFFFFFFF)


def is_spnego(data: bytes) -> bool:
    """Checks a cifs.spnego payload, whose lengths the kernel does not check: an empty key makes it dereference NULL, a
    blob that is too long makes it send heap memory to the server."""
    if len(data) < 16:
        return False
    version, flags, key, blob = struct.unpack_from("<IIII", data)
    return (version, flags) == (2, 0) and 16 <= key <= 64 and blob >= 16 and 16 + key + blob == len(data)


# --- arguments -------------------------------------------------------------------------------------------------


def end(code: int, text: str, fd: int = 2) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(fd, text.encode())
    os._exit(code)


def number_in(text: str, limit: int) -> int:
    """Parses a positive decimal number of at most `limit`, without sign, space or leading zero. 0 if malformed."""
    wellformed = text.isascii() and text.isdigit() and not text.startswith("0") and len(text) <= 10
    return int(text) if wellformed and int(text) <= limit else 0


def take_arguments(words: Sequence[str]) -> Arguments:
    key, path, seconds = 0, "/run/upcall/request-key.sock", 10
    left = iter(words)
    for word in left:
        if word in ("--version", "--help"):
            end(0, f"{NAME} {RELEASE}\n" if word == "--version" else USAGE, 1)
        if word == "-s":
            path = next(left, "")
            wellformed = path.startswith("/") and len(os.fsencode(path)) <= MAX_PATH
        elif word == "-t":
            wellformed = bool(seconds := number_in(next(left, ""), MAX_SECONDS))
        else:
            wellformed = not key and bool(key := number_in(word, MAX_SERIAL))
        if not wellformed:
            end(BAD_USAGE, USAGE)
    if not key:
        end(BAD_USAGE, USAGE)
    return key, path, seconds


# --- the conversation --------------------------------------------------------------------------------------------


class Refusal(Exception):
    """Raised to reject the key with errno `code`. `log`: the fault for an administrator to fix, or ""."""

    def __init__(self, code: int, log: str = "") -> None:
        self.code, self.log = code, log


class Forwarder:
    """Handles one request. `run` ends the process; once it has the key's authority, it answers on every path."""

    def __init__(self, host: Host, arguments: Arguments) -> None:
        self._host = host
        self._key, self._path, seconds = arguments
        self._deadline = time.monotonic_ns() + seconds * 10**9
        self._seconds = seconds

    def run(self) -> NoReturn:
        tidy_descriptors()
        self._host.harden()
        hold_signals()
        try:
            self._host.assume_authority(self._key)
        except OSError:
            end(NO_AUTHORITY, f"{NAME}: no authority over this key; the kernel starts this program\n")
        try:
            self._answer()
        except Refusal as refusal:
            self._refuse(refusal.code, refusal.log)
        except OSError as error:
            self._refuse(error.errno or errno.EIO)
        except BaseException:  # noqa: BLE001 - the kernel waits for an answer, whatever the error
            self._refuse(errno.EIO)

    def _answer(self) -> NoReturn:
        self._catch_signals()
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        signal.pthread_sigmask(signal.SIG_SETMASK, real_time_signals())
        described = self._host.describe(self._key)
        refusal, expiry, payload = decide(described, self._key, self._ask(self._request(described)))
        if refusal:
            raise Refusal(refusal)
        hold_signals()  # nothing blocks from here on, and a rejection after instantiating would come too late
        if expiry:  # must be set before instantiating, which ends the authority
            self._host.set_timeout(self._key, as_counted(expiry, self._host.gone_of_second()))
        try:
            self._host.instantiate(self._key, payload)
        except OSError:
            raise Refusal(errno.EKEYREJECTED) from None
        os._exit(ANSWERED)

    def _request(self, described: bytes) -> bytes:
        """Packs the request in the format of upcall/wire/envelope.py."""
        authorisation, callout = self._host.authorisation(), self._host.read_callout()
        body = UPCALL_HEAD.pack(self._key, authorisation, len(described), len(callout)) + described + callout
        size = REQUEST_HEAD.size + len(SERVICE) + len(body)
        address = size, REQUEST, 0, self._key, 0, 0, size - BEFORE_DATA
        head = REQUEST_HEAD.pack(*address, VERSION, len(SERVICE), 0, 0, os.getpid(), self._deadline)
        return head + SERVICE + body

    def _ask(self, request: bytes) -> bytes:
        broker = self._call_broker()
        response = bytearray(MAX_RESPONSE + 1)
        try:
            self._limit(broker, socket.SO_SNDTIMEO)
            broker.send(request, socket.MSG_NOSIGNAL)
            self._limit(broker, socket.SO_RCVTIMEO)
            size = broker.recv_into(response, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            raise Refusal(errno.ETIMEDOUT) from None
        except ConnectionError:
            size = 0
        if size == 0:
            raise Refusal(errno.ECONNRESET, "the broker hung up")
        if size > MAX_RESPONSE:
            raise Refusal(errno.EPROTO)
        return bytes(response[:size])

    def _call_broker(self) -> socket.socket:
        broker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._limit(broker, socket.SO_SNDTIMEO)
        try:
            broker.connect(self._path)
        except BlockingIOError:
            raise Refusal(errno.ETIMEDOUT, "the broker takes no connection") from None
        except OSError:
            raise Refusal(errno.ENOTCONN, "no broker") from None
        _, uid, _ = PEER.unpack(broker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        if uid != self._host.broker_uid:
            raise Refusal(errno.EPERM, "the socket is not root's")
        return broker

    def _limit(self, broker: socket.socket, option: int) -> None:
        """Sets the socket's time-out to the time until the deadline. Unlike poll(2), this also bounds connect(2) to a
        busy broker."""
        left = (self._deadline - time.monotonic_ns()) // 1000
        if left <= 0:
            raise Refusal(errno.ETIMEDOUT)
        broker.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(left, 10**6)))

    def _catch_signals(self) -> None:
        """Installs a handler that rejects the key, for every signal that would end or stop this program. Real-time
        signals stay blocked. Call with all signals blocked."""
        left_alone = real_time_signals()
        left_alone |= {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
        left_alone |= {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}
        for number in signal.valid_signals() - left_alone - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> NoReturn:
        self._refuse(errno.ETIMEDOUT if number == signal.SIGALRM else errno.ECANCELED)

    def _refuse(self, code: int, log: str = "") -> NoReturn:
        """Rejects the key, then logs without blocking, and ends: the kernel's caller waits for this program's end."""
        hold_signals()
        try:
            seconds = as_counted(REJECTED_FOR, self._host.gone_of_second())
            self._host.reject(self._key, seconds, rejectable(code))
        except BaseException:  # noqa: BLE001 - as above
            end(UNANSWERED, f"{NAME}: the key could not be rejected\n")
        if log:
            self._log(f"{NAME}[{os.getpid()}]: key {self._key} is rejected: {log} ({self._path})")
        os._exit(ANSWERED)

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            line = b"<83>" + os.fsencode(text)  # LOG_AUTHPRIV, LOG_ERR
            out.sendto(line[:255], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._host.log_path)


def hold_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def real_time_signals() -> set[int]:
    return {number for number in signal.valid_signals() if number >= signal.SIGRTMIN}


def tidy_descriptors() -> None:
    """Opens descriptors 0 to 2 if they are closed, so that no socket gets their numbers, and closes all others."""
    with contextlib.suppress(OSError):
        while os.open(os.devnull, os.O_RDWR) <= 2:
            pass
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def main(words: Sequence[str], host: Host) -> NoReturn:
    Forwarder(host, take_arguments(words)).run()


if __name__ == "__main__":
    main(sys.argv[1:], Host())
