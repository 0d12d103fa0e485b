"""Laws of what is accepted."""

from __future__ import annotations

import asyncio
import threading

import pytest

from forgejax.errors import EngineError, OverloadedError
from forgejax.rollout import Driver, LocalSampler, RemoteSampler
from forgejax.rollout.server.http import RolloutServer
from forgejax.types import SamplingLaw
from tests.rollout import tiny
from tests.rollout.serving import served, serving_engine


async def test_what_cannot_be_served_is_refused_at_once_in_a_sentence() -> None:
    with Driver(tiny.engine(max_waiting=1), tiny.params()) as driver:
        cases = [
            (tiny.request("long", tiny.prompt(1, 128)), "128 tokens and the context holds 128"),
            (tiny.request("ids", [1, 50]), "the policy knows 0 to 49"),
            (tiny.request("ids", [1, -1]), "from -1 to 1"),
            (tiny.request("stops", [1], stop_ids=frozenset(range(9))), "9 stop ids given, 8 expected"),
            (tiny.request("stop", [1], stop_ids=frozenset([2**40])), "expected 0 to 2147483647"),
            (tiny.request("cold", [1], law=SamplingLaw(temperature=1e-40)), "give 0 to take the likeliest"),
        ]
        for request, why in cases:
            with pytest.raises(EngineError, match=why):
                await LocalSampler(driver).sample(request)
        assert driver.healthy and driver.metrics().requests == 0
    with pytest.raises(EngineError, match="was stopped"):
        driver.submit(tiny.request("late", [1]))


async def test_a_full_queue_and_a_used_id_are_refused() -> None:
    hold, begun = threading.Event(), threading.Event()

    def block(_: object) -> None:
        begun.set()
        hold.wait(10)

    async with serving_engine(tiny.params(), engine=tiny.engine(max_waiting=1)) as engine:
        driver = engine.driver
        taken = [driver.submit(tiny.request("a", [1], 4), block)]
        await asyncio.to_thread(begun.wait, 20)
        taken += [driver.submit(tiny.request(f"b{number}", [1], 4)) for number in range(engine.engine.config.slots)]
        with pytest.raises(OverloadedError, match="1 requests are waiting already") as caught:
            driver.submit(tiny.request("c", [1], 4))
        assert caught.value.retry_after_s == 1.0
        async with served(RolloutServer(engine).make_app()) as url, RemoteSampler(url) as remote:
            with pytest.raises(OverloadedError, match="1 requests are waiting already") as told:
                await remote.sample(tiny.request("d", [1], 4))
        assert told.value.retry_after_s == 1.0
        hold.set()
        drawn = await asyncio.gather(*(asyncio.wrap_future(each) for each in taken))
        assert len(drawn) == 5 and all(len(completion.token_ids) == 4 for completion in drawn)
    hold.clear()
    with Driver(tiny.engine(), tiny.params()) as driver:
        first = driver.submit(tiny.request("a", [1], 4), block)
        with pytest.raises(EngineError, match="open already"):
            driver.submit(tiny.request("a", [1], 4))
        hold.set()
        await asyncio.wrap_future(first)
