"""Whole prompts that are asked for again: the members of a group."""

from __future__ import annotations

import asyncio

import numpy as np

from forgejax.rollout import Driver, LocalSampler
from tests.rollout import tiny


async def test_the_members_of_a_group_compute_nothing_of_their_prompt_but_the_first() -> None:
    prompt = tiny.prompt(3, 30)
    with Driver(tiny.engine(), tiny.params()) as driver:
        sampler = LocalSampler(driver)
        requests = [tiny.request(f"r{i}", prompt, 8, seed=i) for i in range(8)]
        done = await asyncio.gather(*(sampler.sample(each) for each in requests))
    assert sorted(each.cached_tokens for each in done) == [0] + [29] * 7
    for each in done:
        expected = tiny.dense_logprobs(tiny.params(), prompt, each.token_ids, each.law)
        assert np.abs(expected - each.logprobs).max() < 1e-5


async def test_new_weights_of_the_same_version_reuse_no_prompt() -> None:
    prompt, fresh = tiny.prompt(4, 30), tiny.params(7)
    with Driver(tiny.engine(), tiny.params(), version=2) as driver:
        sampler = LocalSampler(driver)
        await sampler.sample(tiny.request("old", prompt, 4, seed=1))
        driver.publish(fresh, 2)
        done = await sampler.sample(tiny.request("new", prompt, 8, seed=1))
    assert done.cached_tokens == 0
    expected = tiny.dense_logprobs(fresh, prompt, done.token_ids, done.law)
    assert np.abs(expected - done.logprobs).max() < 1e-5


async def test_a_prompt_gives_way_to_those_used_after_it() -> None:
    prompts = [tiny.prompt(seed, 11) for seed in range(3)]
    with Driver(tiny.engine(ready_prompts=2, prefix_cache_tokens=0), tiny.params()) as driver:
        sampler = LocalSampler(driver)
        order = (0, 1, 0, 2, 0, 1)
        found = [
            (await sampler.sample(tiny.request(f"r{at}", prompts[index], 2))).cached_tokens
            for at, index in enumerate(order)
        ]
    assert found == [0, 0, 10, 0, 10, 0]
