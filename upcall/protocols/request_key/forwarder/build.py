"""Compiles the forwarder when the package is built. Named by [tool.setuptools.cmdclass] in pyproject.toml.

Without a compiler, or if compiling fails, the build prints a warning and continues; the package then uses the
stand-in. Imports nothing of upcall, because a build runs before the package is installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from setuptools.command.bdist_wheel import bdist_wheel  # type: ignore[import-untyped]
from setuptools.command.build_py import build_py  # type: ignore[import-untyped]

PROGRAM: Final = "upcall-request-key"
FOLDER: Final = Path("upcall/protocols/request_key/forwarder")
SOURCES: Final = ("forward.c", "decide.c", "host.c")
SESSION: Final = "upcall-session"
SESSION_SOURCES: Final = ("session.c",)
MANYLINUX: Final = ("manylinux_2_17", "manylinux2014")  # in the sorted order that setuptools writes
PT_INTERP: Final = 3
TIME_LIMIT: Final = 120  # seconds for one compilation

Flags = Callable[[], Iterator[list[str]]]

WARNINGS: Final = shlex.split(
    "-Wall -Wextra -Wconversion -Wsign-conversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wformat=2 "
    "-Wcast-qual -Wpointer-arith -Wundef -Wvla"
)
BASE: Final = ["-std=c11", "-O2"]
HARDENING: Final = shlex.split(
    "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -fstack-protector-strong -fPIE -Wl,-z,relro,-z,now"
)
# Not supported by all compilers and machines.
_CHOSEN: Final = ["-fstack-clash-protection"]
_X86: Final = ["-fcf-protection"]


def variants() -> Iterator[list[str]]:
    """Yields compiler flags, in order of preference. Static first: the dynamic loader takes a third of the run
    time."""
    machine = _X86 if os.uname().machine == "x86_64" else []
    yield [*BASE, *HARDENING, *_CHOSEN, *machine, "-static-pie"]
    yield [*BASE, *HARDENING, *_CHOSEN, *machine, "-pie"]
    yield [*BASE, *HARDENING, "-pie"]


def static() -> Iterator[list[str]]:
    """Yields compiler flags for a program that must not use the dynamic loader (session.c)."""
    machine = _X86 if os.uname().machine == "x86_64" else []
    yield [*BASE, *HARDENING, *_CHOSEN, *machine, "-static-pie"]
    yield [*BASE, "-static"]


def compiler() -> list[str] | None:
    """Returns the compiler's command: $CC, otherwise cc, gcc or clang. None if none is installed."""
    configured = shlex.split(os.environ.get("CC", ""))
    for words in (configured, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return None


def compile_program(
    target: Path, folder: Path = FOLDER, names: Sequence[str] = SOURCES, flags_of: Flags = variants
) -> str | None:
    """Compiles the sources `names` in `folder` to `target`, with the first flags that give a program that runs.
    Returns these flags; None if none do: the reason is then on stderr. Takes at most TIME_LIMIT seconds for each
    attempt."""
    words = compiler()
    if words is None:
        _say(target.name, "there is no C compiler")
        return None
    sources = [str(folder / name) for name in names]
    made = target.with_name(target.name + ".new")
    reason = ""
    for flags in flags_of():
        reason = _run([*words, *WARNINGS, *flags, "-o", str(made), *sources]) or _run([str(made), "--version"])
        if not reason:
            made.chmod(0o755)
            made.replace(target)
            return " ".join(flags)
        made.unlink(missing_ok=True)
    _say(target.name, reason)
    return None


def _run(command: Sequence[str]) -> str:
    """Runs a command. Returns why it failed, "" if it did not."""
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=TIME_LIMIT)
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(command)}: {error.stderr.decode('utf-8', 'replace').strip()[-2000:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _say(name: str, reason: str) -> None:
    instead = "PAM cannot be set up without it" if name == SESSION else "its stand-in in Python will do"
    sys.stderr.write(f"upcall: {PROGRAM if name != SESSION else SESSION} is not compiled, {instead}: {reason}\n")


class BuildPy(build_py):  # type: ignore[misc]
    """Compiles the programs into the package's folder; in an editable install, into the source folder."""

    def run(self) -> None:
        super().run()
        session = self.program.with_name(SESSION)
        for program in (self.program, session):
            program.unlink(missing_ok=True)  # of an earlier build
        self.program.parent.mkdir(parents=True, exist_ok=True)
        compile_program(self.program)
        compile_program(session, FOLDER, SESSION_SOURCES, static)

    @property
    def program(self) -> Path:
        return (FOLDER if self.editable_mode else Path(self.build_lib) / FOLDER) / PROGRAM

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        made = (self.program, self.program.with_name(SESSION))
        if not self.editable_mode:
            outputs += [str(program) for program in made if program.exists()]
        return outputs


class BdistWheel(bdist_wheel):  # type: ignore[misc]
    """Tags a wheel that contains compiled programs with the platforms on which they run.

    Statically linked programs need no C library of the machine's: they get the tags of the oldest manylinux that
    package indexes accept (PEP 599). A dynamically linked one needs this machine's or a newer one, and gets a tag that
    they do not accept.
    """

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        folder = Path(self.bdist_dir) / FOLDER
        programs = [path for name in (PROGRAM, SESSION) if (path := folder / name).exists()]
        if programs:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            if all(is_static(path) for path in programs):
                platform = ".".join(platform.replace("linux", name, 1) for name in MANYLINUX)
        return python, abi, platform


def is_static(program: Path) -> bool:
    """Returns whether an ELF program runs without a dynamic loader: no segment is of the type PT_INTERP (elf(5))."""
    data = program.read_bytes()
    if data[:4] != b"\x7fELF" or data[4] not in (1, 2) or data[5] not in (1, 2):
        return False
    order = "<" if data[5] == 1 else ">"
    wide = data[4] == 2
    (offset,) = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", data, 32 if wide else 28)
    size, count = struct.unpack_from(f"{order}HH", data, 54 if wide else 42)
    kinds = (struct.unpack_from(f"{order}I", data, offset + number * size)[0] for number in range(count))
    return PT_INTERP not in kinds
