"""One server seen from afar: its sampler, its weights, its life and its books (see ``server``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from forgejax.errors import EngineError, OverloadedError
from forgejax.rollout.fleet.base import DrawnRequest
from forgejax.rollout.server.admin import (
    IdleBody,
    LoadBody,
    RecordBody,
    RequestsBody,
    StatusBody,
    TransferBody,
    TrimBody,
    decode_ids,
)
from forgejax.rollout.server.http import INSTANCE_HEADER
from forgejax.rollout.server.manifest import Manifest
from forgejax.rollout.server.wire import DrawBody, EndBody, Line, encode_request, join_completion
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest

_LINE_BYTES = 1 << 20
_RETRY_AFTER_S = 1.0  # where a server that is busy does not say
_T = TypeVar("_T")


class UnservedError(EngineError):
    """A server cannot be reached, takes no requests now, or went away: another may serve the same request."""


class RemoteSampler:
    """``types.Sampler`` over ``scripts/serve.py``, and what else it answers; use it inside one event loop, as an async
    context manager.

    ``request_deadline_s`` bounds a whole request, ``silence_s`` the time without a sign of life from the server. Every
    method raises UnservedError where it cannot be reached, and EngineError with its words where it refuses.
    """

    def __init__(self, url: str, *, request_deadline_s: float = 600.0, silence_s: float = 30.0, token: str = ""):
        self.url = url.rstrip("/")
        self._deadline_s, self._silence_s = request_deadline_s, silence_s
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(
                total=self._deadline_s, sock_connect=self._silence_s, sock_read=self._silence_s
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
            async with self._open_session.post(
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
                f"request {request.request_id}: no answer from {self.url} ({error!r}); is scripts/serve.py running "
                "there, and is request_deadline_s long enough?"
            ) from error

    # -- Weights -----------------------------------------------------------------------------------------------------

    async def begin(self, manifest: Manifest) -> str:
        """Begins a transfer of weights, and gives its name."""
        return (await self._post("/weights/begin", manifest, TransferBody)).transfer

    async def write(self, transfer: str, offset: int, data: bytes | memoryview, checksum: int) -> None:
        """The next bytes of all tensors, one behind another."""
        query = {"offset": str(offset), "checksum": str(checksum)}
        await self._ask("PUT", f"/weights/{transfer}", data=data, params=query)

    async def load(self, transfer: str, folder: str, checksums: Mapping[str, int], *, within_s: float) -> None:
        """Has the server read all tensors of a transfer from a folder."""
        body = msgspec.json.encode(LoadBody(path=folder, checksums=dict(checksums)))
        await self._ask("POST", f"/weights/{transfer}/load", data=body, within_s=within_s)

    async def commit(self, transfer: str, *, within_s: float) -> None:
        """Serves the weights of a transfer from its next decode step on."""
        body = msgspec.json.encode(IdleBody(idle_s=within_s / 2))
        await self._ask("POST", f"/weights/{transfer}/commit", data=body, within_s=within_s)

    async def abort(self, transfer: str) -> None:
        """Has the weights of a transfer forgotten."""
        await self._ask("POST", f"/weights/{transfer}/abort")

    # -- Books -------------------------------------------------------------------------------------------------------

    async def status(self) -> StatusBody:
        """What the server says of itself."""
        return _decode(await self._ask("GET", "/status"), StatusBody, self.url)

    async def requests_of(self, request_ids: Sequence[str]) -> dict[str, DrawnRequest]:
        """The server's own records of these requests, as far as it has some."""
        data = await self._ask("POST", "/requests", data=msgspec.json.encode(RequestsBody(ids=list(request_ids))))
        try:
            found = msgspec.msgpack.decode(data, type=dict[str, RecordBody])
        except msgspec.MsgspecError as error:
            raise EngineError(f"{self.url}: its records cannot be read: {error}") from error
        return {
            name: DrawnRequest(
                prompt_ids=decode_ids(record.prompt), sampled_ids=decode_ids(record.sampled), cut=record.cut
            )
            for name, record in found.items()
        }

    async def flush(self) -> None:
        """Returns once the record of every request that has ended is on the server's disk."""
        await self._ask("POST", "/flush")

    async def trim(self, version: int) -> None:
        """Requests that ended under older versions are not asked for any more."""
        await self._ask("POST", "/trim", data=msgspec.json.encode(TrimBody(version=version)))

    @property
    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EngineError("the remote sampler is not open; use it in an `async with` block")
        return self._session

    async def _post(self, path: str, body: msgspec.Struct, kind: type[_T]) -> _T:
        return _decode(await self._ask("POST", path, data=msgspec.json.encode(body)), kind, self.url)

    async def _ask(self, method: str, path: str, *, within_s: float | None = None, **fields: Any) -> bytes:
        """The body of an answer, within the silence or a longer time."""
        seconds = self._silence_s if within_s is None else within_s
        try:
            async with (
                asyncio.timeout(seconds),
                self._open_session.request(
                    method, f"{self.url}{path}", timeout=aiohttp.ClientTimeout(total=seconds), **fields
                ) as response,
            ):
                body = await response.read()
                if response.status >= 400:
                    raise EngineError(f"{self.url}{path}: {body[:500].decode(errors='replace')}")
                return body
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise UnservedError(f"no answer from {self.url}{path} within {seconds:g} s ({error!r})") from error


def _decode(data: bytes, kind: type[_T], url: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise EngineError(f"{url}: unreadable answer {data[:200]!r}: {error}; is it scripts/serve.py?") from error


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
