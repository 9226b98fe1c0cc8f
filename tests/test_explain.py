"""`upcall explain`: the steps of a key, with a played handler, a real broker and a played daemon."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from upcall.cli import explain as commands
from upcall.cli import main
from upcall.core.errors import UsageError
from upcall.keys.plugins import handlers
from upcall.process.paths import Place
from upcall.protocols.request_key.cifs_spnego import Spnego, pack_description, take_description
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.explain import child, steps
from upcall.protocols.request_key.install.lines import install, plan
from upcall.protocols.request_key.install.system import FOLDER, System
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.protocols.request_key.messages import Ask, pack_ask
from upcall.testing.played import PlayedDaemon
from upcall.testing.processes import RunningBroker

PROJECT = Path(__file__).parents[1]
PROGRAM = "/usr/libexec/upcall-request-key"
SYSTEM_PYTHON = "/usr/bin/python3"


def spnego(host: str, uid: int, sec: str = "krb5", user: str | None = None) -> RequestedKey:
    told = {"host": host, "uid": str(uid), "sec": sec, **({} if user is None else {"user": user})}
    return KEY_TYPES["cifs.spnego"].key(told)


def dns(name: str, options: str = "") -> RequestedKey:
    return KEY_TYPES["dns_resolver"].key({"name": name, "options": options})


BODY = pack_ask(Ask(spnego("fs", os.getuid()).description, b""))

HANDLER = """
import os, time
from pathlib import Path
from upcall.core.errors import PeerError, Refused
from upcall.kernel import keyring
from upcall.protocols.request_key.cifs_spnego import take_description
from upcall.protocols.request_key.messages import take_ask

class Played:
    services = ("cifs.spnego", "test.other")
    def lane(self, envelope): return "played"
    def answer(self, envelope): return b""
    def explain(self, ask, contact=False):
        asked = take_description(take_ask(ask).description)
        host = asked.host
        if host == "refuse": raise Refused("no-key", why="there is no ticket")
        if host == "break": raise RuntimeError("with a secret in it")
        if host == "nonsense": return ["a list"]
        if host == "bad": raise PeerError("played", "it is bad")
        if host == "die": os._exit(3)
        if host == "hang": time.sleep(60)
        if host == "flood":
            while True: os.write(1, b"x" * 65536)
        if host == "deep": os.write(1, b"[" * 100_000); os._exit(0)
        if host == "garbage": os.write(1, b"{}"); os._exit(0)
        ids = [os.getresuid(), os.getresgid(), sorted(os.getgroups())]
        return {
            "answer": "would answer", "why": "", "server": f"cifs/{host}", "contact": contact, "ids": ids,
            "environment": dict(os.environ), "cwd": os.getcwd(), "session": keyring.describe(-3).description,
            "tty": os.getsid(0) == os.getpid(), "secret": b"not to be shown", "creduid": asked.creduid,
            "candidates": [{"name": "FILE:/tmp/x\\x1b[2J", "expires": 1_000_000_000, "verdict": "used"}],
        }

class Silent:
    services = ("cifs.spnego",)
    def lane(self, envelope): return "played"
    def answer(self, envelope): return b""

played, silent = Played(), Silent()
"""

Explain = Callable[..., Result]


@pytest.fixture
def site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where plugins are found before all others: with the played handler."""
    found = folder.parent / "site"
    info = found / "played-1.dist-info"
    info.mkdir(parents=True)
    (found / "played.py").write_text(HANDLER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: played\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[upcall.handlers]\ncifs.spnego = played:played\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(found), str(PROJECT)]))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent / "config"))
    return found


@pytest.fixture
def system(folder: Path) -> System:
    """Whose request-key has our line."""
    made = System(folder.parent)
    for path in (PROGRAM, "/sbin/request-key", f"{FOLDER}/cifs.conf"):
        place = made.at(path)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        place.write_bytes(b"create cifs.spnego * * /usr/sbin/cifs.upcall %k\n")
        place.chmod(0o755)
    install(made, plan(made, ["cifs.spnego"], [PROGRAM], copy=False))
    return made


@pytest.fixture
def explain(system: System, site: Path, folder: Path) -> Explain:
    def run(*arguments: str, kind: str = "cifs.spnego") -> Result:
        options = ["--runtime", str(folder), "--root", str(system.root)]
        return CliRunner().invoke(main, ["explain", kind, *arguments, *options])

    return run


@pytest.fixture
def daemon(broker: RunningBroker, folder: Path) -> Any:
    listening(folder)
    with PlayedDaemon(folder) as played:
        broker.registered(os.getpid())
        yield played


def listening(folder: Path) -> None:
    """Root's broker listens there; others' would have to."""
    if os.geteuid() != 0:
        Place(folder).request_key_socket.touch()


def report(result: Result) -> dict[str, Any]:
    found = json.loads(result.output)
    assert isinstance(found, dict)
    return found


# --- the key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        Spnego("fs.lab.test", "127.0.0.1", "krb5", 0, 1001, None, 7, None),
        Spnego("fs", "fe80::1", "mskrb5", 1, 0, "alice", 7, "mount"),
        Spnego("[fe80::1%eth0]", "fe80::1", "krb5", 0, 0, "", 7, None),
    ],
    ids=["uid", "user and creduid", "IPv6 host"],
)
def test_a_packed_description_reads_back_the_same(told: Spnego) -> None:
    assert take_description(pack_description(told)) == told


@pytest.mark.parametrize(
    ("host", "uid", "sec", "user"),
    [
        ("fs;creduid=0x1", 1, "krb5", None), ("", 1, "krb5", None), ("fs", 0xFFFFFFFF, "krb5", None),
        ("fs", 1, "krb5;uid=0x0", None), ("fs", 1, "krb5", "a;pid=0x1"), ("fs", 1, "krb5", "a\0"),
        ("fs", -1, "krb5", None),
    ],
)  # fmt: skip
def test_a_description_that_no_kernel_would_send_is_refused(host: str, uid: int, sec: str, user: str | None) -> None:
    with pytest.raises(UsageError, match="no kernel would ask for this"):
        spnego(host, uid, sec, user)


def test_a_hosts_address_fills_ip4_or_ip6_in_the_description() -> None:
    for host, ip in (("fs", b";ip4=0.0.0.0;"), ("192.0.2.7", b";ip4=192.0.2.7;"), ("fe80::1", b";ip6=fe80::1;")):
        assert ip in spnego(host, 1).description


def test_a_dns_name_and_its_options_become_a_requested_key() -> None:
    assert dns("fs.lab.test", "ipv6") == RequestedKey(b"dns_resolver", b"fs.lab.test", b"ipv6")
    assert dns("afsdb:cell.test", "srv=1").description == b"afsdb:cell.test"


# --- the steps -------------------------------------------------------------------------------------------------


def test_explain_with_everything_in_place_reports_would_answer(
    explain: Explain, daemon: PlayedDaemon, system: System
) -> None:
    result = explain("--host", "fs.lab.test", "--user", "alice", "--contact", "--json")
    found = report(result)
    assert (result.exit_code, found["answer"], found["why"]) == (0, "would answer", "")
    assert found["request-key"]["ours"] and found["request-key"]["line"]["program"] == PROGRAM
    assert found["gate"] == {"uid": os.getuid(), "answer": "would answer", "why": ""}
    assert (found["daemon"]["uid"], found["daemon"]["pid"]) == (os.getuid(), os.getpid())
    handler = found["handler"]
    assert handler["server"] == "cifs/fs.lab.test" and handler["contact"] is True
    assert handler["session"] != "" and handler["tty"] is True
    assert handler["secret"] == "<bytes>" and "not to be shown" not in result.output


def test_explain_prints_text_with_control_characters_escaped(explain: Explain, daemon: PlayedDaemon) -> None:
    result = explain("--host", "fs.lab.test")
    lines = [line.split(None, 1) for line in result.output.splitlines()]
    assert ["daemon", f"of uid {os.getuid()}: pid {os.getpid()}"] in lines
    assert ["server", "cifs/fs.lab.test"] in lines
    assert ["name", "FILE:/tmp/x\\x1b[2J"] in lines, "what a handler says gives a terminal no orders"
    assert any(line[0] == "expires" and line[1].startswith("2001-09-0") for line in lines)
    assert lines[-1] == ["answer", "would answer"]


@pytest.mark.parametrize(
    ("host", "answer", "why"),
    [
        ("refuse", "no-key", "there is no ticket"), ("break", "module-broke", "RuntimeError"),
        ("nonsense", "module-failed", "handler played:played: explains nothing"),
        ("bad", "bad-request", "played: it is bad"), ("die", "module-broke", None), ("flood", "module-broke", None),
        ("deep", "module-broke", None), ("garbage", "module-broke", None),
    ],
)  # fmt: skip
def test_a_handler_that_refuses_or_fails_is_reported_with_the_reason(
    explain: Explain, daemon: PlayedDaemon, host: str, answer: str, why: str | None
) -> None:
    result = explain("--host", host, "--json")
    found = report(result)
    assert (result.exit_code, found["answer"]) == (1, answer)
    assert why is None or found["why"] == why


def test_the_traceback_of_a_handlers_exception_is_shown_to_authors_only(
    explain: Explain, daemon: PlayedDaemon
) -> None:
    for options in ([], ["--json"]):
        assert "with a secret in it" not in explain("--host", "break", *options).output
        shown = explain("--host", "break", "--traceback", *options)
        assert "RuntimeError: with a secret in it" in shown.stderr
        assert "with a secret in it" not in shown.stdout


def test_a_handler_that_hangs_is_reported_as_broken(
    explain: Explain, daemon: PlayedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PATIENCE", 1.5)
    assert report(explain("--host", "hang", "--json"))["answer"] == "module-broke"


def test_a_missing_handler_and_one_that_cannot_explain_are_reported(
    explain: Explain, daemon: PlayedDaemon, site: Path
) -> None:
    points = site / "played-1.dist-info" / "entry_points.txt"
    points.write_text("[upcall.handlers]\ncifs.spnego = played:silent\n")
    result = explain("--host", "fs")
    assert result.exit_code == 1 and "handler played:silent: cannot explain itself" in result.output
    points.write_text("[upcall.handlers]\ncifs.spnego = played:absent\n")
    assert "answer       module-failed: handler played:absent" in explain("--host", "fs").output


@pytest.mark.parametrize(
    ("installed", "others"),
    [({"quota": "q:q", "ecryptfs": "e:e"}, "; there are handlers for quota, ecryptfs"), ({}, "")],
)
def test_a_handler_that_is_not_installed_is_reported_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], others: str
) -> None:
    monkeypatch.setattr(child, "handlers", lambda: installed)
    found = child.explained("cifs.spnego", BODY, False)
    assert found == {"answer": "no-service", "why": f"no handler for 'cifs.spnego' is installed{others}"}


def test_the_plugin_of_a_handler_that_is_not_installed_is_the_remedy(
    explain: Explain, daemon: PlayedDaemon, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "explained_as", lambda *_: {"answer": "no-service", "why": "not installed"})
    monkeypatch.setattr(commands, "handlers", dict)
    remedy = report(explain("--host", "fs", "--json"))["remedy"]
    assert remedy == "install the plugin upcall-spnego; `upcall plugin list` shows the installed ones"


def test_a_handler_that_is_not_allowed_is_reported_as_no_service(
    explain: Explain, daemon: PlayedDaemon, folder: Path
) -> None:
    config = folder.parent / "config" / "upcall" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[plugins]\nallow = ["openssl"]\n')
    found = report(explain("--host", "fs", "--json"))
    assert found["answer"] == "no-service" and "is installed, but not allowed" in found["why"]


def test_without_a_broker_the_other_steps_are_still_reported(explain: Explain) -> None:
    found = report(explain("--host", "fs", "--json"))
    assert found["answer"] == "no-broker"
    assert "`" in found["remedy"]
    assert found["handler"]["answer"] == "would answer", "the other steps are told, too"


def test_the_users_own_broker_does_not_count_and_that_is_said(
    explain: Explain, broker: RunningBroker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "find_place", lambda: Place(folder))
    monkeypatch.setattr(steps, "SYSTEM_FOLDER", folder.with_name("system"))
    report = steps._daemon(folder.with_name("system"), "cifs.spnego", os.getuid())
    assert report["answer"] == "no-broker"
    assert report["why"].endswith(f"; your own broker, in {folder}, is not asked by the kernel")


def test_a_refusal_is_explained_with_its_remedy(explain: Explain, daemon: PlayedDaemon) -> None:
    found = report(explain("--host", "refuse", "--json"))
    assert (found["answer"], found["remedy"]) == ("no-key", "add it: `upcall key add NAME`")
    assert explain("--host", "refuse").output.splitlines()[-1] == f"remedy       {found['remedy']}"


def test_a_broker_without_a_daemon_is_reported_as_no_daemon(
    explain: Explain, broker: RunningBroker, folder: Path
) -> None:
    listening(folder)
    found = report(explain("--host", "fs", "--json"))
    assert (found["answer"], found["why"]) == ("no-daemon", f"no daemon of uid {os.getuid()} is registered")


@pytest.mark.parametrize(("without", "answer"), [("start", "would answer"), ("refuse", "no-daemon")])
def test_the_configuration_decides_what_is_reported_without_a_daemon(
    explain: Explain,
    broker: RunningBroker,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    without: str,
    answer: str,
) -> None:
    listening(folder)
    system_config = folder.parent / "system.toml"
    system_config.write_text(f'[request-key."cifs.spnego"]\nwithout-daemon = "{without}"\n')
    monkeypatch.setattr("upcall.config.SYSTEM", system_config)
    found = report(explain("--host", "fs", "--json"))
    assert (found["daemon"]["without"], found["answer"]) == (without, answer)


def test_a_line_for_another_program_or_a_missing_forwarder_is_reported(
    explain: Explain, daemon: PlayedDaemon, system: System
) -> None:
    system.at(f"{FOLDER}/cifs.conf").write_bytes(b"create cifs.spnego ver=0x2;host=old.* * /usr/sbin/cifs.upcall %k\n")
    found = report(explain("--host", "old.lab.test", "--json"))
    assert (found["answer"], found["why"]) == ("not-asked", f"{FOLDER}/cifs.conf:1 gives it to /usr/sbin/cifs.upcall")
    assert report(explain("--host", "new.lab.test", "--json"))["answer"] == "would answer"
    system.at(PROGRAM).unlink()
    found = report(explain("--host", "fs", "--json"))
    assert (found["answer"], found["why"]) == ("not-asked", f"{PROGRAM} is not there")


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("user", (), f"no keys of type 'user' are known: {', '.join(KEY_TYPES)}"),
        ("cifs.spnego", (), "cifs.spnego needs --host"),
        ("dns_resolver", (), "dns_resolver needs --name"),
        ("cifs.spnego", ("--host", "a", "--name", "b"), "--name has no meaning for cifs.spnego"),
        ("dns_resolver", ("--name", "a b"), "no kernel would ask for this"),
        ("dns_resolver", ("--name", "a", "--options", "A"), "no kernel would ask for this"),
        ("cifs.spnego", ("--host", "a b"), "no kernel would ask for this"),
    ],
)
def test_missing_or_meaningless_arguments_are_usage_errors(
    explain: Explain, kind: str, arguments: tuple[str, ...], said: str
) -> None:
    result = explain(*arguments, kind=kind)
    assert result.exit_code == os.EX_USAGE and said in result.output


# --- as another user -------------------------------------------------------------------------------------------


def test_explain_for_another_uid_is_refused_except_to_root(explain: Explain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 5001)
    result = explain("--host", "fs", "--uid", "5002")
    assert result.exit_code == os.EX_NOPERM and "only root may" in result.output


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which(SYSTEM_PYTHON), reason="needs root, and a Python that everybody can read"
)
def test_the_handler_runs_with_the_users_ids_and_a_clean_environment(
    site: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = folder.parent / "python"  # the environment of the other user does not say where things are
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site}:{PROJECT} exec {SYSTEM_PYTHON} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("SECRET_OF_ROOT", "x")
    found = child.explained_as(65534, "cifs.spnego", BODY, False)
    assert found["ids"] == [[65534] * 3, [65534] * 3, [65534]], found
    environment = found["environment"]
    assert "SECRET_OF_ROOT" not in environment and environment["HOME"] != os.environ["HOME"]
    assert environment["XDG_RUNTIME_DIR"] == "/run/user/65534" and found["cwd"] == "/"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_unknown_uid_and_a_failing_interpreter_are_reported(
    site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="there is no user with uid 3999999999"):
        child.explained_as(3_999_999_999, "cifs.spnego", BODY, False)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = child.explained_as(0, "cifs.spnego", BODY, False)
    assert found["answer"] == "module-broke" and f"{python} as uid 0 said nothing" in found["why"]


# --- the real handler ------------------------------------------------------------------------------------------


def test_the_real_handler_without_a_ticket_reports_no_ticket(
    system: System, daemon: PlayedDaemon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("upcall_spnego")
    if "cifs.spnego" not in handlers():
        pytest.skip("upcall-spnego is not installed")
    (folder.parent / "krb5.conf").write_text("[libdefaults]\ndefault_realm = LAB.TEST\n")
    monkeypatch.setenv("KRB5_CONFIG", str(folder.parent / "krb5.conf"))
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{folder.parent}/no-such-cache")
    monkeypatch.setenv("KRB5_KTNAME", f"FILE:{folder.parent}/no-such-keytab")
    monkeypatch.setenv("KRB5_CLIENT_KTNAME", f"FILE:{folder.parent}/no-such-keytab")
    arguments = ["explain", "cifs.spnego", "--host", "fs.lab.test", "--runtime", str(folder), "--json"]
    found = report(CliRunner().invoke(main, [*arguments, "--root", str(system.root)]))
    assert found["request-key"]["answer"] == found["daemon"]["answer"] == "would answer"
    assert (found["answer"], found["handler"]["credential"]) == ("no-ticket", None), found
    assert found["why"]
