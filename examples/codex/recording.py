"""What Codex CLI says to a model: one episode of the real program, played against a script and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgejax.agents import AgentConfig, EpisodeRunner, ProcessScaffold
from forgejax.agents.recipes import load_recipe
from forgejax.chat import ChatFormat
from forgejax.chat.messages import ChatRequest
from forgejax.environments import Score, Workspace
from forgejax.errors import AgentError
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.gateway.dialects.base import ParsedRequest
from forgejax.gateway.dialects.responses import Responses
from forgejax.gateway.memory import ReplyMemory
from forgejax.plain import from_mapping
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SessionSpec, StopReason, Task, Trajectory

CONTEXT = 200_000  # tokens of the script's model: the script is told nothing of what it is asked


class KeepingResponses(Responses):
    """The dialect, which keeps every request as it was understood."""

    def __init__(self) -> None:
        self.kept: list[ChatRequest] = []

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        parsed = super().parse(body, memory)
        self.kept.append(parsed.chat)
        return parsed


class Script:
    """A sampler that says one reply after the other."""

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        self._left = list(replies)

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        ids = self._left.pop(0)
        for id_ in ids:
            if on_tokens is not None and on_tokens([id_]):
                break
        return Completion(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.asarray(ids, np.int32),
            logprobs=np.zeros(len(ids), np.float32),
            versions=np.zeros(len(ids), np.int32),
            oldest_versions=np.zeros(len(ids), np.int32),
            finish_reason=FinishReason.STOP,
            law=request.law,
        )


class OneFolder:
    """An environment of one task, in a folder that stays."""

    held_out: Sequence[Task] = ()

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def task(self, index: int) -> Task:
        return Task(id=str(index), family="recording", level="recording", question="")

    async def open(self, task: Task) -> Workspace:
        return Workspace(directory=self._directory)

    async def close(self, workspace: Workspace) -> None: ...

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        return Score(outcome=1.0)


def record_requests(tokenizer: str, question: str, replies: Sequence[str], directory: Path) -> list[ChatRequest]:
    """The requests of an episode of Codex (recipe ``codex``) in ``directory``, to which ``replies`` are given.

    Raises AgentError where Codex is not there or does not come to its end.
    """
    return asyncio.run(_record(ChatFormat.load(tokenizer), question, replies, directory))


async def _record(chat: ChatFormat, question: str, replies: Sequence[str], directory: Path) -> list[ChatRequest]:
    agent = from_mapping(AgentConfig, load_recipe("codex").agent, "codex")
    keeping = KeepingResponses()
    script = Script([[*chat.codec.encode(reply), chat.end_of_turn_id] for reply in replies])
    gateway = Gateway(script, chat, CONTEXT, GatewayConfig(port=0), (keeping,))
    scaffold = ProcessScaffold(agent)
    await gateway.start()
    try:
        await scaffold.start()
        runner = EpisodeRunner(sessions=gateway, scaffold=scaffold, environment=OneFolder(directory), agent=agent)
        task = Task(id="0", family="recording", level="recording", question=question)
        played = await runner.run(task, session=SessionSpec())
    finally:
        await scaffold.close()
        await gateway.stop()
    if played.stop_reason is not StopReason.COMPLETED or len(keeping.kept) != len(replies):
        raise AgentError(
            f"Codex made {len(keeping.kept)} requests where {len(replies)} were to be recorded, and ended as "
            f"{played.stop_reason}: {played.error}"
        )
    return keeping.kept
