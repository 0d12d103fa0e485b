"""The doors agents try: the paths a page is found under, and what those hear who knock elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from forgejax.gateway.dialects import Dialect
from forgejax.gateway.keys import KEYED, get_logger, hide_keys
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.refusals import RefusedError

_log = get_logger(__name__)
_KEYED = re.compile("^" + re.escape(KEYED).replace(re.escape("{key}"), "[^/]+"))
_NOBODYS = "none"
_CORS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Max-Age": "86400",
}


def list_paths(path: str) -> tuple[str, ...]:
    """The ways agents spell ``path``: with a slash behind it, with the ``/v1`` of their base address left out, or there
    twice where an agent adds its own to one that ends in it; and each of these behind a key."""
    bare = path.removeprefix("/v1")
    spelled = [path, bare, f"/v1{path}"] if path.startswith("/v1/") else [path]
    return tuple(f"{keyed}{each}{slash}" for keyed in ("", KEYED) for each in spelled for slash in ("", "/"))


async def allow_origin(_: web.Request, response: web.StreamResponse) -> None:
    """Lets pages of any origin read a response; without a key they get nothing."""
    response.headers["Access-Control-Allow-Origin"] = "*"


def word_errors(dialects: Sequence[Dialect], metrics: GatewayMetrics) -> Middleware:
    """Words every error as the dialect whose path it is words it, counts requests, and lets browsers ask."""
    served = ", ".join(route.path for dialect in dialects for route in dialect.routes)

    async def answer(request: web.Request, handler: Handler, dialect: Dialect) -> web.StreamResponse:
        try:
            return await handler(request)
        except RefusedError as error:
            refusal = error
        except web.HTTPException as error:
            if error.status < 400:
                raise
            reason = f"{request.method} {hide_keys(request.path)}: {error.reason}; served are {served}"
            refusal = RefusedError(error.status, reason, code="not_served")
        except Exception:  # noqa: BLE001 (a bug of ours is the agent's 500 and our log's traceback)
            _log.exception("%s %s failed", request.method, request.path)
            refusal = RefusedError(500, "the gateway failed; its log says why", code="internal_error")
        headers = (
            {} if refusal.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(refusal.retry_after_s)))}
        )
        status = dialect.statuses.get(refusal.code or "", refusal.status)
        return web.json_response(dialect.error(refusal), status=status, headers=headers)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=_CORS)
        owner = _find_dialect(dialects, request.path)
        response = await answer(request, handler, owner or dialects[0])
        if owner is not None or response.status >= 400:
            name = _NOBODYS if owner is None else owner.name
            metrics.requests.labels(name, str(response.status)).inc()
        return response

    return guard


def _find_dialect(dialects: Sequence[Dialect], path: str) -> Dialect | None:
    """The dialect of the longest route that covers ``path``."""
    path = _KEYED.sub("", path)
    bare = "/" + path.strip("/").removeprefix("v1/").removeprefix("v1/")
    covering = [
        (len(route.path), dialect)
        for dialect in dialects
        for route in dialect.routes
        if route.covers(path) or route.covers(f"/v1{bare}")
    ]
    return max(covering, key=lambda found: found[0])[1] if covering else None
