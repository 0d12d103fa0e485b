"""The lines that a worker agent and its trainer exchange, so that one process plays many episodes at once.

``{"id", "question", "base_url", "api_key"}`` comes on stdin; ``{"id", "answer"}`` or ``{"id", "error", "stop_reason"}``
goes to stdout, after one ``{"ready": true}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TIMEOUT_S = 300.0


async def work(solve: Callable[[AsyncOpenAI, str], Awaitable[str | None]]) -> None:
    """Answers lines from stdin until it ends. One client, hence one connection pool, serves every episode."""
    from openai import (  # noqa: PLC0415 (a second of start-up that other modes of an agent do not need)
        APIConnectionError,
        APIStatusError,
        AsyncOpenAI,
        BadRequestError,
        InternalServerError,
    )

    shared = AsyncOpenAI(base_url="http://set-per-episode.invalid", api_key="-", max_retries=0, timeout=TIMEOUT_S)

    async def episode(line: bytes) -> None:
        request = json.loads(line)
        client = shared.with_options(base_url=request["base_url"], api_key=request["api_key"])
        reply: dict[str, str | None]
        try:
            reply = {"id": request["id"], "answer": await solve(client, request["question"])}
        except (APIConnectionError, APIStatusError, ValueError, KeyError, IndexError, TypeError) as error:
            stop_reason = "agent_failed"
            if isinstance(error, BadRequestError) and error.code == "context_length_exceeded":
                stop_reason = "truncated"
            elif isinstance(error, APIConnectionError | InternalServerError):
                stop_reason = "environment_failed"
            reply = {"id": request["id"], "error": f"{type(error).__name__}: {error}", "stop_reason": stop_reason}
        print(json.dumps(reply), flush=True)

    reader = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()
    print(json.dumps({"ready": True}), flush=True)
    while line := await reader.readline():
        task = asyncio.create_task(episode(line))
        running.add(task)
        task.add_done_callback(running.discard)
    for task in running:
        task.cancel()
