"""What a server serves: an engine that takes weights, can be paused, put to sleep and woken, and is drained at the end.

Its driver is replaced where the device's memory has to be given back: at sleep, and for weights that the memory has no
room for beside those that are there. The counts of all its drivers add up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import jax

from forgejax.errors import EngineError
from forgejax.grammar import GrammarCompiler
from forgejax.rollout.driver.counters import DriverMetrics
from forgejax.rollout.driver.driver import Driver
from forgejax.rollout.driver.job import OnDraw
from forgejax.rollout.driver.request_log import RequestLog
from forgejax.rollout.driver.warm_up import make_warm_ups
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.weights import HandedWeights, check_version
from forgejax.types import Completion, SampleRequest

EngineState = Literal["empty", "starting", "serving", "paused", "asleep", "draining"]
"""``empty``: no weights yet; ``starting``: it compiles. Requests are taken while it serves, and wait while it is
paused."""

ReadWeights = Callable[[Path, Any], Any]
"""Gives the weights kept at a path, laid out as a tree of shapes asks; raises ForgejaxError."""

_LOOK_S = 0.01
_COMPILE_S = 1800.0
_ADDED = (
    *("requests", "steps", "prompt_tokens", "cached_tokens", "carried_tokens", "computed_tokens", "preemptions"),
    *("restarts", "busy_s", "drafted_tokens", "accepted_tokens", "checked_steps", "checked_s", "unchecked_s"),
)
_ADDED_BY_PURPOSE = ("tokens_sampled", "tokens_returned", "tokens_cancelled", "tokens_failed")


class ServedEngine:
    """One engine and its request log. Belongs to one event loop, but for ``submit`` and what only looks.

    ``instance`` tells this process from one that serves at the same address before or after it. ``publication`` names
    the weights that are served: those of a transfer, or "" for the first ones. ``beside``: whether the device has room
    for new weights beside those that serve; without it requests wait while they are replaced. ``grammars``, of the
    policy's vocabulary: without them a request that has a grammar is refused.
    """

    def __init__(
        self,
        engine: PolicyEngine,
        request_log: RequestLog | None,
        *,
        beside: bool = True,
        grammars: GrammarCompiler | None = None,
    ):
        self.engine, self.request_log, self._beside, self._grammars = engine, request_log, beside, grammars
        self.instance = uuid.uuid4().hex
        self.state: EngineState = "empty"
        self.publication = ""
        self._drivers: tuple[tuple[DriverMetrics, ...], Driver | None] = ((), None)  # what is past, and what serves now
        self._handed: tuple[str, HandedWeights, int] | None = None  # the newest: transfer, weights, version
        self._kept: tuple[Any, int] | None = None  # weights and version on the host while there is no driver
        self._came = asyncio.Event()  # the first weights
        self._door = asyncio.Event()
        self._turn = asyncio.Lock()  # of whatever changes the driver or the door

    # -- Any thread --------------------------------------------------------------------------------------------------

    @property
    def driver(self) -> Driver:
        """The driver that serves now. Raises EngineError where there is none."""
        driver = self._driver
        if driver is None:
            raise EngineError(f"the engine is {self.state}: it has no weights on its device")
        return driver

    @property
    def healthy(self) -> bool:
        """Whether nothing has failed: an engine that waits for weights or sleeps is in order."""
        driver = self._driver
        return driver.healthy if driver is not None else self.state in ("empty", "starting", "asleep")

    @property
    def taking(self) -> bool:
        """Whether requests are taken, be it that they wait."""
        return self.state in ("serving", "paused")

    @property
    def version(self) -> int:
        """That of the weights that serve, or will once it is awake; -1 where there are none."""
        driver, kept = self._driver, self._kept
        return driver.version if driver is not None else kept[1] if kept is not None else -1

    def submit(self, request: SampleRequest, on_draw: OnDraw | None = None) -> Future[Completion]:
        """See ``Driver.submit``."""
        return self.driver.submit(request, on_draw)

    def hand_over(self, transfer: str, weights: HandedWeights, version: int) -> None:
        """Weights that this process has made on the engine's devices; they serve once the transfer is committed."""
        self._handed = (transfer, weights, version)

    def find_handed(self, transfer: str) -> tuple[HandedWeights, int] | None:
        """The weights and version of a transfer that was handed over last, or None."""
        handed = self._handed
        return None if handed is None or handed[0] != transfer else handed[1:]

    def metrics(self) -> DriverMetrics:
        """Those of all its drivers; what is a state and no count is that of now."""
        past, driver = self._drivers
        parts = [*past, driver.metrics()] if driver is not None else [*past]
        nothing: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(DriverMetrics)), 0)
        newest = parts[-1] if parts else DriverMetrics(**nothing)
        added: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _ADDED}
        added |= {name: _add([getattr(part, name) for part in parts]) for name in _ADDED_BY_PURPOSE}
        slots = self.engine.config.slots
        return dataclasses.replace(newest, healthy=self.healthy, version=self.version, slots=slots, **added)

    # -- Its event loop ----------------------------------------------------------------------------------------------

    async def start(self, end: asyncio.Event) -> None:
        """Once there are weights: has every program compiled, so that no request waits for it, and serves.

        Compiling draws from a driver of its own, of which nothing is counted or logged. Returns early where ``end`` is
        set. Raises EngineError where the programs do not compile.
        """
        ended = asyncio.create_task(end.wait())
        came = asyncio.create_task(self._came.wait())
        try:
            await asyncio.wait({came, ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._kept is None or end.is_set():
                return
            trial = await asyncio.to_thread(Driver, self.engine, *self._kept, None, self._grammars)
            with trial:
                for batch in make_warm_ups(self.engine.config, self.instance, grammars=self._grammars is not None):
                    drawn = asyncio.gather(*(asyncio.wrap_future(trial.submit(request)) for request in batch))
                    waits: set[asyncio.Future[Any]] = {drawn, ended}
                    await asyncio.wait(waits, timeout=_COMPILE_S, return_when=asyncio.FIRST_COMPLETED)
                    if not drawn.done():
                        drawn.cancel()
                        if not end.is_set():
                            raise EngineError(
                                f"the engine has not compiled its programs within {_COMPILE_S:g} s; its log says more"
                            )
                        return
                    await drawn
            del trial
            async with self._turn:
                await self._bring_back()
        finally:
            ended.cancel()
            came.cancel()

    async def enter(self, request: SampleRequest) -> None:
        """Waits until a request may be submitted, and its grammar is compiled; it is to be submitted at once, without
        another wait. Raises EngineError where it is refused."""
        prepared = False
        while not (prepared and self._door.is_set()):
            while not self._door.is_set() and self.state == "paused":
                await self._door.wait()
            if not self._door.is_set():
                raise EngineError(f"the engine is {self.state}")
            # While it compiles the door may be shut; and again, for others may have taken its place by then.
            await self.driver.prepare(request)
            prepared = True

    async def publish(self, params: Any, version: int, publication: str, *, idle_s: float) -> None:
        """New weights; each token of a later decode step is theirs. Before it serves, and asleep, they wait for that.

        Where there is no room for them beside the old ones, requests wait at the door while those under way end, for
        ``idle_s`` at most. Raises EngineError, and the old weights go on serving.
        """
        async with self._turn:
            check_version(version)
            if self._driver is None:
                self._kept, self.publication = (params, version), publication
                self.state = "starting" if self.state == "empty" else self.state
                self._came.set()
            elif self._beside:
                await _finish(self._swap(self._driver, params, version, publication))
            else:
                await self._replace(params, version, publication, idle_s)

    async def pause(self, *, idle_s: float) -> int:
        """New requests wait from now on; gives how many are still under way when they have ended or ``idle_s`` is over.

        Raises EngineError unless it serves.
        """
        async with self._turn:
            if self.state not in ("serving", "paused"):
                raise EngineError(f"the engine is {self.state}; only one that serves can be paused")
            self._shut("paused")
            return await self._await_idle(idle_s)

    async def resume(self) -> None:
        """Takes requests again. Raises EngineError unless it was paused."""
        async with self._turn:
            if self.state not in ("serving", "paused"):
                raise EngineError(f"the engine is {self.state}; only one that was paused can go on")
            self._admit()

    async def sleep(self, *, idle_s: float) -> None:
        """Gives the device's memory back, weights, keys and values; the weights are kept on the host.

        Raises EngineError where requests under way do not end within ``idle_s``, and goes on serving.
        """
        async with self._turn:
            if self.state not in ("serving", "paused"):
                raise EngineError(f"the engine is {self.state}; only one that serves can be put to sleep")
            before = self.state
            self._shut("paused")
            try:
                if left := await self._await_idle(idle_s):
                    raise EngineError(f"{left} requests have not ended within {idle_s:g} s; ask again when they have")
                await _finish(self._fall_asleep())
            finally:
                if self.state == "paused" and before == "serving":
                    self._admit()

    async def wake(self) -> None:
        """Brings weights, keys and values back and serves. Raises EngineError unless it sleeps."""
        async with self._turn:
            if self.state != "asleep":
                raise EngineError(f"the engine is {self.state}; only one that sleeps can be woken")
            await _finish(self._bring_back())

    async def drain(self, deadline_s: float) -> int:
        """Refuses new requests and waits for those under way; gives how many the deadline cuts off."""
        self._shut("draining")
        self._door.set()  # whoever waits at it is told
        self._door.clear()
        return await self._await_idle(deadline_s)

    async def stop(self) -> None:
        """Ends the driver; open requests get an EngineError."""
        self._shut("draining")
        driver = self._driver
        if driver is not None:
            await asyncio.to_thread(driver.stop)

    @property
    def _driver(self) -> Driver | None:
        return self._drivers[1]

    def _admit(self) -> None:
        if self.state != "draining":
            self.state = "serving"
            self._door.set()

    def _shut(self, state: EngineState) -> None:
        self._door.clear()
        if self.state != "draining":
            self.state = state

    async def _await_idle(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while (left := self._count_open()) and time.monotonic() < until:  # noqa: ASYNC110 (the driver has its own thread)
            await asyncio.sleep(_LOOK_S)
        return left

    def _count_open(self) -> int:
        driver = self._driver
        if driver is None or not driver.healthy:
            return 0
        metrics = driver.metrics()
        return metrics.active + metrics.waiting

    async def _swap(self, driver: Driver, params: Any, version: int, publication: str) -> None:
        await asyncio.to_thread(driver.publish, params, version)
        self.publication = publication

    async def _fall_asleep(self) -> None:
        weights = self.driver.weights
        self._kept = (await asyncio.to_thread(jax.device_get, weights.params), weights.version)
        del weights
        await self._drop_driver()
        self.state = "asleep"
        self._door.set()  # whoever waits at it is told
        self._door.clear()

    async def _replace(self, params: Any, version: int, publication: str, idle_s: float) -> None:
        before = self.state
        self._shut("paused")
        try:
            if left := await self._await_idle(idle_s):
                raise EngineError(
                    f"version {version} needs the place of the weights that serve, and {left} requests have not ended "
                    f"within {idle_s:g} s; allow more memory, or a longer deadline"
                )
            await _finish(self._exchange(params, version, publication))
        finally:
            if before == "serving":
                self._admit()
            else:
                self.state = before

    async def _exchange(self, params: Any, version: int, publication: str) -> None:
        await self._drop_driver()
        await self._make_driver(params, version)
        self.publication = publication

    async def _bring_back(self) -> None:
        assert self._kept is not None
        await self._make_driver(*self._kept)
        self._kept = None
        self._admit()

    async def _make_driver(self, params: Any, version: int) -> None:
        driver = await asyncio.to_thread(Driver, self.engine, params, version, self.request_log, self._grammars)
        self._drivers = (self._drivers[0], driver.start())

    async def _drop_driver(self) -> None:
        driver = self.driver
        await asyncio.to_thread(driver.stop)
        self._drivers = ((*self._drivers[0], dataclasses.replace(driver.metrics(), active=0, waiting=0)), None)
        del driver
        gc.collect()


async def _finish(change: Coroutine[Any, Any, None]) -> None:
    """Awaits what must not stop halfway, whoever asked for it may go away meanwhile."""
    task = asyncio.ensure_future(change)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _add(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
