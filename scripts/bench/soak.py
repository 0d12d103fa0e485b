"""Servers under random requests, cancellations, publications and kills; says what was lost, leaked or stale: nothing.

    python scripts/bench/soak.py --minutes 10

Requests come at random to servers of this machine: new ones behind shared beginnings, and next turns of sessions; some
are streamed, some are cancelled. Each publication has weights of its own. At a third and at two thirds of the time a
server is killed with SIGKILL, and comes back. The exit status is 1 where anything that is checked does not hold:

- every request ends within its deadline, in a completion, an error that says why, or by its cancellation; only streamed
  requests of a killed server may end in an error;
- each token is accounted for; no page is held in the end, and no engine has failed over its pages;
- no token was drawn, or saw keys and values, of a version older than the one served when its request came, and the
  log-probs of completions of one version are those of a dense forward pass with that version's weights;
- the memory of the server that lives on, and of this process, does not grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from _harness import show
from _soak_checks import find_process, measure_gap, measure_growth, read_memory

from forgejax.errors import EngineError
from forgejax.models import PolicyConfig, init_params
from forgejax.rollout import EngineConfig, Launch, RolloutConfig, ServerEngines, make_environment_of_server
from forgejax.types import Completion, SampleRequest

_POLICY = PolicyConfig(vocab_size=128, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64)
_ENGINE = EngineConfig(slots=8, max_context=256, page_tokens=16, kv_pages=96, prefill_buckets=(16, 64))
_BEGINNINGS, _BEGINNING_TOKENS = 6, 64
_DEADLINE_S, _MOST_OPEN = 240.0, 64
_AGREES, _GROWTH = 1e-4, 0.05
_LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """``rate``: requests a second, while fewer than 64 are open. ``checked``: completions whose log-probs are."""

    minutes: float = 10.0
    publications: int = 20
    rate: float = 8.0
    checked: int = 400
    seed: int = 0
    json: bool = False


@dataclass(kw_only=True)
class Soak:
    """The requests of one soak, and what became of them."""

    engines: ServerEngines
    options: Options
    folder: Path
    version: int = 0
    open: int = 0
    killed: int = 0
    given_tokens: int = 0
    cached_tokens: int = 0
    stale: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    kept: list[Completion] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.options.seed)
        self.numbers = np.random.default_rng(self.options.seed)
        self.beginnings = [self._draw(_BEGINNING_TOKENS) for _ in range(_BEGINNINGS)]
        self.seconds = 60 * self.options.minutes

    async def run(self) -> None:
        """All of it; returns once every request has ended."""
        until = time.monotonic() + self.seconds
        watch = asyncio.create_task(self._watch_memory())
        async with asyncio.TaskGroup() as group:
            changes = [group.create_task(work) for work in (self._publish_on(), self._kill_on())]
            number = 0
            while time.monotonic() < until or not all(change.done() for change in changes):
                await asyncio.sleep(self.random.expovariate(self.options.rate))
                if self.open < _MOST_OPEN:
                    group.create_task(self._play_session(number))
                    number += 1
        watch.cancel()

    async def _play_session(self, number: int) -> None:
        """One to three turns; each goes on from the one before."""
        known = self.random.choice(self.beginnings)
        self.open += 1
        try:
            for turn in range(self.random.randint(1, 3)):
                known = np.concatenate([known, self._draw(self.random.randint(1, 20))])
                request = SampleRequest(
                    request_id=f"{number}-{turn}",
                    session_id=str(number),
                    prompt_ids=known,
                    max_tokens=self.random.randint(1, 24),
                    repeatable=self.random.random() < 0.7,
                )
                completion = await self._ask(request)
                if completion is None:
                    return
                known = np.concatenate([known, completion.token_ids])
        finally:
            self.open -= 1

    async def _ask(self, request: SampleRequest) -> Completion | None:
        version = self.version
        asked = asyncio.create_task(self.engines.sample(request, lambda _: None))
        if self.random.random() < 0.15:
            await asyncio.wait({asked}, timeout=self.random.expovariate(2.0))
            asked.cancel()
        done, _ = await asyncio.wait({asked}, timeout=_DEADLINE_S + 30)
        if not done:
            self.ends["lost"] += 1
            return None
        if asked.cancelled():
            self.ends["cancelled"] += 1
            return None
        if (error := asked.exception()) is not None:
            if not isinstance(error, EngineError):
                raise error
            self.ends["streamed and cut off" if not request.repeatable else "failed"] += 1
            self.reasons[str(error)[:200]] += 1
            return None
        completion = asked.result()
        self.ends["completed"] += 1
        self.given_tokens += len(completion.token_ids)
        self.cached_tokens += completion.cached_tokens
        self.stale += int(min(completion.versions.min(), completion.oldest_versions.min()) < version)
        pure = len(set(completion.versions.tolist()) | set(completion.oldest_versions.tolist())) == 1
        if pure and self.random.random() < self.options.checked / (self.options.rate * self.seconds):
            self.kept.append(completion)
        return completion

    async def _publish_on(self) -> None:
        for version in range(1, self.options.publications + 1):
            await asyncio.sleep(self.seconds / (self.options.publications + 1))
            params = init_params(_POLICY, seed=version)
            await asyncio.to_thread(self.engines.publish, params, version)
            self.version = version
            await asyncio.to_thread(self.engines.trim, version - 1)

    async def _kill_on(self) -> None:
        for _ in range(2):
            await asyncio.sleep(self.seconds / 3)
            with contextlib.suppress(LookupError):  # it is not there yet: a short soak
                os.kill(find_process(f"--address-file={self.folder / '0' / 'address'}"), signal.SIGKILL)
                self.killed += 1

    async def _watch_memory(self) -> None:
        server = find_process(f"--address-file={self.folder / '1' / 'address'}")
        while True:
            for name, process in (("server", server), ("own", os.getpid())):
                self.memory.setdefault(name, []).append(read_memory(process))
            await asyncio.sleep(_LOOK_S)

    def _draw(self, count: int) -> np.ndarray:
        return self.numbers.integers(0, _POLICY.vocab_size, count).astype(np.int32)


def read_metric(address: str, name: str) -> float:
    """One figure of a server's page."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as page:
        text = page.read().decode()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"forgejax_rollout_{name} ")))


async def soak(options: Options, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was seen, and of it what must be 0."""
    launches = [
        Launch(command=_word_server(), env=make_environment_of_server(), folder=folder / str(number))
        for number in range(2)
    ]
    config = RolloutConfig(engines=2, silence_s=60.0, publish_s=60.0)
    params = init_params(_POLICY, seed=0)
    with ServerEngines(config, params, 0, request_deadline_s=_DEADLINE_S, launches=launches) as engines:
        run = Soak(engines=engines, options=options, folder=folder)
        await run.run()
        account = await _settle(engines)
        addresses = [(launch.folder / "address").read_text(encoding="utf-8").strip() for launch in launches]
        held = sum(read_metric(address, "held_kv_pages") for address in addresses)
        restarts = sum(read_metric(address, "restarts_total") for address in addresses)
        serving = engines.figures()["engine/serving"]
    gaps = [measure_gap(_POLICY, init_params(_POLICY, seed=int(each.versions[0])), each) for each in run.kept]
    growth = {name: measure_growth(sizes) for name, sizes in run.memory.items()}
    seen = {
        **{name: run.ends[name] for name in ("completed", "cancelled", "streamed and cut off")},
        "given_tokens": run.given_tokens,
        "cached_tokens": run.cached_tokens,
        "lost_tokens": account.lost,
        "publications": run.version,
        "killed": run.killed,
        "checked": len(gaps),
        "largest_gap": max(gaps, default=0.0),
        **{f"growth_{name}": figure for name, figure in growth.items()},
        **{f"mib_{name}": sizes[-1] / 2**20 for name, sizes in run.memory.items()},
        "reasons": dict(run.reasons),
    }
    wrong = {
        "requests_lost": run.ends["lost"],
        "requests_failed": run.ends["failed"],
        "tokens_unaccounted": abs(
            account.sampled - run.given_tokens - account.cancelled - account.failed - account.lost
        )
        + account.open,
        "pages_held": held,
        "engine_failures": restarts,
        "servers_missing": 2 - serving,
        "stale_completions": run.stale,
        "gaps_too_large": sum(gap > _AGREES for gap in gaps),
        "processes_grown": sum(figure > _GROWTH for figure in growth.values()),
        "publications_missing": options.publications - run.version,
        "kills_missing": 2 - run.killed,
    }
    return seen, wrong


def _word_server() -> list[str]:
    policy = [f"--policy.{name}={getattr(_POLICY, name)}" for name in _SHAPE]
    engine = [f"--engine.{name}={getattr(_ENGINE, name)}" for name in _SETTINGS]
    buckets = ["--engine.prefill_buckets", *map(str, _ENGINE.prefill_buckets)]
    return [sys.executable, "-m", "forgejax.run.serving.program", "--await-weights", *policy, *engine, *buckets]


_SHAPE = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")
_SETTINGS = ("slots", "max_context", "page_tokens", "kv_pages")


async def _settle(engines: ServerEngines) -> Any:
    """The account once nothing is open and both serve; or as it is after two minutes."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        account = await asyncio.to_thread(engines.account)
        if account.active + account.waiting + account.open == 0 and engines.figures()["engine/serving"] == 2:
            break
        await asyncio.sleep(1.0)
    return account


def main(options: Options) -> int:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        seen, wrong = asyncio.run(soak(options, Path(folder)))
    show({**seen, **wrong}, options.json)
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
