"""The same as cifs.upcall in meaning: run with the same tickets, and a library in the place of the kernel's keys."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from upcall_spnego import SpnegoHandler
from upcall_spnego.acceptor import accept
from upcall_spnego.mitkdc import SERVER, UNKNOWN, Realm, asking
from upcall_spnego.negtoken import take_negtokeninit

from upcall.core.errors import Refused
from upcall.protocols.request_key.cifs_spnego import take_payload
from upcall.protocols.request_key.messages import take_ask, take_instance

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("cifs.upcall", path="/usr/sbin:/sbin") or not shutil.which("gcc"),
    reason="cifs.upcall wants root; it and a compiler are needed",
)

# What cifs.upcall calls to learn what is needed, and to answer.
KEYS = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int keyctl_describe_alloc(int key, char **text) { *text = strdup(getenv("TOLD")); return strlen(*text); }
int keyctl_instantiate(int key, const void *payload, size_t size, int ring) {
    FILE *file = fopen(getenv("ANSWER"), "wb");
    fwrite(payload, 1, size, file);
    return fclose(file);
}
int keyctl_negate(int key, unsigned timeout, int ring) { return 0; }
int keyctl_reject(int key, unsigned timeout, unsigned error, int ring) { return 0; }
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys.c").write_text(KEYS)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "keys.so"), str(folder / "keys.c")]
    subprocess.run(command, check=True, timeout=60)
    return folder / "keys.so"


def by_the_peer(keys: Path, folder: Path, description: str) -> bytes | None:
    """The payload that cifs.upcall would give the kernel."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    told = {"LD_PRELOAD": str(keys), "TOLD": f"cifs.spnego;0;0;39010000;{description}", "ANSWER": str(answer)}
    environment = os.environ | told | {"PATH": "/usr/sbin:/sbin"}
    subprocess.run(["cifs.upcall", "--no-env-probe", "1"], env=environment, timeout=60, stderr=subprocess.DEVNULL)
    return answer.read_bytes() if answer.exists() else None


@pytest.mark.parametrize("sec", ["krb5", "mskrb5", "iakerb"])
@pytest.mark.parametrize("host", [SERVER, SERVER.upper(), UNKNOWN])
def test_our_answer_means_the_same_as_that_of_cifs_upcall(
    realm: Realm, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, sec: str
) -> None:
    for name, value in realm.at_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    realm.kinit("alice", f"FILE:{tmp_path}/default")
    asked = asking(host=host, sec=sec)
    theirs = by_the_peer(keys, tmp_path, take_ask(asked.body).description.decode())
    try:
        key, blob = take_payload(take_instance(SpnegoHandler().answer(asked)).payload)
    except Refused:
        assert theirs is None
        return
    assert theirs is not None
    _, flags, key_size, blob_size = struct.unpack_from("<IIII", theirs)
    their_blob = theirs[16 + key_size :][:blob_size]
    assert (flags, key_size) == (0, len(key))
    assert take_negtokeninit(their_blob)[0] == take_negtokeninit(blob)[0]
    ours, peers = accept(blob, realm.keytab), accept(their_blob, realm.keytab)
    assert (ours.client, ours.key) == (peers.client, key)
    assert peers.key == theirs[16 : 16 + key_size]
