"""The quickstart's supervised phase: what the calculator agent and a good model would say to each other."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from forgejax.agents.scaffolds.children import describe_stderr, find_program, quote_command
from forgejax.errors import AgentError, ConfigError
from forgejax.run.warm_start import Demonstration
from forgejax.types import Task

DESCRIBE_S = 30.0
NUMBER = r"-?\d+(?:\.\d+)?"
EXPRESSION = re.compile(rf"{NUMBER}(?:\s*[-+*/]\s*{NUMBER})+")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class AgentDescription:
    """What an agent puts before the model in every episode: its system prompt and its tools (OpenAI's schema)."""

    system: str
    tools: tuple[Mapping[str, Any], ...]


class CalculatorDemonstrator:
    """Solves a task as the calculator agent would, with the tool in ``tool_rate`` of the tasks whatever their level:
    when to use it is left for RL to find out.

    It is no calculator itself: at ``guessed_levels`` it cannot work an answer out in its head and guesses where it does
    without the tool. ``describe`` is the command by which the agent program prints its system prompt and tools.

    Raises ConfigError for a ``tool_rate`` that is no share, AgentError if the agent program does not describe itself.
    """

    def __init__(self, *, tool_rate: float, guessed_levels: Sequence[str] = (), describe: Sequence[str]) -> None:
        if not 0.0 <= tool_rate <= 1.0:
            raise ConfigError(f"warm_start.options.tool_rate is {tool_rate}; expected a share from 0 to 1")
        self._tool_rate = tool_rate
        self._guessed_levels = frozenset(guessed_levels)
        self._agent = describe_agent(describe)

    @property
    def identity(self) -> str:
        return json.dumps(asdict(self._agent), sort_keys=True)

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Demonstration:
        use_tool = bool(rng.random() < self._tool_rate)
        guessed = not use_tool and task.level in self._guessed_levels
        answer = guess_answer(task.question) if guessed else str(task.payload["answer"])
        messages = write_messages(task, answer, use_tool=use_tool, agent=self._agent)
        return Demonstration(messages=messages, tools=self._agent.tools)


def describe_agent(command: Sequence[str]) -> AgentDescription:
    """Asks the agent program itself: ``command`` prints ``{"system": ..., "tools": [...]}``. Raises AgentError."""
    find_program(command)
    try:
        run = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=DESCRIBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AgentError(f"agent command {quote_command(command)} does not describe itself: {error}") from error
    if run.returncode != 0:
        how = f"ended with status {run.returncode}; {describe_stderr(run.stderr)}"
        raise AgentError(f"agent command {quote_command(command)} does not describe itself: it {how}")
    try:
        described = json.loads(run.stdout)
        return AgentDescription(system=str(described["system"]), tools=tuple(described["tools"]))
    except (ValueError, KeyError, TypeError) as error:
        raise AgentError(
            f"agent command {quote_command(command)} printed {run.stdout[:200]!r}; "
            'expected {"system": ..., "tools": [...]}'
        ) from error


def find_expression(question: str) -> str:
    """The longest arithmetic expression in a question. Raises ValueError where it holds none."""
    found = EXPRESSION.findall(question)
    if not found:
        raise ValueError(f"the question holds no arithmetic expression: {question!r}; use arithmetic tasks")
    return str(max(found, key=len))


def guess_answer(question: str) -> str:
    """What comes to mind without calculating: the first number of the question."""
    found = re.search(r"\d+", question)
    return found[0] if found else "0"


def write_messages(
    task: Task, answer: str, *, use_tool: bool, agent: AgentDescription, call_id: str = "call_0"
) -> Messages:
    """One episode of the calculator agent on a reasoning-gym arithmetic task, as chat messages.

    Direct: system, user, assistant with ``answer``. With ``use_tool``: the assistant first has the expression of the
    question evaluated; the tool's result is the task's true answer, whatever ``answer`` says. The tools of the chat
    are ``agent.tools``.
    """
    messages: Messages = [
        {"role": "system", "content": agent.system},
        {"role": "user", "content": task.question},
    ]
    if use_tool:
        function = {
            "name": agent.tools[0]["function"]["name"],
            "arguments": json.dumps({"expression": find_expression(task.question)}),
        }
        call = {"id": call_id, "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": str(task.payload["answer"])},
        ]
    return [*messages, {"role": "assistant", "content": answer}]
