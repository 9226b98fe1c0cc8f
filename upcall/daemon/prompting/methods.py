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
    """Returns the methods that are named, in that order. The default order is WAYS, for these reasons:"""
    known: dict[str, Way] = {
        # Chosen by the person, who has started it in a terminal; works over ssh.
        "agent": agent,
        # Needs a display or terminal in our environment; appears in front of the person at once.
        "pinentry": Pinentry(pinentry, environment),
        # Does not tell whether an agent is running: a prompt that nobody sees lasts until its time-out.
        "systemd": PasswordAgents(environment),
    }
    return [known[name] for name in names]


def prompts(settings: PromptSettings, log: EventLog) -> Prompts:
    """Returns the daemon's prompting, which uses this process's environment."""
    agent = Agent(log)
    methods = ways(settings.ways, settings.pinentry, os.environ, agent)
    return Prompts(methods, settings, log, agent if "agent" in settings.ways else None)
