"""Reads /etc/idmapd.conf as libnfsidmap does: idmapd.conf(5). Later lines and idmapd.conf.d/*.conf take precedence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from upcall.core.errors import Refused

FILE: Final = Path("/etc/idmapd.conf")
NO_DOMAIN: Final = "localdomain"  # if neither the file nor the host's name gives a domain
METHOD: Final = "nsswitch"

_SECTION = re.compile(r"\[\s*([^\]\s\"]+)[^\]]*\]")
_ENTRY = re.compile(r"([^=\s]+)\s*=\s*(.*)")
_COMMENT = re.compile(r"(?:^|\s)[#;].*")
_TRUE = ("true", "on", "yes")


class Settings(NamedTuple):
    """The settings. `unstripped_users`, `unstripped_groups`: look names up with their domain first."""

    domain: str
    unstripped_users: bool = False
    unstripped_groups: bool = False
    reformat_group: bool = False
    nobody_user: str = ""
    nobody_group: str = ""


def read(file: Path, own_domain: Callable[[], str]) -> Settings:
    """Reads the settings. `own_domain`: returns the domain of the host's name. Refused if a configured method is not
    supported."""
    told: dict[tuple[str, str], str] = {}
    for path in (file, *sorted(file.with_name(f"{file.name}.d").glob("*.conf"))):
        try:
            told |= _entries(path.read_text("utf-8", "replace"))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Refused("no-name-service", why=f"{path}: {error.strerror}") from None
    methods = [word.strip().lower() for word in told.get(("translation", "method"), METHOD).split(",") if word.strip()]
    if methods != [METHOD]:
        raise Refused("no-name-service", why=f"{file}: Method = {','.join(methods)}; only {METHOD} is known here")
    unstripped = told.get(("general", "no-strip"), "none").lower()
    groups = unstripped in ("both", "group")
    return Settings(
        told.get(("general", "domain")) or own_domain() or NO_DOMAIN,
        unstripped in ("both", "user"),
        groups,
        groups and told.get(("general", "reformat-group"), "").lower() in _TRUE,
        told.get(("mapping", "nobody-user"), ""),
        told.get(("mapping", "nobody-group"), ""),
    )


def _entries(text: str) -> dict[tuple[str, str], str]:
    """Returns the values by (section, name), both in lower case. Ignores other lines."""
    found, section = {}, ""
    for line in text.splitlines():
        line = _COMMENT.sub("", line).strip()
        if heading := _SECTION.fullmatch(line):
            section = heading[1].lower()
        elif entry := _ENTRY.fullmatch(line):
            found[section, entry[1].lower()] = entry[2].strip().strip('"').strip()
    return found
