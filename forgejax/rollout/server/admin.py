"""What changes a served engine, and what it says of itself, over HTTP.

Weights come in phases, so that many servers can take a version together: ``POST /weights/begin`` with a ``Manifest``
gives a transfer; ``PUT /weights/TRANSFER?offset=..&checksum=..`` takes the bytes of all tensors one behind another, or
``POST /weights/TRANSFER/load`` reads a folder; ``POST /weights/TRANSFER/commit`` serves them, ``.../abort`` forgets
them. A transfer that stands still for a minute, or that another one follows, is forgotten as well. Weights that the
server's own process has made (``ServedEngine.hand_over``) are committed alike. ``POST /publish``
``{"path": "...", "version": n}`` loads saved weights at once. ``POST /pause``, ``/resume``, ``/sleep``, ``/wake``;
``GET /status``; ``POST /requests``, ``/flush`` and ``/trim`` for the request log. Refusals are 409 and a sentence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from aiohttp import web
from aiohttp.typedefs import Handler

from forgejax.errors import EngineError, ForgejaxError
from forgejax.rollout.server.bodies import refuse, take_body, take_json
from forgejax.rollout.server.manifest import Manifest
from forgejax.rollout.server.served import EngineState, ReadWeights, ServedEngine
from forgejax.rollout.server.staging import Staging

STALL_S = 60.0
"""A transfer of weights that gets nothing for so long is forgotten."""

_IDLE_S = 60.0


class PublishBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which weights to load, and the version their tokens will carry."""

    path: str
    version: int


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the tensors of a transfer lie, and CRC-32 of each."""

    path: str
    checksums: dict[str, int]


class IdleBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long requests under way may take to end."""

    idle_s: float = _IDLE_S


class TransferBody(msgspec.Struct, frozen=True):
    """A transfer that was begun."""

    transfer: str


class RequestsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests to be looked up."""

    ids: list[str]


class TrimBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that ended under older versions are not asked for any more."""

    version: int


class RecordBody(msgspec.Struct, frozen=True):
    """One request of the log, in MessagePack; ids as little-endian int32. ``cut``: nobody was given all of it."""

    prompt: bytes
    sampled: bytes
    cut: bool


class StatusBody(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself; tokens and requests as in ``EngineAccount``, since this process began.

    ``inherited`` counts the tokens that its log holds of earlier processes, ``damaged`` the damaged records in it.
    """

    instance: str
    state: EngineState
    healthy: bool
    version: int
    publication: str
    slots: int
    active: int
    waiting: int
    sampled: int
    returned: int
    cancelled: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    inherited: int
    damaged: int


@dataclass(frozen=True, kw_only=True)
class PublishRoot:
    """Weights may be loaded from below ``root``; ``read`` reads saved ones."""

    root: Path
    read: ReadWeights

    def resolve(self, path: str) -> Path:
        """Raises EngineError for a path that is not below the root."""
        try:
            root, found = self.root.resolve(), Path(path).resolve()
        except (ValueError, OSError, RuntimeError) as error:
            raise EngineError(f"{path!r} is no path that can be read: {error}") from error
        if not found.is_relative_to(root):
            raise EngineError(f"{found} is not below the publish directory {root}; write the weights there")
        return found


class EngineAdmin:
    """The handlers. Belongs to the event loop of its engine."""

    def __init__(self, served: ServedEngine, publish_root: PublishRoot | None):
        self._served, self._root = served, publish_root
        self._staging: Staging | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._turn = asyncio.Lock()  # of the transfer

    def list_routes(self) -> list[web.RouteDef]:
        posts: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            "/weights/begin": self.begin,
            "/weights/{transfer}/load": self.load,
            "/weights/{transfer}/commit": self.commit,
            "/weights/{transfer}/abort": self.abort,
            "/publish": self.publish,
            "/pause": self.pause,
            "/resume": self.resume,
            "/sleep": self.sleep,
            "/wake": self.wake,
            "/requests": self.requests,
            "/flush": self.flush,
            "/trim": self.trim,
        }
        routes = [web.post(path, _word_errors(handler)) for path, handler in posts.items()]
        routes.append(web.put("/weights/{transfer}", _word_errors(self.write)))
        routes.append(web.get("/status", self.status))
        return routes

    # -- Weights -----------------------------------------------------------------------------------------------------

    async def begin(self, request: web.Request) -> web.Response:
        manifest = await take_json(request, Manifest)
        async with self._turn:
            self._forget()
            self._staging = Staging(manifest, self._served.engine.abstract_params)
            self._wait_for_more()
            return _answer(TransferBody(transfer=self._staging.transfer))

    async def write(self, request: web.Request) -> web.Response:
        data = await take_body(request)
        offset, checksum = _read_count(request, "offset"), _read_count(request, "checksum")
        async with self._turn:
            staging = self._find(request)
            await asyncio.to_thread(staging.write, offset, data, checksum)
            self._wait_for_more()
        return web.Response(status=204)

    async def load(self, request: web.Request) -> web.Response:
        body = await take_json(request, LoadBody)
        async with self._turn:
            staging, root = self._find(request), self._require_root()
            await asyncio.to_thread(staging.load, root.resolve(body.path), body.checksums)
            self._wait_for_more()
        return web.Response(status=204)

    async def commit(self, request: web.Request) -> web.Response:
        body = await take_json(request, IdleBody)
        transfer = request.match_info["transfer"]
        async with self._turn:
            handed = self._served.find_handed(transfer)
            if handed is not None:
                params, version = handed
            else:
                staging = self._find(request)
                self._forget()
                params, version = staging.join(), staging.version
            await self._served.publish(params, version, transfer, idle_s=body.idle_s)
        return web.json_response({"version": version})

    async def abort(self, request: web.Request) -> web.Response:
        async with self._turn:
            self._find(request)
            self._forget()
        return web.Response(status=204)

    async def publish(self, request: web.Request) -> web.Response:
        body = await take_json(request, PublishBody)
        root = self._require_root()
        async with self._turn:
            path, like = root.resolve(body.path), self._served.engine.abstract_params
            params = await asyncio.to_thread(root.read, path, like)
            await self._served.publish(params, body.version, f"file-{body.version}", idle_s=_IDLE_S)
        return web.json_response({"version": body.version})

    # -- Its life ----------------------------------------------------------------------------------------------------

    async def pause(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"active": await self._served.pause(idle_s=(await take_json(request, IdleBody)).idle_s)}
        )

    async def resume(self, _: web.Request) -> web.Response:
        await self._served.resume()
        return web.Response(status=204)

    async def sleep(self, request: web.Request) -> web.Response:
        await self._served.sleep(idle_s=(await take_json(request, IdleBody)).idle_s)
        return web.Response(status=204)

    async def wake(self, _: web.Request) -> web.Response:
        await self._served.wake()
        return web.Response(status=204)

    # -- Its books ---------------------------------------------------------------------------------------------------

    async def status(self, _: web.Request) -> web.Response:
        served, log = self._served, self._served.request_log
        metrics = served.metrics()
        counts = {
            name: sum(getattr(metrics, f"tokens_{name}").values())
            for name in ("sampled", "returned", "cancelled", "failed")
        }
        return _answer(
            StatusBody(
                instance=served.instance,
                state=served.state,
                healthy=served.healthy,
                version=served.version,
                publication=served.publication,
                slots=metrics.slots,
                active=metrics.active,
                waiting=metrics.waiting,
                prompt_tokens=metrics.prompt_tokens,
                cached_tokens=metrics.cached_tokens,
                computed_tokens=metrics.computed_tokens,
                inherited=log.inherited.sampled if log is not None else 0,
                damaged=await asyncio.to_thread(lambda: log.damaged) if log is not None else 0,
                **counts,
            )
        )

    async def requests(self, request: web.Request) -> web.Response:
        body, log = await take_json(request, RequestsBody), self._served.request_log
        found = await asyncio.to_thread(lambda: [log.find(name) for name in body.ids]) if log is not None else []
        records = {
            entry.request_id: RecordBody(
                prompt=entry.prompt_ids.astype("<i4").tobytes(),
                sampled=entry.sampled_ids.astype("<i4").tobytes(),
                cut=entry.finish_reason == "cancelled",
            )
            for entry in found
            if entry is not None
        }
        return web.Response(body=msgspec.msgpack.encode(records), content_type="application/msgpack")

    async def flush(self, _: web.Request) -> web.Response:
        if self._served.request_log is not None:
            await asyncio.to_thread(self._served.request_log.flush)
        return web.Response(status=204)

    async def trim(self, request: web.Request) -> web.Response:
        body = await take_json(request, TrimBody)
        if self._served.request_log is not None:
            self._served.request_log.trim(body.version)
        return web.Response(status=204)

    def _find(self, request: web.Request) -> Staging:
        staging, asked = self._staging, request.match_info["transfer"]
        if staging is None or staging.transfer != asked:
            raise EngineError(
                f"there is no transfer {asked}: it has ended, stood still for {STALL_S:g} s, or another was begun; "
                "begin anew"
            )
        return staging

    def _wait_for_more(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(STALL_S, self._forget)

    def _forget(self) -> None:
        self._staging = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _require_root(self) -> PublishRoot:
        if self._root is None:
            raise EngineError("this server loads no weights from files; start it with a publish directory")
        return self._root


def decode_ids(data: bytes) -> np.ndarray:
    """The ids in a ``RecordBody``."""
    return np.frombuffer(data, "<i4").astype(np.int32)


def _read_count(request: web.Request, name: str) -> int:
    given = request.query.get(name, "")
    if not (given.isascii() and given.isdigit() and len(given) < 20):
        raise ValueError(f"{name} is {given[:40]!r}; expected a number of at least 0, as in ?offset=0&checksum=CRC32")
    return int(given)


def _answer(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def _word_errors(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ValueError as error:
            return refuse(400, f"{error}")
        except ForgejaxError as error:
            return refuse(409, str(error))

    return answer
