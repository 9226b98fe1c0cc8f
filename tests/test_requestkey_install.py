"""`upcall request-key`, below a folder that stands for the whole system; for any user."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import upcall.cli.requestkey
from upcall.cli import main
from upcall.config import ConfigError
from upcall.process.trust import distrust
from upcall.protocols.request_key.conf import BadLine, RequestedKey, choose
from upcall.protocols.request_key.install.key_makers import standing, standing_of_type
from upcall.protocols.request_key.install.lines import Plan, check_winning, install, missing, others, plan, uninstall
from upcall.protocols.request_key.install.our_file import COPY, FILE, Ours, is_ours, render, take
from upcall.protocols.request_key.install.system import FOLDER, LAST, SOCKET, System
from upcall.protocols.request_key.key_types import KEY_TYPES

PROGRAM = "/usr/lib/upcall/upcall-request-key"
CIFS = b"create  cifs.spnego    * * /usr/sbin/cifs.upcall %k\n"
KEYUTILS = b"# of keyutils\ncreate  dns_resolver *\t\t*               /sbin/key.dns_resolver %k\nnegate * * * /bin/x\n"
CIFS_FILE = f"{FOLDER}/cifs.spnego.conf"
BOTH = ("cifs.spnego", "dns_resolver")


@pytest.fixture
def system(folder: Path) -> System:
    """With the programs and lines of cifs-utils and keyutils, and a program of ours."""
    made = System(folder.parent)
    for program in (PROGRAM, "/sbin/request-key", "/usr/sbin/cifs.upcall", "/sbin/key.dns_resolver"):
        write(made, program, b"#!/bin/sh\n", 0o755)
    write(made, CIFS_FILE, CIFS)
    write(made, LAST, KEYUTILS)
    return made


def write(system: System, path: str, data: bytes, mode: int = 0o644) -> Path:
    place = system.at(path)
    for folder in reversed(place.parents):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)
    place.write_bytes(data)
    place.chmod(mode)
    return place


def planned(system: System, *types: str, command: tuple[str, ...] = (PROGRAM,), copy: bool = False) -> Plan:
    return plan(system, types or ("cifs.spnego",), command, copy)


def content(system: System) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in system.root.rglob("*") if path.is_file()}


# --- the file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("copied", [None, "ab" * 32])
def test_a_rendered_file_is_read_back_as_written(types: tuple[str, ...], copied: str | None) -> None:
    ours = Ours(types, ("/usr/bin/python3", "-I", "-S", "/x/standin.py"), copied)
    assert take(render(ours)) == ours


def test_an_edited_file_is_recognised_as_ours_but_not_taken() -> None:
    data = render(Ours(BOTH, (PROGRAM,), "ab" * 32))
    for edited in (data + b"\n", data[:-1], data.replace(b" %k", b""), data.replace(b"ab", b"cd"), data[:99]):
        assert is_ours(edited) and take(edited) is None
    assert not is_ours(CIFS) and take(CIFS) is None and take(b"") is None


# --- installing --------------------------------------------------------------------------------------------------


def test_installed_lines_win_and_uninstalling_restores_everything(system: System) -> None:
    before = content(system)
    assert [str(standing_of_type(system, name).line) for name in BOTH] == [f"{CIFS_FILE}:1", f"{LAST}:2"]
    assert install(system, planned(system, *BOTH)) == [f"{FILE}: written"]
    for name in BOTH:
        found = standing_of_type(system, name)
        assert found.ours and not found.problems and found.line is not None and found.line.program == PROGRAM
    assert system.at(FILE).stat().st_mode & 0o7777 == 0o644
    assert {path: data for path, data in content(system).items() if path in before} == before
    assert install(system, planned(system, *BOTH)) == []
    assert uninstall(system) == [f"{FILE}: removed"]
    assert content(system) == before
    assert uninstall(system) == []


def test_installing_one_type_leaves_the_lines_of_others_alone(system: System) -> None:
    install(system, planned(system))
    assert standing_of_type(system, "cifs.spnego").ours
    assert not standing_of_type(system, "dns_resolver").ours
    install(system, planned(system, "dns_resolver"))
    assert not standing_of_type(system, "cifs.spnego").ours


def test_a_type_with_several_patterns_has_a_line_for_each(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (RequestedKey(b"dns_resolver", b"a:x.invalid"), RequestedKey(b"dns_resolver", b"afsdb:x.invalid"))
    several = KEY_TYPES["dns_resolver"]._replace(patterns=(b"a:*", b"afsdb:*"), typical=keys)
    monkeypatch.setitem(KEY_TYPES, "dns_resolver", several)
    ours = Ours(("dns_resolver",), (PROGRAM,))
    assert take(render(ours)) == ours
    write(system, CIFS_FILE, b"create dns_resolver * * /sbin/key.dns_resolver %k\n")  # as wild as can be: it loses
    install(system, planned(system, "dns_resolver"))
    assert [standing(system, key).ours for key in keys] == [True, True]
    assert not standing(system, RequestedKey(b"dns_resolver", b"x.invalid")).ours
    assert others(system, ["dns_resolver"])[0][2] is False
    write(system, LAST, b"create dns_resolver afsdb:old.* * /x %k\n")
    assert any(keeps for _, _, keeps in others(system, ["dns_resolver"]))


def test_installing_without_other_configuration_makes_folder_and_file(tmp_path: Path) -> None:
    system = System(tmp_path)
    write(system, PROGRAM, b"", 0o755)
    before = os.umask(0o077)
    try:
        assert install(system, planned(system)) == [f"{FILE}: written"]
    finally:
        os.umask(before)
    assert system.at(FOLDER).stat().st_mode & 0o777 == 0o755
    assert system.at(FILE).stat().st_mode & 0o777 == 0o644
    assert standing_of_type(system, "cifs.spnego").ours


@pytest.mark.parametrize("data", [CIFS, b"", b"# nothing\n"])
def test_a_file_not_made_by_upcall_is_neither_replaced_nor_removed(system: System, data: bytes) -> None:
    write(system, FILE, data)
    with pytest.raises(FileExistsError, match="was not made by upcall"):
        install(system, planned(system))
    with pytest.raises(FileExistsError, match="was not made by upcall"):
        uninstall(system)
    assert system.at(FILE).read_bytes() == data


def test_a_symbolic_link_is_not_taken_for_our_file(system: System) -> None:
    write(system, "/elsewhere", render(planned(system).ours))
    system.at(FILE).symlink_to(system.at("/elsewhere"))
    with pytest.raises(FileExistsError, match="was not made by upcall"):
        install(system, planned(system))
    assert standing_of_type(system, "cifs.spnego").line is not None
    assert not standing_of_type(system, "cifs.spnego").ours, "request-key passes links over"


def test_an_edited_file_is_neither_replaced_nor_removed(system: System) -> None:
    install(system, planned(system))
    edited = system.at(FILE).read_bytes() + b"create user debug:* * /bin/cat\n"
    system.at(FILE).write_bytes(edited)
    with pytest.raises(FileExistsError, match="was edited since"):
        install(system, planned(system))
    with pytest.raises(FileExistsError, match="was edited since"):
        uninstall(system)
    assert system.at(FILE).read_bytes() == edited


@pytest.mark.parametrize(
    ("types", "path", "line"),
    [
        ("cifs.spnego", CIFS_FILE, b"create cifs.spnego ver=0x2;host=* * /x %k\n"),
        ("cifs.spnego", LAST, b"create cifs.spnego ver=0x2;host=any* * /x %k\n"),
        ("cifs.spnego", CIFS_FILE, b"create cifs.spnego *upcall_target=mount * /x %k\n"),
        ("dns_resolver", CIFS_FILE, b"create dns_resolver * * /x %k\n"),
    ],
)
def test_a_line_that_would_win_over_ours_is_refused_by_its_number(
    system: System, types: str, path: str, line: bytes
) -> None:
    write(system, path, b"# this one\n" + line)
    with pytest.raises(ConfigError, match=f"{path}: line 2 wins over ours for {types}"):
        install(system, planned(system, types))
    assert not system.at(FILE).exists()


def test_lines_that_would_not_win_do_not_prevent_the_installation(system: System) -> None:
    write(system, CIFS_FILE, b"create cifs.* ver=0x2;host=any.* * /x %k\nnegate cifs.spnego ver=0x2;host=* * /x %k\n")
    write(system, LAST, b"create cifs.spnego ver=0x2;host=* * /x %k\ncreate dns_resolver * * /x\n")
    install(system, planned(system, *BOTH))
    assert standing_of_type(system, "cifs.spnego").ours and standing_of_type(system, "dns_resolver").ours


def test_a_line_that_stops_request_key_is_refused_by_its_number(system: System) -> None:
    write(system, CIFS_FILE, CIFS + b"create\n")
    with pytest.raises(BadLine, match=f"{CIFS_FILE}: line 2: ends at its operation"):
        install(system, planned(system))
    assert not system.at(FILE).exists()
    assert standing_of_type(system, "cifs.spnego").problems


# --- the program -------------------------------------------------------------------------------------------------


def test_a_program_that_others_can_change_or_that_is_missing_is_refused(system: System) -> None:
    system.at("/usr/lib").chmod(0o775)
    with pytest.raises(ConfigError, match=r"/usr/lib has mode 0775: others can write to it; --copy"):
        planned(system)
    system.at("/usr/lib").chmod(0o755)
    system.at(PROGRAM).unlink()
    with pytest.raises(ConfigError, match=f"{PROGRAM} is not there"):
        planned(system)


def test_paths_and_macros_that_request_key_cannot_take_are_refused(system: System) -> None:
    for path in ("/with space/x", "/with\ttab", "/with\u00a0space", ""):
        with pytest.raises(ConfigError):
            planned(system, command=(path,))
    write(system, "/x", b"", 0o755)
    with pytest.raises(ConfigError, match="%x is no macro"):
        planned(system, command=("/x", "%x"))


def test_a_copy_is_installed_updated_and_uninstalled(system: System, tmp_path_factory: pytest.TempPathFactory) -> None:
    theirs = tmp_path_factory.mktemp("user") / "upcall-request-key"
    theirs.write_bytes(b"#!/bin/sh\nexit 1\n")
    theirs.chmod(0o777)
    assert install(system, planned(system, command=(str(theirs),), copy=True)) == [
        f"{COPY}: written", f"{FILE}: written",
    ]  # fmt: skip
    assert system.at(COPY).read_bytes() == theirs.read_bytes()
    assert system.at(COPY).stat().st_mode & 0o7777 == 0o755
    assert not standing_of_type(system, "cifs.spnego").problems
    theirs.write_bytes(b"newer")
    newer = planned(system, command=(str(theirs),), copy=True)
    assert [one.split(":")[0] for one in missing(system, newer)] == [COPY, FILE]
    assert install(system, newer) == [f"{COPY}: written", f"{FILE}: written"]
    assert uninstall(system) == [f"{FILE}: removed", f"{COPY}: removed"]
    assert not system.at(COPY).parent.exists()


def test_a_copy_is_removed_when_it_is_no_longer_used(system: System) -> None:
    install(system, planned(system, copy=True, command=(str(system.at(PROGRAM)),)))
    assert install(system, planned(system)) == [f"{FILE}: written", f"{COPY}: removed"]
    assert not system.at(COPY).exists()


def test_a_copy_that_is_not_ours_is_neither_replaced_nor_removed(system: System) -> None:
    write(system, COPY, b"somebody's")
    wanted = planned(system, copy=True, command=(str(system.at(PROGRAM)),))
    with pytest.raises(FileExistsError, match="is there, and not as upcall made it"):
        install(system, wanted)
    assert system.at(COPY).read_bytes() == b"somebody's" and not system.at(FILE).exists()
    system.at(COPY).unlink()
    install(system, wanted)
    write(system, COPY, b"somebody's")
    assert uninstall(system) == [f"{FILE}: removed", f"{COPY}: left there, for it is not as upcall made it"]


def test_a_copy_into_a_folder_that_others_can_write_is_refused(system: System) -> None:
    write(system, "/usr/local/libexec/x", b"").parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"/usr/local/libexec has mode 0777"):
        planned(system, copy=True, command=(str(system.at(PROGRAM)),))


def test_a_write_that_fails_leaves_what_was_there(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    install(system, planned(system))
    before = content(system)

    def fail(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        install(system, planned(system, *BOTH))
    assert content(system) == before


# --- who can change a file ---------------------------------------------------------------------------------------


def test_distrust_names_what_lets_others_change_a_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "file"
    file.write_bytes(b"")
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        folder.chmod(0o755)
    file.chmod(0o755)
    me = (os.geteuid(),)
    (tmp_path / "absolute").symlink_to("/a/b")
    (tmp_path / "a" / "relative").symlink_to("../absolute/../b/./file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").symlink_to("../../../a/b/file")
    for path in ("/a/b/file", "/absolute/file", "/a/relative", "//a/./b//file", "/out"):
        assert distrust(path, tmp_path, me) == "", path
    assert distrust("/a/b", tmp_path, me) == "/a/b is not a regular file"
    assert distrust("/a/c", tmp_path, me) == "/a/c is not there"
    assert distrust("/a/c/d", tmp_path, me, may_miss=True) == ""
    assert distrust("/a/b/file/x", tmp_path, me) == "/a/b/file: Not a directory"
    assert distrust("/loop", tmp_path, me) == "/loop: Too many levels of symbolic links"
    (tmp_path / "a" / "b").chmod(0o757)
    for path in ("/a/b/file", "/absolute/file", "/a/relative", "/out"):
        assert distrust(path, tmp_path, me) == "/a/b has mode 0757: others can write to it", path
    assert distrust("/a/b/file", tmp_path, (me[0] + 1,)) == f"/ belongs to uid {me[0]}"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can give files away")
def test_a_link_of_another_user_is_distrusted(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "file").touch(0o755)
    (tmp_path / "link").symlink_to("file")
    os.chown(tmp_path / "link", 5001, 5001, follow_symlinks=False)
    assert distrust("/link", tmp_path) == "/link belongs to uid 5001"
    assert distrust("/file", tmp_path) == ""


# --- the commands ------------------------------------------------------------------------------------------------


class Command:
    def __init__(self, system: System) -> None:
        self.system = system

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["request-key", *arguments, "--root", str(self.system.root)])

    def json(self, *arguments: str) -> dict[str, object]:
        found = json.loads(self("status", "--json", *arguments).output)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def command(system: System, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(upcall.cli.requestkey, "program", lambda: [PROGRAM])
    return Command(system)


def test_the_commands_report_the_state_before_and_after_installation(command: Command, system: System) -> None:
    said = command("install", "--check")
    assert (said.exit_code, said.output) == (1, f"{FILE}: is not there\n")
    assert command("status").exit_code == 1
    said = command("install")
    assert said.exit_code == 0, said.output
    assert said.output.splitlines() == [
        f"{FILE}: written", f"{CIFS_FILE}:1: cifs.spnego by /usr/sbin/cifs.upcall: no longer used",
    ]  # fmt: skip
    assert command("install", "--check").exit_code == 0
    assert command("install").output.startswith("nothing to do\n")
    said = command("status")
    assert said.exit_code == 1 and f"{SOCKET} is not there" in said.output
    system.at(SOCKET).parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(system.at(SOCKET).parent)  # the path would be too long
        try:
            listener.bind(system.at(SOCKET).name)
        finally:
            os.chdir(here)
        said = command("status")
        assert said.exit_code == 0, said.output
        lines = [line.split() for line in said.output.splitlines()]
        assert lines[:2] == [
            ["cifs.spnego", "upcall", f"{FILE}:3", PROGRAM],
            ["dns_resolver", "not", "upcall", f"{LAST}:2", "/sbin/key.dns_resolver"],
        ]
        assert command.json()["ready"] is True
        assert command("status", "--key", "dns_resolver", "fs.lab.test").exit_code == 1
    assert command("uninstall").output == f"{FILE}: removed\n"
    assert command("uninstall").output == "nothing to do\n"


def test_types_and_copy_stay_as_they_were_installed(command: Command, system: System) -> None:
    command("install", "--type", "dns_resolver", "--type", "cifs.spnego")
    assert command("install", "--check").exit_code == 0
    assert command("install").output.startswith("nothing to do\n")
    assert command("install", "--check", "--type", "cifs.spnego").exit_code == 1
    found = system.ours()
    assert found is not None and found.types == BOTH


def test_a_narrower_line_of_the_administrator_is_reported_and_kept(command: Command, system: System) -> None:
    write(system, CIFS_FILE, CIFS + b"create cifs.spnego ver=0x2;host=old\xff.* * /usr/sbin/cifs.upcall %k\n")
    said = command("install")
    assert said.exit_code == 0
    assert f"{CIFS_FILE}:2: cifs.spnego by /usr/sbin/cifs.upcall: keeps ver=0x2;host=old\\xff.*" in said.output


@pytest.mark.parametrize(
    ("path", "data", "code", "said"),
    [
        (FILE, CIFS, os.EX_CANTCREAT, f"upcall: {FILE}: was not made by upcall"),
        (CIFS_FILE, b"create\n", os.EX_CONFIG, f"upcall: {CIFS_FILE}: line 1: ends at its operation"),
        (CIFS_FILE, b"create cifs.spnego ver=0x2;host=a* * /x\n", os.EX_CONFIG, f"upcall: {CIFS_FILE}: line 1 wins"),
    ],
)
def test_an_obstacle_stops_the_installation_and_is_reported(
    command: Command, system: System, path: str, data: bytes, code: int, said: str
) -> None:
    write(system, path, data)
    found = command("install")
    assert found.exit_code == code and found.output.startswith(said)
    checked = command("install", "--check")
    assert checked.exit_code == 1 and said.removeprefix("upcall: ") in checked.output
    assert command("status").exit_code == 1


def test_status_of_one_key_names_the_line_that_fits(command: Command) -> None:
    command("install")
    said = command("status", "--key", "cifs.spnego", "ver=0x1;host=a", "--json")
    assert said.exit_code == 1
    (key,) = json.loads(said.output)["keys"]
    assert key["line"] == {"file": CIFS_FILE, "number": 1, "program": "/usr/sbin/cifs.upcall"}
    said = command("status", "--key", "user", "debug\n\x1b[2J", "--callout", "x")
    assert said.exit_code == 1 and "no line fits" in said.output


def test_status_names_a_program_that_has_gone(command: Command, system: System) -> None:
    command("install")
    system.at(PROGRAM).unlink()
    system.at("/sbin/request-key").chmod(0o644)
    said = command("status")
    assert said.exit_code == 1
    assert f"{PROGRAM} is not there" in said.output and "/sbin/request-key is not a program" in said.output


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes somebody else")
def test_a_user_who_is_not_root_cannot_install(command: Command, system: System) -> None:
    os.seteuid(5001)
    try:
        found = command("install")
    finally:
        os.seteuid(0)
    assert (found.exit_code, found.output) == (os.EX_NOPERM, f"upcall: {system.at(FILE)}: Permission denied\n")


# --- the real one ------------------------------------------------------------------------------------------------

REQUEST_KEY = shutil.which("request-key", path="/sbin:/usr/sbin")


@pytest.mark.skipif(REQUEST_KEY is None, reason="needs keyutils")
@pytest.mark.parametrize("name", BOTH)
def test_the_real_request_key_runs_our_program(system: System, name: str) -> None:
    def run(key: RequestedKey) -> str:
        """The command that request-key would run."""
        describe = f"{name};0;0;39010000;{key.description.decode()}"
        words = [str(REQUEST_KEY), "-l", "-d", "-n", "-v", "-D", describe, "create", "77", *"00000", ""]
        done = subprocess.run(words, cwd=system.at("/etc"), capture_output=True, text=True, timeout=60)
        return done.stderr.partition("execute_program(")[2].partition("\n")[0]

    for key in KEY_TYPES[name].typical:
        assert PROGRAM not in run(key)
        install(system, planned(system, *BOTH))
        assert f"'{PROGRAM} %k'" in run(key)
        assert choose(system.lines(), key) == standing(system, key).line
        uninstall(system)


def test_planning_and_checking_change_nothing(system: System) -> None:
    before = content(system)
    check_winning(system, planned(system, *BOTH))
    assert content(system) == before
