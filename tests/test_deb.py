"""What is in the Debian packages of `make deb`; their life on a machine is tests/lab/test_deb.py's."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from release.build import ROOT
from release.deb import COMPLETIONS, DEBIANS, SERVED, moved, owner_of
from release.deb import packages as names
from tests import packed
from upcall.install.manifest import digest, read
from upcall.install.wanted import PAM, SYSTEMD
from upcall.process.debian import HOME, RECORD

REASON = packed.why_not()
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(REASON), reason=f"cannot build packages here: {REASON}")]
SCRIPTS = ROOT / "release/debian"
SITE = re.compile(rf"{HOME}/lib/python3\.\d+/site-packages")


class Package(NamedTuple):
    files: dict[str, tarfile.TarInfo]  # by path
    data: dict[str, bytes]
    fields: str
    scripts: dict[str, str]


@pytest.fixture(scope="module")
def folder() -> Path:
    return packed.packages()


@pytest.fixture(scope="module")
def packages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    found = {}
    for path in folder.glob("*.deb"):
        work = tmp_path_factory.mktemp("package")
        subprocess.run(["dpkg-deb", "-e", path, work], check=True)
        with (work / "files.tar").open("w+b") as archive:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, stdout=archive)
            archive.seek(0)
            with tarfile.open(fileobj=archive) as tar:
                files = {member.name.removeprefix("."): member for member in tar}
                read = {name: tar.extractfile(member) for name, member in files.items() if member.isfile()}
                data = {name: file.read() for name, file in read.items() if file is not None}
        scripts = {script.name: script.read_text() for script in work.iterdir() if script.name.startswith("p")}
        found[path.name.partition("_")[0]] = Package(files, data, (work / "control").read_text(), scripts)
    return found


def test_there_is_a_package_for_each_entry_of_the_control_file(packages: dict[str, Package]) -> None:
    assert packages.keys() == {*names()}


def test_everything_belongs_to_root_and_only_root_can_write_it(packages: dict[str, Package]) -> None:
    for package in packages.values():
        for name, member in package.files.items():
            assert (member.uid, member.gid) == (0, 0), name
            assert member.issym() or not member.mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_ISUID | stat.S_ISGID), (
                name
            )


def test_units_and_scripts_are_those_of_setup_with_the_packages_paths(packages: dict[str, Package]) -> None:
    for kind in (SYSTEMD, PAM):
        for path, (_, mode) in kind.files.items():
            package = packages[owner_of(path)]
            assert stat.S_IMODE(package.files[moved(path)].mode) == mode, path
            text = package.data[moved(path)].decode()
            assert "$python" not in text and "site-packages" not in text
            assert set(re.findall(r"[^\s=]*/python3?\b", text)) <= {f"{HOME}/bin/python3"}, path
    assert (
        f"{HOME}/upcall-session --without-systemd" in packages["upcall"].data["/usr/share/pam-configs/upcall"].decode()
    )


def test_the_record_names_the_files_of_the_package_as_they_are(packages: dict[str, Package], tmp_path: Path) -> None:
    written = tmp_path / "install.json"
    written.write_bytes(packages["upcall"].data[RECORD])
    record = read(written)
    assert (record.kind, record.settled) == ("debian", True) and record.files
    for path, known in record.files.items():
        assert digest(packages["upcall"].data[path]) == known


def test_programs_are_compiled_and_reached_by_short_paths(packages: dict[str, Package]) -> None:
    upcall = packages["upcall"]
    for name in ("upcall-request-key", "upcall-session"):
        target = f"{HOME}/{upcall.files[f'{HOME}/{name}'].linkname}"
        assert upcall.data[target].startswith(b"\x7fELF")
        assert stat.S_IMODE(upcall.files[target].mode) == 0o755


def test_the_command_searches_no_current_folder(packages: dict[str, Package]) -> None:
    start = packages["upcall"].data["/usr/bin/upcall"].decode()
    assert start == f'#!/bin/sh\nexec {HOME}/bin/python3 -P -m upcall "$@"\n'
    assert "include-system-site-packages = false" in packages["upcall"].data[f"{HOME}/pyvenv.cfg"].decode()


def test_scripts_wait_for_users_managers_with_a_limit() -> None:
    """A user can stop the own one (SIGSTOP), and each call would wait for the bus's time-out."""
    lines = [
        line.strip() for file in SCRIPTS.glob("*.p*") for line in file.read_text().splitlines() if "--user " in line
    ]
    assert len(lines) > 1
    assert all(line.startswith("timeout ") for line in lines)


def test_pages_and_completions_are_where_debian_has_them(packages: dict[str, Package]) -> None:
    files = packages["upcall"].files
    assert {f"/{path}" for path in COMPLETIONS.values()} <= files.keys()
    assert {"/usr/share/man/man1/upcall-key-generate.1.gz", "/usr/share/doc/upcall/copyright"} <= files.keys()


def test_request_keys_lines_come_and_go_with_the_package_of_the_handler(packages: dict[str, Package]) -> None:
    for name, package in packages.items():
        lines = package.data.get(f"{HOME}/request-key/{name}.conf", b"").decode()
        types = dict.fromkeys(line.split()[1] for line in lines.splitlines() if not line.startswith("#"))
        assert tuple(types) == SERVED.get(name, ())
        if types:
            assert f"/etc/request-key.d/{name}.conf" in package.scripts["postinst"]
            for script in ("prerm", "postrm"):
                assert f"rm -f /etc/request-key.d/{name}.conf" in package.scripts[script]
        assert not any(path.startswith("/etc/request-key.d/") for path in package.files)


def test_no_file_is_in_two_packages(packages: dict[str, Package]) -> None:
    paths = [path for package in packages.values() for path in package.data]
    assert len(paths) == len({*paths})


def test_no_tests_bytecode_or_traces_of_the_build_are_packed(packages: dict[str, Package]) -> None:
    for package in packages.values():
        for path in package.files:
            assert not re.search(r"\.pyc$|__pycache__|direct_url\.json", path), path
            assert not path.startswith(("/usr/local", "/tmp", "/home")), path
    about = packages["upcall"].data
    assert not any(str(ROOT).encode() in data for path, data in about.items() if SITE.match(path))


def test_libraries_of_debian_are_dependencies_and_links(packages: dict[str, Package]) -> None:
    for name, links in DEBIANS.items():
        depends = re.search(r"^Depends: (.*)$", packages[name].fields, re.MULTILINE)
        assert depends is not None and {*links} <= {*depends[1].split(", ")}
        linked = {Path(path).name for path, member in packages[name].files.items()
                  if SITE.match(path) and "/dist-packages/" in member.linkname}  # fmt: skip
        assert linked == {each for found in links.values() for each in found}


CARRIED = (
    ("upcall", "cryptography"), ("upcall", "keyring"), ("upcall", "pyroute2"), ("upcall-dns", "dns"),
    ("upcall-pkcs11", "pkcs11"), ("upcall-tpm2", "tpm2_pytss"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "library"), CARRIED)
def test_what_debian_lacks_is_carried_along(packages: dict[str, Package], name: str, library: str) -> None:
    assert any(SITE.sub("", path) == f"/{library}/__init__.py" for path in packages[name].data)
    assert f"{library}/*" in packages[name].data[f"/usr/share/doc/{name}/copyright"].decode()


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
def test_lintian_finds_no_errors(folder: Path) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--no-cfg", "--show-overrides", "--tag-display-limit=0", *folder.glob("*.deb")],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.startswith(("E:", "O:"))] == []
    assert done.returncode == 0, done.stderr


def test_two_builds_are_the_same(folder: Path, tmp_path: Path) -> None:
    again = packed.build(tmp_path / "again")
    assert {path.name: digest(path.read_bytes()) for path in again.iterdir()} == {
        path.name: digest(path.read_bytes()) for path in folder.iterdir()
    }
