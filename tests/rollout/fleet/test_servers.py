"""Laws of many servers as one inference side, while some of them hang, die and come back."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import EngineAccount, RolloutConfig, ServerEngines
from tests.rollout import tiny
from tests.rollout.driving import gap, until
from tests.rollout.fleet.farm import Farm

SILENCE_S = 1.0


@contextmanager
def engines_of(folder: Path, **settings: Any) -> Iterator[tuple[Farm, ServerEngines]]:
    """Two servers and the engines over them, with the weights of seed 1 as version 1."""
    with Farm(folder) as farm:
        config = RolloutConfig(engines=farm.urls, poll_s=0.05, silence_s=SILENCE_S, **settings)
        with ServerEngines(config, tiny.params(1), 1, request_deadline_s=30.0) as engines:
            yield farm, engines


async def settled(engines: ServerEngines) -> EngineAccount:
    """The account once nothing is open."""

    def idle() -> bool:
        now = engines.account()
        return now.active + now.waiting + now.open == 0

    await until(idle)
    return engines.account()


def serving(engines: ServerEngines) -> int:
    return int(engines.figures()["engine/serving"])


async def test_requests_are_spread_and_each_is_drawn_by_the_version_published_last(tmp_path: Path) -> None:
    with engines_of(tmp_path) as (farm, engines):
        first = await asyncio.gather(*(engines.sample(tiny.request(f"a{i}", tiny.prompt(i, 20), 6)) for i in range(6)))
        engines.publish(tiny.params(2), 2)
        second = await asyncio.gather(*(engines.sample(tiny.request(f"b{i}", tiny.prompt(i, 20), 6)) for i in range(6)))
        records, account = engines.requests_of([f"a{i}" for i in range(6)]), await settled(engines)
        figures = engines.figures()
    assert [set(each.versions.tolist()) for each in (*first, *second)] == [{1}] * 6 + [{2}] * 6
    assert max(gap(each, tiny.params(1)) for each in first) < 1e-5
    assert max(gap(each, tiny.params(2)) for each in second) < 1e-5
    assert min(len(server.generated) for server in farm.servers) >= 4
    for each in first:
        assert records[each.request_id].sampled_ids.tolist() == each.token_ids.tolist()
    computed = 240 - len(first) - len(second) - account.cached_tokens  # the last token of a prompt is decoding's
    assert account == EngineAccount(
        sampled=72, prompt_tokens=240, cached_tokens=account.cached_tokens, computed_tokens=computed
    )
    assert figures["engine/publish_s"] > 0 and figures["replica_0/sampled"] + figures["replica_1/sampled"] == 72


async def test_a_server_that_dies_loses_no_request_that_nobody_was_shown_and_ends_the_others_with_a_reason(
    tmp_path: Path,
) -> None:
    with engines_of(tmp_path) as (farm, engines):
        for server in farm.servers:
            server.slow_s = 0.02
        shown: dict[str, list[int]] = {f"s{i}": [] for i in range(2)}
        streamed = [
            asyncio.create_task(engines.sample(tiny.request(name, tiny.prompt(i, 20), 40, seed=i), ids.extend))
            for i, (name, ids) in enumerate(shown.items())
        ]
        whole = [
            asyncio.create_task(engines.sample(tiny.request(f"w{i}", tiny.prompt(i, 20), 40, repeatable=True)))
            for i in range(4)
        ]
        await until(lambda: all(shown.values()))
        farm.run(farm.servers[0].die())
        ends = await asyncio.gather(*streamed, return_exceptions=True)
        done = await asyncio.gather(*whole)
        account = await settled(engines)
        moved = {each.request_id for each in done if each.request_id.endswith("~1")}
        records = engines.requests_of(each.request_id for each in done)
        assert serving(engines) == 1 and engines.healthy
        farm.run(farm.servers[0].start())
    failed = [end for end in ends if isinstance(end, EngineError)]
    assert len(failed) == 1 and re.search("closed the answer|no answer from|is lost", str(failed[0]))
    assert [len(each.token_ids) for each in done] == [40] * 4 and moved
    for each in done:
        assert records[each.request_id].sampled_ids.tolist() == each.token_ids.tolist()
    given = 40 * 4 + 40
    assert account.sampled == given + account.cancelled + account.failed + account.lost
    assert account.cancelled + account.failed + account.lost > 0


async def test_a_server_that_hangs_is_noticed_in_time_and_catches_up_before_it_is_asked_again(tmp_path: Path) -> None:
    with engines_of(tmp_path) as (farm, engines):
        for server in farm.servers:
            server.slow_s = 0.02
        asked = [
            asyncio.create_task(engines.sample(tiny.request(f"r{i}", tiny.prompt(i, 20), 100, repeatable=True)))
            for i in range(4)
        ]
        await until(lambda: all(server.generated for server in farm.servers))
        hung, began = farm.servers[1], time.monotonic()
        hung.slow_s, hung.hang = 3.0, "/"  # neither answers nor draws
        await until(lambda: serving(engines) == 1)
        noticed_s = time.monotonic() - began
        engines.publish(tiny.params(2), 2)  # without it
        done = await asyncio.gather(*asked)
        for server in farm.servers:
            server.generated.clear()
            server.slow_s = 0.0
        hung.hang = ""
        await until(lambda: serving(engines) == 2)
        late = await asyncio.gather(*(engines.sample(tiny.request(f"l{i}", tiny.prompt(i, 20), 4)) for i in range(8)))
        account = await settled(engines)
    assert noticed_s < 2 * SILENCE_S + 1.0
    assert [len(each.token_ids) for each in done] == [100] * 4
    assert set(hung.generated) == {2} and {v for each in late for v in each.versions.tolist()} == {2}
    assert account.sampled == 400 + 32 + account.cancelled + account.failed + account.lost


async def test_another_process_at_the_same_address_gets_the_weights_before_it_is_asked(tmp_path: Path) -> None:
    with engines_of(tmp_path) as (farm, engines):
        first = await engines.sample(tiny.request("a", [1, 2, 3], 4))
        engines.publish(tiny.params(2), 7)
        for server in farm.servers:
            farm.run(server.die())
            farm.run(server.start(version=99))  # with weights and a version of its own
            server.generated.clear()
        done = await engines.sample(tiny.request("b", [1, 2, 3], 4, repeatable=True))
        found = engines.requests_of(["a"])
        account = await settled(engines)
    assert set(done.versions.tolist()) == {7} and gap(done, tiny.params(2)) < 1e-5
    assert {version for server in farm.servers for version in server.generated} == {7}
    assert found["a"].sampled_ids.tolist() == first.token_ids.tolist()  # by the log that the process went on with
    assert account.sampled == 8 + account.lost


async def test_a_server_that_does_not_take_weights_is_left_out_until_it_has_them(tmp_path: Path) -> None:
    with engines_of(tmp_path, publish_s=1.0) as (farm, engines):
        farm.servers[1].hang = "/weights"
        engines.publish(tiny.params(2), 2)
        assert serving(engines) == 1
        done = await asyncio.gather(*(engines.sample(tiny.request(f"r{i}", tiny.prompt(i, 20), 4)) for i in range(4)))
        assert {v for each in done for v in each.versions.tolist()} == {2} and not farm.servers[1].generated
        farm.servers[1].hang = ""
        await until(lambda: serving(engines) == 2)


async def test_where_no_server_takes_the_weights_each_is_named_and_the_version_before_is_served(tmp_path: Path) -> None:
    with engines_of(tmp_path) as (farm, engines):
        other = jax.tree.map(lambda leaf: np.zeros((*leaf.shape, 2), np.float32), tiny.params(2))
        with pytest.raises(EngineError, match=r"no engine took .* version 2; version 1 is served") as caught:
            engines.publish(other, 2)
        assert all(url in str(caught.value) for url in farm.urls) and "belong to another model" in str(caught.value)
        done = await engines.sample(tiny.request("r", [1, 2, 3], 4))
    assert set(done.versions.tolist()) == {1} and gap(done, tiny.params(1)) < 1e-5


async def test_a_request_that_is_stopped_or_left_here_costs_what_was_drawn_for_it_until_then(tmp_path: Path) -> None:
    with engines_of(tmp_path) as (farm, engines):
        for server in farm.servers:
            server.slow_s = 0.01
        seen: list[int] = []

        def enough(ids: Any) -> bool:
            seen.extend(ids)
            return len(seen) >= 6

        done = await engines.sample(tiny.request("stopped", [1, 2, 3], 100), enough)
        left = asyncio.create_task(engines.sample(tiny.request("left", [1, 2, 3], 100)))
        await asyncio.sleep(0.1)
        left.cancel()
        account = await settled(engines)
        record = engines.requests_of(["stopped"])["stopped"]
    assert done.token_ids.tolist() == seen == record.sampled_ids[: len(seen)].tolist() and record.cut
    assert account.sampled == len(seen) + account.cancelled and account.cancelled > 0


async def test_without_any_server_a_run_does_not_begin() -> None:
    config = RolloutConfig(engines=("http://127.0.0.1:9",), poll_s=0.05, silence_s=0.2)
    engines = ServerEngines(config, tiny.params(1), 1, request_deadline_s=30.0)
    with pytest.raises(EngineError, match=r"no inference engine serves: engine 0 \(http://127\.0\.0\.1:9\): it does"):
        engines.__enter__()
    assert not engines.healthy


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for settings, words in [
        ({"engines": 0}, "expected 1 or more"),
        ({"engines": ()}, "one at least"),
        ({"engines": ("http://a:1", "http://a:1")}, "different addresses"),
        ({"engines": ("10.0.0.7:8800",)}, "expected an address such as"),
        ({"poll_s": 5.0, "silence_s": 1.0}, "must be shorter"),
        ({"max_restarts": -1}, "0 or more"),
    ]:
        with pytest.raises(EngineError.__base__, match=words):  # type: ignore[arg-type]
            RolloutConfig(**settings)  # type: ignore[arg-type]
