"""Laws of what a server serves: weights, pauses, sleep, and its end."""

from __future__ import annotations

import asyncio
import time

import jax
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.grammar import GrammarCompiler
from forgejax.rollout.server.manifest import make_manifest
from forgejax.rollout.server.served import ServedEngine
from forgejax.rollout.server.staging import Staging
from forgejax.types import Completion, Grammar, SampleRequest
from tests.rollout import tiny
from tests.rollout.driving import gap, until
from tests.rollout.serving import serving_engine


async def ask(engine: ServedEngine, request: SampleRequest) -> Completion:
    await engine.enter(request)
    return await asyncio.wait_for(asyncio.wrap_future(engine.submit(request)), 60)


async def test_it_serves_once_it_has_weights_and_its_programs_and_counts_nothing_of_compiling_them() -> None:
    engine, end = ServedEngine(tiny.engine(), None), asyncio.Event()
    starting = asyncio.create_task(engine.start(end))
    await asyncio.sleep(0)
    assert (engine.state, engine.version, engine.healthy) == ("empty", -1, True)
    with pytest.raises(EngineError, match="the engine is empty"):
        await engine.enter(tiny.request("x", [1]))
    await engine.publish(tiny.params(1), 4, "first", idle_s=0.0)
    assert (engine.state, engine.version) == ("starting", 4)
    await engine.publish(tiny.params(2), 5, "second", idle_s=0.0)  # while it compiles: these are served
    await asyncio.wait_for(starting, 120)
    done = await ask(engine, tiny.request("r", [1, 2, 3], 5))
    assert (engine.state, engine.publication, set(done.versions.tolist())) == ("serving", "second", {5})
    assert gap(done, tiny.params(2)) < 1e-5
    assert sum(engine.metrics().tokens_sampled.values()) == 5
    await engine.stop()
    assert not engine.healthy


async def test_a_stop_before_there_are_weights_ends_the_start() -> None:
    engine, end = ServedEngine(tiny.engine(), None), asyncio.Event()
    starting = asyncio.create_task(engine.start(end))
    end.set()
    await asyncio.wait_for(starting, 10)
    await engine.stop()
    assert engine.state == "draining"


async def test_requests_wait_while_it_is_paused_and_those_under_way_end() -> None:
    async with serving_engine(tiny.params()) as engine:
        under_way = asyncio.create_task(ask(engine, tiny.request("a", [1, 2], 40)))
        await until(lambda: engine.metrics().active == 1)
        assert await engine.pause(idle_s=30.0) == 0
        assert len((await under_way).token_ids) == 40
        waits = asyncio.create_task(ask(engine, tiny.request("b", [1, 2], 4)))
        await asyncio.sleep(0.05)
        assert not waits.done() and engine.metrics().active == 0 and engine.state == "paused"
        await engine.resume()
        assert len((await waits).token_ids) == 4


async def test_asleep_it_has_no_weights_on_its_device_and_wakes_with_the_newest() -> None:
    async with serving_engine(tiny.params(1), 3) as engine:
        before = await ask(engine, tiny.request("a", [1, 2, 3], 6, seed=1))
        weights = engine.driver.weights.params
        leaf = next(iter(jax.tree.leaves(weights)))
        held = sum(leaf.nbytes for leaf in jax.live_arrays() if leaf.devices() == set(engine.engine.mesh.devices.flat))
        del weights, leaf
        await engine.sleep(idle_s=10.0)
        left = sum(leaf.nbytes for leaf in jax.live_arrays() if leaf.devices() == set(engine.engine.mesh.devices.flat))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.engine.abstract_params))
        assert held - left > 2 * size  # weights, keys and values
        assert (engine.state, engine.version, engine.healthy) == ("asleep", 3, True)
        with pytest.raises(EngineError, match="the engine is asleep"):
            await engine.enter(tiny.request("x", [1]))
        await engine.wake()
        after = await ask(engine, tiny.request("b", [1, 2, 3], 6, seed=1))
        np.testing.assert_array_equal(after.token_ids, before.token_ids)
        await engine.sleep(idle_s=10.0)
        await engine.publish(tiny.params(2), 4, "new", idle_s=0.0)
        await engine.wake()
        done = await ask(engine, tiny.request("c", [1, 2, 3], 6))
        assert set(done.versions.tolist()) == {4} and gap(done, tiny.params(2)) < 1e-5
        metrics = engine.metrics()
        assert sum(metrics.tokens_sampled.values()) == sum(metrics.tokens_returned.values()) == 18
        with pytest.raises(EngineError, match="only one that sleeps"):
            await engine.wake()


async def test_weights_without_room_beside_the_old_ones_wait_for_requests_to_end_or_leave_all_as_it_was() -> None:
    async with serving_engine(tiny.params(1), 3, beside=False) as engine:
        under_way = asyncio.create_task(ask(engine, tiny.request("a", [1, 2], 100)))
        await until(lambda: engine.metrics().active == 1)
        old = next(iter(jax.tree.leaves(engine.driver.weights.params)))
        with pytest.raises(EngineError, match="1 requests have not ended within 0 s"):
            await engine.publish(tiny.params(2), 4, "four", idle_s=0.0)
        assert (engine.version, engine.state, engine.publication) == (3, "serving", "")
        publishing = asyncio.create_task(engine.publish(tiny.params(2), 4, "four", idle_s=30.0))
        await asyncio.sleep(0)
        late = asyncio.create_task(ask(engine, tiny.request("b", [1, 2], 4)))
        await publishing
        assert set((await under_way).versions.tolist()) == {3}
        assert set((await late).versions.tolist()) == {4}
        assert next(iter(jax.tree.leaves(engine.driver.weights.params))) is not old


async def test_draining_it_refuses_what_is_new_and_waits_for_what_is_open() -> None:
    async with serving_engine(tiny.params()) as engine:
        under_way = asyncio.create_task(ask(engine, tiny.request("a", [1, 2], 40)))
        await until(lambda: engine.metrics().active == 1)
        draining = asyncio.create_task(engine.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="the engine is draining"):
            await engine.enter(tiny.request("x", [1]))
        assert await draining == 0 and len((await under_way).token_ids) == 40
        with pytest.raises(EngineError, match="only one that serves can be paused"):
            await engine.pause(idle_s=0.0)


async def test_whoever_goes_away_while_his_change_is_made_leaves_it_made_or_all_as_it_was() -> None:
    async with serving_engine(tiny.params(1), 3, beside=False) as engine:
        slow = tiny.request("a", [1, 2], 100)
        under_way = asyncio.wrap_future(engine.submit(slow, lambda _: time.sleep(0.01)))
        await until(lambda: engine.metrics().active == 1)
        for change in (engine.sleep(idle_s=60.0), engine.publish(tiny.params(2), 4, "four", idle_s=60.0)):
            waiting = asyncio.create_task(change)  # for the request to end
            await asyncio.sleep(0.02)
            waiting.cancel()
            await asyncio.wait({waiting})
            assert (engine.state, engine.version, engine.publication) == ("serving", 3, "")
        await under_way
        for change, state in (
            (engine.publish(tiny.params(2), 4, "four", idle_s=60.0), "serving"),
            (engine.sleep(idle_s=60.0), "asleep"),
            (engine.wake(), "serving"),
        ):
            changing = asyncio.create_task(change)
            for _ in range(3):
                await asyncio.sleep(0)  # by now its driver is being stopped or made
            changing.cancel()
            await asyncio.wait({changing})
            assert (engine.state, engine.version, engine.publication) == (state, 4, "four")
        assert gap(await ask(engine, tiny.request("b", [1, 2], 4)), tiny.params(2)) < 1e-5


async def test_weights_of_a_version_that_no_token_can_carry_never_take_the_place_of_others() -> None:
    async with serving_engine(tiny.params(1), 3) as engine:
        await engine.sleep(idle_s=10.0)
        for version in (-1, 2**31):
            with pytest.raises(EngineError, match=f"policy version {version}: expected 0 to 2147483647"):
                await engine.publish(tiny.params(2), version, "new", idle_s=0.0)
            with pytest.raises(EngineError, match=f"policy version {version}: expected 0 to 2147483647"):
                Staging(make_manifest(tiny.params(2), version), tiny.params(1))
        await engine.wake()
        assert (engine.version, engine.publication) == (3, "")


async def test_a_request_whose_grammar_compiles_while_the_door_is_shut_waits_before_it() -> None:
    grammars = SlowCompiler(
        [b"", b"", b"", b"", *(bytes([byte]) for byte in b'{}[]":, -.0123456789abcdefnulltrsghijkmopqvwxyz')][:50]
    )
    async with serving_engine(tiny.params(), grammars=grammars) as engine:
        bound = tiny.request("a", [1, 2], 4, grammar=Grammar(schema='{"type":"integer"}'), stop_ids=frozenset({3}))
        asked = asyncio.create_task(ask(engine, bound))
        await until(lambda: grammars.asked == 1)
        assert await engine.pause(idle_s=10.0) == 0
        grammars.gate.set()
        await asyncio.sleep(0.1)
        assert not asked.done() and (engine.metrics().active, engine.metrics().requests) == (0, 0)
        await engine.resume()
        assert len((await asked).token_ids) > 0


class SlowCompiler(GrammarCompiler):
    """Holds whoever asks until its gate opens."""

    def __init__(self, vocabulary: list[bytes]) -> None:
        super().__init__(vocabulary)
        self.gate, self.asked = asyncio.Event(), 0

    async def prepare(self, grammar: Grammar) -> None:
        if grammar.schema == '{"type":"integer"}':
            self.asked += 1
            await self.gate.wait()
        await super().prepare(grammar)
