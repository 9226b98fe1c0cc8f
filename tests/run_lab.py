"""Runs the tests of ring 3 (tests/kernel) in the lab: `python -m tests.run_lab [--require] [PYTEST ARGUMENTS...]`.

The machine is booted once for each group (tests/kernel/groups.py). `--group`, `--kernel` and `--file` choose among
them.
Output comes as it is written; JUnit XML and the kernel's log of each group go to build/ring3. The exit code is the
first one of pytest that is not 0, or 71 when a kernel reported a fault. Where the lab cannot run, the tests that are
left out are named with the reason, and the exit code is 0 (with --require: 69).
"""

from __future__ import annotations

import argparse
import compileall
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.cited import passed_in, unshown
from tests.kernel.groups import CORE, FILES, Group, groups
from upcall.testing.lab import LabError, LabUnavailable, run, why_not

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
RESULTS = PROJECT / "build" / "ring3"
# Without the settings of the other rings, which load what takes an emulated processor seconds. The option of Python is
# theirs, too: plugins of tests are in PYTHONPATH, root's, too (upcall/process/start_python.py).
PYTEST = ["-X", "upcall-environment", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
PYTEST += ["--confcutdir=tests/kernel"]
TIME_LIMIT = 1200.0  # seconds for each file of a group on a busy machine; a quiet one needs 20 to 230


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", action="store_true", help="fail where the lab cannot run")
    names = sorted({*groups(FILES), *groups(FILES, uml=False)})
    parser.add_argument("--group", choices=names, action="append", help="only this one; may be repeated")
    parser.add_argument("--file", choices=FILES, action="append", help="only this one; may be repeated")
    parser.add_argument("--core", action="store_true", help="only the link, and what ecryptfsd was seen to say")
    parser.add_argument("--others", action="store_true", help="all but these")
    parser.add_argument("--kernel", choices=("qemu", "uml"), help="only the groups that this one boots for")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for each group")
    options, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # nothing stays behind
    reasons = {kernel: why_not(kernel) for kernel in ("uml", "qemu")}
    uml = reasons["uml"] is None or reasons["qemu"] is not None
    chosen = {
        name: group
        for name, group in groups(options.file or FILES, uml).items()
        if (not options.group or name in options.group)
        and options.kernel in (None, group.kernel)
        and not (options.core and name not in CORE)
        and not (options.others and name in CORE)
    }
    if not uml and chosen.keys() - {*CORE}:
        print(f"--- ring 3: QEMU instead of User-mode Linux ({reasons['uml']})", flush=True)
    codes = []
    for kernel, reason in reasons.items():
        left_out = [group for group in chosen.values() if group.kernel == kernel]
        if reason is not None and left_out:
            codes.append(_left_out(left_out, kernel, reason, options.require))
    _compile([file for group in chosen.values() for file in group.files])
    for name, group in chosen.items():
        if reasons[group.kernel] is None:
            codes.append(_run_group(name, group, arguments, options.timeout or TIME_LIMIT * len(group.files)))
    return next((code for code in codes if code), 0)


def _compile(files: Iterable[str]) -> None:
    """For the guest, which would take a quarter of a minute for each boot, and whose own is gone with it: also what
    pytest makes of assertions."""
    for folder in (PROJECT / "upcall", PROJECT / "plugins", HERE):
        compileall.compile_dir(folder, quiet=2)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *PYTEST, "--collect-only", *(f"tests/kernel/{file}" for file in files)]
    subprocess.run(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, check=False)


def _left_out(left_out: Iterable[Group], kernel: str, reason: str, required: bool) -> int:
    files = [f"tests/kernel/{file}" for group in left_out for file in group.files]
    print(f"LEFT OUT, because the lab cannot run {kernel} here ({reason}):\n  " + "\n  ".join(files), flush=True)
    return os.EX_UNAVAILABLE if required else 0


def _run_group(name: str, group: Group, arguments: list[str], timeout: float) -> int:
    """One boot. 71 is for a kernel that reported a fault although every test went well."""
    command = ["python", *PYTEST, f"--junitxml=/results/{name}.xml", *arguments]
    command += [f"tests/kernel/{file}" for file in group.files]
    print(f"--- ring 3, {name} on {group.kernel}: {' '.join(group.files)}", flush=True)
    started = time.monotonic()
    try:
        result = run(
            command,
            timeout=timeout,
            results=RESULTS / name,
            cwd=PROJECT,
            env={"PYTHONUNBUFFERED": "1", **_of_attacks()},
            out=_writer(1),
            err=_writer(2),
            kernel=group.kernel,
            init=group.init,
        )
    except LabError as error:
        print(f"--- ring 3, {name}: {error}", flush=True)
        return os.EX_UNAVAILABLE if isinstance(error, LabUnavailable) else os.EX_SOFTWARE
    junit = RESULTS / name / f"{name}.xml"
    missing = unshown([f"tests/kernel/{file}" for file in group.files], passed_in(junit) if junit.exists() else [])
    if arguments:  # they may choose among the tests
        missing = []
    for test in missing:
        print(f"--- ring 3, {name}: SECURITY.md names it, and it did not pass: {test}", flush=True)
    for line in result.kernel_faults:
        print(f"--- ring 3, {name}: the kernel reported a fault: {line}", flush=True)
    print(f"--- ring 3, {name}: exit code {result.returncode}, {time.monotonic() - started:.0f} s", flush=True)
    return result.returncode or (os.EX_OSERR if result.kernel_faults else 1 if missing else 0)


def _of_attacks() -> dict[str, str]:
    """How often attacks are tried."""
    return {name: value for name, value in os.environ.items() if name.startswith("UPCALL_ATTACK_")}


def _writer(descriptor: int) -> Callable[[bytes], None]:
    def write(chunk: bytes) -> None:
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]

    return write


if __name__ == "__main__":
    sys.exit(main())
