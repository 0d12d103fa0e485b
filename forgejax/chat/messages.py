"""What an agent asks of the policy, whatever wire format it spoke."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forgejax.types import SamplingLaw

Message = Mapping[str, Any]
"""A message as chat templates read it.

``role`` and ``content`` (always a string) are present; an assistant's ``tool_calls`` are
``{"id", "type": "function", "function": {"name", "arguments"}}`` with the arguments as an object (a string only where
they were not JSON), and its ``reasoning_content`` what it thought; a tool's message may carry ``tool_call_id`` and
``name``.
"""

Tool = Mapping[str, Any]
"""A function tool: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What an agent asks of the policy, whatever wire format it spoke. ``tools`` is empty where none may be called."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    law: SamplingLaw = field(default_factory=SamplingLaw)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
