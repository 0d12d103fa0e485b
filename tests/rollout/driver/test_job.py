"""Laws of when a generation is over."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from forgejax.rollout import Driver, LocalSampler
from forgejax.types import FinishReason, SamplingLaw
from tests.rollout import tiny
from tests.rollout.driving import balanced, gap, sample_all, until


async def test_a_generation_ends_at_a_stop_id_at_max_tokens_or_at_the_context() -> None:
    prompt = tiny.prompt(4, 10)
    with Driver(tiny.engine(), tiny.params()) as driver:
        (free,) = await sample_all(driver, [tiny.request("free", prompt, 21, seed=5)])
        stop = int(free.token_ids[6])
        first = free.token_ids.tolist().index(stop)
        stopped, long, one = await sample_all(
            driver,
            [
                tiny.request("stop", prompt, 20, seed=5, stop_ids=frozenset({stop})),
                tiny.request("long", tiny.prompt(4, 120), 500, seed=5),
                tiny.request("one", prompt[:1], 1, seed=5),
            ],
        )
        assert balanced(driver)
        assert driver.metrics().tokens_sampled["train"] == 21 + first + 1 + 8 + 1
    assert (len(free.token_ids), free.finish_reason) == (21, FinishReason.LENGTH)
    np.testing.assert_array_equal(stopped.token_ids, free.token_ids[: first + 1])
    assert stopped.finish_reason is FinishReason.STOP
    assert (len(long.token_ids), long.finish_reason) == (8, FinishReason.LENGTH)
    assert len(one.token_ids) == 1 and gap(one, tiny.params()) < 1e-5


async def test_on_tokens_sees_every_id_and_its_true_ends_the_generation_there() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        seen: list[int] = []

        def enough(ids: Sequence[int]) -> bool:
            seen.extend(ids)
            return len(seen) >= 5

        done = await LocalSampler(driver).sample(tiny.request("r", tiny.prompt(1, 9), 40, seed=1), enough)
        assert done.token_ids.tolist() == seen and len(seen) == 6  # two tokens a step
        assert done.finish_reason is FinishReason.STOP
        await until(lambda: driver.metrics().active == 0)
        # The slot is free and its successor is not disturbed by what the slot held.
        (after,) = await sample_all(driver, [tiny.request("s", tiny.prompt(1, 9), 8, seed=1)])
        np.testing.assert_array_equal(after.token_ids[:6], seen)
        assert balanced(driver)


async def test_a_run_of_near_certain_tokens_is_a_repetition() -> None:
    sure = jax.tree.map(lambda x: x * 40 if x.ndim > 1 else x, tiny.params())
    with Driver(tiny.engine(repetition_tokens=6), sure) as driver:
        (done,) = await sample_all(driver, [tiny.request("r", tiny.prompt(1, 4), 90, law=SamplingLaw(temperature=0))])
    assert done.finish_reason is FinishReason.REPETITION
    certain = np.exp(done.logprobs) > 0.99
    assert certain[-6:].all() or certain[-7:-1].all()
    assert len(done.token_ids) < 90
