"""What a sandbox lets in and how much its processes may use."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from forgejax.errors import ConfigError

_MIB = 2**20
_OWN = ("/app", "/logs", "/tmp", "/tests", "/run", "/proc", "/dev", "/sys")


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """``kind``: ``bubblewrap``, or ``none`` for agents that you trust with all that this process may do.

    ``read`` names files and folders that are shown inside, read-only and where they are outside, beside the system's
    own, Python and the agent's program. The limits hold for one episode: ``processes`` (threads count) at once,
    ``memory_mib`` of all its processes together, ``disk_mib`` of all that it writes, ``file_mib`` of a single file.
    """

    kind: Literal["bubblewrap", "none"] = "bubblewrap"
    read: tuple[str, ...] = ()
    processes: int = 128
    memory_mib: int = 2048
    disk_mib: int = 1024
    file_mib: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not 1 <= value < 2**31:
                raise ConfigError(f"sandbox {field.name} is {value}; expected 1 to {2**31 - 1}")
        for path in self.read:
            if not Path(path).exists():
                raise ConfigError(f'sandbox read has "{path}", which is not there; expected files or folders')
            if holds_others(Path(path)):
                raise ConfigError(
                    f'sandbox read has "{path}", in which other episodes have their folders, or which each sandbox has '
                    "of its own; name what is needed below it"
                )

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * _MIB

    @property
    def disk_bytes(self) -> int:
        return self.disk_mib * _MIB

    @property
    def file_bytes(self) -> int:
        return self.file_mib * _MIB


def holds_others(path: Path) -> bool:
    """Whether to show a path inside would show what other episodes have, or take from a sandbox what is its own."""
    path = path.absolute()
    holders = (path, path.resolve())
    temporary = Path(tempfile.gettempdir()).resolve()
    return str(path) in _OWN or any(temporary.is_relative_to(holder) for holder in holders)
