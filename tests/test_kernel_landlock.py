"""Landlock, on the kernel that we run on, and as older kernels have it."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from tests.escaping import outcome
from upcall.kernel import landlock, libc, process
from upcall.kernel.landlock import EXECUTE, WRITE_FILE, Place, restrict
from upcall.testing.processes import in_child

ABI = landlock.abi()
here = pytest.mark.skipif(not ABI, reason=f"Landlock: {landlock.why_not()}")


@here
def test_a_restricted_process_writes_beneath_its_places_only(tmp_path: Path) -> None:
    ours, other, file = tmp_path / "ours", tmp_path / "other", tmp_path / "file"
    for folder in (ours / "below", other):
        folder.mkdir(parents=True)
    for one in (file, other / "there"):
        one.touch()

    def tried() -> dict[str, str]:
        process.harden()
        restrict([Place(ours), Place(file), Place(tmp_path / "nothing")])
        acts = {
            "below": lambda: (ours / "below" / "new").touch(),
            "rename": lambda: (ours / "below" / "new").rename(ours / "below" / "newer"),
            "the file": lambda: file.write_text("x"),
            "not beside it": lambda: (tmp_path / "beside").touch(),
            "not elsewhere": lambda: (other / "there").write_text("x"),
            "not out of it": lambda: (ours / "below" / "newer").rename(other / "newer"),
            "not by a link": lambda: os.link(other / "there", ours / "link"),
            "no device": lambda: os.mknod(ours / "device", 0o20600, os.makedev(1, 3)),
            "reading": lambda: (other / "there").read_text(),
        }
        return {name: outcome(act) for name, act in acts.items()}

    found = in_child(tried)
    assert found.pop("not out of it") in ("EACCES", "EXDEV")
    assert found.pop("not by a link") in ("EACCES", "EXDEV")
    assert found.pop("no device") in ("EACCES", "EPERM")
    assert found == {
        "below": "done",
        "rename": "done",
        "the file": "done",
        "not beside it": "EACCES",
        "not elsewhere": "EACCES",
        "reading": "done",
    }


@here
@pytest.mark.parametrize("version", range(1, 9))
def test_each_version_of_landlock_restricts_what_it_knows(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer kernel plays an older one: rights that the older version does not know are not restricted."""
    if version > ABI:
        pytest.skip(f"this kernel has version {ABI}")
    monkeypatch.setattr(landlock, "abi", lambda: version)
    file = tmp_path / "file"
    file.write_text("x")
    pid = os.getpid()

    def tried() -> list[object]:
        process.harden()
        made = restrict([Place(tmp_path / "ours")])
        with socket.socket() as listening:
            bound = outcome(lambda: listening.bind(("127.0.0.1", 0)))
        emptied = outcome(lambda: os.truncate(file, 0))
        return [made, outcome(lambda: file.write_text("y")), emptied, bound, outcome(lambda: os.kill(pid, 0))]

    assert in_child(tried) == [
        version,
        "EACCES",
        "EACCES" if version >= 3 else "done",
        "EACCES" if version >= 4 else "done",
        "EPERM" if version >= 6 else "done",
    ]


@here
def test_only_programs_beneath_the_places_can_be_run(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def tried() -> list[str]:
        process.harden()
        restrict([*(Place(Path(root), EXECUTE) for root in ("/usr", "/bin", "/lib", "/lib64"))], programs=True)
        found = []
        for path in ("/bin/true", str(program)):
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exec {path}"], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 2)])
            found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return [str(one) for one in found]

    assert in_child(tried) == ["0", "126"]


@here
def test_files_of_a_place_with_write_only_can_be_written_but_not_created(tmp_path: Path) -> None:
    (tmp_path / "there").touch()

    def tried() -> list[str]:
        process.harden()
        restrict([Place(tmp_path, WRITE_FILE)])
        return [outcome(lambda: os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT)) for name in ("there", "new")]  # noqa: B023

    assert in_child(tried) == ["done", "EACCES"]


@pytest.mark.skipif(ABI < 6, reason="needs version 6 of Landlock")
def test_abstract_sockets_of_other_processes_are_refused_unless_allowed() -> None:
    name = f"\0upcall-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()

        def tried(abstract: bool) -> str:
            process.harden()
            restrict([], abstract=abstract)
            return outcome(lambda: socket.socket(socket.AF_UNIX).connect(name))

        assert in_child(lambda: tried(True)) == "done"
        assert in_child(lambda: tried(False)) == "EPERM"


@pytest.mark.parametrize(
    ("code", "why"),
    [(errno.ENOSYS, "this kernel has none"), (errno.EOPNOTSUPP, "turned off when the machine"), (1, "Op")],
)
def test_without_landlock_the_version_is_0_and_the_reason_is_told(
    code: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc, "syscall", none)
    assert landlock.abi() == 0
    assert landlock.why_not().startswith(why)
