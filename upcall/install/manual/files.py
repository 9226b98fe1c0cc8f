"""Generates the pages about files, and about the forwarder that request-key starts."""

from __future__ import annotations

import re
from typing import Final

from upcall.config.keys import TABLES
from upcall.config.shown import as_toml
from upcall.config.table import ANY, SYSTEM, Key, Table
from upcall.install.manual.roff import Block, Items, Page, Paragraph, Verbatim, bold, italic

_LINKS: Final = re.compile(r" \(\[[^]]+\]\([^)]+\)\)| See \[[^]]+\]\([^)]+\)\.")


def pages() -> tuple[Page, ...]:
    """Returns these pages."""
    return (_config(), _key(), _request_key_conf(), _request_key())


# --- upcall-config(5) --------------------------------------------------------------------------------------------


def _config() -> Page:
    body: list[tuple[str, tuple[Block, ...]]] = [
        (
            "synopsis",
            (Verbatim("/usr/lib/upcall/config.toml\n/etc/upcall/config.toml\n~/.config/upcall/config.toml"),),
        ),
        (
            "DESCRIPTION",
            (
                Paragraph(
                    "TOML files: the vendor's, the system's, and each user's own ($XDG_CONFIG_HOME in the place of "
                    "`~/.config`). Beside each may be a folder `config.toml.d`, whose files `*.toml` are read after "
                    "it, by name. What is read later is laid over what was read earlier, key by key; a list replaces "
                    "a list. Without any file everything has its default."
                ),
                Paragraph(
                    "A drop-in of the system's masks the vendor's of the same name; an empty one, or a link to "
                    "`/dev/null`, thus removes it. Users mask nothing of the system's."
                ),
                Paragraph(
                    "An unknown key is an error, and so is one in a user's file that only the system may set, and a "
                    "file that others than root and its reader could have written. `upcall config check` tells all "
                    "of them. SIGHUP, or `upcall config reload` for one's own daemon, has the files read again."
                ),
            ),
        ),
    ]
    body += [(f"[{table.name.replace(ANY, 'NAME')}]", _table(table)) for table in TABLES]
    body += [
        ("EXAMPLES", (Verbatim('[plugins]\nallow = ["openssl", "x25519"]\n\n[quota]\nthresholds = [75, 90]'),)),
        ("SEE ALSO", (Paragraph("`upcall-config`(1), `upcall-broker`(8), `upcall-daemon`(1)"),)),
    ]
    return Page("upcall-config", 5, "configuration of upcall's broker, daemons and commands", tuple(body))


def _table(table: Table) -> tuple[Block, ...]:
    return Paragraph(_unlinked(table.about)), Items(tuple((_term(key), _about(key)) for key in table.keys))


def _term(key: Key) -> tuple[str, ...]:
    return (italic("any") if key.name == ANY else bold(key.name),)


def _about(key: Key) -> str:
    default = key.unset if key.default is None else f"`{as_toml(key.default)}`"
    who = "Only the system's files set it." if key.scope == SYSTEM else ""
    return f"{_unlinked(key.about)} Wanted: {key.kind.wanted}. Default: {default}. {who}"


def _unlinked(text: str) -> str:
    """Returns the text without references to other documents."""
    return _LINKS.sub("", text)


# --- upcall-key(5) -----------------------------------------------------------------------------------------------

# Keys of an entry; docs/keys.md describes the same.
ENTRY: Final = {
    "module": "the key module's alias",
    "signature": "16 hexadecimal digits",
    "source": "where the passphrase is: `ask`, `keyring`, `file:/path`, `none`, or `compat`",
    "description": "for people",
    "created": "date and time; for people",
    "path": "of the key file, if there is one",
    "blob": "what the auth token says to the key module, in base64",
    "parameters": "what was chosen, but for secrets",
    "auto": "`true`: the daemon adds it when it starts",
    "own_file": "`true`: `generate` made the key file in upcall's folder, and `remove` deletes it",
}


def _key() -> Page:
    return Page(
        "upcall-key",
        5,
        "what upcall knows of a key",
        (
            ("SYNOPSIS", (Verbatim("~/.local/share/upcall/keys/NAME.toml"),)),
            (
                "DESCRIPTION",
                (
                    Paragraph(
                        "One TOML file for each key of a user, mode 0600, in `$XDG_DATA_HOME/upcall/keys`. `upcall "
                        "key` writes and removes them. There is no secret in them, and an unknown key is an error."
                    ),
                    Items(tuple(((bold(name),), text) for name, text in ENTRY.items())),
                    Paragraph(
                        "A key file of ours, if the key module has some, is beside the entry. Keep a copy of both: "
                        "where there is no `path`, the `blob` may be the only thing by which the key is found, or "
                        "made."
                    ),
                ),
            ),
            ("SEE ALSO", (Paragraph("`upcall-key`(1), `upcall-key-generate`(1), `user-keyring`(7)"),)),
        ),
    )


# --- upcall-request-key.conf(5) ----------------------------------------------------------------------------------


def _request_key_conf() -> Page:
    return Page(
        "upcall-request-key.conf",
        5,
        "which of the kernel's requests for keys come to upcall",
        (
            ("SYNOPSIS", (Verbatim("/etc/request-key.d/upcall.conf"),)),
            (
                "DESCRIPTION",
                (
                    Paragraph(
                        "Lines for `request-key`(8), written by `upcall request-key install` or `upcall setup`. The "
                        "head of the file has a SHA-256 of what follows: an edited file is never overwritten and "
                        "never removed. Lines of your own belong into other files of that folder."
                    ),
                    Paragraph(
                        "Each line has `create`, a type (such as `cifs.spnego`), a pattern of descriptions, "
                        "one of callouts, and `upcall-request-key`(8) with `%k`, the key's number. The least wild "
                        "pattern wins; `upcall request-key status` tells which line does."
                    ),
                ),
            ),
            ("EXAMPLES", (Verbatim("create cifs.spnego ver=0x2;host=* * /usr/lib/upcall/upcall-request-key %k"),)),
            ("SEE ALSO", (Paragraph("`upcall-request-key`(1), `request-key.conf`(5)"),)),
        ),
    )


# --- upcall-request-key(8) ---------------------------------------------------------------------------------------

# The same as the program's `--help` and the codes in forward.c; tests/test_manual.py compares them.
FORWARDER_USAGE: Final = "upcall-request-key [-s SOCKET] [-t SECONDS] KEY"
FORWARDER: Final = {
    "KEY": "the serial number of the key under construction, in decimal",
    "-s SOCKET": "the broker's socket, an absolute path; `/run/upcall/request-key.sock`",
    "-t SECONDS": "time limit for the whole run, 1 to 60; 10",
    "--help, --version": "what it takes, or what it is",
}
FORWARDER_EXITS: Final = {
    0: "the key was instantiated, or rejected",
    64: "bad usage; no key was touched",
    70: "the key could not even be rejected",
    77: "no authority over this key; nothing was done",
}


def _request_key() -> Page:
    program, _, rest = FORWARDER_USAGE.partition(" ")
    options = tuple((tuple(_argument(name)), text) for name, text in FORWARDER.items())
    exits = tuple(((bold(str(code)),), text) for code, text in FORWARDER_EXITS.items())
    return Page(
        "upcall-request-key",
        8,
        "carries one key request of the kernel to the broker, and the answer into the key",
        (
            ("SYNOPSIS", (Paragraph(f"`{program}` {rest}"),)),
            (
                "DESCRIPTION",
                (
                    Paragraph(
                        "`request-key`(8) starts it as root, for a line of `upcall-request-key.conf`(5). It takes "
                        "the authority over the key, tells the broker what the kernel says of it, checks the "
                        "answer, and instantiates the key, or rejects it for a second. By hand it does nothing: "
                        "only the kernel gives authority over a key."
                    ),
                    Paragraph(
                        "Whatever happens, it answers: without a broker with ENOTCONN, with one that is not root's "
                        "with EPERM, after its time with ETIMEDOUT. What an administrator has to mend, and no broker "
                        "can log, goes to the system's log (authpriv)."
                    ),
                ),
            ),
            ("OPTIONS", (Items(options),)),
            ("EXIT STATUS", (Items(exits), Paragraph("The kernel looks at the key, and not at the exit code."))),
            ("FILES", (Items((((bold("/run/upcall/request-key.sock"),), "the broker's socket; root's alone"),)),)),
            (
                "SEE ALSO",
                (Paragraph("`upcall-request-key`(1), `upcall-request-key.conf`(5), `upcall-broker`(8)"),),
            ),
        ),
    )


def _argument(text: str) -> list[str]:
    parts = re.split(r"(, | )", text)
    return [bold(part) if part.startswith("-") else italic(part) if part.isupper() else part for part in parts]
