"""Delivers notices to one sink, in a thread of its own, so that a sink that hangs blocks nothing else. Opens the sink
at the first notice."""

from __future__ import annotations

import math
import random
import threading
import time
import traceback
from collections.abc import Callable

from upcall.core.errors import UpcallError
from upcall.process.log import EventLog
from upcall.protocols.quota.notice import QuotaNotice
from upcall.sink import Sink, TryLater
from upcall_quota.waiting import Item, Waiting


class Delivery:
    """Delivers to one sink. Its thread starts with the first notice, and ends with the process: a sink may hang in
    it."""

    def __init__(self, name: str, opener: Callable[[], Sink], log: EventLog) -> None:
        self._name, self._opener, self._log = name, opener, log
        self._sink: Sink | None = None
        self._waiting = Waiting()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._why = ""  # the last failure: repeated failures are logged once
        self._lost = 0

    def put(self, notice: QuotaNotice, text: str) -> None:
        """Queues a notice; does not block. `text`: the sentence for people. From any thread."""
        with self._change:
            self._waiting.put(notice, text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"sink {self._name}", daemon=True)
                self._thread.start()
            self._change.notify()

    def _run(self) -> None:
        while True:
            self._deliver(self._next())

    def _next(self) -> Item:
        with self._change:
            while not isinstance(item := self._waiting.take(time.monotonic()), Item):
                self._change.wait(None if item == math.inf else item)
            return item

    def _deliver(self, item: Item) -> None:
        try:
            if self._sink is None:
                self._sink = self._opener()
            self._sink.tell(item.notice, item.text)
        except TryLater as error:
            with self._change:
                again = self._waiting.failed(item, time.monotonic(), random.random())  # noqa: S311
            self._failed(str(error) if again else f"{error}; given up after {item.tries + 1} tries")
        except UpcallError as error:
            self._failed(str(error))
        except BaseException as error:  # noqa: BLE001 - a sink may raise anything; its thread must continue
            # The text is not logged: it may contain the sink's secrets.
            frames = traceback.extract_tb(error.__traceback__)
            self._failed(f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}")
        else:
            self._succeeded()

    def _succeeded(self) -> None:
        with self._change:
            self._waiting.told()
        if self._why:
            self._log("sink-works", sink=self._name)
            self._why = ""
        self._say_dropped()

    def _failed(self, why: str) -> None:
        if why != self._why:
            self._log("sink-failed", sink=self._name, why=why)
            self._why = why
        self._say_dropped()

    def _say_dropped(self) -> None:
        dropped = self._waiting.dropped
        if dropped > self._lost:
            self._log("sink-behind", sink=self._name, dropped=dropped - self._lost)
            self._lost = dropped
