"""Laws of the engine of this process, as a run sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import Driver, LocalEngines, RequestLog
from forgejax.rollout.fleet.local import LocalSampler
from tests.rollout import tiny
from tests.rollout.driving import gap, until


def _engines(folder: Path) -> tuple[Driver, LocalEngines]:
    log = RequestLog(folder / "requests.log")
    driver = Driver(tiny.engine(), tiny.params(), version=2, request_log=log)
    return driver, LocalEngines(driver, log)


async def test_every_token_drawn_is_returned_cancelled_or_failed(tmp_path: Path) -> None:
    _, engines = _engines(tmp_path)
    with engines:
        drawn: dict[str, list[int]] = {"gone": [], "bad": []}

        def fail(ids: Sequence[int]) -> None:
            drawn["bad"].extend(ids)
            raise KeyError("boom")

        done = await asyncio.gather(*(engines.sample(tiny.request(f"r{i}", tiny.prompt(i, 9), 6)) for i in range(5)))
        gone = asyncio.create_task(engines.sample(tiny.request("gone", [4, 5], 100), drawn["gone"].extend))
        await until(lambda: bool(drawn["gone"]))
        gone.cancel()
        with pytest.raises(EngineError, match="boom"):
            await engines.sample(tiny.request("bad", [4, 5], 100), fail)
        await until(lambda: engines.account().active + engines.account().open == 0)
        account = engines.account()
    returned = sum(len(each.token_ids) for each in done)
    assert (returned, account.cancelled, account.failed) == (30, len(drawn["gone"]), len(drawn["bad"]))
    assert account.sampled == returned + account.cancelled + account.failed
    assert (account.prompt_tokens, account.cached_tokens, account.waiting, account.inherited) == (49, 1, 0, 0)
    assert account.computed_tokens == 49 - 7 - 1  # the last token of a prompt is decoding's
    assert account.cache_hit_rate == 1 / 49  # "bad" finds the prompt of "gone"


async def test_a_request_that_ends_as_it_is_cancelled_gives_what_it_drew() -> None:
    ending: Future[object] = Future()
    engines = LocalSampler(cast(Driver, SimpleNamespace(submit=lambda request, on_draw: ending)))
    asked = asyncio.create_task(engines.sample(tiny.request("r", [4, 5], 9)))
    await asyncio.sleep(0)
    assert ending.set_running_or_notify_cancel()  # the driver ends it, and counts it as given
    asked.cancel()
    await asyncio.sleep(0.01)
    ending.set_result("what it drew")
    assert await asked == "what it drew"


async def test_on_tokens_sees_what_is_drawn_and_may_end_it(tmp_path: Path) -> None:
    _, engines = _engines(tmp_path)
    with engines:
        seen: list[int] = []

        def enough(ids: Sequence[int]) -> bool:
            seen.extend(ids)
            return len(seen) >= 4

        done = await engines.sample(tiny.request("r", [4, 5], 100), enough)
    assert done.token_ids.tolist() == seen and len(seen) == 4


async def test_the_record_holds_the_ids_of_each_request_and_leaves_out_the_unknown(tmp_path: Path) -> None:
    _, engines = _engines(tmp_path)
    with engines:
        one, two = [
            await engines.sample(tiny.request(name, tiny.prompt(1, 9), 6, owner=f"for {name}"))
            for name in ("one", "two")
        ]
        found = engines.requests_of(["one", "never", "two"])
        engines.flush()
        size = (tmp_path / "requests.log").stat().st_size
    assert set(found) == {"one", "two"}
    for name, done in (("one", one), ("two", two)):
        assert found[name].prompt_ids.tolist() == tiny.prompt(1, 9).tolist()
        assert found[name].sampled_ids.tolist() == done.token_ids.tolist()
    assert (tmp_path / "requests.log").stat().st_size == size  # nothing was left to write at the end
    again, engines = _engines(tmp_path)
    with engines:
        assert engines.account().inherited == 12 and engines.account().sampled == 0
        assert engines.given_before() == {"for one": 6, "for two": 6}
        assert set(engines.requests_of(["two", "three"])) == {"two"}
    assert not again.healthy


async def test_published_weights_draw_the_next_request(tmp_path: Path) -> None:
    driver, engines = _engines(tmp_path)
    with engines:
        engines.publish(tiny.params(1), 7)
        done = await engines.sample(tiny.request("r", tiny.prompt(1, 9), 6))
    assert set(done.versions.tolist()) == {7} and driver.version == 7
    assert gap(done, tiny.params(1)) < 1e-5
    np.testing.assert_array_equal(done.oldest_versions, done.versions)


async def test_engines_are_healthy_inside_the_block_alone_and_leaving_it_answers_who_waits(tmp_path: Path) -> None:
    _, engines = _engines(tmp_path)
    healthy = [engines.healthy]
    with engines:
        healthy.append(engines.healthy)
        task = asyncio.create_task(engines.sample(tiny.request("r", [1, 2], 120), lambda _: time.sleep(0.02)))
        await until(lambda: engines.account().active == 1)
    assert [*healthy, engines.healthy] == [False, True, False]
    with pytest.raises(EngineError, match="the engine was stopped"):
        await task
    with pytest.raises(EngineError, match="the engine was stopped"):
        await engines.sample(tiny.request("late", [1]))
