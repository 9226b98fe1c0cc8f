"""`upcall metrics`: from a played status, and from a real broker over sockets, read by Prometheus' own parser."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from prometheus_client import generate_latest, make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families

from upcall import __version__
from upcall.cli import main
from upcall.core.errors import UsageError
from upcall.observe.metrics import METRICS, PER_UID, registry
from upcall.observe.metrics_server import server
from upcall.testing.processes import RunningBroker, StartDaemon, Started, in_child, until

DOCS = Path(__file__).parents[1] / "docs" / "observing.md"
STATUS: dict[str, Any] = {
    "broker": {"pid": os.getpid(), "portid": 1, "uid": 0, "version": "9.9"},
    "daemons": [
        {
            "uid": uid,
            "answered": 5,
            "refused": 2,
            "rejected": 1,
            "age": 12.5,
            "contexts": {"size": 64, "in_use": 2, "most": most},
            "pending": [{"service": "key"}, {"service": "ecryptfs"}],
        }
        for uid, most in ((1000, 7), (1001, 3))
    ],
    "daemons_not_shown": 3,
    "outcomes": {"key": {"answered": 10, "no-daemon": 2}, "ecryptfs": {"timed-out": 1}},
    "rejected": {"sequence": 4},
    "junk": {"message": 6},
    "kernel": {"read": 9, "stale": 1},
    "request_key": {"forged": 2},
    "latencies": {"key": {"bounds": [0.001, 0.1], "counts": [3, 4, 5], "seconds": 2.5}},
    "devices": [{"uid": 1000, "open": True}, {"uid": 1001, "open": False, "why": "EINVAL"}],
    "quota": {
        **dict.fromkeys(("received", "folded", "dropped", "lost", "overflows", "nonsense", "delivered"), 8),
        "listening": True,
        "undelivered": 1,
        "watched": 2,
    },
}


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and the values of the labels, in the order of the labels' names."""
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


def taken(status: dict[str, Any] | None, per_uid: bool = False) -> dict[tuple[str, tuple[str, ...]], float]:
    return samples(generate_latest(registry(lambda: status, per_uid)).decode())


def test_every_figure_of_a_status_becomes_a_metric() -> None:
    found = taken(STATUS)
    assert found["upcall_up", ()] == 1
    assert found["upcall_requests_total", ("answered", "key")] == 10
    assert found["upcall_requests_total", ("timed-out", "ecryptfs")] == 1
    assert found["upcall_pending_requests", ("key",)] == 2
    assert found["upcall_contexts", ()] == 128
    assert found["upcall_contexts_in_use", ()] == 4
    assert found["upcall_contexts_most", ()] == 7
    assert found["upcall_daemons", ()] == 5
    assert found["upcall_replies_rejected_total", ("sequence",)] == 4
    assert found["upcall_messages_rejected_total", ("message",)] == 6
    assert found["upcall_kernel_frames_total", ("stale",)] == 1
    assert found["upcall_request_keys_total", ("forged",)] == 2
    assert found["upcall_devices", ("open",)] == found["upcall_devices", ("closed",)] == 1
    assert found["upcall_quota_listening", ()] == 1
    assert found["upcall_quota_warnings_total", ("lost",)] == 8
    buckets = [found["upcall_request_duration_seconds_bucket", (end, "key")] for end in ("0.001", "0.1", "+Inf")]
    assert buckets == [3, 7, 12]
    assert found["upcall_request_duration_seconds_count", ("key",)] == 12
    assert found["upcall_request_duration_seconds_sum", ("key",)] == 2.5
    assert found["upcall_broker_process_resident_memory_bytes", ()] > 1 << 20
    assert found["upcall_broker_process_start_time_seconds", ()] > 0
    assert not any("1000" in labels for _, labels in found)


def test_metrics_per_uid_are_exported_only_on_request() -> None:
    found = taken(STATUS, per_uid=True)
    assert found["upcall_daemon_replies_total", ("refused", "1000")] == 2
    assert found["upcall_daemon_contexts_most", ("1001",)] == 3
    assert found["upcall_daemon_contexts_in_use", ("1001",)] == 2
    assert found["upcall_daemon_registered_seconds", ("1000",)] == 12.5


def test_metric_names_follow_prometheus_rules_and_are_documented() -> None:
    docs = DOCS.read_text()
    written = {family.name for family in registry(lambda: STATUS, True).collect()}
    for one in METRICS + PER_UID:
        assert one.name in written
        assert one.name.startswith("upcall_") and not one.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert one.help.endswith(".")
        name = one.name + ("_total" if one.kind.__name__.startswith("Counter") else "")
        labels = ", ".join(f"`{label}`" for label in one.labels)
        assert f"| `{name}` | {labels} | {one.help} |" in docs


def test_a_users_reduced_status_becomes_fewer_metrics_without_an_error() -> None:
    """The broker's status has fewer fields for users other than root."""
    less = {key: value for key, value in STATUS.items() if key not in ("junk", "kernel", "request_key", "quota")}
    del less["latencies"]
    found = taken(less)
    assert found["upcall_requests_total", ("answered", "key")] == 10
    assert not any(name.startswith(("upcall_quota", "upcall_kernel")) for name, _ in found)


def test_the_status_of_an_older_broker_is_exported() -> None:
    old = {**STATUS, "broker": {"pid": os.getpid(), "portid": 1, "uid": 0}, "quota": {}}
    assert taken(old)["upcall_info", ("", __version__)] == 1


def test_without_a_broker_only_upcall_up_is_exported_as_0(folder: Path) -> None:
    assert taken(None) == {("upcall_up", ()): 0}
    result = metrics("--runtime", str(folder))
    assert result.exit_code == 0
    assert samples(result.output) == {("upcall_up", ()): 0}


# --- a real broker -------------------------------------------------------------------------------------------


def metrics(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["metrics", *arguments])


@pytest.fixture
def used(broker: RunningBroker, start_daemon: StartDaemon, signature: str) -> RunningBroker:
    """A broker that has answered once."""
    start_daemon(broker)
    with broker.client() as client:
        client.wrap(signature, b"0123456789abcdef")
    return broker


def test_metrics_of_a_real_broker_are_printed(used: RunningBroker) -> None:
    found = samples(metrics("--runtime", str(used.folder), "--per-uid").output)
    assert found["upcall_requests_total", ("answered", "key")] == 1
    assert found["upcall_daemon_replies_total", ("answered", str(os.getuid()))] == 1
    if os.getuid() == 0:
        assert found["upcall_request_duration_seconds_count", ("key",)] == 1
        assert found["upcall_request_duration_seconds_sum", ("key",)] > 0


def test_a_text_file_for_node_exporter_is_replaced_leaving_no_other_file(used: RunningBroker, tmp_path: Path) -> None:
    file = tmp_path / "upcall.prom"
    file.write_text("old")
    assert metrics("--runtime", str(used.folder), "--textfile", str(file)).exit_code == 0
    assert samples(file.read_text())["upcall_up", ()] == 1
    assert list(tmp_path.iterdir()) == [file]
    result = metrics("--textfile", str(tmp_path / "no" / "folder.prom"))
    assert result.exit_code == os.EX_NOINPUT


def get(connection: socket.socket) -> tuple[str, str]:
    connection.settimeout(60)
    connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    data = b""
    while more := connection.recv(65536):
        data += more
    head, _, body = data.decode().partition("\r\n\r\n")
    return head.splitlines()[0], body


@pytest.fixture
def listening(used: RunningBroker) -> Iterator[tuple[Started, Path]]:
    path = used.folder.parent / "metrics.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()  # a socket that was left behind
    arguments = ["-m", "upcall", "metrics", f"--runtime={used.folder}", f"--listen=unix:{path}"]
    with Started(arguments, used.folder.parent / "metrics.log") as process:
        until(lambda: _listens(path), "somebody who listens")
        yield process, path


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_metrics_are_served_on_a_unix_socket_that_is_removed_at_the_end(listening: tuple[Started, Path]) -> None:
    process, path = listening
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as slow:  # who says nothing holds nobody up
        slow.connect(str(path))
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                head, body = get(connection)
            assert "200" in head
            assert samples(body)["upcall_requests_total", ("answered", "key")] == 1
    with pytest.raises(OSError, match="another process listens there already"):
        server(f"unix:{path}", lambda *_: [])
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert not path.exists()


def ends(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_slow_readers_are_cut_off_and_block_no_other_reader(listening: tuple[Started, Path]) -> None:
    process, path = listening
    slow = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for one in slow:
        one.connect(str(path))
        one.settimeout(60)
        with contextlib.suppress(BrokenPipeError):  # it was cut already
            one.sendall(b"GET /metrics HT")  # and nothing more
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        assert "200" in get(connection)[0]
    assert ends(slow[0]), "the oldest is cut off"
    threads = Path(f"/proc/{process.pid}/task")
    until(lambda: len(list(threads.iterdir())) <= 20, "no thread of each")
    assert ends(slow[-1]), "all are, after the total time"
    until(lambda: len(list(threads.iterdir())) <= 4, "threads have ended")
    for one in slow:
        one.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket to another group")
def test_a_socket_belongs_to_its_group_and_other_users_cannot_connect(used: RunningBroker) -> None:
    path = used.folder / "metrics.sock"
    arguments = ["-m", "upcall", "metrics", f"--runtime={used.folder}", "--group=64300", "--listen"]
    with Started(arguments, used.folder.parent / "metrics.log"):
        until(lambda: _listens(path), "somebody who listens")
        assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (64300, 0o660)
        assert in_child(lambda: _listens(path), uid=64301) is False


def test_tcp_is_served_with_a_warning(used: RunningBroker) -> None:
    arguments = ["-m", "upcall", "metrics", f"--runtime={used.folder}", "--listen=127.0.0.1:0"]
    with Started(arguments, used.folder.parent / "metrics.log") as process:
        process.logged("every user of this machine can read")
    assert metrics("--group", "root", "--listen", "127.0.0.1:0").exit_code == os.EX_USAGE


def test_metrics_are_served_on_a_local_tcp_port() -> None:
    with server("127.0.0.1:0", make_wsgi_app(registry(lambda: STATUS))) as serving:
        threading.Thread(target=serving.handle_request).start()
        with socket.create_connection(("127.0.0.1", serving.server_port), 10) as connection:
            head, body = get(connection)
    assert "200" in head and samples(body)["upcall_daemons", ()] == 5


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9", "example.org:9", "[::]:9", ":9", "127.0.0.1", "127.0.0.1:x", "", "127.0.0.1:65536"]
)
def test_a_listen_address_that_is_not_local_or_malformed_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        server(address, lambda *_: [])


def test_metrics_refuses_two_outputs_at_once_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics("--textfile", "x", "--listen", "127.0.0.1:0").exit_code == os.EX_USAGE
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = metrics()
    assert result.exit_code == os.EX_USAGE
    assert "upcall[metrics]" in result.stderr


def test_broker_and_daemon_import_neither_the_metrics_library_nor_openssl(broker: RunningBroker) -> None:
    code = "import sys, upcall.broker.__main__, upcall.daemon.__main__; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    unused = {"prometheus_client", "datetime", "ast", "upcall.observe.recorder", "upcall.observe.doctor"}
    assert not (unused | {"_hashlib", "_ssl", "secrets", "random"}) & set(loaded.stdout.split())
