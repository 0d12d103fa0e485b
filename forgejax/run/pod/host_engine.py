"""This host's engine, behind the server of ``scripts/serve.py``, in an event loop and thread of its own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from forgejax.errors import EngineError
from forgejax.grammar import GrammarCompiler
from forgejax.rollout import PolicyEngine, RequestLog
from forgejax.rollout.engine.weights import HandedWeights
from forgejax.rollout.server.access import make_bearer_check
from forgejax.rollout.server.http import RolloutServer
from forgejax.rollout.server.served import ServedEngine

_START_S = 60.0
_END_S = 60.0


class HostEngine:
    """Use as a context manager: inside it listens at ``url``, for whoever brings the job's secret; it serves once
    weights that were handed over are committed."""

    def __init__(self, engine: PolicyEngine, log: Path, *, host: str, secret: str, grammars: GrammarCompiler):
        """Raises EngineError for a log that cannot be opened."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = RequestLog(log)
        self._engine, self._host, self._secret, self._grammars = engine, host, secret, grammars
        self.url = ""
        self._listens = threading.Event()
        self._end: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._served: ServedEngine | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="host-engine", daemon=True)

    def __enter__(self) -> Self:
        """Raises EngineError where nothing can listen at this host."""
        self._thread.start()
        if not self._listens.wait(_START_S) or self._failure is not None:
            raise EngineError(f"the engine's server cannot listen at {self._host}: {self._failure or 'it hangs'}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Open requests get an EngineError."""
        if self._loop is not None and self._end is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(_END_S)
        self._log.close()

    def hand_over(self, transfer: str, params: Any, version: int) -> None:
        """See ``ServedEngine.hand_over``. Any thread."""
        assert self._served is not None
        self._served.hand_over(transfer, HandedWeights(params=params), version)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001  a boundary: whoever waits is told
            self._failure = error
        finally:
            self._listens.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._served = ServedEngine(self._engine, self._log, grammars=self._grammars)
        app = RolloutServer(self._served).make_app(make_bearer_check(self._secret))
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, 0).start()
            self.url = f"http://{self._host}:{runner.addresses[0][1]}"
            self._listens.set()
            await self._served.start(self._end)
            await self._end.wait()
        finally:
            await self._served.stop()
            await runner.cleanup()
