"""The doors agents try: the paths a page is found under, and what those hear who knock elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from forgejax.gateway.dialects import Dialect
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.refusals import RefusedError

_log = logging.getLogger(__name__)
_NOBODYS = "none"
_CORS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Max-Age": "86400",
}


def list_paths(path: str) -> tuple[str, ...]:
    """The ways agents spell ``path``: with a slash behind it, and with the ``/v1`` of their base address left out, or
    there twice where an agent adds its own to one that ends in it."""
    if not path.startswith("/v1/"):
        return path, f"{path}/"
    bare = path.removeprefix("/v1")
    return tuple(f"{spelled}{slash}" for spelled in (path, bare, f"/v1{path}") for slash in ("", "/"))


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
            reason = f"{request.method} {request.path}: {error.reason}; served are {served}"
            refusal = RefusedError(error.status, reason, code="not_served")
        except Exception:  # noqa: BLE001 (a bug of ours is the agent's 500 and our log's traceback)
            _log.exception("%s %s failed", request.method, request.path)
            refusal = RefusedError(500, "the gateway failed; its log says why", code="internal_error")
        headers = {} if refusal.retry_after_s is None else {"Retry-After": f"{refusal.retry_after_s:.0f}"}
        return web.json_response(dialect.error(refusal), status=refusal.status, headers=headers)

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
    bare = "/" + path.strip("/").removeprefix("v1/").removeprefix("v1/")
    covering = [
        (len(route.path), dialect)
        for dialect in dialects
        for route in dialect.routes
        if route.covers(path) or route.covers(f"/v1{bare}")
    ]
    return max(covering, key=lambda found: found[0])[1] if covering else None
