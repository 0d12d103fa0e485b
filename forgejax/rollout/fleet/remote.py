"""The sampler of an engine behind HTTP (see ``server``)."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from forgejax.errors import EngineError, OverloadedError
from forgejax.rollout.server.wire import DrawBody, EndBody, Line, encode_request, join_completion
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest

_LINE_BYTES = 1 << 20
_RETRY_AFTER_S = 1.0  # where a server that is busy does not say


class RemoteSampler:
    """``types.Sampler`` over ``scripts/serve.py``; use it inside one event loop, as an async context manager.

    ``request_deadline_s`` bounds a whole request, ``silence_s`` the time without a sign of life from the server.
    """

    def __init__(self, url: str, *, request_deadline_s: float = 600.0, silence_s: float = 30.0):
        self._url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=request_deadline_s, sock_connect=silence_s, sock_read=silence_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=_LINE_BYTES
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``; leaving early closes the connection, which cancels the request in the engine.

        If ``on_tokens`` asks to stop, the completion ends there; what the server drew in the meantime it counts as
        cancelled.
        """
        if self._session is None:
            raise EngineError("the remote sampler is not open; use it in an `async with` block")
        try:
            async with self._session.post(f"{self._url}/generate", data=encode_request(request)) as response:
                if response.status == 429:
                    told = response.headers.get("Retry-After", "")
                    wait_s = float(told) if told.isdecimal() else _RETRY_AFTER_S
                    raise OverloadedError(f"{self._url}: {(await response.text())[:500]}", wait_s)
                if response.status != 200:
                    raise EngineError(f"request {request.request_id}: {self._url}: {(await response.text())[:500]}")
                return await _read_lines(request, response, on_tokens)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise EngineError(
                f"request {request.request_id}: no answer from {self._url} ({error!r}); is scripts/serve.py running "
                "there, and is request_deadline_s long enough?"
            ) from error


async def _read_lines(
    request: SampleRequest, response: aiohttp.ClientResponse, on_tokens: OnTokens | None
) -> Completion:
    draws: list[DrawBody] = []
    begun = time.monotonic()
    async for raw in response.content:
        try:
            line = msgspec.json.decode(raw, type=Line)
        except msgspec.MsgspecError as error:
            raise EngineError(f"request {request.request_id}: unreadable answer {raw[:200]!r}: {error}") from error
        if line.error is not None:
            raise EngineError(line.error)
        if line.end is not None:
            return join_completion(request, draws, line.end)
        if line.draw is not None:
            draws.append(line.draw)
            if on_tokens is not None and on_tokens(line.draw.token_ids) is True:
                elapsed = time.monotonic() - begun
                end = EndBody(finish_reason=FinishReason.STOP, cached_tokens=0, queued_s=0.0, generate_s=elapsed)
                return join_completion(request, draws, end)
    raise EngineError(f"request {request.request_id}: the server closed the answer before its end; ask again")
