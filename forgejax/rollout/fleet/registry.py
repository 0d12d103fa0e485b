"""Where servers elsewhere say that they are there, so that nobody has to name them beforehand."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from forgejax.errors import ConfigError, OverloadedError
from forgejax.rollout.server.access import make_bearer_check
from forgejax.rollout.server.announcer import SERVERS_PATH, AcceptBody, AnnounceBody
from forgejax.rollout.server.bodies import refuse, take_json

_BODY_BYTES = 1 << 16
_CLOSE_S = 1.0


class Registry:
    """``POST /servers`` with the address of a server (see ``announcer``); ``admit`` is told each time, in the loop of
    ``open``, and may raise OverloadedError.

    A server says it again every ``again_s``: so a trainer that was started anew hears of it as well.
    """

    def __init__(self, admit: Callable[[str], None], *, token: str, again_s: float):
        self._admit, self._again_s = admit, again_s
        checks = [make_bearer_check(token)] if token else []
        app = web.Application(middlewares=checks, client_max_size=_BODY_BYTES)
        app.router.add_post(SERVERS_PATH, self._take)
        self._runner = web.AppRunner(app, shutdown_timeout=_CLOSE_S)

    async def open(self, host: str, port: int) -> int:
        """Begins to listen, and gives the port. Raises ConfigError where it cannot."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"rollout.register_at: nothing can listen at {host}:{port}: {error}; give another port, 0 for a free "
                "one, or another address of this machine"
            ) from error
        found: int = self._runner.addresses[0][1]
        return found

    async def close(self) -> None:
        """Idempotent."""
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        try:
            url = (await take_json(request, AnnounceBody)).url.rstrip("/")
            check_address(url)
            self._admit(url)
        except OverloadedError as error:
            return refuse(429, str(error))
        except (msgspec.MsgspecError, ValueError, ConfigError) as error:
            return refuse(400, str(error))
        return web.Response(body=msgspec.json.encode(AcceptBody(again_s=self._again_s)))


def check_address(url: str) -> None:
    """Raises ConfigError for what is no address of a server."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        fits = fits and parts.port != 0 and parts.username is None
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f'"{url}" is no address of a server; expected one such as http://10.0.0.7:8800')
