"""One server seen from afar: its weights, its life and its books, beside its sampler (see ``server``)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import msgspec

from forgejax.errors import EngineError
from forgejax.rollout.fleet.base import DrawnRequest
from forgejax.rollout.fleet.remote import RemoteSampler, UnservedError
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
from forgejax.rollout.server.manifest import Manifest

_T = TypeVar("_T")


class RemoteEngine(RemoteSampler):
    """And what else ``scripts/serve.py`` answers.

    Every method raises UnservedError where it cannot be reached, and EngineError with its words where it refuses.
    """

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

    async def _post(self, path: str, body: msgspec.Struct, kind: type[_T]) -> _T:
        return _decode(await self._ask("POST", path, data=msgspec.json.encode(body)), kind, self.url)

    async def _ask(self, method: str, path: str, *, within_s: float | None = None, **fields: Any) -> bytes:
        """The body of an answer, within the silence or a longer time."""
        seconds = self.silence_s if within_s is None else within_s
        try:
            async with (
                asyncio.timeout(seconds),
                self.open_session.request(
                    method, f"{self.url}{path}", timeout=aiohttp.ClientTimeout(total=seconds), **fields
                ) as response,
            ):
                body = await response.read()
                if response.status >= 400:
                    raise EngineError(f"{self.url}{path}: {body[:500].decode(errors='replace')}")
                return body
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise UnservedError(
                f"no answer from {self.url}{path} within {seconds:g} s ({str(error) or repr(error)})"
            ) from error


def _decode(data: bytes, kind: type[_T], url: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise EngineError(f"{url}: unreadable answer {data[:200]!r}: {error}; is it scripts/serve.py?") from error
