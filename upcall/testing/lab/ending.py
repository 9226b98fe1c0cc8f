"""Detects that a stream from the guest is complete.

The guest's ports are separate queues: the exit code can arrive before the end of the output, and the host does not see
that a port was closed. So the guest ends every stream with a mark, unique for each run, which the reader removes."""

from __future__ import annotations


class MarkedStream:
    """Removes the mark from a stream, chunk by chunk, and detects it."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._held = b""
        self.complete = False

    def feed(self, chunk: bytes) -> bytes:
        """Returns the bytes that can be passed on. Holds back what may be the beginning of the mark."""
        if self.complete:
            return b""
        data = self._held + chunk
        at = data.find(self._mark)
        if at >= 0:
            self.complete = True
            self._held = b""
            return data[:at]
        hold = self._beginning_at_end(data)
        self._held = data[len(data) - hold :]
        return data[: len(data) - hold]

    def rest(self) -> bytes:
        """Returns the bytes that were held back, if the machine has ended without a mark."""
        held, self._held = self._held, b""
        return held

    def _beginning_at_end(self, data: bytes) -> int:
        for length in range(min(len(self._mark) - 1, len(data)), 0, -1):
            if data.endswith(self._mark[:length]):
                return length
        return 0
