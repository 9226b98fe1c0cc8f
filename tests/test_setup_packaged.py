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
from upcall.observe.doctor.findings import PROBLEM
from upcall.observe.doctor.system import Scene
from upcall.process.debian import HOME, RECORD
from upcall.protocols.request_key.install.key_makers import standing_of_type
from upcall.protocols.request_key.install.lines import check_winning, install, others, plan
from upcall.protocols.request_key.install.our_file import PACKAGED, Ours, body, is_upcalls
from upcall.protocols.request_key.install.packages import command_to_install, lines_of
from upcall.protocols.request_key.install.system import System

UNIT, INIT = "/lib/systemd/system/upcall-broker.service", "/etc/init.d/upcall-broker"
PYTHON = f"{HOME}/bin/python3"
PROGRAM = f"{HOME}/upcall-request-key"
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
    put(made, RECORD, manifest.shown(record))
    for program in (PROGRAM, "/sbin/request-key", "/usr/sbin/cifs.upcall"):
        put(made, program, b"#!/bin/sh\n", 0o755)
    for path in (LINES, lines_of("upcall-spnego")):
        put(made, path, b"# Of the package.\n" + body(Ours(("cifs.spnego",), (PROGRAM,))))
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
    assert report["lines"] == [f"{UNIT}: {told}: apt install --reinstall ./upcall_*.deb"]
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
    put(system, RECORD, b"{}")
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


def remove(system: System, *packages: str) -> None:
    """What removing these packages does."""
    for package in packages:
        for path in (f"/etc/request-key.d/{package}.conf", lines_of(package)):
            system.at(path).unlink(missing_ok=True)


def command_of(system: System) -> str:
    (finding,) = request_key(Scene(root=system.root))
    return finding.command


def test_without_the_package_of_a_handler_doctor_names_it_for_apt(system: System) -> None:
    remove(system, "upcall-spnego")
    packages = "./upcall-spnego_*.deb ./upcall-dns_*.deb ./upcall-idmap_*.deb"
    assert command_of(system) == f"chroot {system.root} apt install {packages}"


def test_with_the_packages_and_without_their_lines_doctor_copies_these(system: System) -> None:
    for package in ("upcall-dns", "upcall-idmap"):
        put(system, lines_of(package), b"# Of the package.\n")
    system.at(LINES).unlink()
    lines = " ".join(map(lines_of, ("upcall-spnego", "upcall-dns", "upcall-idmap")))
    assert command_of(system) == f"chroot {system.root} cp {lines} /etc/request-key.d"


def test_lines_without_the_package_of_their_handler_are_a_problem(system: System) -> None:
    done = CliRunner().invoke(
        main, ["request-key", "install", "--root", str(system.root), "--type", "dns_resolver", "--copy"]
    )
    if "was not compiled" in done.output:
        pytest.skip("the forwarder is not built")
    apt = f"chroot {system.root} apt install ./upcall-dns_*.deb"
    assert f"no handler for dns_resolver is installed: `{apt}`\n" in done.output
    found = {finding.what: finding for finding in request_key(Scene(root=system.root))}
    finding = found["keys of type dns_resolver come to upcall, whose handler for them is not installed"]
    assert (finding.state, finding.command) == (PROBLEM, apt)
    assert f"keys of type cifs.spnego come to upcall, by {LINES}:2" in found


def test_a_line_of_another_program_beside_packages_is_left_to_the_administrator(system: System) -> None:
    put(system, "/etc/request-key.d/other.conf", b"create cifs.spnego ver=0x2;host=any.invalid* * /bin/other %k\n")
    (finding,) = request_key(Scene(root=system.root))
    assert finding.remedy == (
        "narrow the description in that line, or remove it; "
        f"then `upcall request-key status --root {system.root}`"
    )  # fmt: skip


def test_explain_names_the_package_of_the_handler(system: System) -> None:
    asked = ["explain", "dns_resolver", "--name", "fs.example.com", "--root", str(system.root), "--json"]
    if os.geteuid() != 0:
        pytest.skip("only root may ask about the machine's daemon")
    report = json.loads(CliRunner().invoke(main, asked).output)
    assert (report["answer"], report["remedy"]) == (
        "not-asked", f"`chroot {system.root} apt install ./upcall-dns_*.deb` as root"
    )  # fmt: skip


def test_request_key_status_names_the_packages(system: System) -> None:
    remove(system, "upcall-spnego")
    done = CliRunner().invoke(main, ["request-key", "status", "--root", str(system.root)])
    assert done.exit_code == 1
    assert f"upcall answers none of them: `chroot {system.root} apt install ./upcall-spnego_*.deb" in done.output


def test_the_command_for_this_system_has_no_chroot(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(System, "at", lambda self, path: system.root / path.lstrip("/"))
    here = System()
    assert command_to_install(here, ["dns_resolver"]) == "apt install ./upcall-dns_*.deb"
    assert command_to_install(here, ["cifs.spnego"]) == f"cp {lines_of('upcall-spnego')} /etc/request-key.d"
    system.root.joinpath(RECORD.lstrip("/")).unlink()
    assert command_to_install(here, ["dns_resolver"]) == "upcall request-key install --type dns_resolver"


def test_without_packages_the_command_keeps_the_types_that_are_installed(folder: Path) -> None:
    system = System(folder.parent)
    put(system, PROGRAM, b"#!/bin/sh\n", 0o755)
    install(system, plan(system, ["cifs.spnego"], [PROGRAM], copy=False))
    command = f"upcall request-key install --root {system.root}"
    assert command_to_install(system, ["dns_resolver"]) == f"{command} --type cifs.spnego --type dns_resolver"
    assert command_to_install(system, ["cifs.spnego"]) == command
