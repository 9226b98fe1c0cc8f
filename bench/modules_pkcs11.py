"""Measures keys in a SoftHSM token: wraps and unwraps per second, by one thread and by four, and checks for the token.

    python -m bench.modules_pkcs11 [SECONDS]

Measures the same RSA operation with a key in memory in the same run: compare ratios.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1
from upcall_pkcs11.softhsm import SoftHsm, TypedPins, missing

KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rsa", {"bits": "2048"}),
    ("rsa", {"bits": "3072"}),
    ("ec", {"curve": "p-256"}),
    ("ec", {"curve": "p-384"}),
)
CLEAR = bytes(19)


def rate(work: Callable[[], object], seconds: float, threads: int = 1) -> float:
    """Returns calls per second of all threads together."""
    end = time.perf_counter() + seconds
    counts = [0] * threads

    def run(number: int) -> None:
        while time.perf_counter() < end:
            work()
            counts[number] += 1

    started = time.perf_counter()
    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - started)


def measure(hsm: SoftHsm, seconds: float) -> None:
    from upcall_pkcs11 import module, token

    row = "{:12} {:>10} {:>10} {:>12} {:>10}"
    print(row.format("", "wrap/s", "unwrap/s", "4 threads/s", "stale us"))
    for number, (kind, values) in enumerate(KINDS):
        enrolled = hsm.new_key(kind, label=f"key{number}", **values)
        key = module.open(enrolled.signature, enrolled.blob, TypedPins())
        wrapped = key.wrap(CLEAR)
        key.unwrap(wrapped)
        told = [rate(lambda: key.wrap(CLEAR), seconds)]  # noqa: B023
        told += [rate(lambda: key.unwrap(wrapped), seconds, threads) for threads in (1, 4)]  # noqa: B023
        token.PROBE_EVERY = 0.0
        told.append(1e6 / rate(key.stale, seconds))
        token.PROBE_EVERY = 1.0
        name = enrolled.description.removesuffix(" in one")
        print(row.format(name, *(f"{figure:.0f}" for figure in told)))
        key.close()
    for bits in (2048, 3072):
        private = rsa.generate_private_key(65537, bits)
        oaep = padding.OAEP(padding.MGF1(SHA1()), SHA1(), None)
        wrapped = private.public_key().encrypt(CLEAR, oaep)
        told = [rate(lambda: private.decrypt(wrapped, oaep), seconds, threads) for threads in (1, 4)]  # noqa: B023
        print(row.format(f"memory {bits}", "", *(f"{figure:.0f}" for figure in told), ""))


def main() -> None:
    if missing():
        sys.exit(missing())
    with tempfile.TemporaryDirectory() as folder:
        hsm = SoftHsm(Path(folder))
        hsm.add("one")
        print(hsm.run(measure, float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))


if __name__ == "__main__":
    from bench import modules_pkcs11  # by its full name, so that the child can import it

    modules_pkcs11.main()
