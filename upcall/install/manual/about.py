"""Holds the parts of manual pages that no help text has: files, environment, exit codes, references."""

from __future__ import annotations

import os
from typing import Final

# Exit codes of upcall.cli and their meaning for people.
EXITS: Final = {
    os.EX_OK: "All went well.",
    1: "What was asked for is not so: `--check` found something to do, or a problem was found.",
    os.EX_USAGE: "It was called wrongly: an option, a name, or something that does not go together.",
    os.EX_DATAERR: "What was read is damaged, or a key module could not do it.",
    os.EX_NOINPUT: "A file is not there.",
    os.EX_UNAVAILABLE: "There is no broker, no daemon, no journal or no passphrase to be had.",
    os.EX_SOFTWARE: "Something that should not happen; please tell.",
    os.EX_OSERR: "The system said no; the text says to what.",
    os.EX_IOERR: "Standard input or output is closed, or the disk is full.",
    os.EX_CANTCREAT: "A file is there already, and is not ours to replace.",
    os.EX_TEMPFAIL: "The request was refused, or came to no end in time; the text says why.",
    os.EX_NOPERM: "Only root, or the owner, may do that.",
    os.EX_CONFIG: "A configuration file is wrong; the text says file, line and key.",
    130: "Ctrl-C (SIGINT).",
    141: "The reader of standard output has ended (a closed pipe); nothing is printed.",
    143: "SIGTERM; 129 for SIGHUP. Temporary files and what was begun are cleaned up first.",
}

ENVIRONMENT: Final = {
    "XDG_RUNTIME_DIR": "Where the sockets of a user's daemon are, in `upcall`; `/run/user/UID` without it, if that is "
    "the user's own, or else `/tmp/upcall-UID`.",
    "XDG_CONFIG_HOME": "Where a user's own configuration is, in `upcall`; `~/.config` without it.",
    "XDG_DATA_HOME": "Where the entries of a user's keys are, in `upcall/keys`; `~/.local/share` without it.",
    "DISPLAY, WAYLAND_DISPLAY, GPG_TTY": "Where the daemon's `pinentry` asks for PINs.",
    "KRB5CCNAME": "Where the daemon looks for tickets first, if it is set in the daemon's own environment.",
    "PYTHON_KEYRING_BACKEND, KEYRING_PROPERTY_WHERE, KEYRING_PROPERTY_TIMEOUT": "Where passphrases of "
    "`--passphrase-keyring` are kept, and for how long; they go before the configuration.",
    "NO_COLOR": "No colours, unless `--color` says so.",
}

# By the first word of the command; "" for the program itself.
FILES: Final[dict[str, dict[str, str]]] = {
    "": {
        "/etc/upcall/config.toml": "The configuration, see `upcall-config`(5); users' own are in "
        "`~/.config/upcall/config.toml`.",
        "~/.local/share/upcall/keys/NAME.toml": "What is known of a key, see `upcall-key`(5).",
        "/etc/request-key.d/upcall.conf": "Which of the kernel's requests come to upcall, see "
        "`upcall-request-key.conf`(5).",
        "/run/upcall": "The broker's sockets.",
        "/run/user/UID/upcall": "The daemon's socket.",
        "/var/lib/upcall": "What the quota source keeps, and `install.json`.",
    },
    "broker": {
        "/run/upcall/broker.sock": "Where any process may ask its own user's daemon.",
        "/run/upcall/request-key.sock": "Where `upcall-request-key`(8) brings the kernel's requests; root's alone.",
        "/run/upcall/registration.sock": "Where daemons register.",
        "/run/upcall/source.sock": "Where the quota source is connected; root's alone.",
        "/etc/upcall/config.toml": "See `upcall-config`(5). SIGHUP has it read again.",
    },
    "quota": {
        "/var/lib/upcall/quota.json": "What `upcall quota serve` keeps: which quotas are how bad, and who was told.",
        "/etc/upcall/config.toml": "See `upcall-config`(5); read when `upcall quota serve` starts.",
    },
    "daemon": {
        "/run/user/UID/upcall/daemon.sock": "Where the user's own commands reach it.",
        "~/.config/upcall/config.toml": "See `upcall-config`(5). SIGHUP has it read again.",
    },
    "key": {
        "~/.local/share/upcall/keys": "An entry for each key, `NAME.toml`, see `upcall-key`(5), and key files of key "
        "modules that have some. A copy of this folder is a copy of the keys.",
    },
    "mounts": {
        "~/.local/share/upcall/mounts": "What is remembered of each mount, `NAME.toml`.",
        "/run/upcall/mount.sock": "Where users ask for mounts.",
        "/etc/upcall/config.toml": "`[mount] users` says who may.",
    },
    "request-key": {
        "/etc/request-key.d/upcall.conf": "See `upcall-request-key.conf`(5).",
        "/usr/local/libexec/upcall/upcall-request-key": "The copy that `--copy` makes.",
    },
    "config": {
        "/usr/lib/upcall/config.toml": "The vendor's.",
        "/etc/upcall/config.toml": "The system's.",
        "~/.config/upcall/config.toml": "A user's own. Beside each may be a folder of drop-ins, `config.toml.d`.",
    },
    "setup": {
        "/var/lib/upcall/install.json": "What was written, with a SHA-256 for each file: what `--undo` takes away.",
        "/etc/systemd/system/upcall-broker.service": "The broker; beside it `upcall-quota.service`, the quota source, "
        "`upcall-mount.service`, which mounts for users, "
        "`upcall-system-daemon.service`, the machine's daemon, `upcall-root-daemon.service`, root's, and "
        "`upcall-keytab.path`.",
        "/etc/systemd/user/upcall-daemon.service": "Each user's daemon.",
        "/etc/tmpfiles.d/upcall.conf": "The broker's folder.",
        "/etc/sysusers.d/upcall.conf": "The user of the machine's daemon.",
        "/etc/init.d/upcall": "Broker, quota source and the machine's daemon, where there is no systemd.",
        "/usr/share/pam-configs/upcall": "Each user's daemon, where there is no systemd.",
        "/usr/local/share/man": "These pages; completions for bash, zsh and fish are near them.",
    },
    "session": {
        "/run/upcall/sessions/UID": "A line for each session of that user.",
    },
}

EXAMPLES: Final = """\
# upcall setup
$ upcall doctor
$ upcall key generate
$ upcall status"""

SEE: Final[dict[str, tuple[str, ...]]] = {
    "": (
        "`upcall-config`(5)",
        "`upcall-key`(5)",
        "`upcall-request-key.conf`(5)",
        "`upcall-request-key`(8)",
        "`keyrings`(7)",
        "`request-key`(8)",
    ),
    "broker": ("`upcall-daemon`(1)", "`upcall-config`(5)", "`upcall-request-key`(8)"),
    "daemon": ("`upcall-broker`(8)", "`upcall-config`(5)", "`upcall-prompt`(1)"),
    "doctor": ("`upcall-status`(1)", "`upcall-explain`(1)"),
    "log": ("`upcall-metrics`(1)", "`upcall-config`(5)", "`journalctl`(1)"),
    "key": ("`upcall-key`(5)", "`user-keyring`(7)"),
    "config": ("`upcall-config`(5)",),
    "request-key": ("`upcall-request-key`(8)", "`upcall-request-key.conf`(5)", "`request-key`(8)"),
    "explain": ("`upcall-request-key`(1)", "`upcall-doctor`(1)"),
    "setup": ("`upcall-broker`(8)", "`upcall-daemon`(1)", "`upcall-doctor`(1)"),
    "session": ("`upcall-setup`(8)", "`pam_exec`(8)"),
    "quota": ("`upcall-config`(5)", "`quota`(1)"),
    "mount": ("`upcall-umount`(1)", "`upcall-mounts`(1)", "`upcall-key`(1)"),
    "umount": ("`upcall-mount`(1)", "`upcall-mounts`(1)"),
    "mounts": ("`upcall-mount`(1)", "`upcall-umount`(1)", "`upcall-config`(5)"),
}
