"""A Kerberos realm inside the lab's guest: MIT's KDC with a fresh database, people's tickets, keytabs.

    with realm() as lab:
        lab.login(person("alice"))

The guest's /etc/krb5.conf and /etc/hosts lead to it meanwhile: what the kernel starts sees no environment of ours.
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
ELSEWHERE = "ELSEWHERE.TEST"  # a realm that nobody serves
HOST = "lab.lab.test"  # this machine's own principal is host/ of it
FILE_SERVER = "fs.lab.test"
UNKNOWN_SERVER = "unknown.lab.test"  # the KDC has no principal for it
FOREIGN_SERVER = "fs.elsewhere.test"  # belongs to the realm that nobody serves
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

# The account information of Active Directory (PAC) would take a domain: a standalone smbd goes by the ticket's name.
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
    """A program of Kerberos or Samba did not do what it should; the text is what it said."""


class Realm:
    """A KDC on the loopback, its files in `folder`. Closed by `realm`."""

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
        """Of the file server."""
        return self.folder / "server.keytab"

    @property
    def machine_keytab(self) -> Path:
        """Of host/HOST; `installed_keytab` puts it where programs look for it."""
        return self.folder / "machine.keytab"

    def administer(self, *commands: str) -> None:
        """Commands of kadmin.local. They go in by its standard input: there are passwords in them."""
        said = self.run(["kadmin.local", "-r", self.name], stdin="".join(f"{command}\n" for command in commands))
        complaints = [line for line in said.splitlines() if line.startswith("kadmin.local: ") and " while " in line]
        if complaints:
            raise KerberosFailed("; ".join(complaints))

    def run(self, argv: Sequence[str], who: Person | None = None, stdin: str = "", **environment: str) -> str:
        """One of Kerberos's programs, as root or as somebody else; what it printed. KerberosFailed."""
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
        """Returns when it takes connections."""
        with (self.folder / "kdc.out").open("ab") as output:
            self._kdc = subprocess.Popen(["krb5kdc", "-n"], env=self.environment, stdout=output, stderr=output)
        wait_until(lambda: listening(KDC_PORT), "the KDC")

    def stop(self) -> None:
        if self._kdc is not None:
            end(self._kdc)
            self._kdc = None

    def pause(self) -> None:
        """It takes connections still, and answers nothing: the worst that a KDC can do."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._kdc is not None, "there is no KDC"  # noqa: S101
        self._kdc.send_signal(number)

    # --- tickets -----------------------------------------------------------------------------------------------

    def login(self, who: Person, principal: str | None = None, lifetime: float = 3600, ccache: str = "") -> None:
        """A ticket-granting ticket for this person. `ccache` is a name as in KRB5CCNAME; "" is where all look."""
        name = principal or who.name
        where = {"KRB5CCNAME": ccache} if ccache else {}
        self.run(["kinit", "-l", f"{lifetime:.0f}s", name], who, f"{self._passwords[name]}\n", **where)

    def logout(self, who: Person) -> None:
        """Takes the ticket away again, if there is one."""
        default_ccache(who).unlink(missing_ok=True)

    def login_for_a_moment(self, who: Person) -> None:
        """A ticket that has expired when this returns."""
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
        """The machine's keytab, where root's programs look for it."""
        shutil.copyfile(self.machine_keytab, MACHINE_KEYTAB)
        MACHINE_KEYTAB.chmod(0o600)
        try:
            yield MACHINE_KEYTAB
        finally:
            MACHINE_KEYTAB.unlink()

    def log(self) -> str:
        return (self.folder / "kdc.log").read_text(errors="replace")


def default_ccache(who: Person) -> Path:
    return Path(f"/tmp/krb5cc_{who.uid}")  # noqa: S108 - where Kerberos has it


def listening(port: int) -> bool:
    """Whether somebody takes connections at this port of the loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def realm(name: str = NAME) -> Iterator[Realm]:
    """A realm whose KDC runs. One at a time; everything is as before afterwards, but for people's tickets."""
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
    """Other contents for one of the guest's own files. Refuses on any machine that is not the lab's."""
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
