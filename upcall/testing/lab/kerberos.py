"""Runs a Kerberos realm in the lab's guest: MIT's KDC with a new database, users' tickets, keytabs.

    with realm() as lab:
        lab.login(person("alice"))

Meanwhile the guest's /etc/krb5.conf and /etc/hosts refer to it: programs that the kernel starts inherit no
environment.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from upcall.core.errors import UpcallError
from upcall.testing.lab.stage import PATIENCE, Person, end, wait_until

NAME = "LAB.TEST"
ELSEWHERE = "ELSEWHERE.TEST"  # a realm without a KDC
HOST = "lab.lab.test"  # this machine's own principal is host/ of it
FILE_SERVER = "fs.lab.test"
UNKNOWN_SERVER = "unknown.lab.test"  # the KDC has no principal for it
FOREIGN_SERVER = "fs.elsewhere.test"  # belongs to the realm without a KDC
PEOPLE = ("alice", "bob")

KDC_PORT = 88
MACHINE_KEYTAB = Path("/etc/krb5.keytab")

_KRB5_CONF = """\
[libdefaults]
default_realm = {name}
dns_lookup_realm = false
dns_lookup_kdc = false
dns_canonicalize_hostname = false
rdns = false
udp_preference_limit = 1
default_ccache_name = FILE:/tmp/krb5cc_%{{uid}}
[realms]
{name} = {{
  kdc = 127.0.0.1:{port}
}}
[domain_realm]
.lab.test = {name}
.elsewhere.test = {elsewhere}
[logging]
kdc = FILE:{folder}/kdc.log
admin_server = FILE:{folder}/kadmin.log
default = FILE:{folder}/krb5.log
"""

# No account information of Active Directory (PAC), which needs a domain: a standalone smbd uses the ticket's name.
_KDC_CONF = """\
[kdcdefaults]
kdc_listen = ""
kdc_tcp_listen = 127.0.0.1:{port}
[realms]
{name} = {{
  database_name = {folder}/principal
  key_stash_file = {folder}/stash
  acl_file = {folder}/acl
  max_life = 1d
  supported_enctypes = aes256-cts-hmac-sha1-96:normal
  disable_pac = true
}}
"""


class KerberosFailed(UpcallError):
    """A program of Kerberos or Samba failed. The text is its output."""


class Realm:
    """A KDC on the loopback, with its files in `folder`. Made by `realm`."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.folder, self.name = folder, name
        self.environment = {
            "KRB5_KDC_PROFILE": str(folder / "kdc.conf"),
            "PATH": os.environ.get("PATH", ""),
            "LANG": "C.UTF-8",
        }
        self._passwords = {who: secrets.token_hex(16) for who in PEOPLE}
        self._kdc: subprocess.Popen[bytes] | None = None
        (folder / "kdc.conf").write_text(_KDC_CONF.format(name=name, folder=folder, port=KDC_PORT))
        master = secrets.token_hex(16)
        self.run(["kdb5_util", "create", "-s", "-r", name], stdin=f"{master}\n{master}\n")
        self.administer(
            *(f"add_principal -pw {password} {who}" for who, password in self._passwords.items()),
            *(f"add_principal -randkey {one}" for one in (f"cifs/{FILE_SERVER}", f"host/{HOST}")),
            f"ktadd -norandkey -k {self.server_keytab} cifs/{FILE_SERVER}",
            f"ktadd -norandkey -k {folder}/machine.keytab host/{HOST}",
        )

    @property
    def server_keytab(self) -> Path:
        """The path of the file server's keytab."""
        return self.folder / "server.keytab"

    @property
    def machine_keytab(self) -> Path:
        """The path of the keytab of host/HOST. `installed_keytab` copies it to the system's path."""
        return self.folder / "machine.keytab"

    def administer(self, *commands: str) -> None:
        """Runs commands of kadmin.local. Passes them by its standard input, because they contain passwords."""
        said = self.run(["kadmin.local", "-r", self.name], stdin="".join(f"{command}\n" for command in commands))
        complaints = [line for line in said.splitlines() if line.startswith("kadmin.local: ") and " while " in line]
        if complaints:
            raise KerberosFailed("; ".join(complaints))

    def run(self, argv: Sequence[str], who: Person | None = None, stdin: str = "", **environment: str) -> str:
        """Runs a program of Kerberos; returns its output. `who`: its user; None: root. KerberosFailed."""
        done = subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * PATIENCE,
            cwd="/",
            env=self.environment | (who.environment() if who else {}) | environment,
            user=who.uid if who else None,
            group=who.gid if who else None,
            extra_groups=[] if who else None,
        )
        if done.returncode != 0:
            raise KerberosFailed(f"{argv[0]}: {done.stdout.strip() or done.returncode}")
        return done.stdout

    # --- the KDC -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the KDC, and waits until it accepts connections."""
        with (self.folder / "kdc.out").open("ab") as output:
            self._kdc = subprocess.Popen(["krb5kdc", "-n"], env=self.environment, stdout=output, stderr=output)
        wait_until(lambda: listening(KDC_PORT), "the KDC")

    def stop(self) -> None:
        if self._kdc is not None:
            end(self._kdc)
            self._kdc = None

    def pause(self) -> None:
        """Stops the KDC by SIGSTOP: the kernel accepts connections, but there are no answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._kdc is not None, "there is no KDC"  # noqa: S101
        self._kdc.send_signal(number)

    # --- tickets -----------------------------------------------------------------------------------------------

    def login(self, who: Person, principal: str | None = None, lifetime: float = 3600, ccache: str = "") -> None:
        """Obtains a ticket-granting ticket for this user. `lifetime`: seconds. `ccache`: a name as in KRB5CCNAME; "":
        the default cache."""
        name = principal or who.name
        where = {"KRB5CCNAME": ccache} if ccache else {}
        self.run(["kinit", "-l", f"{lifetime:.0f}s", name], who, f"{self._passwords[name]}\n", **where)

    def logout(self, who: Person) -> None:
        """Destroys the user's ticket, if there is one."""
        default_ccache(who).unlink(missing_ok=True)

    def login_for_a_moment(self, who: Person) -> None:
        """Obtains a ticket and waits until it has expired."""
        self.login(who, lifetime=1)
        wait_until(lambda: not self.has_valid_ticket(who), f"the ticket of {who.name} to expire")

    def has_valid_ticket(self, who: Person) -> bool:
        try:
            self.run(["klist", "-s"], who)
        except KerberosFailed:
            return False
        return True

    @contextlib.contextmanager
    def installed_keytab(self) -> Iterator[Path]:
        """A context with the machine's keytab at the system's path."""
        shutil.copyfile(self.machine_keytab, MACHINE_KEYTAB)
        MACHINE_KEYTAB.chmod(0o600)
        try:
            yield MACHINE_KEYTAB
        finally:
            MACHINE_KEYTAB.unlink()

    def log(self) -> str:
        return (self.folder / "kdc.log").read_text(errors="replace")


def default_ccache(who: Person) -> Path:
    return Path(f"/tmp/krb5cc_{who.uid}")  # noqa: S108 - the default of libkrb5


def listening(port: int) -> bool:
    """Returns whether a process accepts connections at this port of the loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def realm(name: str = NAME) -> Iterator[Realm]:
    """A context with a running realm, one at a time. Restores all files at its end, except users' tickets."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="realm-")))
        config = _KRB5_CONF.format(name=name, folder=folder, port=KDC_PORT, elsewhere=ELSEWHERE)
        stack.enter_context(replaced(Path("/etc/krb5.conf"), lambda _: config))
        names = " ".join((HOST, FILE_SERVER, UNKNOWN_SERVER, FOREIGN_SERVER))
        stack.enter_context(replaced(Path("/etc/hosts"), lambda hosts: f"{hosts}127.0.0.1 {names}\n"))
        made = Realm(folder, name)
        stack.callback(made.stop)
        made.start()
        yield made


@contextlib.contextmanager
def replaced(file: Path, change: Callable[[str], str]) -> Iterator[None]:
    """A context with another content for one of the guest's files. Refuses to run outside the lab."""
    if not os.environ.get("UPCALL_LAB"):
        raise KerberosFailed(f"{file} is changed in the lab's guest only")
    before = file.read_text() if file.exists() else None
    file.write_text(change(before or ""))
    file.chmod(0o644)
    try:
        yield
    finally:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(before)
