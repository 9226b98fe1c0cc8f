"""Exports the broker's status as Prometheus metrics, by the client library, in a process of its own.

Label values are words of the protocol, so there are at most some hundred series; uids are labels only on demand.
https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from upcall import __version__
from upcall.core.errors import UpcallError
from upcall.process.connection import BrokerConnection

Status = Mapping[str, Any]
PATIENCE: Final = 2.0  # seconds, the time-out of the broker's answer
_QUOTA_COUNTS = ("received", "folded", "dropped", "lost", "nonsense", "overflows", "delivered")


class Family(NamedTuple):
    """A metric. `name`: as in the output, without the suffix _total of counters."""

    name: str
    kind: type[Metric]
    labels: tuple[str, ...]
    help: str


_C, _G, _H = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
UP = Family("upcall_up", _G, (), "1 if the broker answered.")
METRICS: Final = (
    UP,
    Family("upcall_info", _G, ("version", "broker_version"), "The versions of this command and of the broker; 1."),
    Family("upcall_requests", _C, ("service", "outcome"), "Requests settled: answered, or why they were refused."),
    Family("upcall_request_duration_seconds", _H, ("service",), "Duration of requests that were sent to a daemon."),
    Family("upcall_pending_requests", _G, ("service",), "Requests that a daemon has not answered yet."),
    Family("upcall_contexts", _G, (), "Message contexts of all registered uids."),
    Family("upcall_contexts_in_use", _G, (), "Message contexts in use."),
    Family("upcall_contexts_most", _G, (), "The most contexts that one uid has had in use at once."),
    Family("upcall_daemons", _G, (), "Daemons that are registered."),
    Family("upcall_replies_rejected", _C, ("on",), "Replies of daemons that matched no context, by failed check."),
    Family("upcall_messages_rejected", _C, ("on",), "Messages that their sender may not send, by failed check."),
    Family("upcall_devices", _G, ("state",), "Uids for which /dev/ecryptfs is open, or should be."),
    Family("upcall_kernel_frames", _C, ("what",), "Frames of /dev/ecryptfs, by outcome."),
    Family("upcall_request_keys", _C, ("outcome",), "Keys that the kernel requested, by outcome."),
    Family("upcall_quota_listening", _G, (), "1 if the quota source receives the kernel's warnings."),
    Family("upcall_quota_warnings", _C, ("what",), "Quota warnings, by outcome."),
    Family("upcall_quota_undelivered", _G, (), "Quota notices that wait for their daemon."),
    Family("upcall_quota_watched", _G, (), "Quotas near a limit or over it."),
)
PER_UID: Final = (
    Family("upcall_daemon_replies", _C, ("uid", "outcome"), "Replies of this daemon: answered, refused, rejected."),
    Family("upcall_daemon_contexts_in_use", _G, ("uid",), "Contexts of this uid that are in use."),
    Family("upcall_daemon_contexts_most", _G, ("uid",), "The most of them that were ever in use at once."),
    Family("upcall_daemon_registered_seconds", _G, ("uid",), "How long this daemon has been registered."),
)

Samples = list[tuple[tuple[str, ...], float]]


def registry(ask: Callable[[], Status | None], per_uid: bool = False) -> CollectorRegistry:
    """Returns a registry that calls `ask` once per collection. `per_uid`: export metrics of each uid, too."""
    found = CollectorRegistry()
    found.register(_Broker(ask, per_uid))
    return found


def asker(folder: Any = None) -> Callable[[], Status | None]:
    """Returns a function for `registry`: it returns the status of the broker in `folder`, or None if it does not
    answer."""

    def ask() -> Status | None:
        try:
            with BrokerConnection(folder, timeout=PATIENCE) as client:
                return client.status()
        except (UpcallError, OSError):
            return None

    return ask


class _Broker(Collector):
    def __init__(self, ask: Callable[[], Status | None], per_uid: bool) -> None:
        self._ask, self._per_uid = ask, per_uid

    def describe(self) -> list[Metric]:
        """Returns nothing: otherwise registering would ask the broker."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics; only `upcall_up` 0 if the broker does not answer."""
        status = self._ask()
        if status is None:
            yield _family(UP, [((), 0.0)])
            return
        samples = _samples(status) | (_of_each_uid(status) if self._per_uid else {})
        for described in METRICS + (PER_UID if self._per_uid else ()):
            if described.kind is HistogramMetricFamily:
                yield _durations(described, status.get("latencies", {}))
            elif described.name in samples:
                yield _family(described, samples[described.name])
        pid = status["broker"]["pid"]
        yield from ProcessCollector("upcall_broker", lambda: pid, registry=None).collect()


def _family(described: Family, samples: Samples) -> Metric:
    family = described.kind(described.name, described.help, labels=described.labels)  # type: ignore[call-arg]
    for labels, value in samples:
        family.add_metric(labels, value)  # type: ignore[attr-defined]
    return family


def _durations(described: Family, latencies: Mapping[str, Any]) -> Metric:
    family = HistogramMetricFamily(described.name, described.help, labels=described.labels)
    for service, one in latencies.items():
        ends, buckets, count = [*map(str, one["bounds"]), "+Inf"], [], 0
        for end, more in zip(ends, one["counts"], strict=True):
            count += more
            buckets.append((end, float(count)))
        family.add_metric((service,), buckets, one["seconds"])
    return family


def _samples(status: Status) -> dict[str, Samples]:
    """Returns samples by metric. Missing parts of the status are omitted: users other than root get less."""
    daemons = status["daemons"]
    contexts = [one["contexts"] for one in daemons]
    found: dict[str, Samples] = {
        "upcall_up": [((), 1.0)],
        "upcall_info": [((__version__, str(status["broker"].get("version", ""))), 1.0)],
        "upcall_requests": [
            ((service, outcome), count)
            for service, outcomes in status["outcomes"].items()
            for outcome, count in outcomes.items()
        ],
        "upcall_pending_requests": _pending(daemons),
        "upcall_contexts": [((), sum(one["size"] for one in contexts))],
        "upcall_contexts_in_use": [((), sum(one["in_use"] for one in contexts))],
        "upcall_contexts_most": [((), max((one["most"] for one in contexts), default=0))],
        "upcall_daemons": [((), len(daemons) + status.get("daemons_not_shown", 0))],
        "upcall_replies_rejected": _counts(status["rejected"]),
        "upcall_devices": [
            ((state,), sum(one["open"] is is_open for one in status.get("devices", [])))
            for state, is_open in (("open", True), ("closed", False))
        ],
    }
    for name, key in (
        ("upcall_messages_rejected", "junk"),
        ("upcall_kernel_frames", "kernel"),
        ("upcall_request_keys", "request_key"),
    ):
        if key in status:
            found[name] = _counts(status[key])
    if quota := status.get("quota"):
        found["upcall_quota_listening"] = [((), float(quota["listening"]))]
        found["upcall_quota_warnings"] = _counts({name: quota[name] for name in _QUOTA_COUNTS})
        found["upcall_quota_undelivered"] = [((), quota["undelivered"])]
        found["upcall_quota_watched"] = [((), quota["watched"])]
    return found


def _pending(daemons: list[dict[str, Any]]) -> Samples:
    counts: dict[str, int] = {}
    for daemon in daemons:
        for one in daemon.get("pending", ()):
            counts[one["service"]] = counts.get(one["service"], 0) + 1
    return _counts(counts)


def _counts(counts: Mapping[str, int]) -> Samples:
    return [((name,), count) for name, count in counts.items()]


def _of_each_uid(status: Status) -> dict[str, Samples]:
    daemons = [(str(one["uid"]), one) for one in status["daemons"]]
    outcomes = ("answered", "refused", "rejected")
    return {
        "upcall_daemon_replies": [((uid, name), one[name]) for uid, one in daemons for name in outcomes],
        "upcall_daemon_contexts_in_use": [((uid,), one["contexts"]["in_use"]) for uid, one in daemons],
        "upcall_daemon_contexts_most": [((uid,), one["contexts"]["most"]) for uid, one in daemons],
        "upcall_daemon_registered_seconds": [((uid,), one["age"]) for uid, one in daemons],
    }
