"""Tasks of an OpenEnv server: each episode is a session there, played by a white-box agent."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from forgejax.environments.base import Score, Workspace, WorkTool
from forgejax.environments.openenv.connection import Connection, Observed, RefusedStepError, open_connection
from forgejax.errors import ConfigError, EnvironmentLostError, UnscoredError
from forgejax.types import Reward, Task, Trajectory

_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class OpenEnvConfig:
    """An OpenEnv server and how its episodes are put to a policy.

    ``moves``: each reply of the policy is a step. It stands in the field ``action`` of the step's action; without one
    the reply itself must be that action, as a JSON object. Shown is the field ``observation`` of what comes back, or
    all of it. ``tools``: the server's tools (ListTools) are those of the conversation, and each call is a step
    (CallTool). ``reset`` is sent with every reset, with the task's ``seed``.

    ``open_s`` is how long a server that is full is asked for a session, ``message_s`` how long it may take to answer.
    """

    url: str = ""
    form: Literal["moves", "tools"] = "moves"
    instruction: str = ""
    action: str = "message"
    observation: str = ""
    level: str = "default"
    reset: dict[str, int | float | str | bool] = field(default_factory=dict)
    open_s: float = 45.0
    message_s: float = 30.0

    def __post_init__(self) -> None:
        if "seed" in self.reset:
            raise ConfigError('tasks openenv.reset sets "seed"; it is the task\'s own: set tasks.seed instead')
        if self.form == "tools" and not self.instruction:
            raise ConfigError(
                'tasks openenv.instruction is empty with form "tools"; expected what the policy is to do with them'
            )
        for name, most in (("open_s", 50.0), ("message_s", math.inf)):
            if not 0.0 < getattr(self, name) <= most or math.isinf(getattr(self, name)):
                limit = "" if math.isinf(most) else f", {most:g} at most"
                raise ConfigError(
                    f"tasks openenv.{name} is {getattr(self, name)}; expected a finite number of seconds above 0{limit}"
                )


class OpenEnvGame:
    """A session as a ``Game``, and the rewards of its steps with their times."""

    def __init__(self, config: OpenEnvConfig, connection: Connection, first: Observed) -> None:
        self._config, self.connection = config, connection
        self.rewards: list[tuple[float, float]] = []
        self.steps = 0
        self.done = first.done
        self.observation = self._word(first)

    async def act(self, move: str) -> None:
        """The policy is told of a move that the server refuses, and may try again."""
        action: object = {self._config.action: move} if self._config.action else _read_object(move)
        if not isinstance(action, dict):
            self.observation = f"error: your reply is no JSON object: {move[:200]!r}"
            return
        try:
            self.observation = self._word(await self.step(action))
        except RefusedStepError as refusal:
            self.observation = f"error: {refusal}"

    async def step(self, action: Mapping[str, Any]) -> Observed:
        """A step, with its reward kept. Raises RefusedStepError and EnvironmentLostError."""
        observed = await self.connection.step(action)
        self.steps += 1
        if observed.reward is not None:
            self.rewards.append((observed.reward, time.monotonic()))
        self.done = self.done or observed.done
        return observed

    def _word(self, observed: Observed) -> str:
        name = self._config.observation
        if name and name not in observed.observation:
            raise EnvironmentLostError(
                f'tasks.openenv.observation is "{name}"; the server\'s observation has '
                f"{', '.join(sorted(observed.observation)) or 'no fields'}"
            )
        shown = observed.observation[name] if name else observed.observation
        return shown if isinstance(shown, str) else json.dumps(shown)


class OpenEnv:
    """An ``Environment``: ``task(i)`` is a seed that depends on the configuration's and ``i`` only. No training task
    has the seed of a held-out one.

    The reward of an episode's last rewarded step, in [0, 1], is its outcome; what lies outside, and the rewards of
    earlier steps, are granted at their own times. An episode whose steps gave no reward is unscored, one without a
    step is worth 0. Raises ConfigError where the address cannot be one.
    """

    def __init__(self, config: OpenEnvConfig, *, eval_tasks: int, seed: int) -> None:
        if not config.url.startswith(("http://", "https://", "ws://", "wss://")):
            raise ConfigError(
                f'tasks openenv.url is "{config.url}"; expected the address of an OpenEnv server, as '
                "http://127.0.0.1:8000"
            )
        self._config, self._eval_tasks, self._seed = config, eval_tasks, seed
        self.held_out: Sequence[Task] = tuple(self._make("evaluation", index, index) for index in range(eval_tasks))

    def task(self, index: int) -> Task:
        """The training task at an absolute index."""
        drawn = hashlib.blake2b(repr((self._seed, "train", index)).encode(), digest_size=8).digest()
        return self._make("train", index, self._eval_tasks + int.from_bytes(drawn) % (_SEEDS - self._eval_tasks))

    async def open(self, task: Task) -> Workspace:
        config, reset = self._config, {**self._config.reset, "seed": task.payload["seed"]}
        connection, first = await open_connection(config.url, reset, open_s=config.open_s, message_s=config.message_s)
        try:
            game = OpenEnvGame(config, connection, first)
            if config.form == "moves":
                return Workspace(game=game)
            return Workspace(tools=await list_tools(game), session=game)
        except BaseException:
            await connection.close()
            raise

    async def close(self, workspace: Workspace) -> None:
        await _read_game(workspace).connection.close()

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        game = _read_game(workspace)
        if not game.rewards:
            if game.steps:
                raise UnscoredError(f"the OpenEnv server gave no reward in {game.steps} steps")
            return Score(outcome=0.0)
        (*earlier, (last, at)) = game.rewards
        outcome = min(1.0, max(0.0, last))
        granted = [*earlier, (last - outcome, at)]
        rewards = tuple(Reward(kind="process", value=value, at=at) for value, at in granted if value)
        return Score(outcome=outcome, rewards=rewards)

    def _make(self, split: str, index: int, seed: int) -> Task:
        return Task(
            id=f"{split}-{index}",
            family="openenv",
            level=self._config.level,
            question=self._config.instruction,
            payload={"seed": seed},
        )


async def list_tools(game: OpenEnvGame) -> tuple[WorkTool, ...]:
    """The server's tools; a call is a step of the session. Raises EnvironmentLostError where it lists none."""
    listed = await game.connection.step({"type": "list_tools"})
    tools = listed.observation.get("tools")
    if not isinstance(tools, list) or not tools:
        raise EnvironmentLostError(
            f"the OpenEnv server lists no tools, but {str(dict(listed.observation))[:200]}; expected some, "
            'or tasks.openenv.form = "moves"'
        )
    return tuple(_make_tool(game, tool) for tool in tools)


def _make_tool(game: OpenEnvGame, tool: Mapping[str, Any]) -> WorkTool:
    name = str(tool["name"])

    async def call(arguments: Mapping[str, Any]) -> str:
        if game.done:
            return "error: the episode is over"
        try:
            observed = await game.step({"type": "call_tool", "tool_name": name, "arguments": dict(arguments)})
        except RefusedStepError as refusal:
            return f"error: {refusal}"
        return word_result(observed.observation)

    schema = tool.get("input_schema") or {"type": "object", "properties": {}}
    return WorkTool(name=name, description=str(tool.get("description", "")), parameters=schema, call=call)


def word_result(observation: Mapping[str, Any]) -> str:
    """What a tool gave, as text: its error, the texts of MCP content, or the value itself."""
    error, result = observation.get("error"), observation.get("result")
    if isinstance(error, Mapping):
        return f"error: {error.get('message')}"
    if isinstance(result, Mapping) and isinstance(result.get("content"), list):
        texts = [part.get("text") for part in result["content"] if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return result if isinstance(result, str) else json.dumps(result)


def _read_game(workspace: Workspace) -> OpenEnvGame:
    found = workspace.game if workspace.session is None else workspace.session
    assert isinstance(found, OpenEnvGame)
    return found


def _read_object(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
