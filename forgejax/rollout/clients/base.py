"""What the servers of tokens have in common: they say what they are, and stream what they draw."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
import numpy as np

from forgejax.errors import EngineError
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest

_LINE_BYTES = 1 << 22
_LOOK_S = 5.0
_CONNECT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says of itself; None where it does not say."""

    context_length: int | None
    version: int | None = None


class TokenServer(Protocol):
    """A ``types.Sampler`` in another process; an async context manager inside one event loop."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion: ...

    async def look(self) -> ServerFacts:
        """Asks the server what it is. Raises EngineError within seconds where it does not answer."""
        ...


def check_served(request: SampleRequest, server: str) -> None:
    """Raises EngineError for what a server of another project is not asked for: masks, and log-probs with a bias."""
    if request.law.logit_bias:
        raise EngineError(
            f"request {request.request_id} has a logit_bias, and {server} is not known to give log-probabilities with "
            "it; leave it out, or serve the policy with scripts/serve.py"
        )
    if request.grammar is not None:
        raise EngineError(
            f"request {request.request_id} is bound to a JSON schema, which {server} is not asked to hold to; leave it "
            "out, or serve the policy with scripts/serve.py"
        )


class HttpClient:
    """The HTTP side of a server. ``deadline_s`` bounds a whole request; leaving early closes its connection."""

    def __init__(self, url: str, *, deadline_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=_CONNECT_S)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=_LINE_BYTES
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str) -> Any:
        """A page's JSON, and None where there is no such page. Raises EngineError."""
        session, where = self._require_session(), f"{self.url}{path}"
        timeout = aiohttp.ClientTimeout(total=_LOOK_S)
        try:
            async with session.get(where, timeout=timeout) as response:
                if response.status == 404:
                    return None
                if response.status != 200:
                    raise EngineError(f"{where} answers {response.status}: {(await response.text())[:500]}")
                return json.loads(await response.read())
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise EngineError(
                f"no answer from {where} ({str(error) or repr(error)}); is a server of tokens running there?"
            ) from error
        except ValueError as error:
            raise EngineError(f"{where} does not answer in JSON ({error}); is it the address of another?") from error

    async def stream(self, path: str, body: Any, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of an event stream, up to its ``[DONE]``. ``name`` is the request's in errors.

        Raises EngineError, also where the stream breaks off before its end.
        """
        where = f"{self.url}{path}"
        try:
            async with self._require_session().post(where, json=body) as response:
                if response.status != 200:
                    said = (await response.text())[:500]
                    raise EngineError(f"request {name}: {where} answers {response.status}: {said}")
                async for raw in response.content:
                    line = raw.strip()
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    yield _read_event(data, name)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise EngineError(
                f"request {name}: no answer from {where} ({str(error) or repr(error)}); is the server running?"
            ) from error
        raise EngineError(f"request {name}: {where} closed its answer before the end; ask again")

    def _require_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EngineError("the client is not open; use it in an `async with` block")
        return self._session


class DrawnTokens:
    """What has been drawn of one request so far."""

    def __init__(self, request: SampleRequest, on_tokens: OnTokens | None) -> None:
        self._request = request
        self._on_tokens = on_tokens
        self._begun = time.monotonic()
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[int], logprobs: Sequence[float], version: int) -> bool:
        """Takes a run of tokens; whether the caller wants no more. Raises EngineError where log-probs are missing."""
        if len(ids) != len(logprobs):
            raise EngineError(
                f"request {self._request.request_id}: {len(ids)} tokens came with {len(logprobs)} log-probabilities; "
                "the server must give one for each"
            )
        self._ids += ids
        self._logprobs += logprobs
        self._versions += [version] * len(ids)
        return bool(ids) and self._on_tokens is not None and self._on_tokens(ids) is True

    def finish(self, reason: FinishReason, cached_tokens: int = 0) -> Completion:
        versions = np.asarray(self._versions, np.int32)
        return Completion(
            request_id=self._request.request_id,
            prompt_ids=np.asarray(self._request.prompt_ids, np.int32),
            token_ids=np.asarray(self._ids, np.int32),
            logprobs=np.asarray(self._logprobs, np.float32),
            versions=versions,
            oldest_versions=versions,
            finish_reason=reason,
            law=self._request.law,
            cached_tokens=cached_tokens,
            generate_s=time.monotonic() - self._begun,
        )


def read_finish(kind: object, name: str, why: object = None) -> FinishReason:
    """``stop`` or ``length``. Raises EngineError for an end that is neither."""
    if kind == "stop":
        return FinishReason.STOP
    if kind == "length":
        return FinishReason.LENGTH
    raise EngineError(f"request {name}: the server ended it as {kind!r}{f': {why}' if why else ''}")


def refuse_answer(name: str, error: Exception, given: object) -> EngineError:
    """What is raised for an answer of another shape than is documented."""
    return EngineError(f"request {name}: unreadable answer {str(given)[:200]!r}: {error!r}")


def _read_event(data: bytes, name: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise refuse_answer(name, error, data) from error
    if not isinstance(event, dict):
        raise EngineError(f"request {name}: unreadable answer {data[:200]!r}: expected an object")
    if event.get("error"):
        raise EngineError(f"request {name}: the server says {str(event['error'])[:500]}")
    return event
