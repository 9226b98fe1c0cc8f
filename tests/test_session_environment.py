"""The real pam_exec hands on what PAM's environment holds, and nothing of it reaches what root runs."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.forwarder import build
from upcall.testing.processes import in_child

SOURCES = Path(build.__file__).parent
CONTROL = "/usr/bin/env"

# Leaves its mark when the dynamic loader takes it in.
PRELOADED = """
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void run(void) { close(open(MARK, O_CREAT | O_WRONLY, 0600)); }
"""


class _Conversation(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("data", ctypes.c_void_p))


pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler"),
]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    made = tmp_path / "upcall-session"
    if build.compile_program(made, SOURCES, build.SESSION_SOURCES, build.static) is None:
        pytest.skip("nothing can be linked statically here (Debian: libc6-dev)")
    return made


def opened(folder: Path, line: str, environment: dict[str, str]) -> int:
    """What pam_open_session returns for a service that runs this line by pam_exec with that environment."""
    pam = ctypes.CDLL(ctypes.util.find_library("pam") or "libpam.so.0")
    if not hasattr(pam, "pam_start_confdir"):
        pytest.skip("this PAM reads services from /etc/pam.d only (1.4 has pam_start_confdir)")
    services = folder / "pam.d"
    services.mkdir(exist_ok=True)
    (services / "upcall-test").write_text(f"session required pam_exec.so quiet seteuid {line}\n")
    handle, conversation = ctypes.c_void_p(), _Conversation()
    begun = pam.pam_start_confdir(
        b"upcall-test", b"root", ctypes.byref(conversation), os.fsencode(services), ctypes.byref(handle)
    )
    assert begun == 0
    for name, value in environment.items():
        assert pam.pam_putenv(handle, f"{name}={value}".encode()) == 0
    result = int(pam.pam_open_session(handle, 0))
    pam.pam_end(handle, result)
    return result


def test_nothing_of_pams_environment_reaches_the_loader_or_the_program(tmp_path: Path, program: Path) -> None:
    mark, library, source, said = (tmp_path / name for name in ("mark", "planted.so", "planted.c", "said"))
    source.write_text(PRELOADED)
    words = [*(build.compiler() or []), "-shared", "-fPIC", f'-DMARK="{mark}"', "-o", str(library), str(source)]
    subprocess.run(words, check=True, timeout=60)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\nexec /usr/bin/env > {said}\n")
    script.chmod(0o755)
    planted = {"LD_PRELOAD": str(library), "PYTHONPATH": str(tmp_path), "GCONV_PATH": str(tmp_path), "BASH_ENV": "/x"}

    # The control: env -i clears the environment, but the loader has had its turn in env itself.
    assert in_child(lambda: opened(tmp_path, f"{CONTROL} -i {script}", planted)) == 0
    assert mark.exists()
    mark.unlink()
    said.unlink()

    assert in_child(lambda: opened(tmp_path, f"{program} {script}", planted)) == 0
    assert not mark.exists()
    names = {line.partition("=")[0] for line in said.read_text().splitlines()}
    assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {"PATH", "LANG", "PAM_TYPE", "PAM_USER", "PAM_SERVICE"}


def test_the_line_that_setup_writes_runs_under_pam_exec(tmp_path: Path, program: Path) -> None:
    """upcall.install.sessions hears from PAM what it needs: this service is one that it does not count."""
    words = [str(program), "--without-systemd", sys.executable, "-I", "-m", "upcall.install.sessions", "open"]
    assert in_child(lambda: opened(tmp_path, shlex.join(words), {"PYTHONSTARTUP": "/x"}), timeout=60) in (0, 14)
    environment = {"PAM_TYPE": "open_session", "PAM_USER": "root", "PAM_SERVICE": "cron", "PYTHONHOME": "/nowhere"}
    assert subprocess.run(words, env=environment, timeout=60).returncode == 0


def test_the_session_program_is_static_and_does_not_search_path(program: Path) -> None:
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert b"/ld-linux" not in program.read_bytes()[:4096]
    assert subprocess.run([program, "true"], timeout=60).returncode == os.EX_USAGE  # nothing is looked for in PATH
    assert subprocess.run([program, "/nowhere"], timeout=60).returncode == os.EX_UNAVAILABLE


def test_the_session_program_does_nothing_where_systemd_runs_if_asked(program: Path) -> None:
    done = subprocess.run([program, "--without-systemd", "/bin/echo", "x"], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"" if Path("/run/systemd/system").exists() else b"x\n")
    assert subprocess.run([program, "--without-systemd"], timeout=60).returncode == os.EX_USAGE


def test_setup_of_pam_is_refused_without_the_session_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcall.config import ConfigError
    from upcall.install.services import SetupPlan, check
    from upcall.install.wanted import PAM
    from upcall.protocols.request_key.install.system import System

    monkeypatch.setattr(forwarder, "SESSION", tmp_path / "upcall-session")
    with pytest.raises(ConfigError, match="was not compiled"):
        check(System(), SetupPlan(PAM))


def test_setup_ignores_the_callers_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcall.install.services import _run
    from upcall.protocols.request_key.install.system import System

    shutil.copy(shutil.which("true") or "/bin/true", tmp_path / "upcall-no-such-program")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    from upcall.install.services import OrderFailed

    with pytest.raises(OrderFailed, match="upcall-no-such-program"):
        _run(System(), [("upcall-no-such-program",)])
    monkeypatch.setenv("LD_PRELOAD", "/nowhere")
    said = tmp_path / "said"
    _run(System(), [("sh", "-c", f"env > {said}")])
    names = {line.partition("=")[0] for line in said.read_text().splitlines()}
    assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {"PATH", "LANG", "HOME", "DEBIAN_FRONTEND"}
