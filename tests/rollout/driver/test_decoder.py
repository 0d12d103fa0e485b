"""Laws of the decoder over any ``KVCache``: here one that shares nothing and has little room."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

import forgejax.rollout.driver
from forgejax.errors import EngineError
from forgejax.rollout import Driver, PolicyEngine
from forgejax.rollout.engine.kv.base import ExtendedPrompt, KVCache, KVMemory
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import TokenIds
from tests.rollout import tiny
from tests.rollout.driving import balanced, gap, sample_all


class SmallCache:
    """Room for 60 tokens in all, or for one request; every prompt is computed from its beginning."""

    def __init__(self, engine: PolicyEngine):
        self.engine, self.reserved, self.calls = engine, dict[int, int](), list[str]()

    def use(self, weights: PublishedWeights) -> None:
        self.weights = weights

    def reserve(self, slot: int, ids: TokenIds, budget: int) -> bool:
        fits = not self.reserved or sum(self.reserved.values()) + len(ids) + budget <= 60
        if fits:
            self.reserved[slot] = len(ids) + budget
        self.calls.append(f"reserve {slot}" if fits else "full")
        return fits

    def extend(self, slot: int, ids: TokenIds) -> ExtendedPrompt:
        first = self.engine.begin_sequence(int(ids[0]))
        return ExtendedPrompt(sequence=self.engine.append(self.weights, first, ids[1:]), cached_tokens=0)

    def share(self, memory: KVMemory, slot: int, ids: TokenIds) -> None:
        self.calls.append(f"share {slot} of {len(ids)}")

    def release(self, slot: int) -> None:
        del self.reserved[slot]
        self.calls.append(f"release {slot}")

    def check_integrity(self) -> None:
        self.calls.append("check")
        for slot in self.reserved:
            raise AssertionError(f"slot {slot} is still reserved")


class SmallEngine(PolicyEngine):
    """The tiny engine with a ``SmallCache``."""

    def make_cache(self) -> KVCache:
        self.cache = SmallCache(self)
        return self.cache


async def test_a_request_without_room_waits_and_draws_the_same_tokens_when_a_slot_is_released() -> None:
    requests = [tiny.request(f"r{i}", tiny.prompt(i, 20), 8, seed=i) for i in range(3)]
    engine = SmallEngine(tiny.POLICY, tiny.engine().config, jax.devices()[1])
    with Driver(engine, tiny.params()) as driver:
        small = await sample_all(driver, requests)
        assert balanced(driver) and driver.metrics().cached_tokens == 0
    with Driver(tiny.engine(), tiny.params()) as driver:
        large = await sample_all(driver, requests)
    for one, other in zip(small, large, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
    assert max(gap(each, tiny.params()) for each in small) < 1e-5
    calls = [call for call in engine.cache.calls if call != "full"]
    # Two requests of 28 tokens fit; the third gets the room of the first.
    assert "full" in engine.cache.calls and engine.cache.reserved == {}
    ends = ["share 0 of 27", "release 0", "share 1 of 27", "release 1"]
    assert calls == ["reserve 0", "reserve 1", *ends, "reserve 0", *ends[:2], "check"]


async def test_keys_and_values_that_do_not_add_up_at_the_end_are_told() -> None:
    engine = SmallEngine(tiny.POLICY, tiny.engine().config, jax.devices()[1])
    with Driver(engine, tiny.params()) as driver:
        (done,) = await sample_all(driver, [tiny.request("r", [1, 2], 4)])
        engine.cache.reserved[3] = 7  # of no request
    assert len(done.token_ids) == 4
    with pytest.raises(EngineError, match=r"the engine failed: AssertionError\('slot 3"):
        driver.submit(tiny.request("late", [1]))


def test_the_driver_knows_of_keys_and_values_no_more_than_their_contract() -> None:
    kv, known = "forgejax.rollout.engine.kv", set[str]()
    for path in Path(forgejax.rollout.driver.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                known |= {node.module} if node.module.startswith(kv) else set()
    assert known <= {f"{kv}.base"}
