"""Reads the JSON object a request brings, and says in a sentence what is wrong with one that cannot be read."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

import msgspec
from aiohttp import web

from forgejax.chat.messages import mend_surrogates
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.refusals import RefusedError


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
    body = _decode(raw)
    if not isinstance(body, dict):
        raise RefusedError(400, f"the body is a JSON {type(body).__name__}; expected an object", code="invalid_json")
    return body


def _decode(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if b"\\u" not in raw or isinstance(error, RecursionError):
            raise _refuse(error) from error
    try:
        return mend_surrogates(json.loads(raw.decode(), parse_constant=_refuse_constant, parse_float=_read_float))
    except (ValueError, RecursionError) as error:
        raise _refuse(error) from error


def _refuse(error: Exception) -> RefusedError:
    return RefusedError(400, f"the body is not valid JSON: {error}", code="invalid_json")


def _read_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:30]} is out of range")
    return number


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
