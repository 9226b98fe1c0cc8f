"""`python -m release.deb FOLDER [--version VERSION]`: builds Debian packages of upcall and its plugins.

What is in them comes from the wheels of release/build.py, and from the generators of `upcall setup`, `upcall manual`
and `upcall completion`. docs/packaging.md describes the layout. Two builds of one commit are the same bit for bit, as
long as the tools of Debian are.
"""

from __future__ import annotations

import argparse
import datetime
import email
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from release.build import ROOT, dist, epoch
from upcall.cli import main as commands
from upcall.install.completion import script
from upcall.install.manifest import Manifest, digest, shown
from upcall.install.manual.written import written
from upcall.install.packaged import PACKAGE
from upcall.install.wanted import PAM, SYSTEMD, content
from upcall.process.debian import HOME, RECORD
from upcall.protocols.request_key.install.our_file import Ours, body
from upcall.protocols.request_key.install.packages import lines_of
from upcall.protocols.request_key.key_types import KEY_TYPES

HERE: Final = Path(__file__).parent / "debian"
PYTHON: Final = Path("/usr/bin/python3")  # Debian's, which runs upcall
MAINTAINER: Final = ("DEBFULLNAME", "DEBEMAIL")  # as other tools of Debian have it
TOOLS: Final = {"dpkg-buildpackage": "dpkg-dev", "dh": "debhelper", "lintian": "lintian", "gcc": "gcc"}

# Libraries of Debian 12 that are new enough, by package: name and lowest version, and what of dist-packages is linked
# into upcall's own folder. So nothing else of dist-packages is imported, nor anything of /usr/local.
DEBIANS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "upcall": {
        "python3-click (>= 8.1)": ("click",),
        "python3-jeepney (>= 0.8)": ("jeepney",),
        "python3-markdown-it": ("markdown_it",),
        "python3-mdurl": ("mdurl",),
        "python3-pygments": ("pygments",),
        "python3-rich (>= 13)": ("rich",),
        "python3-secretstorage": ("secretstorage",),
        "python3-tomli-w (>= 1.0)": ("tomli_w",),
    },
    "upcall-pkcs11": {"python3-asn1crypto (>= 1.5.1)": ("asn1crypto",)},
}
# Not needed here: Debian's, those of other systems, and what only cffi's compiler needs.
NOT_CARRIED: Final = frozenset(
    {"asn1crypto", "click", "jeepney", "markdown-it-py", "mdurl", "pycparser", "pygments", "pywin32-ctypes", "rich",
     "secretstorage", "tomli-w", "win-inet-pton"}
)  # fmt: skip
# Whose a wheel is, if it is not upcall's.
OWNERS: Final = {
    "dnspython": "upcall-dns",
    "python-pkcs11": "upcall-pkcs11",
    "tpm2-pytss": "upcall-tpm2",
    **{f"upcall-{name}": f"upcall-{name}" for name in ("dns", "idmap", "pkcs11", "quota", "spnego", "tpm2")},
}
SERVED: Final = {  # types of keys that a package has upcall answer
    package: tuple(name for name, key_type in KEY_TYPES.items() if key_type.package == package)
    for package in sorted({key_type.package for key_type in KEY_TYPES.values()})
}
COMPLETIONS: Final = {
    "bash": "usr/share/bash-completion/completions/upcall",
    "zsh": "usr/share/zsh/vendor-completions/_upcall",
    "fish": "usr/share/fish/vendor_completions.d/upcall.fish",
}
# Where packages of Debian have what `upcall setup` writes.
_MOVED: Final = {
    "/etc/systemd/system/": "/lib/systemd/system/",
    "/etc/systemd/user/": "/usr/lib/systemd/user/",
    "/etc/tmpfiles.d/": "/usr/lib/tmpfiles.d/",
    "/etc/sysusers.d/": "/usr/lib/sysusers.d/",
    "/etc/init.d/upcall": "/etc/init.d/upcall-broker",
}

_COMMON: Final = "Apache-2.0. On Debian systems, its text is in /usr/share/common-licenses/Apache-2.0."


def packages() -> tuple[str, ...]:
    """Returns the names of the packages, in the order of the control file."""
    return tuple(re.findall(r"^Package: (\S+)", (HERE / "control").read_text(), re.MULTILINE))


def moved(path: str) -> str:
    """Returns where a package has what `upcall setup` writes to `path`."""
    for before, after in _MOVED.items():
        if path.startswith(before):
            return after + path.removeprefix(before)
    return path


def owner_of(path: str) -> str:
    """Returns the package of a unit or other file of `upcall setup`."""
    named = Path(path).stem
    return named if named in packages() and path.endswith(".service") else PACKAGE


class Tree:
    """The files of each package below `root`, as they will be on the machine."""

    def __init__(self, root: Path, python: str) -> None:
        self._root = root
        self.site = f"{HOME}/lib/python{python}/site-packages"

    def at(self, package: str, path: str) -> Path:
        """Returns the place of a file, with its folder."""
        place = self._root / package / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def write(self, package: str, path: str, data: bytes, mode: int = 0o644) -> None:
        place = self.at(package, path)
        place.write_bytes(data)
        place.chmod(mode)

    def link(self, package: str, path: str, target: str) -> None:
        """Links `path` to `target`, both absolute; relatively, as Debian's policy has it below one top folder."""
        place = self.at(package, path)
        place.symlink_to(os.path.relpath(target, Path(path).parent))

    def unpack(self, package: str, wheel: Path) -> None:
        """Unpacks a wheel into the private folder of modules."""
        with zipfile.ZipFile(wheel) as archive:
            for item in archive.infolist():
                if item.is_dir():
                    continue
                if ".data/" in item.filename or ".." in Path(item.filename).parts:
                    raise SystemExit(f"{wheel.name}: {item.filename} has no place in a Debian package")
                mode = 0o755 if (item.external_attr >> 16) & 0o100 and not item.filename.endswith(".so") else 0o644
                self.write(package, f"{self.site}/{item.filename}", archive.read(item), mode)


def debian_python() -> str:
    """Returns major.minor of /usr/bin/python3, for which wheels are taken. SystemExit if this Python has another."""
    found = subprocess.run(
        [PYTHON, "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
    )
    ours = "{}.{}".format(*sys.version_info[:2])
    if found.stdout.strip() != ours:
        raise SystemExit(f"{PYTHON} is {found.stdout.strip() or 'not there'}, but .venv has Python {ours}: "
                         f"make clean, and make deb PYTHON={PYTHON}")  # fmt: skip
    return ours


def require_tools() -> None:
    """SystemExit if a tool is missing."""
    if absent := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        raise SystemExit(f"not installed: {', '.join(absent)}: apt-get install {' '.join(absent)}")


def version_of(when: int, root: Path = ROOT) -> str:
    """Returns the packages' version: of a tagged commit the release's, between releases later than that."""
    text = (root / "pyproject.toml").read_text()
    release = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    assert release is not None
    asked = ["git", "describe", "--tags", "--exact-match", "--match", f"v{release[1]}"]
    if subprocess.run(asked, cwd=root, capture_output=True).returncode == 0:
        return release[1]
    moment = datetime.datetime.fromtimestamp(when, datetime.UTC)
    return f"{release[1]}+git{moment:%Y%m%d.%H%M%S}"


def carried(target: Path) -> list[Path]:
    """Fetches the pinned wheels of what Debian 12 has not, or too old. Returns their paths."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / "requirements/runtime.txt").read_text())
    wanted = [entry for entry in entries if re.split(r"[=\s\[]", entry, maxsplit=1)[0] not in NOT_CARRIED]
    listed = target / "carried.txt"
    listed.write_text("\n".join(wanted) + "\n")
    _pip("download", "--require-hashes", "--only-binary", ":all:", "-r", str(listed), "-d", str(target))
    return sorted(target.glob("*.whl"))


def tss(target: Path) -> list[Path]:
    """Builds the wheel of tpm2-pytss, of which there is none, against Debian's libtss2. Returns its path."""
    venv = target / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    _pip("install", "--require-hashes", "-r", str(ROOT / "requirements/tss-build.txt"), python=venv / "bin/python")
    _pip("wheel", "--require-hashes", "--no-build-isolation", "--no-binary", "tpm2-pytss",
         "-r", str(ROOT / "requirements/tss.txt"), "-w", str(target), python=venv / "bin/python")  # fmt: skip
    return sorted(target.glob("tpm2_pytss-*.whl"))


def _pip(*words: str, python: Path | None = None) -> None:
    command = [str(python or sys.executable), "-m", "pip", words[0], "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", *words[1:]], check=True)


def project_of(wheel: Path) -> str:
    """Returns the normalized name of a wheel's project."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def fill(tree: Tree, wheels: Iterable[Path], python: str) -> None:
    """Puts everything into the packages' trees."""
    for wheel in wheels:
        tree.unpack(OWNERS.get(project_of(wheel), PACKAGE), wheel)
    for package, links in DEBIANS.items():
        for name in (name for names in links.values() for name in names):
            tree.link(package, f"{tree.site}/{name}", f"/usr/lib/python3/dist-packages/{name}")
    # A virtual environment: sys.path is its own folder and the standard library's.
    about = f"home = {PYTHON.parent}\ninclude-system-site-packages = false\nversion = {python}\n"
    tree.write(PACKAGE, f"{HOME}/pyvenv.cfg", about.encode())
    tree.link(PACKAGE, f"{HOME}/bin/python3", str(PYTHON))
    # -P: the current folder is not searched.
    tree.write(PACKAGE, "usr/bin/upcall", f'#!/bin/sh\nexec {HOME}/bin/python3 -P -m upcall "$@"\n'.encode(), 0o755)
    programs = f"{tree.site}/upcall/protocols/request_key/forwarder"
    for name in ("upcall-request-key", "upcall-session"):
        if not tree.at(PACKAGE, f"{programs}/{name}").exists():
            raise SystemExit(f"{name} was not compiled: apt-get install gcc libc6-dev")
        tree.link(PACKAGE, f"{HOME}/{name}", f"{programs}/{name}")
    _services(tree)
    for package, types in SERVED.items():
        told = f"# Of the package {package}, which replaces it: put lines of your own into other files.\n"
        lines = body(Ours(types, (f"{HOME}/upcall-request-key",)))
        # Its postinst copies it to /etc/request-key.d.
        tree.write(package, lines_of(package), told.encode() + lines)
    for shell, path in COMPLETIONS.items():
        tree.write(PACKAGE, path, script(shell).encode())
    for name, text in written(commands).items():
        tree.write(PACKAGE, f"usr/share/man/{name}", text.encode())
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]):
        tree.write(PACKAGE, f"usr/share/doc/upcall/{page.name}", page.read_bytes())


def _services(tree: Tree) -> None:
    """Writes what `upcall setup` writes for services and logins, and the record by which it knows this package."""
    files = {}
    for kind in (SYSTEMD, PAM):
        for path, (_, mode) in kind.files.items():
            data = content(kind, path, f"{HOME}/bin/python3", f"{HOME}/upcall-session")
            tree.write(owner_of(path), moved(path), data, mode)
            if owner_of(path) == PACKAGE:
                files[moved(path)] = digest(data)
    tree.write(PACKAGE, RECORD, shown(Manifest("debian", files, settled=True)))


def copyright_of(wheels: Iterable[Path]) -> str:
    """Returns debian/copyright: ours, and what each carried wheel says of itself."""
    head = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/",
        "Upstream-Name: upcall", "", "Files: *", "Copyright: upcall developers", "License: Apache-2.0", "",
    ]  # fmt: skip
    foreign = [line for wheel in wheels if not project_of(wheel).startswith("upcall") for line in _about(wheel)]
    return "\n".join([*head, *foreign, "License: Apache-2.0", f" {_COMMON}", ""])


def _about(wheel: Path) -> list[str]:
    """Returns the lines of debian/copyright for a carried wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("info/METADATA"))))
        texts = sorted(name for name in names if re.search(r"dist-info/.*(LICEN|COPYING)", name, re.IGNORECASE))
        text = archive.read(texts[0]).decode("utf-8", "replace") if texts else ""
    if "Apache License" in text and "TERMS AND CONDITIONS" in text:
        text = _COMMON
    text = text or about["License-Expression"] or about["License"] or ""
    author = about["Author"] or about["Author-email"] or about["Maintainer"] or f"the authors of {about['Name']}"
    parts = sorted({name.split("/")[0] for name in names if ".dist-info/" not in name})
    files = " ".join(part if "." in part else f"{part}/*" for part in parts)
    called = f"{about['Name']}-{about['Version']}"
    stanza = [f"Files: {files}", f"Copyright: {' '.join(str(author).split())}", f"License: {called}", ""]
    return [*stanza, f"License: {called}", *_indented(text), ""]


def _indented(text: str) -> list[str]:
    return [f" {line.rstrip()}" if line.strip() else " ." for line in text.strip().splitlines()]


def describe(folder: Path, version: str, when: int, python: str, wheels: list[Path]) -> None:
    """Writes the folder `debian` of the build."""
    folder.mkdir()
    maintainer = "{} <{}>".format(*(os.environ.get(name, default) for name, default in zip(
        MAINTAINER, ("upcall developers", "upcall@packages.invalid"), strict=True)))  # fmt: skip
    after = python.split(".")[0] + "." + str(int(python.split(".")[1]) + 1)
    values = {"maintainer": maintainer, "python": f"python3 (>= {python}), python3 (<< {after})"}
    values |= {f"links:{package}": ", ".join(links) for package, links in DEBIANS.items()}
    control = (HERE / "control").read_text()
    for name, value in values.items():
        control = control.replace(f"${{{name}}}", value)
    (folder / "control").write_text(control)
    moment = datetime.datetime.fromtimestamp(when, datetime.UTC)
    entry = f"upcall ({version}) unstable; urgency=medium\n\n  * Built from its repository by `make deb`.\n\n"
    (folder / "changelog").write_text(f"{entry} -- {maintainer}  {moment:%a, %d %b %Y %H:%M:%S} +0000\n")
    (folder / "copyright").write_text(copyright_of(wheels))
    (folder / "source").mkdir()
    (folder / "source/format").write_text("3.0 (native)\n")
    for path in sorted(HERE.iterdir()):
        if path.name == "rules" or path.name.startswith("upcall"):
            shutil.copyfile(path, folder / path.name)
        elif path.name.startswith("plugin."):
            for package in packages():
                if package != PACKAGE:
                    text = string.Template(path.read_text()).safe_substitute(package=package)
                    (folder / f"{package}{path.suffix}").write_text(text)
    (folder / "rules").chmod(0o755)


def build(target: Path, version: str | None = None) -> list[Path]:
    """Builds the packages into `target`. Returns their paths. SystemExit if something is missing or fails."""
    require_tools()
    python, when, target = debian_python(), epoch(), target.absolute()
    version = version or version_of(when)
    os.umask(0o022)
    os.environ["SOURCE_DATE_EPOCH"] = str(when)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="upcall-deb-") as folder:
        work = Path(folder, f"upcall-{version}")
        for name in ("ours", "carried", "tss", work.name):
            Path(folder, name).mkdir()
        dist(Path(folder, "ours"))
        wheels = sorted(Path(folder, "ours").glob("*.whl"))
        wheels += carried(Path(folder, "carried")) + tss(Path(folder, "tss"))
        tree = Tree(work / "tree", python)
        fill(tree, wheels, python)
        describe(work / "debian", version, when, python, wheels)
        for path in (work, *work.rglob("*")):
            os.utime(path, (when, when), follow_symlinks=False)
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "SOURCE_DATE_EPOCH") if name in os.environ}
        environment |= {"LC_ALL": "C.UTF-8", "TZ": "UTC"}
        done = subprocess.run(
            ["dpkg-buildpackage", "--build=binary", "--no-sign", "--no-check-builddeps"], cwd=work, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stdout[-8000:])
        made = sorted(Path(folder).glob("*.deb"))
        for old in target.glob("upcall*_*.deb"):  # `apt install dist/deb/upcall_*.deb` would name both
            old.unlink()
        return [Path(shutil.copy(path, target / path.name)) for path in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages are put")
    parser.add_argument("--version", help="of the packages  [default: the release's, with the commit's time]")
    options = parser.parse_args()
    for path in build(options.folder, options.version):
        print(f"{digest(path.read_bytes())}  {path.name}")


if __name__ == "__main__":
    main()
