"""Runs a Kerberos realm on the loopback, for tests and measurements: MIT's KDC as a process, in a folder of its own.

    with Realm(folder) as realm:
        realm.kinit("alice", "FILE:/somewhere/cache")

Programs that use it need `realm.environment` in their environment. Nothing outside the folder is read or written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from upcall.core.errors import UpcallError
from upcall.core.messages import Requester
from upcall.protocols.request_key.messages import Ask, pack_ask
from upcall.wire.envelope import Envelope

NAME = "LAB.TEST"
ELSEWHERE = "ELSEWHERE.TEST"  # a realm without a KDC
SERVER = "fs.lab.test"
UNKNOWN = "unknown.lab.test"  # the KDC has no principal for it
FOREIGN = "fs.elsewhere.test"  # belongs to the realm without a KDC
PEOPLE = ("alice", "bob")
PATIENCE = 60.0  # seconds, the time-out of MIT's programs

_PROGRAMS = ("krb5kdc", "kdb5_util", "kadmin.local", "kinit", "klist")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))

_KRB5_CONF = """\
[libdefaults]
default_realm = {name}
dns_lookup_realm = false
dns_lookup_kdc = false
default_ccache_name = FILE:{folder}/cache/default
default_keytab_name = FILE:{folder}/cache/machine.keytab
default_client_keytab_name = FILE:{folder}/cache/client.keytab
[realms]
{name} = {{
  kdc = 127.0.0.1:{port}
}}
[domain_realm]
.lab.test = {name}
.elsewhere.test = {elsewhere}
"""

_KDC_CONF = """\
[kdcdefaults]
kdc_listen = 127.0.0.1:{port}
kdc_tcp_listen = 127.0.0.1:{port}
[realms]
{name} = {{
  database_name = {folder}/principal
  key_stash_file = {folder}/stash
  acl_file = {folder}/acl
  max_life = 1d
  supported_enctypes = {enctype}:normal
}}
[logging]
kdc = FILE:{folder}/kdc.log
"""


class KerberosFailed(UpcallError):
    """A program of MIT Kerberos failed. The text is its output."""


def missing() -> str:
    """Returns why a KDC cannot run here; "" if it can."""
    lacking = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(lacking)}: not installed (Debian packages krb5-kdc, krb5-admin-server, krb5-user)" * bool(
        lacking
    )


class Realm:
    """A KDC with the principals alice, bob, cifs/SERVER and host/SERVER. `keytab` has the keys of the last two."""

    def __init__(self, folder: Path, enctype: str = "aes256-cts-hmac-sha1-96") -> None:
        self.folder = folder
        self.keytab = folder / "server.keytab"
        (folder / "cache").mkdir(mode=0o700)
        self.port = _free_port()
        self.environment = {
            "KRB5_CONFIG": str(folder / "krb5.conf"),
            "KRB5_KDC_PROFILE": str(folder / "kdc.conf"),
            "PATH": _PATH,
            "LC_ALL": "C.UTF-8",
        }
        told = {"name": NAME, "elsewhere": ELSEWHERE, "folder": folder, "port": self.port, "enctype": enctype}
        (folder / "krb5.conf").write_text(_KRB5_CONF.format(**told))
        (folder / "kdc.conf").write_text(_KDC_CONF.format(**told))
        self._passwords = {who: secrets.token_hex(16) for who in PEOPLE}
        self._kdc: subprocess.Popen[bytes] | None = None
        master = secrets.token_hex(16)
        self.run(["kdb5_util", "create", "-s", "-r", NAME], f"{master}\n{master}\n")
        self.administer(
            *(f"add_principal -pw {password} {who}" for who, password in self._passwords.items()),
            *(f"add_principal -randkey {kind}/{SERVER}" for kind in ("cifs", "host")),
            f"ktadd -norandkey -k {self.keytab} cifs/{SERVER} host/{SERVER}",
        )

    def administer(self, *commands: str) -> None:
        """Runs commands of kadmin.local. Passes them by its standard input, because they contain passwords."""
        stdin = "".join(f"{command}\n" for command in commands)
        said = self.run(["kadmin.local", "-r", NAME, "-p", f"admin@{NAME}"], stdin)
        complaints = [line for line in said.splitlines() if line.startswith("kadmin.local: ") and " while " in line]
        if complaints:
            raise KerberosFailed("; ".join(complaints))

    def run(self, argv: Sequence[str], stdin: str = "", **environment: str) -> str:
        """Runs a program of MIT Kerberos; returns its output. KerberosFailed."""
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            env=self.environment | environment,
        )
        if done.returncode != 0:
            raise KerberosFailed(f"{argv[0]}: {done.stdout.strip() or done.returncode}")
        return done.stdout

    def kinit(self, who: str, cache: str, lifetime: int = 3600) -> None:
        """Obtains a ticket-granting ticket for `lifetime` seconds. `cache`: a name as in KRB5CCNAME."""
        self.run(["kinit", "-l", f"{lifetime}s", who], f"{self._passwords[who]}\n", KRB5CCNAME=cache)

    def expired(self, who: str, cache: str) -> None:
        """Obtains a ticket and waits until it has expired."""
        self.kinit(who, cache, 1)
        deadline = time.monotonic() + PATIENCE
        while self._valid(cache):
            if time.monotonic() > deadline:
                raise KerberosFailed(f"the ticket of {who} does not expire")
            time.sleep(0.05)

    def _valid(self, cache: str) -> bool:
        try:
            self.run(["klist", "-s"], KRB5CCNAME=cache)
        except KerberosFailed:
            return False
        return True

    def at_home(self, home: Path) -> dict[str, str]:
        """Returns an environment for a user with files in `home`: the cache `default`, and two keytabs."""
        return self.environment | {
            "KRB5CCNAME": f"FILE:{home}/default",
            "KRB5_CLIENT_KTNAME": f"FILE:{home}/client.keytab",
            "KRB5_KTNAME": f"FILE:{home}/machine.keytab",
            "KRB5RCACHENAME": "none:",
        }

    def client_keytab(self, path: Path, *principals: str) -> None:
        """Writes a keytab with the principals' keys, mode 0600."""
        self.administer(*(f"ktadd -norandkey -k {path} {principal}" for principal in principals))

    def start(self, **environment: str) -> None:
        """Starts the KDC and waits until it accepts connections. `environment`: additional variables, such as those
        that fake the time."""
        with (self.folder / "kdc.out").open("ab") as output:
            told = self.environment | environment
            self._kdc = subprocess.Popen(["krb5kdc", "-n"], env=told, stdout=output, stderr=output)
        deadline = time.monotonic() + PATIENCE
        while not _listening(self.port):
            if self._kdc.poll() is not None or time.monotonic() > deadline:
                raise KerberosFailed(f"krb5kdc: {(self.folder / 'kdc.out').read_text(errors='replace')}")
            time.sleep(0.01)

    def stop(self) -> None:
        if self._kdc is not None:
            self._kdc.terminate()
            try:
                self._kdc.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._kdc.kill()
                self._kdc.wait()
            self._kdc = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the KDC is stopped: the kernel accepts connections, but there are no answers."""
        if self._kdc is None:
            raise KerberosFailed("there is no KDC that could be paused")
        self._kdc.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._kdc.send_signal(signal.SIGCONT)

    def asked(self) -> int:
        """Returns the number of requests in the KDC's log."""
        log = self.folder / "kdc.log"
        return sum(" TGS_REQ " in line or " AS_REQ " in line for line in log.read_text(errors="replace").splitlines())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def asking(host: str = SERVER, sec: str = "krb5", user: str | None = "nobody", creduid: int | None = None) -> Envelope:
    """Returns the broker's message for such a request of the kernel. `creduid`: by default the uid of this process."""
    uid = os.geteuid() if creduid is None else creduid
    wish = "" if user is None else f";user={user}"
    text = f"ver=0x2;host={host};ip4=127.0.0.1;sec={sec};uid=0x0;creduid={uid:#x}{wish};pid=0x164"
    deadline = time.monotonic_ns() + 8 * 10**9
    return Envelope(1, 0, "cifs.spnego", Requester(uid, 356), deadline, pack_ask(Ask(text.encode(), b"")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True
