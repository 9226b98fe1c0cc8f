"""Formats a broker's status as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from upcall.observe.tables import Column, print_table
from upcall.protocols.quota.notice import printable


def show(status: dict[str, Any], console: Console) -> None:
    """Prints a broker's status for people."""
    broker = status["broker"]
    console.print(f"broker: pid {broker['pid']}, uid {broker['uid']}")
    if hardening := broker.get("hardening"):  # missing from older brokers
        names = {"capabilities": "capabilities kept:"}
        text = ", ".join(f"{names.get(name, name)} {said}" for name, said in hardening.items())
        console.print(f"restrictions: {text}", highlight=False)
    if machine := broker.get("machine"):
        pids = [daemon["pid"] for daemon in status["daemons"] if daemon["uid"] == machine]
        about = f"pid {pids[0]}" if pids else "not registered"
        console.print(f"machine daemon: uid {machine}, {about}", highlight=False)
    if status["daemons"]:
        _daemons(status, console)
    else:
        console.print("no daemon is registered")
    for daemon in status["daemons"]:
        if daemon.get("pending"):
            _pending(daemon, console)
    if status["outcomes"]:
        _outcomes(status, console)
    for title, counts in (
        ("replies rejected", status["rejected"]),
        ("messages rejected", status.get("junk")),
        ("keys that the kernel requested", status.get("request_key")),
    ):
        if counts:
            console.print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if status.get("quota"):
        console.print(Text(_quota(status.get("quota", {}))))
    if missing := [one for one in status.get("devices", []) if not one["open"] and "No such file" in one["why"]]:
        console.print("/dev/ecryptfs: not there; `modprobe ecryptfs` creates it, if needed", highlight=False)
    for device in status.get("devices", []):
        if device in missing:
            continue
        state = "open" if device["open"] else f"not open: {device['why']}"
        console.print(f"/dev/ecryptfs for uid {device['uid']}: {state}", highlight=False)


def _daemons(status: dict[str, Any], console: Console) -> None:
    heads = ("uid", "pid", "age", "contexts", "most", "answered", "refused", "rejected")
    rows = []
    for daemon in status["daemons"]:
        contexts = daemon["contexts"]
        rows.append(
            (
                str(daemon["uid"]),
                str(daemon["pid"]) + (" (leaving)" if daemon["leaving"] else ""),
                _age(daemon["age"]),
                f"{contexts['in_use']}/{contexts['size']}",
                str(contexts["most"]),
                *(str(daemon[name]) for name in ("answered", "refused", "rejected")),
            )
        )
    print_table(console, "daemons", [Column(head, right=True) for head in heads], rows)


def _pending(daemon: dict[str, Any], console: Console) -> None:
    heads = [Column(head, right=True) for head in ("index", "sequence", "service", "age")]
    rows = [(str(one["index"]), str(one["seq"]), one["service"], _age(one["age"])) for one in daemon["pending"]]
    print_table(console, f"pending, uid {daemon['uid']}", heads, rows)


def _outcomes(status: dict[str, Any], console: Console) -> None:
    rows = [
        (service, outcome, str(count))
        for service, outcomes in status["outcomes"].items()
        for outcome, count in sorted(outcomes.items(), key=lambda item: -item[1])
    ]
    print_table(console, "requests by outcome", ["service", "outcome", Column("count", right=True)], rows)


def _quota(quota: dict[str, Any]) -> str:
    """Tells what the quota source has said, which the broker does not check."""
    if not quota.get("listening"):
        return f"quota warnings: off: {printable(str(quota.get('why', '?')))}"
    counts = ("received", "folded", "lost", "delivered", "undelivered")
    where = ", ".join(printable(str(one)) for one in quota.get("filesystems", ())) or "no filesystem has any"
    return (
        "quota warnings: "
        + ", ".join(f"{name} {printable(str(quota.get(name, '?')))}" for name in counts)
        + f"; quotas: {where}"
    )


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
