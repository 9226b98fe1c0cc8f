"""`upcall setup`, `upcall request-key` and `upcall doctor` beside Debian's packages, below a folder that stands for
the whole system; for any user."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from upcall.cli import main
from upcall.config import ConfigError
from upcall.install import manifest, packaged
from upcall.install.manifest import Manifest, digest
from upcall.install.wanted import SYSTEMD
from upcall.observe.doctor.configuration import request_key
from upcall.observe.doctor.system import Scene
from upcall.protocols.request_key.install.key_makers import standing_of_type
from upcall.protocols.request_key.install.lines import check_winning, others, plan
from upcall.protocols.request_key.install.our_file import PACKAGED, Ours, body, is_upcalls
from upcall.protocols.request_key.install.system import System

UNIT, INIT = "/lib/systemd/system/upcall-broker.service", "/etc/init.d/upcall-broker"
PYTHON = f"{packaged.HOME}/bin/python3"
PROGRAM = f"{packaged.HOME}/upcall-request-key"
LINES = PACKAGED.format("spnego")


def put(system: System, path: str, data: bytes, mode: int = 0o644) -> None:
    place = system.at(path)
    for folder in reversed(place.parents):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)
    place.write_bytes(data)
    place.chmod(mode)


@pytest.fixture
def system(folder: Path) -> System:
    """With the packages upcall, upcall-spnego and cifs-utils."""
    made = System(folder.parent)
    record = Manifest("debian", {path: digest(b"as packed") for path in (UNIT, INIT)}, settled=True)
    for path in (UNIT, INIT):
        put(made, path, b"as packed")
    put(made, packaged.RECORD, manifest.shown(record))
    for program in (PROGRAM, "/sbin/request-key", "/usr/sbin/cifs.upcall"):
        put(made, program, b"#!/bin/sh\n", 0o755)
    put(made, LINES, b"# Of the package.\n" + body(Ours(("cifs.spnego",), (PROGRAM,))))
    put(made, "/etc/request-key.d/cifs.spnego.conf", b"create cifs.spnego * * /usr/sbin/cifs.upcall %k\n")
    return made


def setup(system: System, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["setup", "--root", str(system.root), *arguments])


def everything(system: System) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in system.root.rglob("*") if path.is_file()}


def test_setup_has_nothing_to_do(system: System) -> None:
    before = everything(system)
    for arguments in ([], ["--check"]):
        done = setup(system, "--python", PYTHON, *arguments)
        assert done.output == "nothing to do: the package upcall has set up this machine\n"
        assert done.exit_code == 0
    assert everything(system) == before


def test_another_upcall_does_not_set_up_a_second_one(system: System) -> None:
    before = everything(system)
    done = setup(system)
    assert done.exit_code == os.EX_CONFIG
    assert "`apt-get remove upcall` comes first" in done.output
    assert everything(system) == before


@pytest.mark.parametrize(("changed", "told"), [(b"other", "says something else"), (None, "is not there")])
def test_a_file_that_is_not_as_packed_is_named_with_the_remedy(
    system: System, changed: bytes | None, told: str
) -> None:
    system.at(UNIT).unlink()
    if changed is not None:
        put(system, UNIT, changed)
    done = setup(system, "--check", "--json")
    report = json.loads(done.output)
    assert report["lines"] == [f"{UNIT}: {told}: apt-get install --reinstall upcall"]
    assert (done.exit_code, report["ready"]) == (1, False)


def test_a_conffile_may_be_edited(system: System) -> None:
    put(system, INIT, b"edited")
    assert setup(system, "--check").exit_code == 0


def test_units_of_an_earlier_setup_are_named_and_taken_away(system: System) -> None:
    earlier = "/etc/systemd/system/upcall-broker.service"
    put(system, earlier, b"earlier")
    put(system, manifest.FILE, manifest.shown(Manifest(SYSTEMD.name, {earlier: digest(b"earlier")}, settled=True)))
    assert f"{earlier}: takes precedence over the package's" in setup(system, "--check").output
    done = setup(system, "--undo")
    assert done.exit_code == 0
    assert f"{earlier}: removed" in done.output
    assert done.output.endswith("the package stays: apt-get remove upcall\n")
    assert not system.at(earlier).exists() and system.at(UNIT).exists()
    assert setup(system, "--check").exit_code == 0


def test_a_damaged_record_is_an_error(system: System) -> None:
    put(system, packaged.RECORD, b"{}")
    with pytest.raises(ConfigError, match="is not as upcall wrote it"):
        packaged.packaged(system)


def test_without_a_package_there_is_no_record(folder: Path) -> None:
    assert packaged.packaged(System(folder.parent)) is None


# --- request-key's lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/request-key.d/upcall.conf", LINES])
def test_files_of_upcall_and_its_packages_are_upcalls(path: str) -> None:
    assert is_upcalls(path)


@pytest.mark.parametrize("path", ["/etc/request-key.conf", "/etc/request-key.d/upcall-.conf", f"{LINES}.dpkg-old"])
def test_other_files_are_not(path: str) -> None:
    assert not is_upcalls(path)


def test_a_packages_line_wins_and_counts_as_upcalls(system: System) -> None:
    assert system.packaged() == ("cifs.spnego",)
    found = standing_of_type(system, "cifs.spnego")
    assert found.ours and str(found.line) == f"{LINES}:2"
    done = CliRunner().invoke(main, ["request-key", "status", "--root", str(system.root), "--json"])
    report = json.loads(done.output)
    assert (report["packaged"], report["problem"]) == (["cifs.spnego"], "")


def test_install_beside_a_package_is_allowed_and_does_not_call_it_another_program(system: System) -> None:
    both = plan(system, ("cifs.spnego", "dns_resolver"), (PROGRAM,), copy=False)
    check_winning(system, both)
    assert [line.path for _, line, _ in others(system, both.ours.types)] == ["/etc/request-key.d/cifs.spnego.conf"]


def test_doctor_knows_that_the_keys_come_to_upcall(system: System) -> None:
    texts = [finding.what for finding in request_key(Scene(root=system.root))]
    assert texts == [f"keys of type cifs.spnego come to upcall, by {LINES}:2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_doctor_names_a_packages_program_that_others_can_change(system: System) -> None:
    system.at(PROGRAM).chmod(0o777)
    assert "others can write" in next(finding.what for finding in request_key(Scene(root=system.root)))
