"""Walls around the processes of one episode: what they see, whom they reach, how much they may use."""

from forgejax.environments.sandbox.bubblewrap import (
    WORK,
    Bubblewrap,
    Entered,
    Ran,
    list_environment,
    make_bubblewrap,
    probe_bubblewrap,
)
from forgejax.environments.sandbox.config import SandboxConfig
from forgejax.environments.sandbox.egress import Egress

__all__ = [
    "WORK",
    "Bubblewrap",
    "Egress",
    "Entered",
    "Ran",
    "SandboxConfig",
    "list_environment",
    "make_bubblewrap",
    "probe_bubblewrap",
]
