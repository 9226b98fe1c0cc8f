"""Checks upcall's configuration, and request-key's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from shlex import quote

from upcall import config
from upcall.config import ConfigError
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.protocols.request_key.install.key_makers import Standing, standing_of_type
from upcall.protocols.request_key.install.our_file import FILE
from upcall.protocols.request_key.install.packages import command_to_install, is_packaged, lacks_package
from upcall.protocols.request_key.install.system import REQUEST_KEY
from upcall.protocols.request_key.key_types import KEY_TYPES


def ours(scene: Scene) -> Iterator[Finding]:
    """Checks /etc/upcall and the user's own configuration; reports the first error."""
    try:
        config.load()
    except ConfigError as error:
        yield problem(str(error), *_remedy(error))
    else:
        yield ok("the configuration is valid")


def _remedy(error: ConfigError) -> tuple[str, str]:
    try:
        found = error.file.stat()
    except OSError:
        return "see that it can be read", ""
    where = quote(str(error.file))
    if found.st_uid not in (0, os.geteuid()):
        return "check what its owner has written", f"chown {os.geteuid()} {where}"
    if stat.S_ISREG(found.st_mode) and found.st_mode & 0o022:
        return "check that no other user has changed it", f"chmod go-w {where}"
    return f"edit {error.file}, and see `upcall config check`; until then commands and daemons do not start", ""


def request_key(scene: Scene) -> Iterator[Finding]:
    """Checks which line wins for the types of keys that upcall answers, and that its program is safe."""
    system, root = scene.system, scene.root_option()
    packaged = is_packaged(system)
    try:
        installed = system.ours()
    except OSError as error:
        file = quote(str(system.at(FILE)))
        then = "the lines of upcall's packages are in other files" if packaged else (
            "then `upcall request-key install` writes it again")  # fmt: skip
        yield problem(f"{error.filename}: {error.strerror}", then, f"mv {file} {file}.old")
        return
    types = dict.fromkeys((*(installed.types if installed else ()), *system.packaged()))
    if not types:
        made = "; ".join(_made(name, standing_of_type(system, name)) for name in KEY_TYPES)
        yield note(made, "to have upcall answer them, or some of them", command_to_install(system, KEY_TYPES))
        return
    if why := system.request_key():
        yield problem(f"{REQUEST_KEY} {why}", "the kernel starts it", "apt-get install keyutils")
    again = f"`upcall request-key {'status' if packaged else 'install'}{root}`"
    check = again if packaged else f"`upcall request-key install{root} --check`"
    for name in filter(KEY_TYPES.__contains__, types):
        found = standing_of_type(system, name)
        if found.line is not None and not found.ours:
            why = f"{_made(name, found)}, though upcall is installed for them"
            yield problem(why, f"narrow the description in that line, or remove it; then {check}")
            continue
        for why in found.problems:
            yield problem(f"keys of type {name}: {why}", f"fix that, then {again}")
        if lacks_package(system, name):
            what = f"keys of type {name} come to upcall, whose handler for them is not installed"
            yield problem(what, f"install {KEY_TYPES[name].package}", command_to_install(system, [name]))
        elif not found.problems:
            yield ok(f"keys of type {name} come to upcall, by {found.line}")


def _made(name: str, found: Standing) -> str:
    who = f"are made by {found.line.program} ({found.line})" if found.line else "are made by no program"
    return f"keys of type {name} {who}"
