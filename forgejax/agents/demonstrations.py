"""Demonstrations for a supervised warm start: the messages a calculator agent and a good model would exchange."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgejax.agents.children import find_program, shown, stderr_note
from forgejax.errors import AgentError
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


def describe_agent(command: Sequence[str]) -> AgentDescription:
    """Asks the agent program itself: ``command`` prints ``{"system": ..., "tools": [...]}``. Raises AgentError."""
    find_program(command)
    try:
        run = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=DESCRIBE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AgentError(f"agent command {shown(command)} does not describe itself: {error}") from error
    if run.returncode != 0:
        how = f"ended with status {run.returncode}; {stderr_note(run.stderr)}"
        raise AgentError(f"agent command {shown(command)} does not describe itself: it {how}")
    try:
        described = json.loads(run.stdout)
        return AgentDescription(system=str(described["system"]), tools=tuple(described["tools"]))
    except (ValueError, KeyError, TypeError) as error:
        raise AgentError(
            f'agent command {shown(command)} printed {run.stdout[:200]!r}; expected {{"system": ..., "tools": [...]}}'
        ) from error


def expression_of(question: str) -> str:
    """The longest arithmetic expression in a question. Raises ValueError where it holds none."""
    found = EXPRESSION.findall(question)
    if not found:
        raise ValueError(f"the question holds no arithmetic expression: {question!r}; use arithmetic tasks")
    return str(max(found, key=len))


def calculator_demonstrations(
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
            "arguments": json.dumps({"expression": expression_of(task.question)}),
        }
        call = {"id": call_id, "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": str(task.payload["answer"])},
        ]
    return [*messages, {"role": "assistant", "content": answer}]
