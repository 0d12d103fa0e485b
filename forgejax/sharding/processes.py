"""Several processes as one job of jax: which environment asks for it, how they find each other, and what they share
before the first collective."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding.mesh import count_chips, prepare_platform
from forgejax.sharding.topology import MeshPlan

_SCHEDULERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
_LATER_S = 60  # jax's own deadline, behind ours
_SLOWEST_BEAT_S = 600  # jax's own watch, behind ours: it ends a process without a sentence


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of one job find each other; left out, the environment tells (TPU slices, SLURM, MPI).

    ``coordinator`` is HOST:PORT of process 0, which listens there. All of them must have come within ``start_s``. One
    that gives no sign of life for ``silence_s`` is lost, and so is one that has not done what the leader said within
    ``order_s``, compiling included: then the job ends.
    """

    coordinator: str = ""
    processes: int = 0
    process_id: int = -1
    start_s: float = 300.0
    silence_s: float = 30.0
    order_s: float = 1800.0

    def __post_init__(self) -> None:
        by_hand = [bool(self.coordinator), self.processes != 0, self.process_id != -1]
        if any(by_hand) and not all(by_hand):
            raise ConfigError(
                f"--distributed.coordinator {self.coordinator or 'is missing'}, --distributed.processes "
                f"{self.processes or 'is missing'} and --distributed.process-id "
                f"{self.process_id if self.process_id != -1 else 'is missing'}: give all three or none"
            )
        if not all(by_hand):
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"--distributed.coordinator is {self.coordinator!r}; expected HOST:PORT of process 0, as 10.0.0.2:8476"
            )
        if not 0 <= self.process_id < self.processes:
            raise ConfigError(
                f"--distributed.process-id is {self.process_id}; expected 0 to {self.processes - 1}, for "
                f"--distributed.processes is {self.processes}"
            )
        for name in ("start_s", "silence_s", "order_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"--distributed.{name.replace('_', '-')} is {getattr(self, name)}; expected a positive time"
                )


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the job: process 0 leads."""

    index: int
    count: int
    coordinator: str = ""

    @property
    def host(self) -> str:
        """Where process 0 is."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    def share(self, name: str, value: str) -> None:
        """Lets every process ``hear`` it."""
        _client().key_value_set(f"forgejax/{name}", value)

    def hear(self, name: str, within_s: float) -> str:
        """What some process has shared, once it has. Raises MeshError where nobody does in time."""
        try:
            value: str = _client().blocking_key_value_get(f"forgejax/{name}", round(within_s * 1000))
        except RuntimeError as error:  # jax's, of the service that process 0 keeps
            raise MeshError(
                f"process 0 at {self.coordinator} has not said {name} within {within_s:g} s: {_first_line(error)}; "
                "look at what it printed"
            ) from error
        return value

    def leave(self) -> None:
        """Takes leave of the others. Idempotent."""
        if self.count > 1 and _client() is not None:
            jax.distributed.shutdown()


ALONE = Processes(index=0, count=1)


def is_several(config: DistributedConfig, plan: MeshPlan, environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether this process is meant to be one of several: by options, by a scheduler, or for a slice of more chips than
    this machine has."""
    if config.coordinator:
        return config.processes > 1
    if any(environ.get(name, "1").strip() not in ("", "0", "1") for name in _SCHEDULERS):
        return True
    return plan.platform == "tpu" and 0 < count_chips(root) < plan.chips


def join_processes(config: DistributedConfig, plan: MeshPlan) -> Processes:
    """Makes this process one of the job's, once all have come; call it before the first use of a device. Where some do
    not come in time it ends this process (``give_up_after``).

    A CPU mesh is split evenly over the processes, with collectives over the network.

    Raises:
        MeshError: the environment does not tell who they are, they did not find each other, or the mesh's devices
            cannot be shared out.
    """
    if not is_several(config, plan, os.environ):
        return ALONE
    if plan.platform == "cpu":
        _prepare_cpu(config, plan)
    given: dict[str, Any] = {}
    if config.coordinator:
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process_id,
        }
        # For TPUs and GPUs alike a process has all devices of its machine.
        given["cluster_detection_method"] = "deactivate"
    # It would take SIGTERM for itself, which ends a run in order.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with give_up_after(config):
            jax.distributed.initialize(
                **given,
                initialization_timeout=round(config.start_s) + _LATER_S,
                heartbeat_timeout_seconds=_SLOWEST_BEAT_S,
                shutdown_timeout_seconds=round(3 * config.silence_s),
            )
    except ValueError as error:
        raise MeshError(
            f"mesh {plan.name} is one of several hosts, and the environment does not tell who they are ({error}); give "
            "each --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process-id K"
        ) from error
    except RuntimeError as error:
        raise MeshError(
            f"the processes of the job did not find each other: {_first_line(error)}; look at what the others print"
        ) from error
    from jax._src import distributed  # noqa: PLC0415  (the only way to what it found)

    return Processes(
        index=jax.process_index(),
        count=jax.process_count(),
        coordinator=str(distributed.global_state.coordinator_address),
    )


def check_share(processes: Processes, plan: MeshPlan) -> None:
    """Raises MeshError where the processes' devices are not exactly the mesh's, the same number in each."""
    devices, own = len(jax.devices()), len(jax.local_devices())
    if processes.count > 1 and (devices != plan.devices or own * processes.count != plan.devices):
        raise MeshError(
            f"mesh {plan.name} has {plan.devices} devices; the {processes.count} processes have {devices} together, "
            f"{own} of them in process {processes.index}: start one process on every host of the mesh, or choose the "
            "--mesh that they make up"
        )


@contextlib.contextmanager
def give_up_after(config: DistributedConfig, leave: Callable[[int], object] = os._exit) -> Iterator[None]:
    """Around what waits for the other processes: after ``start_s`` a sentence, and the end of this process.

    jax's own deadline comes later, for it ends a process without a sentence. ``leave`` ends it, with an exit code.
    """

    def give_up() -> None:
        print(
            f"train.py: not all processes of the job have come within {config.start_s:g} s; start the same command on "
            f"every host, see that they reach {config.coordinator or 'the first one'}, or raise --distributed.start-s",
            file=sys.stderr,
            flush=True,
        )
        leave(1)

    timer = threading.Timer(config.start_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _prepare_cpu(config: DistributedConfig, plan: MeshPlan) -> None:
    count = config.processes
    if count and plan.devices % count:
        raise MeshError(
            f"mesh {plan.name} has {plan.devices} devices, which {count} processes cannot share evenly; choose another "
            "number of processes, or another --mesh"
        )
    prepare_platform(plan, processes=max(count, 1), extra_devices=0)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def _client() -> Any:
    """jax's connection to the service of process 0: a store of names and values. Not public, and what Orbax uses."""
    from jax._src import distributed  # noqa: PLC0415

    return distributed.global_state.client


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
