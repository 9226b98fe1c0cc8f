"""Lists every check, in the order in which findings should be fixed, and runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from upcall.config import ConfigError
from upcall.core.errors import UpcallError, error_words
from upcall.observe.doctor import broker, daemon, hardening, kernel, keyrings, keys, locking, mounts, plugins, quota
from upcall.observe.doctor import configuration as configured
from upcall.observe.doctor.findings import Finding, note, problem
from upcall.observe.doctor.system import Scene

PATIENCE: Final = 10.0  # seconds, the time-out of a check


class Check(NamedTuple):
    """A check. `about`: its description for docs/observing.md. `patience`: seconds, its time-out."""

    name: str
    about: str
    look: Callable[[Scene], Iterator[Finding]]
    patience: float = PATIENCE


CHECKS: Final = (
    Check("trust", "no other user can change what is run: interpreter, sys.path, .pth, plugins", plugins.trusted, 60),
    Check("netlink", "sockets of NETLINK_USERSOCK are available", kernel.netlink),
    Check("kernel-keys", "the kernel's keyrings are available", kernel.keys),
    Check("ecryptfs", "eCryptfs is loaded, asks daemons, and its device is root's alone", kernel.ecryptfs),
    Check("kernel-upcalls", "the kernel's CIFS and DNS can ask by request_key", kernel.upcalls),
    Check("quota-family", "the kernel reports quota warnings in this network namespace", kernel.quota),
    Check("configuration", "the configuration files are valid, and other users cannot write them", configured.ours),
    Check("folder", "the broker's folder and sockets: owners and modes", broker.folder),
    Check("broker", "the broker runs, is not stopped, answers within a second, is of this version", broker.running),
    Check("device", "the broker serves /dev/ecryptfs for each uid that is registered", broker.device),
    Check("forwarder-socket", "the socket for the kernel's requests for keys is there", broker.forwarders),
    Check("daemon", "your daemon runs, is not stopped, answers within a second, is of this version", daemon.running),
    Check("registration", "your daemon is the one that the broker asks", daemon.registered),
    Check("machine-daemon", "the machine's daemon runs, as a user of its own, with the keytab", daemon.machines),
    Check("hardening", "broker and daemon have dropped their privileges", hardening.held),
    Check("keyrings", "the user keyring can be reached, the session keyring is usable", keyrings.reachable),
    Check("key-quota", "there is room for more keys in the kernel", keyrings.room),
    Check("key-files", "the files of your keys exist, are valid and private", keys.files),
    Check("auth-tokens", "your keys have auth tokens, and those a key module that may be loaded", keys.tokens),
    Check("login-keys", "the keys that are marked auto were added when the daemon started", locking.added),
    Check("locking", "events lock the keys as configured, and they are not locked now", locking.listened_to),
    Check("plugins", "each allowed plugin can be imported, and has this API version", plugins.importable, 120),
    Check("kerberos", "the Kerberos library is there, if cifs.spnego is answered", plugins.library),
    Check("request-key", "upcall's lines win, and only root can change their program", configured.request_key),
    Check("quota", "quota warnings are received, and the source is connected to the broker", quota.listening),
    Check("mount", "who may mount eCryptfs without root, and that the service runs for them", mounts.mounting),
)


def examine(scene: Scene) -> Iterator[tuple[Check, Finding]]:
    """Runs every check and yields its findings. A check that hangs or raises becomes a finding."""
    for check in CHECKS:
        for finding in bounded(check, scene):
            yield check, finding


def bounded(check: Check, scene: Scene) -> list[Finding]:
    """Runs one check in a thread and returns its findings; if it hangs, those made so far and one about that."""
    found: list[Finding] = []

    def look() -> None:
        try:
            for finding in check.look(scene):
                found.append(finding)
        except ConfigError as error:
            if check.look is not configured.ours:  # which tells of it, once
                found.append(note("not looked at, as the configuration is invalid", f"see {error.file}"))
        except (UpcallError, OSError) as error:
            found.append(problem(f"it cannot be looked at: {error_words(error)}"))
        except Exception as error:  # noqa: BLE001 - the other checks must run
            found.append(problem(f"the check broke: {type(error).__name__}: {error}", "that is a fault of upcall's"))

    thread = threading.Thread(target=look, name=check.name, daemon=True)
    thread.start()
    thread.join(check.patience)
    if thread.is_alive():
        return [
            *found,
            problem(
                f"no result within {check.patience:g} s",
                "something that it reads hangs, or this machine is overloaded: run it again",
            ),
        ]
    return [*dict.fromkeys(found)]
