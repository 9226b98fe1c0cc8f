"""Tests of quotas for every filesystem; test_quota_ext4 and test_quota_xfs inherit them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.quota_scene import (
    GRACE,
    MB,
    NAMES,
    NO_ROOM,
    PROJECT,
    STAFF,
    Disk,
    QuotaHouse,
    fill,
    give_names,
    is_registered,
    levels,
    quiet,
    reachable_disk,
    reads,
    remove,
    status,
    try_to_write,
)
from upcall.protocols.quota.notice import amount
from upcall.protocols.quota.policy import HARD
from upcall.testing.lab.stage import PATIENCE, Person, do_as, person, wait_until


class QuotaCases:
    """To be inherited; the subclass names the filesystem."""

    kind: str

    @pytest.fixture
    def people(self) -> tuple[Person, Person, Person]:
        return person("root"), person("alice"), person("bob")

    @pytest.fixture
    def drive(self, tmp_path: Path) -> Iterator[Disk]:
        with reachable_disk(self.kind, tmp_path) as made:
            yield made

    @pytest.fixture
    def place(self, tmp_path: Path, people: tuple[Person, Person, Person]) -> Iterator[QuotaHouse]:
        folder = tmp_path / "house"
        folder.mkdir()
        made = QuotaHouse(folder)
        try:
            made.open(people[0])
            for who in people:
                made.daemon(who)
            yield made
        finally:
            made.close()

    def test_a_soft_limit_its_grace_and_the_all_clear_are_told(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        root, alice, bob = people
        drive.grace("u", GRACE)
        drive.limit("u", alice.uid, 1 * MB, 4 * MB)
        file = drive.point / "alice"
        assert fill(alice, file, 2 * MB) == 0
        notice = place.wait(alice, "over-soft")
        assert (notice.subject.name, notice.resource, notice.soft, notice.hard) == ("alice", "space", MB, 4 * MB)
        assert (notice.filesystem.mount, notice.filesystem.type) == (str(drive.point), self.kind)
        assert notice.used > MB
        assert notice.grace_until is not None  # XFS has no date yet when it warns
        assert 0 <= notice.grace_until - notice.at <= GRACE
        words = "over the limit of 1 MiB. Delete or move files; after"
        reads(notice, alice, f"Your files on {drive.point} take up", words)
        reads(place.wait(alice, "grace"), alice, words)
        told = place.wait(alice, "over-soft-long")
        reads(told, alice, "nothing more can be written until they are below 1 MiB. Delete or move files.")
        # XFS counts whole seconds, and preallocates beyond the old file's end.
        wait_until(lambda: try_to_write(alice, drive.point / "more", 65536) in NO_ROOM, "refused")
        remove(alice, file)
        wait_until(lambda: drive.used(alice.uid) == 0, "the kernel counts nothing")
        reads(place.wait(alice, "below"), alice, "below the limit again")
        quiet()
        assert place.events(alice) == ["over-soft", "grace", "over-soft-long", "below"]
        assert place.events(bob) == place.events(root) == []

    def test_hard_limits_of_space_and_files_are_told(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        root, alice, bob = people
        drive.limit("u", bob.uid, 0, 1 * MB, (0, 5))
        for _ in range(5):  # XFS warns at each
            assert fill(bob, drive.point / "bob", 2 * MB) in NO_ROOM
        notice = place.wait(bob, "over-hard")
        assert notice.resource == "space"
        assert notice.cause.name == ("bob" if notice.raw else None)  # or the broker has just read that he is there
        assert MB // 2 < notice.used <= MB
        reads(notice, bob, f"Your files on {drive.point} take up {amount(notice.used, 'space')}, the limit is 1 MiB")
        reads(notice, bob, "nothing more can be written. Delete or move files to go on.")
        remove(bob, drive.point / "bob")  # on XFS a file needs space, too
        place.wait(bob, "below")

        def create() -> None:
            for number in range(9):
                (drive.point / f"bob{number}").touch()

        with pytest.raises(OSError, match=r"quota|space"):
            do_as(bob, create)
        notice = place.wait(bob, "over-hard", 2)
        assert (notice.resource, notice.used, notice.hard) == ("files", 5, 5)
        reads(notice, bob, "number 5, the limit is 5 files: no more files can be made. Delete files to go on.")
        quiet()
        assert place.events(bob) == ["over-hard", "below", "over-hard"]
        assert place.events(alice) == place.events(root) == []

    def test_the_owner_is_told_who_wrote_into_the_file(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        root, alice, bob = people
        drive.limit("u", alice.uid, 1 * MB, 4 * MB)
        file = drive.point / "alice"
        assert fill(alice, file, 65536) == 0
        do_as(alice, lambda: file.chmod(0o666))
        assert fill(root, file, 2 * MB) == 0
        notice = place.wait(alice, "over-soft")
        assert (notice.subject.name, notice.cause.name) == ("alice", "root" if notice.raw else None)
        quiet()
        assert place.events(alice) == ["over-soft"]
        assert place.events(bob) == place.events(root) == []

    @pytest.mark.parametrize(("whose", "number", "folder"), [("g", STAFF, "shared"), ("P", PROJECT, "project")])
    def test_limits_of_groups_and_projects_are_told_to_who_wrote_and_to_root(
        self,
        drive: Disk,
        place: QuotaHouse,
        people: tuple[Person, Person, Person],
        whose: str,
        number: int,
        folder: str,
    ) -> None:
        root, alice, bob = people
        give_names()
        drive.limit(whose, number, 0, 2 * MB)
        file = drive.point / folder / "file"
        assert fill(alice, file, 3 * MB) in NO_ROOM
        for who in (alice, root):
            notice = place.wait(who, "over-hard")
            kind = {"g": "group", "P": "project"}[whose]
            assert notice.subject == (kind, number, NAMES[number])
            assert notice.cause.name == ("alice" if notice.raw else None)
            reads(notice, who, f"The files of {kind} {NAMES[number]} on {drive.point} take up", "the limit is 2 MiB")
        remove(alice, file)
        for who in (alice, root):
            place.wait(who, "below")
        quiet()
        assert place.events(alice) == ["over-hard", "below"]
        assert place.events(root) == ["over-hard", "below"]
        assert place.events(bob) == []

    def test_nearing_a_limit_is_told_at_85_and_95_percent(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        _, alice, _ = people
        drive.limit("u", alice.uid, 0, 10 * MB)
        with place.source_stopped():
            assert fill(alice, drive.point / "alice", 8 * MB + MB // 2) == 0
        assert place.wait(alice, "near").percent in (84, 85, 86)
        with place.source_stopped():
            assert fill(alice, drive.point / "alice", MB) == 0
        assert place.wait(alice, "near", 2).percent in (94, 95, 96)
        quiet()
        assert [notice.event for notice in place.told(alice)] == ["near", "near"]

    def test_what_happened_before_a_login_is_told_then(
        self, drive: Disk, tmp_path: Path, people: tuple[Person, Person, Person]
    ) -> None:
        """Without a daemon at the time of the event; then broker and source are restarted; then the user logs in."""
        root, alice, _ = people
        folder = tmp_path / "house"
        folder.mkdir()
        place = QuotaHouse(folder)
        try:
            place.open(root)
            drive.limit("u", alice.uid, 0, MB)
            assert fill(alice, drive.point / "alice", 2 * MB) in NO_ROOM
            wait_until(lambda: status().get("undelivered") == 1, "one that waits")
            place.end()
            place.open(root)
            place.daemon(alice)
            assert place.wait(alice, "over-hard").subject.name == "alice"
            quiet()
            assert place.events(alice) == ["over-hard"]
        finally:
            place.close()

    def test_a_source_that_is_killed_tells_nothing_twice_and_loses_nothing(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        """Warnings that the kernel sent while no source was running are derived from the figures."""
        root, alice, bob = people
        drive.limit("u", alice.uid, 0, MB)
        drive.limit("u", bob.uid, MB, 4 * MB)  # over it he stays; just below a hard one, figures say only "near"
        file = drive.point / "alice"
        assert fill(alice, file, 2 * MB) in NO_ROOM
        place.wait(alice, "over-hard")
        wait_until(lambda: HARD in levels(alice.uid), "it is written down")
        place.kill_source()
        assert fill(bob, drive.point / "bob", 2 * MB) == 0
        place.open(root)
        place.wait(bob, "over-soft")
        assert fill(alice, file, 65536) in NO_ROOM  # XFS warns again
        quiet()
        assert (place.events(alice), place.events(bob)) == (["over-hard"], ["over-soft"])
        remove(alice, file)
        place.wait(alice, "below")
        quiet()
        assert place.events(alice) == ["over-hard", "below"]

    def test_warnings_while_there_is_no_broker_are_delivered_later(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        """The source receives warnings meanwhile, and delivers them when a broker is back."""
        root, alice, bob = people
        for who in (alice, bob):
            drive.limit("u", who.uid, 0, MB)
        assert fill(alice, drive.point / "alice", 2 * MB) in NO_ROOM
        place.wait(alice, "over-hard")
        place.kill_broker()
        assert fill(bob, drive.point / "bob", 2 * MB) in NO_ROOM
        place.open(root)
        for who in people:
            again = f"the daemon of {who.name} again"
            wait_until(functools.partial(is_registered, who), again, 2 * PATIENCE)
        place.wait(bob, "over-hard")
        quiet()
        assert place.events(alice) == place.events(bob) == ["over-hard"]

    def test_a_flood_hides_nobody_elses_warning(
        self, drive: Disk, place: QuotaHouse, people: tuple[Person, Person, Person]
    ) -> None:
        _, alice, bob = people
        drive.limit("u", alice.uid, 0, 0, (3, 0))
        drive.limit("u", bob.uid, 0, MB)
        before = status()["received"]

        def flood() -> int:
            """Exceeds the soft limit and goes below it repeatedly: a warning each time; on XFS only when exceeded."""
            for number in range(3):
                (drive.point / f"alice{number}").touch()
            path = str(drive.point / "alice-more")
            for _ in range(1500):
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
                os.unlink(path)
            return 0

        do_as(alice, flood)
        assert fill(bob, drive.point / "bob", 2 * MB) in NO_ROOM
        do_as(alice, flood)
        place.wait(bob, "over-hard")
        place.wait(alice, "over-soft")
        quiet()
        found = status()
        assert found["received"] + found["lost"] - before >= 3000
        assert (found["lost"], found["nonsense"], found["dropped"]) == (0, 0, 0)
        assert place.events(bob) == ["over-hard"]
        assert place.events(alice).count("over-soft") == 1
