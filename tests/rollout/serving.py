"""A web application on a port of its own, and a served engine that has started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from forgejax.grammar import GrammarCompiler
from forgejax.rollout import PolicyEngine, RequestLog
from forgejax.rollout.server.served import ServedEngine
from tests.rollout import tiny


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def serving_engine(
    params: Any,
    version: int = 0,
    log: RequestLog | None = None,
    *,
    beside: bool = True,
    grammars: GrammarCompiler | None = None,
    engine: PolicyEngine | None = None,
) -> AsyncIterator[ServedEngine]:
    """An engine, the tiny one by default, with these weights, serving."""
    serving = ServedEngine(engine or tiny.engine(), log, beside=beside, grammars=grammars)
    await serving.publish(params, version, "", idle_s=0.0)
    await serving.start(asyncio.Event())
    try:
        yield serving
    finally:
        await serving.stop()
