"""An attacker has its uid's registration end at the victim's daemon."""

from __future__ import annotations

from functools import partial

from tests.attacks import raw
from tests.attacks.attacker import Attacker
from tests.attacks.hijack import hijack
from tests.attacks.scene import ATTACKER, BEFORE, VICTIM, World, answers, leaked, tries


def test_a_starting_daemon_serves_its_own_uid_only(world: World) -> None:
    """It is not sent the attacker's requests, as its daemon, nor told to quit when the attacker registers
    again."""
    keys = world.victim.wrapped(8)
    packets = list(keys.values())
    count = hijacked = ended = stolen = binds = helos = 0
    attack = partial(hijack, folder=world.folder, victim=VICTIM, packets=packets)
    with world.broker() as broker, Attacker(ATTACKER, attack, world.network.enter) as attacker:
        for _ in range(tries(40)):
            count += 1
            assert attacker.asked("go") == "ready"
            with world.daemon() as daemon:
                report = attacker.heard(60)
                hijacked += report["hijacked"]
                stolen += leaked(keys, report["got"]) > 0
                binds, helos = binds + report["binds"], helos + report["helos"]
                if BEFORE:
                    daemon.ended_by_itself(2)
                else:
                    world.wait_registered(daemon)
                    with world.connected(VICTIM) as connection:
                        connection.send(raw.request(1, 1, VICTIM, packets[0]))
                        assert leaked(keys, [one.hex() for one in answers(connection, 1)]) == 1
                ended += not daemon.lives
        assert broker.lives
    print(
        f"hijack at registration: taken for the attacker's {hijacked}, told to go {ended}, keys stolen {stolen} "
        f"of {count} ({binds} binds, {helos} HELOs)"
    )
    assert binds >= count
    assert helos >= count
    if not BEFORE:
        assert hijacked == ended == stolen == 0
