"""Reads the JSON object a request brings, and says in a sentence what is wrong with one that cannot be read."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from aiohttp import web

from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.refusals import RefusedError

# An escape is a whole pair of surrogates, half of one (group 1), or anything else, as a backslash.
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\(u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)


async def read_body(http: web.Request, config: GatewayConfig) -> dict[str, Any]:
    """The body as an object; halves of surrogate pairs, which some agents cut texts to, become U+FFFD.

    Raises RefusedError: 400 for what is no JSON object, 408 for what does not arrive, 413 for what is too large.
    """
    try:
        async with asyncio.timeout(None if http.content.is_eof() else config.body_timeout_s):
            raw = await http.read()
    except web.HTTPRequestEntityTooLarge as error:
        message = f"the body has more than {config.limits.body_bytes} bytes; send fewer or shorter messages"
        raise RefusedError(413, message, code="body_too_large") from error
    except web.RequestPayloadError as error:
        message = f"the body cannot be read: {error.__cause__ or error}; check its Content-Encoding"
        raise RefusedError(400, message, code="invalid_body") from error
    except TimeoutError as error:
        message = f"the body did not arrive within {config.body_timeout_s:g} s; send it again"
        raise RefusedError(408, message, code="timeout") from error
    body = await _decode(raw)
    if not isinstance(body, dict):
        raise RefusedError(400, f"the body is a JSON {type(body).__name__}; expected an object", code="invalid_json")
    return body


async def _decode(raw: bytes) -> Any:
    try:
        try:
            return msgspec.json.decode(raw)
        except msgspec.DecodeError:
            if b"\\u" not in raw:
                raise
        # On another thread, for there may be millions of them.
        return msgspec.json.decode(await asyncio.to_thread(_HALF.sub, _mend_half, raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _mend_half(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if escape[1] else escape[0]
