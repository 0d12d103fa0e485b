"""One server seen from afar: its sampler. What asks no more than that needs no jax."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from forgejax.errors import EngineError, OverloadedError
from forgejax.rollout.server.wire import INSTANCE_HEADER, DrawBody, EndBody, Line, encode_request, join_completion
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest

_LINE_BYTES = 1 << 20
_RETRY_AFTER_S = 1.0  # where a server that is busy does not say


class UnservedError(EngineError):
    """A server cannot be reached, takes no requests now, or went away: another may serve the same request."""


class RemoteSampler:
    """``types.Sampler`` over ``scripts/serve.py``; use it inside one event loop, as an async context manager.

    ``request_deadline_s`` bounds a whole request, ``silence_s`` the time without a sign of life from the server. Every
    method raises UnservedError where it cannot be reached, and EngineError with its words where it refuses.
    """

    def __init__(self, url: str, *, request_deadline_s: float = 600.0, silence_s: float = 30.0, token: str = ""):
        self.url = url.rstrip("/")
        self._deadline_s, self.silence_s = request_deadline_s, silence_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(
                total=self._deadline_s, sock_connect=self.silence_s, sock_read=self.silence_s
            ),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=_LINE_BYTES,
            headers=self._headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def sample(
        self, request: SampleRequest, on_tokens: OnTokens | None = None, *, instance: str = ""
    ) -> Completion:
        """See ``types.Sampler``; leaving early closes the connection, which cancels the request in the engine.

        If ``on_tokens`` asks to stop, the completion ends there; what the server drew in the meantime it counts as
        cancelled. A server process that is not ``instance`` refuses (where it is given).
        """
        headers = {INSTANCE_HEADER: instance} if instance else {}
        try:
            async with self.open_session.post(
                f"{self.url}/generate", data=encode_request(request), headers=headers
            ) as response:
                if response.status == 429:
                    told = response.headers.get("Retry-After", "")
                    wait_s = float(told) if told.isdecimal() else _RETRY_AFTER_S
                    raise OverloadedError(f"{self.url}: {(await response.text())[:500]}", wait_s)
                if response.status != 200:
                    words = f"request {request.request_id}: {self.url}: {(await response.text())[:500]}"
                    raise UnservedError(words) if response.status == 503 else EngineError(words)
                return await _read_lines(request, response, on_tokens)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise UnservedError(
                f"request {request.request_id}: no answer from {self.url} ({str(error) or repr(error)}); "
                "is scripts/serve.py running there, and is request_deadline_s long enough?"
            ) from error

    @property
    def open_session(self) -> aiohttp.ClientSession:
        """Where its requests go. Raises EngineError outside the context."""
        if self._session is None:
            raise EngineError("the remote sampler is not open; use it in an `async with` block")
        return self._session


async def _read_lines(
    request: SampleRequest, response: aiohttp.ClientResponse, on_tokens: OnTokens | None
) -> Completion:
    draws: list[DrawBody] = []
    begun = time.monotonic()
    async for raw in response.content:
        try:
            line = msgspec.json.decode(raw, type=Line)
        except msgspec.MsgspecError as error:
            raise UnservedError(f"request {request.request_id}: unreadable answer {raw[:200]!r}: {error}") from error
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
    raise UnservedError(f"request {request.request_id}: the server closed the answer before its end; ask again")
