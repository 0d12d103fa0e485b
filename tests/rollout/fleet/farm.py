"""Servers in this process, in a thread of their own, that can hang, die, come back and be slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from aiohttp.typedefs import Handler

from forgejax.rollout import RequestLog
from forgejax.rollout.driver.job import Draw
from forgejax.rollout.server.http import RolloutServer
from forgejax.rollout.server.served import ServedEngine
from tests.rollout import tiny


class Server:
    """One of them. ``hang``: paths that begin so are never answered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hang, self.port, self.slow_s = folder, "", 0, 0.0
        self.generated: list[int] = []  # versions served when requests came

    async def start(self, version: int = 0) -> None:
        self.engine = ServedEngine(tiny.engine(), RequestLog(self.folder))
        submit = self.engine.submit

        def submit_slowly(request: Any, on_draw: Any = None) -> Any:
            self.generated.append(self.engine.version)

            def draw(drawn: Draw) -> Any:
                time.sleep(self.slow_s)
                return on_draw(drawn)

            return submit(request, draw)

        self.engine.submit = submit_slowly  # type: ignore[method-assign]
        await self.engine.publish(tiny.params(9), version, "", idle_s=0.0)
        await self.engine.start(asyncio.Event())
        self.runner = web.AppRunner(
            RolloutServer(self.engine).make_app(self._make_hang()), handler_cancellation=True, shutdown_timeout=0.1
        )
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self.runner.addresses[0][1]

    async def die(self) -> None:
        """At once: who is connected sees that alone."""
        await self.runner.cleanup()
        await self.engine.stop()
        assert self.engine.request_log is not None
        self.engine.request_log.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _make_hang(self) -> Any:
        @web.middleware
        async def hang(request: web.Request, handler: Handler) -> web.StreamResponse:
            while self.hang and request.path.startswith(self.hang):  # noqa: ASYNC110 (the test is another thread)
                await asyncio.sleep(0.02)
            return await handler(request)

        return hang


class Farm:
    """Use as a context manager: inside, ``servers`` serve."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.servers = [Server(folder / f"server-{number}.log") for number in range(count)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        for server in self.servers:
            self.run(server.start())
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.hang = ""
            self.run(server.die())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self.servers)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)
