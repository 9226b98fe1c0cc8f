"""Names and ids as nfsidmap's method nsswitch has them; a name service that is silent; the contract of handlers."""

from __future__ import annotations

import os
import pwd
import tempfile
import threading
import time
from pathlib import Path

import pytest
from upcall_idmap import EXPIRY, NOBODYS_EXPIRY, IdResolver, idmapd_conf
from upcall_idmap.bounded import MOST, Bounded
from upcall_idmap.names import LIBC, NOBODY, Services

from upcall.core.errors import PeerError, Refused
from upcall.core.messages import Requester
from upcall.kernel import seccomp
from upcall.kernel.process import harden
from upcall.process.hardening import DaemonHardening, of_daemon
from upcall.protocols.request_key.id_resolver import TYPE, check_answer
from upcall.protocols.request_key.messages import Ask, pack_ask, take_instance
from upcall.testing.handlercontract import HandlerContract
from upcall.testing.processes import in_child
from upcall.wire.envelope import Envelope

USERS = {"root": 0, "alice": 1000, "nobody": 65534, "bob@other.test": 1002, "odd:name": 1003, "x" * 120: 1004}
GROUPS = {"staff": 50, "nogroup": 65533, "OTHER\\team": 2000, "Domain Users": 2001}
NOBODYS_UID = 65534
DOMAIN = "[General]\nDomain = Lab.test\n"
DEBIANS = f"{DOMAIN}[Mapping]\nNobody-User = nobody\nNobody-Group = nogroup\n"


def by_number(names: dict[str, int], number: int) -> str:
    found = [name for name, one in names.items() if one == number]
    if not found:
        raise KeyError(number)
    return found[0]


PLAYED = Services(
    USERS.__getitem__,
    GROUPS.__getitem__,
    lambda number: by_number(USERS, number),
    lambda number: by_number(GROUPS, number),
    lambda: "host.test",
)


def asking(description: str, seconds: float = 5.0) -> Envelope:
    body = pack_ask(Ask(description.encode(), b""))
    return Envelope(1, 0, TYPE, Requester(0, 0), int((time.monotonic() + seconds) * 1e9), body)


def answer(folder: Path, description: str, conf: str = DEBIANS) -> tuple[str, int]:
    """(what the key says, for how many seconds)"""
    (folder / "idmapd.conf").write_text(conf)
    envelope = asking(description)
    given = IdResolver(folder / "idmapd.conf", PLAYED).answer(envelope)
    check_answer(envelope.body, given)
    instance = take_instance(given)
    return instance.payload.rstrip(b"\0").decode(), instance.expiry


class TestIdResolver(HandlerContract):
    handler = IdResolver(Path("/nonexistent/idmapd.conf"), LIBC._replace(own_domain=lambda: "lab.test"))

    def asking(self) -> Envelope:
        return asking("uid:root@lab.test")


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("uid:alice@lab.test", "1000"),
        ("uid:alice@LAB.TEST", "1000"),
        ("uid:root@lab.test", "0"),
        ("uid:odd:name@lab.test", "1003"),
        ("uid:4711@lab.test", "4711"),  # of a server that has no name for it
        ("gid:0@lab.test", "0"),
        ("gid:staff@lab.test", "50"),
        ("gid:Domain Users@lab.test", "2001"),
        ("user:1000", "alice@Lab.test"),
        ("user:0", "root@Lab.test"),
        ("group:50", "staff@Lab.test"),
        ("group:2001", "Domain Users@Lab.test"),
    ],
)
def test_known_names_and_ids_are_answered(tmp_path: Path, description: str, said: str) -> None:
    assert answer(tmp_path, description) == (said, EXPIRY)


@pytest.mark.parametrize(
    "name",
    [
        "nothere@lab.test",
        "alice@other.test",
        "alice",
        "alice@",
        "@lab.test",
        "alice@lab.test@other.test",
        "root@lab",
        "01@lab.test",
        "4294967295@lab.test",
        "12x@lab.test",
        "4711@other.test",
    ],
)
def test_an_unknown_name_is_answered_with_nobody_for_a_short_time(tmp_path: Path, name: str) -> None:
    assert answer(tmp_path, f"uid:{name}") == ("65534", NOBODYS_EXPIRY)
    assert answer(tmp_path, f"gid:{name}") == ("65533", NOBODYS_EXPIRY)


def test_a_name_of_another_domain_that_begins_with_digits_is_nobody(tmp_path: Path) -> None:
    """nfsidmap takes the digits for the id, so that the server could choose a local user."""
    assert answer(tmp_path, "uid:0x@other.test")[0] == "65534"
    assert answer(tmp_path, "uid:1000@other.test")[0] == "65534"


@pytest.mark.parametrize("mapping", ["", "No-Strip = both\n", "No-Strip = both\nReformat-Group = true\n"])
def test_a_domain_that_only_unicode_folds_to_the_own_is_another_domain(tmp_path: Path, mapping: str) -> None:
    """The lower case of U+212A KELVIN SIGN is "k"; libnfsidmap compares by strcasecmp(3)."""
    conf = f"[General]\nDomain = kernel.org\n{mapping}"
    assert answer(tmp_path, "uid:root@KERNEL.org", conf) == ("0", EXPIRY)
    for name in ("root@\u212aernel.org", "0@\u212aernel.org"):
        assert answer(tmp_path, f"uid:{name}", conf) == ("65534", NOBODYS_EXPIRY)
        assert answer(tmp_path, f"gid:{name}", conf) == (str(NOBODY), NOBODYS_EXPIRY)


def test_reformat_group_changes_the_case_of_ascii_letters_only(tmp_path: Path) -> None:
    conf = f"{DOMAIN}No-Strip = group\nReformat-Group = true\n"
    asked: list[str] = []

    def group_id(name: str) -> int:
        asked.append(name)
        raise KeyError(name)

    (tmp_path / "idmapd.conf").write_text(conf)
    IdResolver(tmp_path / "idmapd.conf", PLAYED._replace(group_id=group_id)).answer(asking("gid:team@o\u00dfo.test"))
    assert asked[0] == "O\u00dfO\\team"  # not OSSO, which is another domain's


def test_an_account_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "idmapd.conf").write_text(DEBIANS)
    resolver = IdResolver(tmp_path / "idmapd.conf", PLAYED._replace(user_name=lambda number: "b\udce4r"))
    with pytest.raises(Refused) as caught:
        resolver.answer(asking("user:1000"))
    assert caught.value.reason == "no-such-name"


@pytest.mark.parametrize(
    ("conf", "user", "group"),
    [
        (DOMAIN, 65534, NOBODY),  # there is a user "nobody", and no group
        (f"{DOMAIN}[Mapping]\nNobody-User = alice\nNobody-Group = staff\n", 1000, 50),
        (f"{DOMAIN}[Mapping]\nNobody-User = gone\nNobody-Group = gone\n", 65534, NOBODY),
    ],
)
def test_nobody_is_the_configured_user_or_the_default(tmp_path: Path, conf: str, user: int, group: int) -> None:
    assert answer(tmp_path, "uid:nothere@lab.test", conf)[0] == str(user)
    assert answer(tmp_path, "gid:nothere@lab.test", conf)[0] == str(group)


@pytest.mark.parametrize("description", ["user:4711", "group:4711", "user:4294967294"])
def test_an_unknown_id_is_refused(tmp_path: Path, description: str) -> None:
    """The kernel then sends the number itself."""
    with pytest.raises(Refused) as caught:
        answer(tmp_path, description)
    assert caught.value.reason == "no-such-name"


def test_a_name_that_the_kernel_could_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no-such-name"):
        answer(tmp_path, "user:1004")


@pytest.mark.parametrize("description", ["", "uid:", "user:x", "uid:a\nb", "sid:1"])
def test_a_malformed_description_is_a_peer_error(tmp_path: Path, description: str) -> None:
    with pytest.raises(PeerError):
        answer(tmp_path, description)


# --- idmapd.conf ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "domain"),
    [
        ("", "host.test"),
        ("[General]\nDomain =\n", "host.test"),
        ("[General]\n;Domain = e.test\n# Domain = f.test\n", "host.test"),
        ("Domain = a.test\n[Mapping]\nDomain = b.test\n", "host.test"),
        ("[General]\nDomain = a.test\nDomain = b.test\n", "b.test"),
        ("[GENERAL]\n  domain=d.test # x\n", "d.test"),
        ('[General]\nDomain = "c d.test"\n', "c d.test"),
        ("[General]\nnonsense\n[\nDomain=x.test", "x.test"),
    ],
)
def test_the_domain_is_the_one_that_nfsidmap_shows(tmp_path: Path, conf: str, domain: str) -> None:
    """As `nfsidmap -d` printed it for these files."""
    assert answer(tmp_path, "user:0", conf)[0] == f"root@{domain}"


def test_without_any_domain_it_is_localdomain(tmp_path: Path) -> None:
    settings = idmapd_conf.read(tmp_path / "not there", lambda: "")
    assert settings.domain == "localdomain"


def test_drop_ins_override_idmapd_conf(tmp_path: Path) -> None:
    folder = tmp_path / "idmapd.conf.d"
    folder.mkdir()
    (folder / "10.conf").write_text("[General]\nDomain = drop.test\n")
    (folder / "20.txt").write_text("[General]\nDomain = no.test\n")
    assert answer(tmp_path, "user:0")[0] == "root@drop.test"


@pytest.mark.parametrize(
    ("option", "description", "said"),
    [
        ("No-Strip = none", "uid:bob@other.test", "65534"),
        ("No-Strip = user", "uid:bob@other.test", "1002"),
        ("No-Strip = both", "uid:alice@lab.test", "1000"),
        ("No-Strip = both", "user:1002", "bob@other.test"),
        ("No-Strip = group", "user:1002", "bob@other.test@Lab.test"),
        ("No-Strip = group", "group:50", "staff@Lab.test"),
        ("No-Strip = group\nReformat-Group = yes", "gid:team@other.lab.test", "2000"),
        ("Reformat-Group = yes", "gid:team@other.lab.test", "65533"),
    ],
)
def test_no_strip_and_reformat_group_keep_domains_in_names(
    tmp_path: Path, option: str, description: str, said: str
) -> None:
    conf = DEBIANS.replace("[General]\n", f"[General]\n{option}\n")
    assert answer(tmp_path, description, conf)[0] == said


@pytest.mark.parametrize("method", ["static", "umich_ldap", "static,nsswitch"])
def test_a_method_that_is_not_known_is_refused_and_named(tmp_path: Path, method: str) -> None:
    with pytest.raises(Refused) as caught:
        answer(tmp_path, "uid:alice@lab.test", f"{DEBIANS}[Translation]\nMethod = {method}\n")
    assert caught.value.reason == "no-name-service"
    assert method in caught.value.why
    assert answer(tmp_path, "uid:alice@lab.test", f"{DEBIANS}[Translation]\nMethod = NSSwitch\n")[0] == "1000"


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "idmapd.conf").mkdir()
    with pytest.raises(Refused) as caught:
        IdResolver(tmp_path / "idmapd.conf", PLAYED).answer(asking("user:0"))
    assert (caught.value.reason, caught.value.errno > 0) == ("no-name-service", True)


def test_the_real_name_service_answers_for_this_user(tmp_path: Path) -> None:
    (tmp_path / "idmapd.conf").write_text(DEBIANS)
    handler = IdResolver(tmp_path / "idmapd.conf")
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert take_instance(handler.answer(asking(f"user:{os.geteuid()}"))).payload.decode() == f"{me}@Lab.test"
    assert take_instance(handler.answer(asking(f"uid:{me}@lab.test"))).payload == b"%d\0" % os.geteuid()
    assert LIBC.own_domain() == "" or "." not in LIBC.own_domain()[:1]


@pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")
def test_it_answers_after_the_privilege_dropping_of_the_machines_daemon(tmp_path: Path) -> None:
    """As an unprivileged user, behind seccomp."""
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[: -len(Path(tempfile.gettempdir()).parts)]:
        above.chmod(0o755)
    (tmp_path / "idmapd.conf").write_text(DEBIANS)

    def work() -> list[str]:
        harden()
        assert of_daemon(DaemonHardening(), "no", None).seccomp == "yes"
        handler = IdResolver(tmp_path / "idmapd.conf")
        asked = ("uid:root@lab.test", "user:0", "gid:root@lab.test")
        return [take_instance(handler.answer(asking(one))).payload.decode() for one in asked]

    found = in_child(work, NOBODYS_UID if os.geteuid() == 0 else None)
    assert found == ["0\0", "root@Lab.test", "0\0"]


# --- a name service that is silent ---------------------------------------------------------------------------------


class Silent:
    """A name service that answers when `goes_on` is set."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def __call__(self, name: str) -> int:
        assert self.goes_on.wait(60)
        return USERS[name]


def test_requests_are_refused_without_waiting_while_the_name_service_hangs(tmp_path: Path) -> None:
    (tmp_path / "idmapd.conf").write_text(DEBIANS)
    silent = Silent()
    handler = IdResolver(tmp_path / "idmapd.conf", PLAYED._replace(user_id=silent))
    for _ in range(MOST):
        with pytest.raises(Refused) as caught:
            handler.answer(asking("uid:alice@lab.test", seconds=0.15))
        assert (caught.value.reason, caught.value.why) == ("name-service-silent", "it does not answer in time")
    with pytest.raises(Refused) as caught:  # without waiting, and without one more thread
        handler.answer(asking("uid:alice@lab.test", seconds=60))
    assert caught.value.why == f"{MOST} calls of it hang already"
    hanging = [thread for thread in threading.enumerate() if thread.name == "upcall-idmap"]
    assert len(hanging) == MOST
    silent.goes_on.set()
    for thread in hanging:
        thread.join(60)
    assert take_instance(handler.answer(asking("uid:alice@lab.test"))).payload == b"1000\0"


def test_an_exception_of_a_bounded_call_reaches_the_caller() -> None:
    def work() -> int:
        raise LookupError("x")

    with pytest.raises(LookupError):
        Bounded().call(work, time.monotonic() + 30)


def test_an_answer_that_is_there_already_counts_after_the_deadline() -> None:
    bounded = Bounded()
    for _ in range(50):
        try:
            assert bounded.call(lambda: 7, time.monotonic()) == 7
        except Refused as refused:
            assert refused.reason == "name-service-silent"


# --- upcall explain ------------------------------------------------------------------------------------------------


def test_explain_says_would_answer_and_with_contact_the_answer(tmp_path: Path) -> None:
    (tmp_path / "idmapd.conf").write_text(DEBIANS)
    handler = IdResolver(tmp_path / "idmapd.conf", PLAYED)
    ask = pack_ask(Ask(b"uid:alice@lab.test", b""))
    assert handler.explain(ask)["answer"] == "would answer"
    assert "1000 for 600 s, in the domain Lab.test" in handler.explain(ask, contact=True)["why"]
    unknown = pack_ask(Ask(b"uid:alice@other.test", b""))
    assert "stands for whoever is not known" in handler.explain(unknown, contact=True)["why"]
    assert handler.explain(pack_ask(Ask(b"user:4711", b"")), contact=True)["answer"] == "no-such-name"
