"""The gateway in a process of its own, over a sampler that costs nothing. Lines of JSON in, lines of JSON out.

``{"open": 3}`` opens sessions and gives their ``keys``; ``{"close": true}`` closes all and gives how many ``turns``
they had; both give what memory and processor time the process has used.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SessionSpec

_CONTEXT = 4_000_000
_WORDS = ["the", "agent", "looks", "at", "a", "file", "and", "says", "what", "it", "has", "found", "there"]
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, kw_only=True)
class Options:
    """The tokenizer, the size of the prompt that agents send, and how it is answered: a token every ``every_s``."""

    tokenizer: Path
    prompt_tokens: int
    tools: int
    every_s: float = 0.0


class NullSampler:
    """Answers with the same few tokens at once; or draws tokens without end, one every ``every_s``."""

    def __init__(self, chat_format: ChatFormat, every_s: float) -> None:
        self._ids = [*chat_format.codec.encode("It is 5."), chat_format.end_of_turn_id]
        self._every_s = every_s

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        if self._every_s:
            while True:
                await asyncio.sleep(self._every_s)
                if on_tokens is not None:
                    on_tokens(self._ids[:1])
        count = len(self._ids)
        return Completion(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.asarray(self._ids, np.int32),
            logprobs=np.full(count, -1.0, np.float32),
            versions=np.zeros(count, np.int32),
            oldest_versions=np.zeros(count, np.int32),
            finish_reason=FinishReason.STOP,
            law=request.law,
        )


def make_body(chat_format: ChatFormat, tokens: int, tools: int) -> dict[str, Any]:
    """A chat completion of as many prompt tokens, ``tools`` schemas among them; a few more where words do not fit."""
    schemas = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{index}",
                "description": "Does one thing and says how it went.",
                "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
            },
        }
        for index in range(tools)
    ]

    def word(words: int) -> list[dict[str, Any]]:
        text = " ".join(_WORDS[index % len(_WORDS)] for index in range(words))
        return [{"role": "system", "content": "You are kind."}, {"role": "user", "content": text}]

    words = 1
    while len(chat_format.render(word(words), schemas)) < tokens:
        words += 1
    return {"model": "policy", "messages": word(words), "tools": schemas}


def read_usage() -> dict[str, float]:
    """MB of this process, now and at its most, and the processor seconds it has used."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rss_mb": pages * _PAGE_MB, "peak_mb": peak_mb, "cpu_s": time.process_time()}


async def serve(options: Options) -> None:
    chat_format = ChatFormat.load(options.tokenizer)
    sampler = NullSampler(chat_format, options.every_s)
    gateway = Gateway(sampler, chat_format, _CONTEXT, GatewayConfig(port=0))
    url = await gateway.start()
    body = make_body(chat_format, options.prompt_tokens, options.tools)
    tokens = len(chat_format.render(body["messages"], body["tools"]))
    print(json.dumps({"url": url, "body": body, "prompt_tokens": tokens, **read_usage()}), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    open_: list[str] = []
    while line := await reader.readline():
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if "open" in command:
            sessions = [gateway.open(SessionSpec()) for _ in range(command["open"])]
            open_ += [session.id for session in sessions]
            answer["keys"] = [session.api_key for session in sessions]
        if command.get("close"):
            answer["turns"] = sum([len(await gateway.close(id_)) for id_ in open_])
            open_.clear()
        print(json.dumps({**answer, **read_usage()}), flush=True)
    await gateway.stop()


if __name__ == "__main__":
    asyncio.run(serve(tyro.cli(Options)))
