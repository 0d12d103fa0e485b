"""``scripts/serve.py`` as a server of tokens: the sampler of a fleet, and what the server says of itself."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from forgejax.errors import EngineError
from forgejax.rollout.clients.base import HttpClient, ServerFacts
from forgejax.rollout.fleet.remote import RemoteSampler
from forgejax.types import Completion, OnTokens, SampleRequest


class ServeClient:
    """See ``TokenServer``. Log-probs and versions are exact, for every law and every token."""

    def __init__(self, url: str, *, deadline_s: float = 600.0) -> None:
        self._sampler = RemoteSampler(url, request_deadline_s=deadline_s)
        self._http = HttpClient(url, deadline_s=deadline_s)

    async def __aenter__(self) -> Self:
        await self._sampler.__aenter__()
        await self._http.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()
        await self._sampler.__aexit__(kind, error, trace)

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        return await self._sampler.sample(request, on_tokens)

    async def look(self) -> ServerFacts:
        said = await self._http.get("/health")
        if not isinstance(said, dict) or "max_context" not in said:
            raise EngineError(
                f"{self._http.url}/health does not answer as scripts/serve.py does; say with --engine-kind what it is"
            )
        return ServerFacts(context_length=said["max_context"], version=said["version"])
