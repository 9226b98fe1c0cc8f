"""`python -m release.install_check [--dist FOLDER] [--lowest | --newest] [SET ...]`: installs the wheels as a user
would, and uses what was installed.

Each SET of extras ("base", "dns", ..., "all"; default: every one) goes into a clean virtual environment, from a folder
of wheels and with no index: upcall's own from `make dist`, the others fetched beforehand from pip's configured index.
So nothing of upcall's can come from an index. Everything is done twice, with the newest version of each dependency and
with the lowest that the pyproject.toml files allow ("lowest-direct": their own dependencies are the newest).

What is checked in each environment:

    pip check; `import upcall` finds the installed package, not the source
    `upcall plugin list` names the plugins of the extras, and no others
    `upcall plugin check` of each plugin in the set; tokens and TPMs are software, and left out where that is missing
    base and all: `upcall demo`; a key of each included module is made, and wraps and unwraps in a daemon
    metrics: `upcall metrics` prints figures

Exit code 0 if everything holds. Needs no privileges.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from release.build import dist
from release.version import version

_BASE: Final = ("openssl", "passphrase", "x25519")
PLUGINS: Final[Mapping[str, tuple[str, ...]]] = {
    "base": (),
    "dns": ("dns_resolver",),
    "idmap": ("cifs.idmap", "id_resolver"),
    "metrics": (),
    "pkcs11": ("pkcs11",),
    "quota": ("quota",),
    "spnego": ("cifs.spnego",),
    "tpm2": ("tpm2",),
}
SETS: Final = (*PLUGINS, "all")
NEWEST, LOWEST = "newest", "lowest"
_BUILT: Final = "tpm2-pytss"  # has no wheels
_TIME_LIMIT: Final = 900.0  # seconds for one command
_REGISTERED: Final = 60.0  # seconds until a daemon must answer
_FAST: Final = {"openssl": ["--param", "bits=2048"], "passphrase": ["--param", "passes=1"]}

# Run by the environment's Python: what the plugin ships for its own tests starts the token or TPM. Arguments: an empty
# folder, and the command `upcall`.
_TOKENS: Final = {
    "pkcs11": """
import os, subprocess, sys
from pathlib import Path
from upcall_pkcs11.softhsm import SoftHsm, missing
if what := missing():
    sys.exit(print("left out:", what))
hsm = SoftHsm(Path(sys.argv[1]))
hsm.add("one")
uri = hsm.uri("one", ";object=checked", with_pin=True)
command = [sys.argv[2], "plugin", "check", "pkcs11", "--param", "type=ec", "--param", f"uri={uri}"]
sys.exit(subprocess.call(command, env=hsm.environment()))
""",
    "tpm2": """
import subprocess, sys
from pathlib import Path
from upcall_tpm2.swtpm import SoftwareTpm, missing
if what := missing():
    sys.exit(print("left out:", what))
with SoftwareTpm(Path(sys.argv[1])) as tpm:
    sys.exit(subprocess.call([sys.argv[2], "plugin", "check", "tpm2", "--param", f"tcti={tpm.tcti}"]))
""",
}


class CheckFailed(Exception):
    """A command failed, or printed what it should not. The text says which, and what it printed."""


class Requirement(NamedTuple):
    """A third-party dependency of one of our wheels."""

    name: str
    bound: str  # its lower bound


def requirements(folder: Path) -> list[Requirement]:
    """Returns the third-party dependencies of the wheels in `folder`, extras included, except upcall's "dev"."""
    found: set[Requirement] = set()
    for path in folder.glob("*.whl"):
        for line in metadata(path).get_all("Requires-Dist", []):
            entry = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)(?:;.*)?", line.replace(" ", ""))
            if entry is not None and 'extra=="dev"' not in line.replace(" ", "") and "test" not in line:
                found.add(Requirement(entry[1], entry[2]))
    return sorted(found)


def metadata(wheel: Path) -> email.message.Message:
    """Returns the METADATA of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def run(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None, stdin: bytes = b""
) -> str:
    """Runs a command in `folder`. Returns its standard output. CheckFailed if it does not exit with 0."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, input=stdin, capture_output=True, timeout=_TIME_LIMIT)
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    if done.returncode:
        raise CheckFailed(f"{' '.join(words)}: exit code {done.returncode}\n{out[-4000:]}{err[-4000:]}")
    return out


def fetch(wheels: Path, target: Path, resolution: str, python: str) -> str:
    """Puts wheels of all third-party dependencies into `target`, from pip's configured index; builds those that have
    none. Returns why tpm2-pytss is missing, or ""."""
    needed = requirements(wheels)
    pins = target / "constraints.txt"
    pins.write_text("".join(f"{one.name}=={one.bound}\n" for one in needed) if resolution == LOWEST else "")
    names = [f"{one.name}>={one.bound}" for one in needed if one.name != _BUILT]
    pip = [python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "-w", str(target), "-c", str(pins)]
    run([*pip, *names], target)
    if subprocess.run(["pkg-config", "--exists", "tss2-esys"], capture_output=True).returncode:
        return "libtss2-dev is not installed"
    run([*pip, *(f"{one.name}>={one.bound}" for one in needed if one.name == _BUILT)], target)
    return ""


class Installed:
    """A clean virtual environment with upcall and extras, and folders for a user of it."""

    def __init__(self, folder: Path, python: str, wheels: Sequence[Path], extras: str) -> None:
        """`extras`: as in SETS. Installs without an index."""
        self.folder = folder
        self._binaries = folder / "venv" / "bin"
        for name in ("home", "run", "work"):
            (folder / name).mkdir(mode=0o700, parents=True)
        run([python, "-m", "venv", folder / "venv"], folder)
        wanted = "upcall" if extras == "base" else f"upcall[{extras}]"
        places = [word for path in wheels for word in ("--find-links", str(path))]
        self.pip("install", "--quiet", "--no-index", "--only-binary", ":all:", *places, f"{wanted}=={version()}")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self._binaries}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder / "home"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
        }

    def pip(self, *arguments: str) -> str:
        environment = {**self.environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
        return run([self._binaries / "python", "-m", "pip", *arguments], self.folder / "work", environment)

    def python(self, code: str, *arguments: str | Path) -> str:
        return run([self._binaries / "python", "-c", code, *arguments], self.folder / "work", self.environment)

    def upcall(self, *arguments: str | Path, stdin: bytes = b"") -> str:
        return run([self._binaries / "upcall", *arguments], self.folder / "work", self.environment, stdin)

    def check(self, extras: str) -> Iterator[str]:
        """Checks what this environment has. Yields what was done. CheckFailed."""
        self.pip("check")
        found = Path(self.python("import upcall; print(upcall.__file__)").strip())
        if not found.is_relative_to(self.folder):
            raise CheckFailed(f"upcall is imported from {found}")
        everything = tuple(name for names in PLUGINS.values() for name in names)
        expected = set(_BASE) | set(everything if extras == "all" else PLUGINS[extras])
        names = set(re.findall(r'"name": "([^"]+)"', self.upcall("plugin", "list", "--json")))
        if names != expected:
            raise CheckFailed(f"plugin list: {sorted(names)}, expected are {sorted(expected)}")
        self.upcall("key", "list")  # a group's command without arguments: versions of click differ there
        yield f"{len(names)} plugins"
        whole = extras in ("base", "all")
        for name in sorted(expected if whole else PLUGINS[extras]):
            yield self._checked(name)
        if whole:
            self.upcall("demo", "--keys", "100", "--bits", "2048")
            yield "demo"
            yield from self._round_trips()
        if extras in ("metrics", "all") and "upcall_up" not in self.upcall("metrics"):
            raise CheckFailed("metrics: no upcall_up")

    def _checked(self, name: str) -> str:
        """Runs `upcall plugin check`. Returns its last line."""
        if name in _TOKENS:
            token = self.folder / f"token-{name}"
            token.mkdir()
            said = self.python(_TOKENS[name], token, self._binaries / "upcall")
        else:
            said = self.upcall("plugin", "check", name, *_FAST.get(name, []))
        return f"check {said.strip().splitlines()[-1]}"

    def _round_trips(self) -> Iterator[str]:
        """Makes a key of each included module, wraps and unwraps with it. Yields their names."""
        runtime, word = self.folder / "runtime", self.folder / "word"
        runtime.mkdir(mode=0o700)
        word.touch(0o600)
        word.write_text("correct horse battery staple\n")
        clear = secrets.token_bytes(32)
        with (
            self._process("broker", "--runtime", runtime, "--no-ecryptfs"),
            self._process("daemon", "--runtime", runtime),
        ):
            for module in _BASE:
                name = f"check-{secrets.token_hex(4)}"
                self.upcall("key", "generate", name, "--module", module, "--passphrase-file", word)
                try:
                    wrapped = self._wrapped(name, runtime, clear)
                    if self._transformed("unwrap", name, runtime, wrapped) != clear:
                        raise CheckFailed(f"{module}: another key came back")
                finally:
                    self.upcall("key", "remove", name, "--yes")
                yield f"round trip {module}"

    def _wrapped(self, name: str, runtime: Path, clear: bytes) -> bytes:
        """Wraps; tries again until the daemon is registered."""
        end = time.monotonic() + _REGISTERED
        while True:
            try:
                return self._transformed("wrap", name, runtime, clear)
            except CheckFailed:
                if time.monotonic() > end:
                    raise

    def _transformed(self, verb: str, name: str, runtime: Path, data: bytes) -> bytes:
        command = [str(self._binaries / "upcall"), verb, name, "--runtime", str(runtime)]
        done = subprocess.run(command, input=data, capture_output=True, env=self.environment, timeout=_TIME_LIMIT)
        if done.returncode:
            raise CheckFailed(f"{verb}: {done.stderr.decode('utf-8', 'replace')}")
        return done.stdout

    @contextmanager
    def _process(self, *arguments: str | Path) -> Iterator[None]:
        words = [str(self._binaries / "upcall"), *map(str, arguments)]
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        with log, subprocess.Popen(words, env=self.environment, stdout=log, stderr=log) as process:
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def check(wheels: Path, sets: Sequence[str], resolutions: Sequence[str], python: str) -> list[str]:
    """Installs and checks. Prints what was done; returns the failures."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="upcall-install-") as name:
        for resolution in resolutions:
            others = Path(name, resolution, "wheels")
            others.mkdir(parents=True)
            missing = fetch(wheels, others, resolution, python)
            for extras in sets:
                if missing and extras in ("tpm2", "all"):
                    print(f"{resolution:6} {extras:8} left out: {missing}", flush=True)
                    continue
                folder = Path(name, resolution, extras)
                try:
                    done = ", ".join(Installed(folder, python, [wheels, others], extras).check(extras))
                except CheckFailed as error:
                    failures.append(f"{resolution} {extras}: {error}")
                    done = f"FAILED: {error}"
                print(f"{resolution:6} {extras:8} {done}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.install_check")
    parser.add_argument("--dist", type=Path, help="a folder with upcall's wheels; default: they are built")
    parser.add_argument("--python", default=sys.executable, help="of the virtual environments")
    parser.add_argument("--newest", dest="resolutions", action="append_const", const=NEWEST)
    parser.add_argument("--lowest", dest="resolutions", action="append_const", const=LOWEST)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], metavar="SET", help=" ".join(SETS))
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upcall-wheels-") as name:
        wheels = told.dist.absolute() if told.dist else Path(name)
        if not told.dist:
            dist(wheels)
        return 1 if check(wheels, told.sets or SETS, told.resolutions or [NEWEST, LOWEST], told.python) else 0


if __name__ == "__main__":
    sys.exit(main())
