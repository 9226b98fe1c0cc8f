"""Lists every check, in the order in which findings should be fixed, and runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from upcall.core.errors import UpcallError
from upcall.observe.doctor import broker, daemon, hardening, kernel, keyrings, keys, locking, plugins, quota
from upcall.observe.doctor import configuration as configured
from upcall.observe.doctor.findings import Finding, problem
from upcall.observe.doctor.system import Scene

PATIENCE: Final = 10.0  # seconds, the time-out of a check


class Check(NamedTuple):
    """A check. `about`: its description for docs/observing.md. `patience`: seconds, its time-out."""

    name: str
    about: str
    look: Callable[[Scene], Iterator[Finding]]
    patience: float = PATIENCE


CHECKS: Final = (
    Check("trust", "nobody else can change what is run: interpreter, sys.path, .pth, plugins", plugins.trusted, 60),
    Check("netlink", "sockets of NETLINK_USERSOCK can be had", kernel.netlink),
    Check("kernel-keys", "the kernel keeps keys, and lets us have some", kernel.keys),
    Check("ecryptfs", "eCryptfs is loaded, asks daemons, and its device is root's alone", kernel.ecryptfs),
    Check("kernel-upcalls", "the kernel's CIFS and DNS can ask by request_key", kernel.upcalls),
    Check("quota-family", "the kernel tells of quotas in this network namespace", kernel.quota),
    Check("configuration", "the configuration files can be followed, and are nobody else's", configured.ours),
    Check("folder", "the broker's folder and sockets: owners and modes", broker.folder),
    Check("broker", "the broker runs, is not stopped, answers within a second, is of this version", broker.running),
    Check("device", "the broker serves /dev/ecryptfs for each uid that is registered", broker.device),
    Check("forwarder-socket", "the socket for the kernel's requests for keys is there", broker.forwarders),
    Check("daemon", "your daemon runs, is not stopped, answers within a second, is of this version", daemon.running),
    Check("registration", "your daemon is the one that the broker asks", daemon.registered),
    Check("machine-daemon", "the machine's daemon runs, as a user of its own, with the keytab", daemon.machines),
    Check("hardening", "broker and daemon have dropped their privileges", hardening.held),
    Check("keyrings", "the user keyring can be reached, the session keyring is of use", keyrings.reachable),
    Check("key-quota", "there is room for more keys in the kernel", keyrings.room),
    Check("key-files", "what belongs to your keys is there, sound and private", keys.files),
    Check("auth-tokens", "your keys have auth tokens, and those a key module that may be loaded", keys.tokens),
    Check("login-keys", "the keys that are marked auto were added when the daemon started", locking.added),
    Check("locking", "what is to lock the keys is heard, and they are not locked", locking.listened_to),
    Check("plugins", "each plugin that is allowed can be imported, and knows this contract", plugins.importable, 120),
    Check("kerberos", "the Kerberos library is there, if cifs.spnego is answered", plugins.library),
    Check("request-key", "our lines win, and only root can change what they start", configured.request_key),
    Check("quota", "quota warnings are heard, and reach the broker", quota.listening),
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
        except (UpcallError, OSError) as error:
            found.append(problem(f"it cannot be looked at: {error}"))
        except Exception as error:  # noqa: BLE001 - the other checks must run
            found.append(problem(f"the check broke: {type(error).__name__}: {error}", "that is a fault of upcall's"))

    thread = threading.Thread(target=look, name=check.name, daemon=True)
    thread.start()
    thread.join(check.patience)
    if thread.is_alive():
        return [*found, problem(f"nothing is known after {check.patience:g} s", "something that is asked here hangs")]
    return found
