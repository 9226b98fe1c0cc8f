"""The kernel's log as /dev/kmsg gives it (Documentation/ABI/testing/dev-kmsg): reading it, and finding faults
in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

KERNEL_FACILITY = 0

FAULT = re.compile(
    r"\bBUG: |\bkernel BUG at |\bOops\b|general protection fault|Kernel panic|double fault"
    r"|list_(?:add|del) corruption|usercopy: Kernel memory|refcount_t: |KASAN|UBSAN"
    r"|self-detected stall|detected stalls on"
)


@dataclass(frozen=True)
class KernelMessage:
    """One message: its facility (0 is the kernel itself), its level (0 to 7), seconds since boot, and its
    text."""

    facility: int
    level: int
    seconds: float
    text: str

    def __str__(self) -> str:
        return f"<{self.facility << 3 | self.level}>[{self.seconds:12.6f}] {self.text}"


def records(raw: bytes) -> Iterator[KernelMessage]:
    """The messages in what was read from /dev/kmsg: `priority,sequence,microseconds,flags;text`.

    Lines that begin with a space belong to the message before (its dictionary) and are left out, as is a line
    that was cut short by the machine's end."""
    for line in raw.decode(errors="replace").split("\n"):
        prefix, semicolon, text = line.partition(";")
        fields = prefix.split(",")
        if semicolon and len(fields) >= 3 and fields[0].isdecimal() and fields[2].isdecimal():
            priority = int(fields[0])
            yield KernelMessage(priority >> 3, priority & 7, int(fields[2]) / 1e6, text)


def faults(raw: bytes) -> list[str]:
    """The texts in which the kernel reports a fault of its own. What programs write to /dev/kmsg does not
    count."""
    return [record.text for record in records(raw) if record.facility == KERNEL_FACILITY and FAULT.search(record.text)]


def console_faults(console: str) -> list[str]:
    """The same in what reached the console: after a panic it holds lines that /dev/kmsg had no time to
    give."""
    return [line.strip() for line in console.splitlines() if FAULT.search(line)]


def readable(raw: bytes) -> str:
    """The log as `dmesg --raw` prints it."""
    return "".join(f"{record}\n" for record in records(raw))
