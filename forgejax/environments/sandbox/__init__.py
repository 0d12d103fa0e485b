"""Walls around the processes of one episode: what they see, whom they reach, how much they may use."""

from forgejax.environments.sandbox.bubblewrap import (
    WORK,
    Bubblewrap,
    Entered,
    Ran,
    list_environment,
    make_bubblewrap,
)
from forgejax.environments.sandbox.config import SandboxConfig, holds_others
from forgejax.environments.sandbox.egress import Egress
from forgejax.environments.sandbox.probe import probe_bubblewrap

__all__ = [
    "WORK",
    "Bubblewrap",
    "Egress",
    "Entered",
    "Ran",
    "SandboxConfig",
    "holds_others",
    "list_environment",
    "make_bubblewrap",
    "probe_bubblewrap",
]
