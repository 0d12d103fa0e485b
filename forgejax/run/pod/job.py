"""A process's place in its job, from the first word to the last: alone, leading or following."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import jax

from forgejax.errors import ForgejaxError
from forgejax.run.conclude import find_versions
from forgejax.run.config import TrainConfig, to_mapping
from forgejax.run.pod.followed import Followed
from forgejax.run.pod.hello import Hello, digest_sources
from forgejax.run.pod.leader import Leader
from forgejax.sharding import DistributedConfig, Processes, join_processes, resolve

_COMPUTING = ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


class JobMember:
    """``leader`` where this process leads others, ``followed`` where it follows; neither where it is alone.

    Use as a context manager: however it is left, the followers are told.
    """

    def __init__(self, config: TrainConfig, distributed: DistributedConfig):
        """Joins the job; call it before the first use of a device. Raises ForgejaxError where that cannot be."""
        self.processes: Processes = join_processes(distributed, resolve(config.mesh))
        self.leader: Leader | None = None
        self.followed: Followed | None = None
        if self.processes.count == 1:
            return
        versions = find_versions()
        self.own = Hello(
            process=self.processes.index,
            config=to_mapping(config),
            code=digest_sources(),
            versions={name: versions[name] for name in _COMPUTING if name in versions},
        )
        if self.processes.index:
            self.followed = Followed(distributed, self.processes, self.own)
            return
        self.leader = Leader(distributed)
        try:
            self.leader.gather(self.processes, self.own)
        except ForgejaxError as error:
            self.leader.refuse(str(error))
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.leader is not None and error is not None:
            self.leader.refuse(str(error) or repr(error))

    def end(self, code: int) -> None:
        """All processes end in order; the others with this exit code."""
        if self.leader is not None:
            self.leader.end(code)
        self.processes.leave()

    def describe(self) -> str:
        """For people."""
        devices = len(jax.local_devices())
        return f"{self.processes.count} processes of {devices} devices; this one, process {self.processes.index}, leads"
