"""Parses the kernel's log as read from /dev/kmsg, and finds faults in it.

Source: Documentation/ABI/testing/dev-kmsg."""

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
    """One message: facility (0: the kernel), level (0 to 7), seconds since boot, and text."""

    facility: int
    level: int
    seconds: float
    text: str

    def __str__(self) -> str:
        return f"<{self.facility << 3 | self.level}>[{self.seconds:12.6f}] {self.text}"


def records(raw: bytes) -> Iterator[KernelMessage]:
    """Yields the messages in data from /dev/kmsg, with lines `priority,sequence,microseconds,flags;text`.

    Skips lines that begin with a space (the dictionary of the message before), and a line that the machine's end
    truncated."""
    for line in raw.decode(errors="replace").split("\n"):
        prefix, semicolon, text = line.partition(";")
        fields = prefix.split(",")
        if semicolon and len(fields) >= 3 and fields[0].isdecimal() and fields[2].isdecimal():
            priority = int(fields[0])
            yield KernelMessage(priority >> 3, priority & 7, int(fields[2]) / 1e6, text)


def faults(raw: bytes) -> list[str]:
    """Returns the texts that report a fault of the kernel itself. Ignores what programs write to /dev/kmsg."""
    return [record.text for record in records(raw) if record.facility == KERNEL_FACILITY and FAULT.search(record.text)]


def console_faults(console: str) -> list[str]:
    """Returns faults in the console's output, which after a panic has lines that did not reach /dev/kmsg."""
    return [line.strip() for line in console.splitlines() if FAULT.search(line)]


def readable(raw: bytes) -> str:
    """Formats the log as `dmesg --raw` does."""
    return "".join(f"{record}\n" for record in records(raw))
