"""The pages of a gateway that stands alone: its sessions and what was recorded of them, and whether it is ready."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from forgejax.errors import EngineError
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.dialects.base import find_bearer
from forgejax.gateway.http.bodies import read_body
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.sessions import SessionLog
from forgejax.gateway.walk_in import StandAlone, WalkInSessions
from forgejax.types import Purpose, SamplingLaw, SessionSpec, Turn


class OpenBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``POST /sessions`` takes: as ``SessionSpec``, and the key, which is made up where it is left out."""

    key: str | None = None
    purpose: Purpose = "train"
    law: SamplingLaw | None = None
    seed: int | None = None


def add_session_pages(
    app: web.Application, sessions: WalkInSessions, rules: StandAlone, config: GatewayConfig, url: Callable[[], str]
) -> None:
    """``GET`` and ``POST /sessions``, ``GET`` and ``DELETE /sessions/{id}``, all of them for the admin's token alone;
    ``GET /ready`` for everybody. ``url`` is told to whoever opens a session."""

    def guard(handler: Handler) -> Handler:
        async def answer(http: web.Request) -> web.StreamResponse:
            given = find_bearer(http.headers) or ""
            if not hmac.compare_digest(given.encode("utf-8", "replace"), rules.admin_token.encode()):
                message = "this page is for the gateway's owner; send its token as 'Authorization: Bearer TOKEN'"
                raise RefusedError(401, message, code="invalid_api_key")
            return await handler(http)

        return answer

    async def list_sessions(_: web.Request) -> web.Response:
        found = [
            {"id": session.id, "name": name, "turns": len(session.turns()), "idle_s": round(idle_s, 3)}
            for name, session, idle_s in sessions.list_open()
        ]
        return web.json_response({"sessions": found})

    async def open_session(http: web.Request) -> web.Response:
        try:
            body = msgspec.convert(await read_body(http, config), OpenBody)
        except msgspec.ValidationError as error:
            raise RefusedError(400, f"the body is no session: {error}", code="invalid_value") from error
        key = body.key
        if key is not None and sessions.holds(key):
            raise RefusedError(409, "a session is open under this key; close it, or give another", code="key_taken")
        session = sessions.open(SessionSpec(purpose=body.purpose, law=body.law, seed=body.seed), key)
        opened = {"id": session.id, "api_key": session.api_key if key is None else key, "base_url": f"{url()}/v1"}
        return web.json_response(opened, status=201)

    async def show_session(http: web.Request) -> web.Response:
        session = sessions.get(http.match_info["id"])
        return await _word_session(session, session.turns(), still_open=True)

    async def close_session(http: web.Request) -> web.Response:
        session = sessions.get(http.match_info["id"])
        return await _word_session(session, await sessions.close(session.id), still_open=False)

    async def show_ready(_: web.Request) -> web.Response:
        try:
            return web.json_response({"status": "ok", "engine": dict(await rules.look())})
        except EngineError as error:
            raise RefusedError(
                503, f"the engine is not there: {error}", code="engine_error", retry_after_s=2
            ) from error

    app.router.add_get("/sessions", guard(list_sessions))
    app.router.add_post("/sessions", guard(open_session))
    app.router.add_get("/sessions/{id}", guard(show_session))
    app.router.add_delete("/sessions/{id}", guard(close_session))
    app.router.add_get("/ready", show_ready)


async def _word_session(session: SessionLog, turns: Sequence[Turn], *, still_open: bool) -> web.Response:
    body = await asyncio.to_thread(_encode_session, session.id, turns, still_open)
    return web.Response(body=body, content_type="application/json")


def _encode_session(id_: str, turns: Sequence[Turn], still_open: bool) -> bytes:
    worded = [_word_turn(turn, turns) for turn in turns]
    return msgspec.json.encode({"id": id_, "open": still_open, "turns": worded})


def _word_turn(turn: Turn, turns: Sequence[Turn]) -> dict[str, Any]:
    """``prompt_ids`` are those behind the prompt and the reply of the parent, where there is one."""
    done = turn.completion
    known = 0
    if turn.parent is not None:
        before = turns[turn.parent].completion
        known = len(before.prompt_ids) + len(before.token_ids)
    return {
        "index": turn.index,
        "parent": turn.parent,
        "branch": turn.branch,
        "prompt_tokens": len(done.prompt_ids),
        "prompt_ids": done.prompt_ids[known:].tolist(),
        "token_ids": done.token_ids.tolist(),
        "logprobs": done.logprobs.tolist(),
        "versions": done.versions.tolist(),
        "oldest_versions": done.oldest_versions.tolist(),
        "finish_reason": done.finish_reason.value,
        "law": done.law,
        "untrainable": turn.untrainable,
        "tool_calls": turn.tool_calls,
        "malformed_tool_calls": turn.malformed_tool_calls,
        "cached_tokens": done.cached_tokens,
        "seconds": turn.finished_at - turn.requested_at,
    }
