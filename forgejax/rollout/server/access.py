"""Who may ask a server: anybody on this machine, or whoever knows its token."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from forgejax.errors import ConfigError

_OPEN_PATHS = ("/health", "/ready")


def check_exposure(host: str, token: str) -> None:
    """Raises ConfigError for an address that others can reach, without a token that keeps them out."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who it stands for is known to the network alone
        loopback = False
    if not loopback and not token:
        raise ConfigError(
            f"host {host} can be reached from other machines, and there is no token; set the environment variable "
            "that --token-env names, or listen on 127.0.0.1"
        )


def make_bearer_check(token: str) -> Middleware:
    """Answers 401 to requests without the token, but for those that ask whether the server is up."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in _OPEN_PATHS and not _knows(token, request.headers.get("Authorization", "")):
            return web.json_response(
                {"error": "this server wants its token, as `Authorization: Bearer TOKEN`"},
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    return check


class BearerInterceptor(grpc.aio.ServerInterceptor):
    """The same for gRPC: the token comes as metadata, ``authorization: Bearer TOKEN``."""

    def __init__(self, token: str):
        self._token = token

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata)
        if handler is None or _knows(self._token, str(metadata.get("authorization", ""))):
            return handler

        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this server wants its token in `authorization`")

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)


def _knows(token: str, given: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {token}".encode())
