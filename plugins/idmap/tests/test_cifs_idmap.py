"""SIDs and ids by a plugin of cifs-utils that is played: its answers, its refusals, none at all, one that hangs."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from upcall_idmap import EXPIRY
from upcall_idmap.bounded import MOST
from upcall_idmap.cifs import CifsIdmap

from upcall.core.errors import PeerError, Refused
from upcall.core.messages import Requester
from upcall.protocols.request_key.cifs_idmap import TYPE, Sid, check_answer, pack_id, pack_sid
from upcall.protocols.request_key.messages import Ask, pack_ask, take_instance
from upcall.testing.handlercontract import HandlerContract
from upcall.wire.envelope import Envelope

# Uids and gids are the SID's last number: users from 100, groups from 200, both from 300; 400 is uid -1. It knows
# no others; 666 has it hang while the file "hang" is in its folder, 667 says that winbind is gone.
PLAYED = r"""
#include <stdint.h>
#include <string.h>
#include <unistd.h>
struct sid { uint8_t revision, count, authority[6]; uint32_t sub[15]; } __attribute__((packed));
struct id { uint32_t id; uint8_t type; } __attribute__((packed));
static const char **said;
int cifs_idmap_init_plugin(void **handle, const char **message) {
    *handle = (void *)0x1234;
    said = message;
    *said = "it does not want to";
    return access(FOLDER "/broken", F_OK) == 0;
}
static int look_up(void *handle, uint32_t number) {
    while (number == 666 && access(FOLDER "/hang", F_OK) == 0)
        usleep(10000);
    *said = number == 667 ? "WBC_ERR_WINBIND_NOT_AVAILABLE" : "WBC_ERR_DOMAIN_NOT_FOUND";
    return handle != (void *)0x1234 || number < 100 || number > 400;
}
int cifs_idmap_sids_to_ids(void *handle, const struct sid *sid, size_t count, struct id *found) {
    found->id = sid->sub[sid->count - 1];
    found->type = found->id / 100;
    if (found->id == 400) {
        found->id = -1;
        found->type = 3;
    }
    return look_up(handle, sid->sub[sid->count - 1]) || count != 1;
}
int cifs_idmap_ids_to_sids(void *handle, const struct id *id, size_t count, struct sid *found) {
    if (look_up(handle, id->id) || count != 1)
        return 1;
    struct sid made = {1, 3, {0, 0, 0, 0, 0, 5}, {21, id->type, id->id}};
    if (id->id == 399)
        made.revision = 0;
    memcpy(found, &made, sizeof made);
    return 0;
}
"""

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make a plugin of cifs-utils")


def made(folder: Path) -> Path:
    (folder / "plugin.c").write_text(PLAYED)
    command = ["gcc", "-shared", "-fPIC", f'-DFOLDER="{folder}"', "-o", f"{folder}/idmap-plugin", f"{folder}/plugin.c"]
    subprocess.run(command, check=True, timeout=60)
    return folder / "idmap-plugin"


@pytest.fixture
def handler(tmp_path: Path) -> CifsIdmap:
    return CifsIdmap(made(tmp_path))


def asking(description: str, seconds: float = 5.0) -> Envelope:
    body = pack_ask(Ask(description.encode(), b""))
    return Envelope(1, 0, TYPE, Requester(0, 0), int((time.monotonic() + seconds) * 1e9), body)


def payload(handler: CifsIdmap, description: str) -> bytes:
    envelope = asking(description)
    given = handler.answer(envelope)
    check_answer(envelope.body, given)
    instance = take_instance(given)
    assert instance.expiry == EXPIRY
    return instance.payload


class TestCifsIdmap(HandlerContract):
    handler = CifsIdmap(Path("/nonexistent/idmap-plugin"))

    def asking(self) -> Envelope:
        return asking("os:S-1-5-21-1-2-3-100")


def test_answers_are_those_of_the_plugin(handler: CifsIdmap) -> None:
    assert payload(handler, "os:S-1-5-21-100") == pack_id(100)
    assert payload(handler, "gs:S-1-5-21-200") == pack_id(200)
    assert payload(handler, "os:S-1-5-21-300") == payload(handler, "gs:S-1-5-21-300") == pack_id(300)
    assert payload(handler, "oi:100") == pack_sid(Sid(5, (21, 1, 100)))
    assert payload(handler, "gi:200") == pack_sid(Sid(5, (21, 2, 200)))


@pytest.mark.parametrize(
    ("description", "reason", "why"),
    [
        ("os:S-1-5-21-99", "no-such-name", "DOMAIN_NOT_FOUND"),
        ("oi:99", "no-such-name", "DOMAIN_NOT_FOUND"),
        ("os:S-1-5-21-200", "no-such-name", "is no user"),
        ("gs:S-1-5-21-100", "no-such-name", "is no group"),
        ("os:S-1-5-21-400", "no-such-name", "the kernel could not take"),
        ("oi:399", "no-such-name", "revision 0"),
        ("os:S-1-5-21-667", "no-name-service", "WINBIND_NOT_AVAILABLE"),
        ("gi:667", "no-name-service", "WINBIND_NOT_AVAILABLE"),
    ],
)
def test_what_the_plugin_does_not_know_is_refused_with_the_reason(
    handler: CifsIdmap, description: str, reason: str, why: str
) -> None:
    with pytest.raises(Refused) as caught:
        handler.answer(asking(description))
    assert caught.value.reason == reason
    assert why in caught.value.why


@pytest.mark.parametrize("description", ["", "os:", "oi:x", "os:S-1-5-21-1\n", "uid:alice"])
def test_a_malformed_description_is_a_peer_error(handler: CifsIdmap, description: str) -> None:
    with pytest.raises(PeerError):
        handler.answer(asking(description))


def test_without_a_plugin_the_refusal_names_winbind_and_sssd(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        CifsIdmap(tmp_path / "idmap-plugin").answer(asking("oi:100"))
    assert caught.value.reason == "no-name-service"
    assert "winbind and sssd" in caught.value.why


def test_a_library_that_is_no_plugin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text("int x;\n")
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "x.so", tmp_path / "x.c"], check=True, timeout=60)
    with pytest.raises(Refused, match="no-name-service"):
        CifsIdmap(tmp_path / "x.so").answer(asking("oi:100"))


def test_a_plugin_that_cannot_start_is_tried_again_with_the_next_request(tmp_path: Path, handler: CifsIdmap) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(Refused) as caught:
        handler.answer(asking("oi:100"))
    assert caught.value.reason == "no-name-service"
    assert "it does not want to" in caught.value.why
    (tmp_path / "broken").unlink()
    assert payload(handler, "oi:100") == pack_sid(Sid(5, (21, 1, 100)))


def test_a_service_that_hangs_is_given_up_and_used_again_when_it_goes_on(tmp_path: Path, handler: CifsIdmap) -> None:
    (tmp_path / "hang").touch()
    for _ in range(MOST):
        with pytest.raises(Refused, match="name-service-silent"):
            handler.answer(asking("oi:666", seconds=0.15))
    with pytest.raises(Refused) as caught:  # without waiting
        handler.answer(asking("oi:100", seconds=60))
    assert caught.value.why == f"{MOST} calls of it hang already"
    (tmp_path / "hang").unlink()
    for _ in range(1000):
        try:
            assert payload(handler, "os:S-1-5-21-100") == pack_id(100)
            return
        except Refused:
            time.sleep(0.01)
    pytest.fail("it is refused though the service goes on")


def test_explain_names_the_plugin_and_with_contact_the_answer(tmp_path: Path, handler: CifsIdmap) -> None:
    found = handler.explain(pack_ask(Ask(b"os:S-1-5-21-100", b"")))
    assert (found["answer"], found["why"]) == ("would answer", f"by {tmp_path}/idmap-plugin")
    assert ": 100 for 600 s" in handler.explain(pack_ask(Ask(b"os:S-1-5-21-100", b"")), contact=True)["why"]
    assert ": S-1-5-21-1-100 for" in handler.explain(pack_ask(Ask(b"oi:100", b"")), contact=True)["why"]
    assert handler.explain(pack_ask(Ask(b"oi:99", b"")), contact=True)["answer"] == "no-such-name"
    nothing = CifsIdmap(tmp_path / "nothing").explain(pack_ask(Ask(b"oi:99", b"")))
    assert nothing["answer"] == "no-name-service"
