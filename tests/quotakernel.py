"""Simulates a kernel that sends quota warnings, in a process of its own: `python quotakernel.py`.

Prints "ready PORTID". For each line "GROUP COUNT RATE" it multicasts COUNT warnings about alice, RATE per second, and
one about bob in the middle; then it prints "done".
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections import Counter

from upcall.kernel.netlink import NETLINK_USERSOCK
from upcall.protocols.quota.warning import BHARDWARN, Warned, pack

FAMILY = 28
ALICE, BOB = 5001, 5002
_AT_ONCE = 10


def main() -> None:
    sender = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_USERSOCK)
    sender.bind((0, 0))
    print("ready", sender.getsockname()[0], flush=True)
    sequence: Counter[int] = Counter()

    def warn(group: int, uid: int) -> None:
        sequence[group] += 1
        with contextlib.suppress(ConnectionRefusedError):  # netlink also tries portid 0, which no socket has
            sender.sendto(pack(Warned(0, uid, BHARDWARN, 7, 0, uid), FAMILY, sequence[group]), (0, 1 << group - 1))

    for line in sys.stdin:
        group, count, rate = map(int, line.split())
        began = time.monotonic()
        for number in range(count):
            if number % _AT_ONCE == 0 and (early := began + number / rate - time.monotonic()) > 0:
                time.sleep(early)
            warn(group, ALICE)
            if number == count // 2:
                warn(group, BOB)
        print("done", flush=True)


if __name__ == "__main__":
    main()
