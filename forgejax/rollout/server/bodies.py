"""Request bodies as they come in, and refusals as they go out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from aiohttp import web

PATIENCE_S = 30.0
"""For a client to send its request, or to read what waits for it."""

MOST_BYTES = 64 << 20

_T = TypeVar("_T")


async def take_body(request: web.Request) -> bytes:
    """The whole body. Raises ValueError for one that does not arrive or cannot be unpacked."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await request.read()
    except web.RequestPayloadError as error:
        raise ValueError(f"the body cannot be read: {error.__cause__ or error}; check its Content-Encoding") from error
    except TimeoutError as error:
        raise ValueError(f"the body did not arrive within {PATIENCE_S:g} s; send it again") from error


async def take_json(request: web.Request, kind: type[_T]) -> _T:
    """The body as a value of ``kind``; an empty one stands for its defaults. Raises ValueError."""
    return msgspec.json.decode(await take_body(request) or b"{}", type=kind)


def refuse(status: int, why: str, *, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer that says in a sentence why nothing was done."""
    text = json.dumps({"error": why})
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)
