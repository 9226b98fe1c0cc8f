"""`upcall quota`, with figures as a test wants them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from upcall.cli import main
from upcall.cli import quota as module
from upcall.kernel import quotactl
from upcall.kernel.genetlink import Ids
from upcall.kernel.mounts import Mount
from upcall.observe.status import show
from upcall.process.settings import dumps
from upcall.protocols.quota.settings import SourceSettings
from upcall.protocols.quota.warning import BHARDWARN, NOTHING, Figures, Quota, Warned, pack
from upcall.testing.processes import Started

MB = 1 << 20
HOME = Mount(os.makedev(7, 0), "/", "/ho\x1bme", "ext4", "/dev/loop0", frozenset())
ME = os.geteuid()


class Played:
    """An open filesystem."""

    quotas = {
        (0, ME): Quota(ME, Figures(150 * MB, 100 * MB, 200 * MB, 2_000_000_000), Figures(5, 0, 10, 0)),
        (0, 5002): Quota(5002, Figures(1, 0, 200 * MB, 0), NOTHING),
        (0, 5003): Quota(5003, Figures(9, 0, 0, 0), NOTHING),
    }

    def get(self, kind: int, number: int) -> Quota:
        if number not in (ME, *os.getgroups(), os.getegid()) and number != 5002:
            raise PermissionError(1, "Operation not permitted")
        return self.quotas.get((kind, number), Quota(number, NOTHING, NOTHING))

    def next(self, kind: int, number: int) -> Quota | None:
        found = sorted(one for of, one in self.quotas if of == kind and one >= number)
        return self.quotas[kind, found[0]] if found else None

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_quotas(_: Iterable[Mount]) -> dict[Mount, tuple[int, ...]]:
        return {HOME: (0, 1)}

    monkeypatch.setattr(quotactl, "with_quotas", with_quotas)
    monkeypatch.setattr(quotactl, "opened", lambda _: Played())


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["quota", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_status_shows_the_users_own_usage_limits_and_grace() -> None:
    code, output = run("status")
    assert code == 0
    assert "150 MiB" in output
    assert "left, until" in output
    assert "nothing more" not in output
    assert "10 files" in output
    assert "\x1b" not in output
    assert "/ho\\x1bme" in output


def test_status_prints_the_same_figures_as_json() -> None:
    code, output = run("status", "--json")
    assert code == 0
    space, files = json.loads(output)
    assert (space["used"], space["soft"], space["hard"]) == (150 * MB, 100 * MB, 200 * MB)
    assert (space["kind"], space["id"], space["resource"], space["grace_until"]) == (
        "user",
        ME,
        "space",
        2_000_000_000,
    )
    assert (files["resource"], files["used"], files["hard"], files["grace_until"]) == ("files", 5, 10, None)


def test_status_of_all_lists_every_user_with_a_limit() -> None:
    code, output = run("status", "--all", "--json")
    assert code == 0
    assert {row["id"] for row in json.loads(output)} == {ME, 5002} - {0}


def test_status_of_one_user_lists_that_user_only() -> None:
    code, output = run("status", "--user", "5002", "--json")
    assert code == 0
    assert [row["id"] for row in json.loads(output)] == [5002]


def test_status_without_any_limit_says_so() -> None:
    assert run("status", "--project", "5002") == (0, "no limits\n")


def test_status_of_another_user_is_refused_except_to_root() -> None:
    code, output = run("status", "--user", "4999")
    assert (code, output) == (os.EX_NOPERM, "upcall: other people's quotas are for root to see\n")


@pytest.mark.parametrize(("option", "what"), [("--user", "user"), ("--group", "group")])
def test_status_of_an_unknown_user_or_group_is_a_usage_error(option: str, what: str) -> None:
    assert run("status", option, "no-such-name") == (os.EX_USAGE, f"upcall: there is no {what} 'no-such-name'\n")


@pytest.mark.parametrize("listening", [True, False])
def test_status_of_a_quota_source_that_says_nonsense_is_shown_without_control_characters(listening: bool) -> None:
    told = {"listening": listening, "why": "\x1b]0;x", "received": "\x1b]0;x"}
    for quota in (told, {"listening": listening}):
        written = io.StringIO()
        nothing: dict[str, Any] = {"daemons": [], "outcomes": {}, "rejected": {}, "devices": []}
        show({"broker": {"pid": 1, "uid": 0}, "quota": quota, **nothing}, Console(file=written, width=200))
        assert "quota warnings: " in written.getvalue()
        assert "\x1b" not in written.getvalue()


def test_control_characters_and_markup_in_a_mount_point_are_escaped() -> None:
    """Users choose the names of removable disks, which root sees in `upcall status`."""
    counts = dict.fromkeys(("received", "folded", "lost", "delivered", "undelivered"), 0)
    quota = {"listening": True, **counts, "filesystems": ["/media/[red]\x1b]0;x", "/media/[/b]"]}
    written = io.StringIO()
    nothing: dict[str, Any] = {"daemons": [], "outcomes": {}, "rejected": {}, "devices": []}
    broker = {"pid": 1, "uid": 0, "portid": 1}
    show({"broker": broker, "quota": quota, **nothing}, Console(file=written, width=200))
    assert "quotas: /media/[red]\\x1b]0;x, /media/[/b]" in written.getvalue()


# --- watch -------------------------------------------------------------------------------------------------------


class Waiting:
    """A listener with something to read, once."""

    def __init__(self, *datagrams: bytes) -> None:
        self._datagrams = list(datagrams)
        self._reader, self._writer = os.pipe()
        os.write(self._writer, b"x")

    def fileno(self) -> int:
        return self._reader

    def receive(self, most: int) -> list[bytes]:
        os.read(self._reader, 1)
        found, self._datagrams = self._datagrams[:most], []
        return found

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def watched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    mine, others = Warned(0, 5001, BHARDWARN, 7, 0, 5001), Warned(0, 5002, BHARDWARN, 7, 0, 5002)
    listener = Waiting(*(pack(one, 28, seq) for seq, one in enumerate((mine, others, mine), 1)), pack(mine, 28, 9))
    monkeypatch.setattr(module, "look_up", lambda *_: Ids(28, 1))
    monkeypatch.setattr(module, "Listener", lambda _: listener)
    result = CliRunner().invoke(main, ["quota", "watch", "--timeout", "0.05", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_watch_shows_a_user_only_that_users_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 5001)
    (line,) = watched(monkeypatch)
    assert "device 7:0: user 5001: nothing more can be written (by 5001) x3" in line


def test_watch_shows_root_the_warnings_of_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    rows = [json.loads(line) for line in watched(monkeypatch, "--json")]
    assert [(row["excess_id"], row["count"], row["kind"]) for row in rows] == [(5001, 3, "user"), (5002, 1, "user")]


@pytest.mark.parametrize(
    "figures",
    [Figures(200 * MB, 100 * MB, 200 * MB, 2_000_000_000), Figures(150 * MB, MB, 0, 5)],
    ids=["at the hard limit", "past the grace date"],
)
def test_status_says_nothing_more_can_be_written_at_the_limit_or_past_grace(
    figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Played.quotas, (0, ME), Quota(ME, figures, NOTHING))
    assert "nothing more can be written" in run("status")[1]


# --- serve ---------------------------------------------------------------------------------------------------


def test_serve_is_refused_except_to_root(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may")
    words = [sys.executable, "-m", "upcall", "quota", "serve", "--runtime", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == os.EX_UNAVAILABLE
    assert "root's source" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_serve_without_a_broker_ends_on_sigterm(folder: Path) -> None:
    """On kernels with and without quota warnings."""
    folder.mkdir()
    words = ["-m", "upcall", "quota", "serve", "--runtime", str(folder)]
    with Started(words, folder.parent / "log") as source:
        source.logged("broker-connect-failed")
        source.signal(signal.SIGTERM)
        assert source.wait() == 0
    assert "privileges-dropped" in source.log and "source-closed" in source.log


def test_the_brokers_old_quota_option_names_the_new_command(folder: Path) -> None:
    words = ["-m", "upcall", "broker", "--quota", "--no-ecryptfs", "--runtime", str(folder)]
    with Started(words, folder.parent / "log") as broker:
        broker.logged("ready")
        assert "upcall quota serve" in broker.log


def test_a_source_refuses_a_folder_that_others_can_write_to(tmp_path: Path) -> None:
    """Its state is read from there and written to it."""
    tmp_path.chmod(0o777)
    words = [sys.executable, "-m", "upcall.protocols.quota", dumps(SourceSettings(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode not in (0, 1)
    assert "not a folder of our own" in done.stderr
    assert list(tmp_path.iterdir()) == []
