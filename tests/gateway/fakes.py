"""What the gateway's tests stand on: an engine that reads its answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.gateway.dialects import DIALECTS, Dialect
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SamplingLaw, SessionSpec


class ScriptedSampler:
    """Draws the scripted ids, one by one; the request's stop ids end a reply. Keeps every request it was given."""

    def __init__(self, chat_format: ChatFormat, *replies: str | Sequence[int], delay_s: float = 0.0) -> None:
        self.chat_format = chat_format
        self.script = [chat_format.codec.encode(reply) if isinstance(reply, str) else reply for reply in replies]
        self.delay_s = delay_s
        self.requests: list[SampleRequest] = []
        self.returned: list[Completion] = []

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)
        drawn: list[int] = []
        reason = FinishReason.LENGTH
        for id_ in self.script[len(self.requests) - 1][: request.max_tokens]:
            await asyncio.sleep(self.delay_s)
            drawn.append(id_)
            if (on_tokens is not None and on_tokens([id_])) or id_ in request.stop_ids:
                reason = FinishReason.STOP
                break
        self.returned.append(completion(request, drawn, reason))
        return self.returned[-1]


def completion(request: SampleRequest, ids: Sequence[int], reason: FinishReason) -> Completion:
    return Completion(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        token_ids=np.asarray(ids, np.int32),
        logprobs=(-np.arange(1, len(ids) + 1) / 8).astype(np.float32),
        versions=np.full(len(ids), 3, np.int32),
        oldest_versions=np.full(len(ids), 3, np.int32),
        finish_reason=reason,
        law=request.law,
        cached_tokens=min(4, len(request.prompt_ids)),
    )


async def started(
    sampler: ScriptedSampler, context_length: int = 4096, dialects: Sequence[Dialect] = DIALECTS, **settings: Any
) -> Gateway:
    config = GatewayConfig(port=0, **settings)
    gateway = Gateway(sampler, sampler.chat_format, context_length, config, dialects)
    await gateway.start()
    return gateway


TRAINING = SessionSpec(law=SamplingLaw(), seed=7)
