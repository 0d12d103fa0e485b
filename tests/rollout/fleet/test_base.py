"""Laws of the inference side as one account, and of anything that stands in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from forgejax.rollout import (
    DrawnRequest,
    Driver,
    EngineAccount,
    Engines,
    LocalEngines,
    RequestLog,
    RolloutConfig,
    ServerEngines,
)
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest
from tests.rollout import tiny
from tests.rollout.fleet.farm import Farm


class OneTokenEngines:
    """Draws the token 0 for everybody."""

    healthy, version, trouble = False, 0, ""

    def __init__(self) -> None:
        self.requests: dict[str, DrawnRequest] = {}

    def __enter__(self) -> Self:
        self.healthy = True
        return self

    def __exit__(self, *_: object) -> None:
        self.healthy = False

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        ids, version = np.zeros(1, np.int32), np.full(1, self.version, np.int32)
        self.requests[request.request_id] = DrawnRequest(prompt_ids=request.prompt_ids, sampled_ids=ids)
        return Completion(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            token_ids=ids,
            logprobs=np.zeros(1, np.float32),
            versions=version,
            oldest_versions=version,
            finish_reason=FinishReason.LENGTH,
            law=request.law,
        )

    def publish(self, params: Any, version: int) -> None:
        self.version = version

    def account(self) -> EngineAccount:
        return EngineAccount(sampled=len(self.requests), prompt_tokens=2 * len(self.requests))

    def given_before(self) -> Mapping[str, int]:
        return {}

    def requests_of(self, request_ids: Iterable[str]) -> dict[str, DrawnRequest]:
        return {name: self.requests[name] for name in request_ids if name in self.requests}

    damaged_requests = 0

    def trim(self, version: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}


@contextmanager
def _local(folder: Path) -> Iterator[Engines]:
    log = RequestLog(folder / "requests.log")
    yield LocalEngines(Driver(tiny.engine(), tiny.params(), request_log=log), log)


@contextmanager
def _servers(folder: Path) -> Iterator[Engines]:
    with Farm(folder) as farm:
        config = RolloutConfig(engines=farm.urls, poll_s=0.05, silence_s=5.0)
        yield ServerEngines(config, tiny.params(), 0, request_deadline_s=30.0)


@contextmanager
def _fake(_: Path) -> Iterator[Engines]:
    yield OneTokenEngines()


@pytest.mark.parametrize("make", [_local, _servers, _fake])
async def test_what_a_run_needs_of_its_engines_is_the_protocol_alone(
    make: Callable[[Path], AbstractContextManager[Engines]], tmp_path: Path
) -> None:
    with make(tmp_path) as engines:
        healthy = [engines.healthy]
        with engines:
            healthy.append(engines.healthy)
            engines.publish(tiny.params(1), 3)
            done = [await engines.sample(tiny.request(f"r{i}", [1, 2], 1)) for i in range(3)]
            engines.flush()
            found, account = engines.requests_of(["r2", "r9", "r0"]), engines.account()
            assert engines.trouble == "" and all(isinstance(each, float) for each in engines.figures().values())
        healthy.append(engines.healthy)
    assert healthy == [False, True, False]
    assert (account.sampled, account.prompt_tokens, account.active, account.waiting) == (3, 6, 0, 0)
    assert [each.versions.tolist() for each in done] == [[3]] * 3
    assert {name: (entry.prompt_ids.tolist(), entry.sampled_ids.tolist()) for name, entry in found.items()} == {
        f"r{i}": ([1, 2], done[i].token_ids.tolist()) for i in (0, 2)
    }


def test_the_accounts_of_several_engines_add_up() -> None:
    one = EngineAccount(
        sampled=10, cancelled=2, failed=1, inherited=4, inherited_failed=3, prompt_tokens=30, cached_tokens=10, active=1
    )
    other = EngineAccount(sampled=5, failed=3, prompt_tokens=10, cached_tokens=10, active=2, waiting=7)
    total = EngineAccount(
        **{"sampled": 15, "cancelled": 2, "failed": 4, "inherited": 4, "inherited_failed": 3},
        **{"prompt_tokens": 40, "cached_tokens": 20, "active": 3, "waiting": 7},
    )
    assert one + other == other + one == total and one + EngineAccount() == one
    assert (one.cache_hit_rate, total.cache_hit_rate, EngineAccount().cache_hit_rate) == (1 / 3, 0.5, 0.0)
