"""What each process says of itself before the first collective, and why it may not take part."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forgejax
from forgejax.run.rundir import list_changes

_CLOCKS_S = 60.0  # apart; times of episodes and files are compared across hosts
_NAMED = 5  # keys that a refusal names


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A process of the job. ``code`` digests the package's sources, ``versions`` are those of what computes."""

    process: int
    config: Mapping[str, Any]
    code: str
    versions: Mapping[str, str]
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    clock: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """For people."""
        return f"process {self.process} on {self.host}"


def digest_sources(root: Path | None = None) -> str:
    """What tells the code of this process from another's, committed or not."""
    root = Path(forgejax.__path__[0]) if root is None else root
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_difference(leader: Hello, other: Hello, now: float) -> str:
    """Why they cannot be processes of one job, as a sentence; "" where they can. ``now``: the leader's clock as the
    other's words arrive."""
    if leader.code != other.code:
        return (
            f"{other.name} runs other code ({other.code}) than the leader on {leader.host} ({leader.code}); check out "
            "the same commit on every host, without changes"
        )
    changes = list_changes(leader.config, other.config)
    if changes:
        told = ", ".join(f"{key} {old!r} there and {new!r} here" for key, (old, new) in list(changes.items())[:_NAMED])
        return (
            f"{other.name} was started with another configuration than the leader on {leader.host}: "
            f"{told.replace(' there', f' on {leader.host}').replace(' here', f' on {other.host}')}; start the same "
            "command with the same file on every host"
        )
    differing = {name for name in leader.versions if leader.versions[name] != other.versions.get(name)}
    if differing:
        told = ", ".join(
            f"{name} {other.versions.get(name)}, not {leader.versions[name]}" for name in sorted(differing)
        )
        return f"{other.name} has other packages than the leader on {leader.host}: {told}; install the same pins"
    if abs(apart := other.clock - now) > _CLOCKS_S:
        return (
            f"the clock of {other.name} is {apart:+.0f} s from the leader's on {leader.host}; set them by NTP: times "
            f"of episodes are compared, within {_CLOCKS_S:g} s"
        )
    return ""
