"""Detects that a stream from the guest is complete.

The guest's ports are queues of their own: the exit code can arrive while output is still under way, and
closing a port tells the host nothing. So the guest ends every stream with a mark that is new for each run,
and whoever reads the stream takes the mark out again."""

from __future__ import annotations


class MarkedStream:
    """Takes chunks as they arrive; gives them back without the mark, and knows when the mark has come."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._held = b""
        self.complete = False

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that may be passed on now. What could be the beginning of the mark is held back."""
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
        """What was held back, for when the machine ended without a mark."""
        held, self._held = self._held, b""
        return held

    def _beginning_at_end(self, data: bytes) -> int:
        for length in range(min(len(self._mark) - 1, len(data)), 0, -1):
            if data.endswith(self._mark[:length]):
                return length
        return 0
