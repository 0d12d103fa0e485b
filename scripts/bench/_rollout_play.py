"""A workload through the project's engines: how long each token took to come, and what was computed for it."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _rollout_cases import Asked, Workload, count_ideal

from forgejax.models import PolicyConfig
from forgejax.rollout import (
    Driver,
    EngineConfig,
    Engines,
    Launch,
    LocalEngines,
    PolicyEngine,
    RequestLog,
    RolloutConfig,
    ServerEngines,
    make_environment_of_server,
)
from forgejax.types import Completion, SampleRequest

_PAGE = 32


def fit_engine(workload: Workload, engines: int) -> EngineConfig:
    """The default engine, with slots for all sessions and room for the longest."""
    context = -(-workload.context // _PAGE) * _PAGE
    return EngineConfig(slots=-(-len(workload.sessions) // engines), max_context=context, page_tokens=_PAGE)


@contextmanager
def serving(policy: PolicyConfig, config: EngineConfig, params: Any, count: int) -> Iterator[Engines]:
    """``count`` servers of this machine, or 1: an engine in this process."""
    with tempfile.TemporaryDirectory(prefix="rollout-") as name:
        folder = Path(name)
        if count == 1:
            driver = Driver(PolicyEngine(policy, config), params, request_log=(log := RequestLog(folder / "requests")))
            engines: Engines = LocalEngines(driver, log)
        else:
            launches = [
                Launch(command=_word_server(policy, config), env=make_environment_of_server(), folder=folder / str(n))
                for n in range(count)
            ]
            deadline = config.request_deadline_s
            engines = ServerEngines(
                RolloutConfig(engines=count), params, 0, request_deadline_s=deadline, launches=launches
            )
        with engines:
            yield engines


def _word_server(policy: PolicyConfig, config: EngineConfig) -> list[str]:
    shape = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "qk_norm")
    options = [f"--policy.{name}={getattr(policy, name)}" for name in shape]
    options += [f"--policy.rope.theta={policy.rope.theta}"]
    options += [f"--engine.{name}={getattr(config, name)}" for name in ("slots", "max_context", "page_tokens")]
    return [sys.executable, "-m", "forgejax.run.serving.program", "--await-weights", *options]


@dataclass(kw_only=True)
class Played:
    """One pass over a workload. Times are seconds."""

    seconds: float = 0.0
    computed: int = 0
    prompt: int = 0
    cached: int = 0
    first_tokens: list[float] = field(default_factory=list)  # from the request to its first token
    between_tokens: list[float] = field(default_factory=list)  # of a run of tokens, the time since the last, shared out
    served: list[Asked] = field(default_factory=list)

    @property
    def ideal(self) -> int:
        return count_ideal(self.served)


class Player:
    """Plays a workload as often as it is asked to; each time nothing is cached, for the weights are a new version."""

    def __init__(self, engines: Engines, params: Any, workload: Workload) -> None:
        self._engines, self._params, self._workload = engines, params, workload
        self._version = self._turns = self._passes = 0

    def play(self) -> Played:
        self._publish()
        self._passes += 1
        self._turns, before, played = 0, self._engines.account(), Played()
        began = time.perf_counter()
        asyncio.run(self._play_all(played))
        played.seconds = time.perf_counter() - began
        after = self._engines.account()
        played.computed = after.computed_tokens - before.computed_tokens
        played.prompt = after.prompt_tokens - before.prompt_tokens
        played.cached = after.cached_tokens - before.cached_tokens
        return played

    def _publish(self) -> None:
        self._version += 1
        self._engines.publish(self._params, self._version)

    async def _play_all(self, played: Played) -> None:
        await asyncio.gather(*(self._play_session(n, played) for n in range(len(self._workload.sessions))))

    async def _play_session(self, number: int, played: Played) -> None:
        known = np.zeros(0, np.int32)
        for index, turn in enumerate(self._workload.sessions[number]):
            prompt = np.concatenate([known, turn.observed])
            name = f"{self._passes}-{number}"
            request = SampleRequest(
                request_id=f"{name}-{index}", session_id=name, prompt_ids=prompt, max_tokens=turn.drawn, seed=number
            )
            version = self._version
            completion = await self._ask(request, played)
            played.served.append(Asked(version=version, completion=completion))
            known = np.concatenate([prompt, completion.token_ids])
            self._turns += 1
            every = self._workload.publish_every
            if every and self._turns % every == 0 and self._turns < sum(map(len, self._workload.sessions)):
                await asyncio.to_thread(self._publish)

    async def _ask(self, request: SampleRequest, played: Played) -> Completion:
        last = time.perf_counter()
        came = False

        def clock(ids: Any) -> None:
            nonlocal last, came
            now = time.perf_counter()
            if came:
                played.between_tokens += [(now - last) / len(ids)] * len(ids)
            else:
                played.first_tokens.append(now - last)
            last, came = now, True

        return await self._engines.sample(request, clock)
