"""Chooses the methods of prompting: terminal, pinentry, systemd's password agents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from upcall.daemon.prompting.agent import Agent
from upcall.daemon.prompting.pinentry import Pinentry
from upcall.daemon.prompting.prompts import Prompts
from upcall.daemon.prompting.question import Way
from upcall.daemon.prompting.settings import PromptSettings
from upcall.daemon.prompting.systemd import PasswordAgents
from upcall.process.log import EventLog


def ways(names: Sequence[str], pinentry: str | None, environment: Mapping[str, str], agent: Agent) -> list[Way]:
    """Returns the methods with these names, in that order. The comments give the reasons for the default order,
    WAYS."""
    known: dict[str, Way] = {
        # First: by starting `upcall prompt`, a person has chosen this terminal. It works over ssh.
        "agent": agent,
        # Second: needs a display or terminal in the daemon's environment, and appears there at once.
        "pinentry": Pinentry(pinentry, environment),
        # Last: cannot tell whether a person is present. An unseen prompt takes its whole time-out.
        "systemd": PasswordAgents(environment),
    }
    return [known[name] for name in names]


def prompts(settings: PromptSettings, log: EventLog) -> Prompts:
    """Returns the daemon's `Prompts`, which uses this process's environment."""
    agent = Agent(log)
    methods = ways(settings.ways, settings.pinentry, os.environ, agent)
    return Prompts(methods, settings, log, agent if "agent" in settings.ways else None)
