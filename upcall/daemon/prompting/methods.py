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
    """Those that are named, in that order. The usual order, WAYS, and why:"""
    known: dict[str, Way] = {
        # A person has said, by starting it, that this is where they want to be asked; it works over ssh.
        "agent": agent,
        # Needs a display or terminal in our environment; at once in front of whoever sits there.
        "pinentry": Pinentry(pinentry, environment),
        # The only one that we cannot ask whether anybody is there: a prompt that nobody sees costs its whole time.
        "systemd": PasswordAgents(environment),
    }
    return [known[name] for name in names]


def prompts(settings: PromptSettings, log: EventLog) -> Prompts:
    """Returns what the daemon asks with, in this process's environment."""
    agent = Agent(log)
    methods = ways(settings.ways, settings.pinentry, os.environ, agent)
    return Prompts(methods, settings, log, agent if "agent" in settings.ways else None)
