"""The seam between an episode and the agent program that plays it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from forgejax.agents.white_box.context import ContextConfig
from forgejax.environments.base import Workspace
from forgejax.errors import ConfigError
from forgejax.types import StopReason


@dataclass(frozen=True, kw_only=True)
class EpisodeSpec:
    """All that an agent program is given; of ``workspace`` as far as its scaffold starts a process for the episode.

    ``deadline_s`` counts from the call of ``Scaffold.run``; ``context_length`` is in tokens."""

    id: str
    question: str
    base_url: str
    api_key: str = field(repr=False)
    model: str
    context_length: int
    deadline_s: float
    workspace: Workspace = field(default_factory=Workspace)


@dataclass(frozen=True, kw_only=True)
class AgentResult:
    """What became of the agent. ``answer`` is None where it gave none; ``error`` says why, for people.

    ``accident``: it was cut off by something that concerns many episodes at once, the death of a worker or of what
    forks agents, and may be played again. ``began_at`` (``time.monotonic()``): when it could begin, where it had to
    wait for a worker.
    """

    answer: str | None = None
    error: str | None = None
    stop_reason: StopReason = StopReason.COMPLETED
    accident: bool = False
    began_at: float | None = None


class Scaffold(Protocol):
    """A way to run an agent program. One scaffold runs many episodes at once, on the event loop that started it."""

    async def start(self) -> None:
        """Makes the agent ready; raises AgentError (with the program's own words) if it can never run."""
        ...

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        """Plays one episode. A crash or a passed deadline is a result; cancelling the call ends the agent."""
        ...

    def check(self) -> None:
        """Raises AgentError once no further episode can succeed."""
        ...

    async def close(self) -> None:
        """Ends every process of this scaffold. Idempotent."""
        ...


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Which agent program plays the episodes, and how it is started.

    ``recipe`` names what the other values were taken from, where they are not given (``forgejax.agents.recipes``).

    For kind ``process``, ``command``, ``answer_file`` and the values of ``env`` and ``files`` may hold ``{question}``,
    ``{base_url}`` (it ends with /v1), ``{origin}`` (it does not), ``{api_key}``, ``{model}`` (its name at the gateway),
    ``{context}`` (its length in tokens) and ``{home}``; ``{question}`` in the command stands in for ``question_via``.
    ``{home}`` is a folder that the episode has for itself: ``files`` are written there before the program starts, by
    their names in it. Who has one works in an empty folder beside it, unless the environment gives another. The answer
    is the last line of stdout, or all of ``answer_file``.

    Every agent process inherits this process's environment; ``env`` is laid over it. ``function`` is
    ``module:function`` for kind ``coroutine``; ``context`` says how its dialogues keep within the policy's context.
    ``preload`` names modules that a Python program of kind ``process`` imports: they are imported once, and each
    episode's program is forked behind that.
    """

    recipe: str = ""
    kind: Literal["process", "worker", "coroutine"] = "worker"
    command: tuple[str, ...] = ()
    function: str = ""
    context: ContextConfig = field(default_factory=ContextConfig)
    preload: tuple[str, ...] = ()
    question_via: Literal["argument", "stdin"] = "argument"
    workers: int = 1
    deadline_s: float = 30.0
    grace_s: float = 5.0  # past the deadline, for the scaffold to end the agent in an orderly way
    start_timeout_s: float = 60.0  # for a worker to say that it is ready
    max_restarts: int = 3  # deaths in a row of one worker, or what forks agents, without a result in between
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    answer_file: str = ""

    @property
    def longest_s(self) -> float:
        """What the plays of one episode may take together: the last of them begins within the first's deadline."""
        return 2 * self.deadline_s + self.grace_s

    def __post_init__(self) -> None:
        if self.kind == "coroutine":
            if ":" not in self.function:
                raise ConfigError(f'agent function is "{self.function}"; kind "coroutine" expects "module:function"')
        elif not self.command:
            raise ConfigError(f'agent command is empty; kind "{self.kind}" expects the program and its arguments')
        if self.kind != "coroutine" and self.context != ContextConfig():
            raise ConfigError(
                f'agent context belongs to kind "coroutine", whose dialogues are cut here; the kind is "{self.kind}"'
            )
        if self.preload and self.kind != "process":
            raise ConfigError(
                f'agent preload is {list(self.preload)} with kind "{self.kind}"; expected kind "process", or none'
            )
        if self.kind != "process" and (self.files or self.answer_file):
            raise ConfigError(f'agent files and answer_file belong to kind "process"; the kind is "{self.kind}"')
        if odd := [name for name in self.files if name.startswith(("/", "~")) or ".." in name.split("/")]:
            raise ConfigError(f'agent files has "{odd[0]}"; expected a path inside the home, as ".config/agent.toml"')
        if self.workers < 1:
            raise ConfigError(f"agent workers is {self.workers}; expected at least 1 process")
        if self.max_restarts < 0:
            raise ConfigError(f"agent max_restarts is {self.max_restarts}; expected 0 or more")
        for name in ("deadline_s", "grace_s", "start_timeout_s"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"agent {name} is {getattr(self, name)}; expected a finite number of seconds above 0")
