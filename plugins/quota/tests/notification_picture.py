"""Makes docs/notification.png: a screenshot of a real notification on a virtual screen.

python plugins/quota/tests/notification_picture.py docs/notification.png     (needs dbus-daemon, Xvfb, dunst, scrot)
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from upcall_quota.desktop import Desktop
from upcall_quota.privatebus import Desktop as Screen
from upcall_quota.privatebus import desktop, message_bus

from upcall.protocols.quota.notice import Filesystem, sentence
from upcall.testing.notices import notice
from upcall.testing.processes import until

GIB = 1 << 30
AREA = "325,10,465,200"


def main(path: Path) -> None:
    told = notice(event="over-soft", used=int(9.2 * GIB), percent=102)
    later = notice(event="below", filesystem=Filesystem("/srv/photos", "/dev/vdb1", "xfs"), used=4 * GIB)
    told = told._replace(grace_until=told.at + 6 * 86400)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bus = stack.enter_context(message_bus(folder))
        screen = stack.enter_context(desktop(folder, bus))
        mine = Desktop(lambda: iter([bus]))
        for one in (told, later):
            mine.tell(one, sentence(one, one.at, one.subject.id))
        until(lambda: screen.displayed() == 2, "two bubbles")
        until(lambda: _has_settled(screen, folder), "a picture that does not change any more")
        screen.picture(path, AREA)
        mine.close()


def _has_settled(screen: Screen, folder: Path) -> bool:
    for name in ("one.png", "two.png"):
        screen.picture(folder / name, AREA)
    one, two = ((folder / name).read_bytes() for name in ("one.png", "two.png"))
    return one == two and len(one) > 4000  # bytes: an empty screen has a few hundred


if __name__ == "__main__":
    main(Path(sys.argv[1]))
