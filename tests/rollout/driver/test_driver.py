"""Laws of the driver: exact log-probs and versions, whatever the company, the reuse and the swaps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.errors import EngineError
from forgejax.rollout import Driver, LocalSampler
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from forgejax.rollout.engine.slots import Slots
from forgejax.types import Completion, SamplingLaw
from tests.rollout import tiny
from tests.rollout.driving import balanced, gap, sample_all, until


async def test_logprobs_are_those_of_a_dense_forward_pass_with_and_without_reuse() -> None:
    params, shared = tiny.params(), tiny.prompt(0, 41)
    first = [tiny.request(f"a{i}", [*shared, i], 30, seed=i) for i in range(5)]
    gaps, tokens, cached = [], 0, 0
    for reuse in ("version", "none"):
        with Driver(tiny.engine(reuse=reuse), params) as driver:
            turns = await sample_all(driver, first)
            following = [
                tiny.request(f"b{i}", [*turn.prompt_ids, *turn.token_ids, 7, 8], 20, seed=i)
                for i, turn in enumerate(turns)
            ]
            turns += await sample_all(driver, following)
            gaps += [gap(turn, params) for turn in turns]
            tokens += sum(len(turn.token_ids) for turn in turns)
            cached = driver.metrics().cached_tokens
            if reuse == "version":
                # Members 2 to 5 share 41 tokens; each next turn finds all that the turn before it fed.
                assert [turn.cached_tokens for turn in turns] == [0, 41, 41, 41, 41] + [71] * 5
                reused_ids = [turn.token_ids.tolist() for turn in turns]
            else:
                assert cached == 0 and [turn.token_ids.tolist() for turn in turns] == reused_ids
    assert tokens == 500 and max(gaps) < 1e-5


async def test_results_do_not_depend_on_the_company() -> None:
    params = tiny.params()
    requests = [
        tiny.request(f"r{i}", tiny.prompt(i, 3 + 5 * i), 12 + i, seed=i, law=SamplingLaw(temperature=0.5 + 0.2 * i))
        for i in range(7)
    ]
    with Driver(tiny.engine(), params) as driver:
        together = await sample_all(driver, requests)
    with Driver(tiny.engine(reuse="none"), params) as driver:
        alone = [(await sample_all(driver, [request]))[0] for request in reversed(requests)][::-1]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert max(gap(each, params) for each in together) < 1e-5


async def test_a_batch_invariant_engine_gives_a_request_the_same_bits_in_any_company_and_after_any() -> None:
    """Two turns of six members that begin alike, at once and one by one, in an engine that is used and a fresh one."""
    params, shared = tiny.params(), tiny.prompt(0, 21)
    engine = tiny.engine(batch_invariant=True)

    async def turns(driver: Driver, members: Sequence[int], name: str) -> list[Completion]:
        first = [
            tiny.request(f"{name}-a{i}", [*shared, *tiny.prompt(i, 1 + 4 * i)], 3 + 3 * i, seed=i) for i in members
        ]
        said = await sample_all(driver, first)
        following = [
            tiny.request(f"{name}-b{i}", [*turn.prompt_ids, *turn.token_ids, 7, 8], 12, seed=100 + i)
            for i, turn in zip(members, said, strict=True)
        ]
        return said + await sample_all(driver, following)

    with Driver(engine, params) as driver:
        expected = await turns(driver, range(6), "together")
        alone = [await turns(driver, [i], "alone") for i in (4, 1, 5, 0, 3, 2)]
        assert all(each.cached_tokens in (0, len(each.prompt_ids) - 1) for pair in alone for each in pair)
    with Driver(engine, params) as driver:
        backwards = await turns(driver, range(5, -1, -1), "backwards")
    ordered = sorted(alone, key=lambda pair: pair[0].request_id)
    for found in ([a for a, _ in ordered] + [b for _, b in ordered], backwards[5::-1] + backwards[:5:-1]):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.logprobs.view(np.int32), other.logprobs.view(np.int32))


async def test_greedy_takes_the_likeliest_and_records_the_untempered_logprob() -> None:
    params = tiny.params()
    with Driver(tiny.engine(), params) as driver:
        (done,) = await sample_all(driver, [tiny.request("g", tiny.prompt(1, 9), 15, law=SamplingLaw(temperature=0))])
    logits = tiny.dense_logits(params, np.concatenate([done.prompt_ids, done.token_ids]))
    np.testing.assert_array_equal(done.token_ids, logits[8:-1].argmax(-1))
    assert gap(done, params) < 1e-5


async def test_a_swap_in_flight_keeps_the_kv_and_marks_every_token() -> None:
    old, new = tiny.params(0), tiny.params(1)
    engine = tiny.engine()
    with Driver(engine, old, version=3) as driver:
        sampler, count = LocalSampler(driver), 0

        def swap(ids: Sequence[int]) -> None:
            nonlocal count
            count += len(ids)
            if count == 10:
                driver.publish(new, 5)

        prompt = tiny.prompt(2, 20)
        crossing = await sampler.sample(tiny.request("crossing", prompt, 24, seed=1), swap)
        assert crossing.versions.tolist() == [3] * 10 + [5] * 14
        assert crossing.oldest_versions.tolist() == [3] * 24
        assert gap(crossing, old) > 0.1  # later tokens are not the old policy's
        np.testing.assert_allclose(
            crossing.logprobs[:10], tiny.dense_logprobs(old, prompt, crossing.token_ids, crossing.law)[:10], atol=1e-5
        )
        # Nothing of the old weights is reused: not the prompt, not the completion that crossed the swap.
        following = np.concatenate([prompt, crossing.token_ids, [1, 2]])
        (after,) = await sample_all(driver, [tiny.request("after", following, 10, seed=2)])
        assert after.cached_tokens == 0 and gap(after, new) < 1e-5
        assert after.versions.tolist() == after.oldest_versions.tolist() == [5] * 10
        (again,) = await sample_all(driver, [tiny.request("again", following, 10, seed=2)])
        assert again.cached_tokens == 45 and again.token_ids.tolist() == after.token_ids.tolist()
        assert driver.version == driver.metrics().version == 5


async def test_logprobs_after_a_swap_are_those_of_new_weights_over_old_keys_and_values() -> None:
    """Replayed by hand through the engine: a prefix computed by the old weights, decoded by the new."""
    old, new, engine = tiny.params(0), tiny.params(1), tiny.engine()
    prompt = tiny.prompt(2, 20)
    with Driver(engine, old, version=0) as driver:
        done = await LocalSampler(driver).sample(
            tiny.request("r", prompt, 6, seed=1), lambda _: driver.publish(new, 1) if driver.version == 0 else None
        )
    assert done.versions.tolist() == [0, 0, 1, 1, 1, 1]
    box = engine.load_params(old)
    ids = np.concatenate([prompt, done.token_ids])
    expected = []
    for index in range(2, 6):
        # All tokens but those fed after the swap were fed by the old weights.
        prefix = engine.prefill(params=box, padded_tokens=np.pad(ids[:22], (0, 10)), true_length=22)
        fresh = engine.load_params(new)
        rest = ids[22 : 20 + index]
        if len(rest):
            prefix = engine.prefill(
                params=fresh,
                existing_prefix=prefix,
                padded_tokens=np.pad(rest, (0, 8 - len(rest))),
                true_length=len(rest),
            )
        state = engine.insert(prefix, engine.init_decode_state(), 0, SlotSettings(budget=9, seed=1))
        state, result = engine.generate(fresh, state, rows=1)
        (run,) = split_draws(result, [0])
        assert run.token_ids[0] == done.token_ids[index]
        expected.append(run.logprobs[0])
    np.testing.assert_allclose(done.logprobs[2:], expected, atol=1e-5)


async def test_a_temperature_close_to_0_draws_the_likeliest_token_and_harms_nobody() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        cold, greedy = await sample_all(
            driver,
            [tiny.request(f"{t}", tiny.prompt(1, 4), 8, law=SamplingLaw(temperature=t)) for t in (2e-38, 0.0)],
        )
        assert driver.healthy
    np.testing.assert_array_equal(cold.token_ids, greedy.token_ids)
    np.testing.assert_allclose(cold.logprobs, 0.0, atol=1e-6)


async def test_a_failure_in_the_thread_fails_the_open_requests_and_shows() -> None:
    nan = jax.tree.map(lambda x: x * np.nan, tiny.params())
    driver = Driver(tiny.engine(), nan).start()
    waiting = [driver.submit(tiny.request(f"r{i}", tiny.prompt(1, 9), 20)) for i in range(6)]
    results = await asyncio.gather(*map(asyncio.wrap_future, waiting), return_exceptions=True)
    assert all(isinstance(each, EngineError) and "finite" in str(each) for each in results)
    await until(lambda: not driver.healthy)
    with pytest.raises(EngineError, match="the engine failed"):
        driver.submit(tiny.request("late", [1]))
    assert balanced(driver)
    driver.stop()


async def test_an_engine_that_fails_starts_again_with_fresh_pages_and_after_a_few_times_in_a_row_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing, generate = 1, Slots.generate

    def fail(self: Slots, *arguments: Any) -> Any:
        nonlocal failing
        failing -= 1
        if failing >= 0:
            raise RuntimeError("out of luck")
        return generate(self, *arguments)

    monkeypatch.setattr(Slots, "generate", fail)
    driver = Driver(tiny.engine(max_restarts=2), tiny.params()).start()

    async def ask(name: str) -> Completion | BaseException:
        sampling = LocalSampler(driver).sample(tiny.request(name, tiny.prompt(1, 9), 6, seed=1))
        return (await asyncio.gather(sampling, return_exceptions=True))[0]

    first, second = await ask("a"), await ask("b")
    assert isinstance(first, EngineError) and "the engine failed: RuntimeError('out of luck')" in str(first)
    assert isinstance(second, Completion) and gap(second, tiny.params()) < 1e-5 and driver.healthy
    failing = 3  # in a row: two restarts, and no more
    for name in "cde":
        assert isinstance(await ask(name), EngineError)
    await until(lambda: not driver.healthy)
    with pytest.raises(EngineError, match="out of luck"):
        driver.submit(tiny.request("late", [1]))
    assert driver.metrics().restarts == 3 and balanced(driver)
    driver.stop()


_ASKED = st.tuples(st.integers(0, 2), st.integers(1, 70), st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))


@given(st.lists(_ASKED, min_size=1, max_size=9))
@settings(max_examples=20, deadline=None)
def test_whatever_the_schedule_logprobs_are_those_of_a_dense_forward_pass(
    asked: list[tuple[int, int, int, int, int]],
) -> None:
    """Shared prefixes, sessions, cancellations and, with pages for one long request, preemptions."""
    params = tiny.params()
    with Driver(tiny.engine(kv_pages=36), params) as driver:
        futures = []
        for number, (text, length, tokens, fate, session) in enumerate(asked):
            request = tiny.request(
                str(number), tiny.prompt(text, 70)[:length], tokens, seed=number, session_id=str(session)
            )
            futures.append((driver.submit(request), fate == 3))
        for future, cancelled in futures:
            if cancelled:
                future.cancel()
        done = [future.result(60) for future, cancelled in futures if not cancelled]
    assert balanced(driver)
    for completion in done:
        assert gap(completion, params) < 1e-5
        assert completion.oldest_versions.tolist() == [0] * len(completion.token_ids)


async def test_stopping_answers_every_waiter() -> None:
    driver = Driver(tiny.engine(), tiny.params()).start()
    sampler = LocalSampler(driver)
    tasks = [asyncio.create_task(sampler.sample(tiny.request(f"r{i}", [1, 2], 120))) for i in range(9)]
    await until(lambda: driver.metrics().active > 0)
    await asyncio.to_thread(driver.stop)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert sum(isinstance(each, EngineError) for each in results) >= 5
    assert all(isinstance(each, EngineError | Completion) for each in results)
    driver.stop()
    assert not driver.healthy and balanced(driver)
