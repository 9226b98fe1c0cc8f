"""Chooses the methods of prompting: terminal, pinentry, systemd's password agents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from upcall.daemon.prompting.agent import Agent
from upcall.daemon.prompting.pinentry import Pinentry
from upcall.daemon.prompting.prompts import Prompts
from upcall.daemon.prompting.question import Way
from upcall.daemon.prompting.settings import Settings
from upcall.daemon.prompting.systemd import PasswordAgents
from upcall.process.log import EventLog


def ways(names: Sequence[str], pinentry: str | None, environment: Mapping[str, str], agent: Agent) -> list[Way]:
    """Returns the methods by their names, in that order. The default order is upcall.daemon.prompter.WAYS: the
    comments give the reasons."""
    known: dict[str, Way] = {
        # First: by starting `upcall prompt`, a person has chosen this terminal. It works over ssh.
        "agent": agent,
        # Second: needs a display or terminal in the daemon's environment, and appears there at once.
        "pinentry": Pinentry(pinentry, environment),
        # Last: cannot tell whether a person is present. An unseen prompt takes its whole time-out.
        "systemd": PasswordAgents(environment),
    }
    return [known[name] for name in names]


def prompts(names: Sequence[str], pinentry: str | None, settings: Settings, log: EventLog) -> Prompts:
    """Returns the daemon's `Prompts`, for this process's environment. `names`: the methods, in order. `pinentry`: path
    of the program; None: from PATH."""
    agent = Agent(log)
    return Prompts(ways(names, pinentry, os.environ, agent), settings, log, agent if "agent" in names else None)
