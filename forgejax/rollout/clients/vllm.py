"""vLLM's ``POST /v1/completions``, of token ids, as a server of tokens (docs.vllm.ai, OpenAI-compatible server)."""

from __future__ import annotations

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
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, SamplingLaw


class VllmClient:
    """See ``TokenServer``. vLLM gives the log-probability at temperature 1 (``raw_logprobs``, its default): only laws
    whose log-probability that is are served. Versions are 0: the server knows none.
    """

    def __init__(self, url: str, *, deadline_s: float = 600.0) -> None:
        self._http = HttpClient(url, deadline_s=deadline_s)
        self._model: str | None = None

    async def __aenter__(self) -> Self:
        await self._http.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``. Raises EngineError for a law of another temperature than 0 and 1, a bias, a schema."""
        check_served(request, "vLLM")
        if not gives_logprobs_of(request.law):
            raise EngineError(
                f"request {request.request_id} asks for temperature {request.law.temperature:g}, and vLLM gives "
                "log-probabilities at temperature 1 alone; set the law of every request with --temperature 1"
            )
        if self._model is None:
            await self.look()
        drawn, name = DrawnTokens(request, on_tokens), request.request_id
        finish: FinishReason | None = None
        cached = 0
        async with aclosing(self._http.stream("/v1/completions", self._word_request(request), name)) as events:
            async for event in events:
                try:
                    usage = event.get("usage") or {}
                    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or cached)
                    if not event["choices"]:
                        continue
                    choice = event["choices"][0]
                    ids = [int(id_) for id_ in choice.get("token_ids") or ()]
                    logprobs = [float(value) for value in (choice.get("logprobs") or {}).get("token_logprobs") or ()]
                    reason = choice.get("finish_reason")
                except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                    raise refuse_answer(name, error, event) from error
                if drawn.add(ids, logprobs, 0):
                    return drawn.finish(FinishReason.STOP, cached)
                if reason is not None:
                    finish = read_finish(reason, name)
        if finish is None:
            raise EngineError(f"request {name}: the server ended its answer without saying why; ask again")
        return drawn.finish(finish, cached)

    async def look(self) -> ServerFacts:
        said = await self._http.get("/v1/models")
        try:
            model = said["data"][0]
            self._model = str(model["id"])
            length = model.get("max_model_len")
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError(
                f"{self._http.url}/v1/models names no model, as vLLM's does; say with --engine-kind what it is"
            ) from error
        return ServerFacts(context_length=length if isinstance(length, int) else None)

    def _word_request(self, request: SampleRequest) -> dict[str, Any]:
        law = request.law
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": np.asarray(request.prompt_ids).tolist(),
            "max_tokens": request.max_tokens,
            "temperature": law.temperature,
            "top_p": law.top_p,
            "top_k": law.top_k,
            "min_p": law.min_p,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "stop_token_ids": sorted(request.stop_ids),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body if request.seed is None else body | {"seed": request.seed}


def gives_logprobs_of(law: SamplingLaw) -> bool:
    """Whether the log-probability at temperature 1, before any truncation, is the one a completion holds."""
    return law.temperature in (0.0, 1.0)
