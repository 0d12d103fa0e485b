"""SGLang's native ``POST /generate`` as a server of tokens (docs.sglang.io, Sampling Parameters and Native APIs)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import numpy as np

from forgejax.errors import EngineError
from forgejax.rollout.clients.base import (
    DrawnTokens,
    HttpClient,
    ServerFacts,
    check_served,
    read_finish,
    refuse_answer,
)
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest


class SglangClient:
    """See ``TokenServer``. SGLang gives the log-probability at the law's temperature before any truncation, unless it
    was started with SGLANG_RETURN_ORIGINAL_LOGPROB; a seed has an effect only where it draws deterministically.

    A token's version is the server's ``weight_version`` where that is a number, else 0.
    """

    def __init__(self, url: str, *, deadline_s: float = 600.0) -> None:
        self._http = HttpClient(url, deadline_s=deadline_s)

    async def __aenter__(self) -> Self:
        await self._http.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``. Raises EngineError for a bias and for a schema."""
        check_served(request, "SGLang")
        drawn, name = DrawnTokens(request, on_tokens), request.request_id
        finish: FinishReason | None = None
        cached = 0
        async with aclosing(self._http.stream("/generate", word_sglang_request(request), name)) as events:
            async for event in events:
                try:
                    meta = event["meta_info"]
                    # Chunks hold all tokens so far or, as the server was started, the new ones alone: the last are new.
                    new = meta["completion_tokens"] - len(drawn)
                    fresh = meta["output_token_logprobs"][-new:] if new > 0 else []
                    ids, logprobs = [int(item[1]) for item in fresh], [float(item[0]) for item in fresh]
                    cached = int(meta.get("cached_tokens") or 0)
                    reason: Mapping[str, Any] | None = meta.get("finish_reason")
                    if len(ids) != max(new, 0):
                        raise ValueError(f"{new} new tokens, and log-probabilities of {len(ids)}")
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise refuse_answer(name, error, event) from error
                if drawn.add(ids, logprobs, _read_version(meta.get("weight_version"))):
                    return drawn.finish(FinishReason.STOP, cached)
                if reason is not None:
                    finish = read_finish(reason.get("type"), name, reason.get("message"))
        if finish is None:
            raise EngineError(f"request {name}: the server ended its answer without saying why; ask again")
        return drawn.finish(finish, cached)

    async def look(self) -> ServerFacts:
        said = await self._http.get("/get_server_info")
        if not isinstance(said, dict):
            raise EngineError(
                f"{self._http.url} has no /get_server_info, as SGLang has; say with --engine-kind what it is"
            )
        length = said.get("context_length") or said.get("max_req_input_len")
        return ServerFacts(context_length=length if isinstance(length, int) else None)


def word_sglang_request(request: SampleRequest) -> dict[str, Any]:
    """The body of ``/generate``. What a server may have defaults for is said, so that the law is the request's."""
    law = request.law
    params: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "temperature": law.temperature,
        "top_p": law.top_p,
        "top_k": law.top_k or -1,
        "min_p": law.min_p,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop_token_ids": sorted(request.stop_ids),
        "skip_special_tokens": False,
    }
    if request.seed is not None:
        params["sampling_seed"] = request.seed
    return {
        "rid": request.request_id,
        "input_ids": np.asarray(request.prompt_ids).tolist(),
        "sampling_params": params,
        "return_logprob": True,
        "logprob_start_len": len(request.prompt_ids),
        "stream": True,
    }


def _read_version(said: object) -> int:
    return int(said) if isinstance(said, str | int) and str(said).isdecimal() else 0
