"""Laws of the driver: every request ends once, with exact log-probs, versions and counts."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import Driver, LocalSampler, RequestLog
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from forgejax.types import Completion, FinishReason, SampleRequest, SamplingLaw
from tests.rollout import tiny


def _gap(completion: Completion, params: object) -> float:
    expected = tiny.dense_logprobs(params, completion.prompt_ids, completion.token_ids, completion.law)
    return float(np.abs(expected - completion.logprobs).max())


async def _sample_all(driver: Driver, requests: Sequence[SampleRequest]) -> list[Completion]:
    sampler = LocalSampler(driver)
    return await asyncio.wait_for(asyncio.gather(*(sampler.sample(request) for request in requests)), 60)


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(3_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true within 30 s")


def _balanced(driver: Driver) -> bool:
    metrics = driver.metrics()
    ended = (metrics.tokens_returned, metrics.tokens_cancelled, metrics.tokens_failed)
    return all(count == sum(x[purpose] for x in ended) for purpose, count in metrics.tokens_sampled.items())


async def test_logprobs_are_those_of_a_dense_forward_pass_with_and_without_reuse() -> None:
    params, shared = tiny.params(), tiny.prompt(0, 41)
    first = [tiny.request(f"a{i}", [*shared, i], 30, seed=i) for i in range(5)]
    gaps, tokens, cached = [], 0, 0
    for reuse in (1024, 0):
        with Driver(tiny.engine(prefix_cache_tokens=reuse), params) as driver:
            turns = await _sample_all(driver, first)
            following = [
                tiny.request(f"b{i}", [*turn.prompt_ids, *turn.token_ids, 7, 8], 20, seed=i)
                for i, turn in enumerate(turns)
            ]
            turns += await _sample_all(driver, following)
            gaps += [_gap(turn, params) for turn in turns]
            tokens += sum(len(turn.token_ids) for turn in turns)
            cached = driver.metrics().cached_tokens
            if reuse:
                # Members 2 to 5 share 40 tokens; each next turn finds all of the turn before it but a page.
                assert [turn.cached_tokens for turn in turns] == [0, 40, 40, 40, 40] + [68] * 5
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
        together = await _sample_all(driver, requests)
    with Driver(tiny.engine(prefix_cache_tokens=0), params) as driver:
        alone = [(await _sample_all(driver, [request]))[0] for request in reversed(requests)][::-1]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert max(_gap(each, params) for each in together) < 1e-5


async def test_greedy_takes_the_likeliest_and_records_the_untempered_logprob() -> None:
    params = tiny.params()
    with Driver(tiny.engine(), params) as driver:
        (done,) = await _sample_all(driver, [tiny.request("g", tiny.prompt(1, 9), 15, law=SamplingLaw(temperature=0))])
    logits = tiny.dense_logits(params, np.concatenate([done.prompt_ids, done.token_ids]))
    np.testing.assert_array_equal(done.token_ids, logits[8:-1].argmax(-1))
    assert _gap(done, params) < 1e-5


async def test_a_generation_ends_at_a_stop_id_at_max_tokens_or_at_the_context() -> None:
    prompt = tiny.prompt(4, 10)
    with Driver(tiny.engine(), tiny.params()) as driver:
        (free,) = await _sample_all(driver, [tiny.request("free", prompt, 21, seed=5)])
        stop = int(free.token_ids[6])
        first = free.token_ids.tolist().index(stop)
        stopped, long, one = await _sample_all(
            driver,
            [
                tiny.request("stop", prompt, 20, seed=5, stop_ids=frozenset({stop})),
                tiny.request("long", tiny.prompt(4, 120), 500, seed=5),
                tiny.request("one", prompt[:1], 1, seed=5),
            ],
        )
        assert _balanced(driver)
        assert driver.metrics().tokens_sampled["train"] == 21 + first + 1 + 8 + 1
    assert (len(free.token_ids), free.finish_reason) == (21, FinishReason.LENGTH)
    np.testing.assert_array_equal(stopped.token_ids, free.token_ids[: first + 1])
    assert stopped.finish_reason is FinishReason.STOP
    assert (len(long.token_ids), long.finish_reason) == (8, FinishReason.LENGTH)
    assert len(one.token_ids) == 1 and _gap(one, tiny.params()) < 1e-5


async def test_on_tokens_sees_every_id_and_its_true_ends_the_generation_there() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        seen: list[int] = []

        def enough(ids: Sequence[int]) -> bool:
            seen.extend(ids)
            return len(seen) >= 5

        done = await LocalSampler(driver).sample(tiny.request("r", tiny.prompt(1, 9), 40, seed=1), enough)
        assert done.token_ids.tolist() == seen and len(seen) == 6  # two tokens a step
        assert done.finish_reason is FinishReason.STOP
        await _until(lambda: driver.metrics().active == 0)
        # The slot is free and its successor is not disturbed by what the slot held.
        (after,) = await _sample_all(driver, [tiny.request("s", tiny.prompt(1, 9), 8, seed=1)])
        np.testing.assert_array_equal(after.token_ids[:6], seen)
        assert _balanced(driver)


async def test_a_failing_callback_loses_only_its_own_request() -> None:
    def fail(_: Sequence[int]) -> bool:
        raise KeyError("boom")

    with Driver(tiny.engine(), tiny.params()) as driver:
        bad = LocalSampler(driver).sample(tiny.request("bad", tiny.prompt(1, 9), 40), fail)
        good = LocalSampler(driver).sample(tiny.request("good", tiny.prompt(1, 9), 10))
        lost, done = await asyncio.gather(bad, good, return_exceptions=True)
        assert isinstance(lost, EngineError) and "boom" in str(lost)
        assert isinstance(done, Completion) and len(done.token_ids) == 10
        assert driver.healthy and driver.metrics().tokens_failed["train"] == 2 and _balanced(driver)


async def test_cancelling_the_task_frees_the_slot_and_its_tokens_are_counted() -> None:
    with Driver(tiny.engine(slots=4), tiny.params()) as driver:
        begun = threading.Event()
        blocked = threading.Event()

        def hold(_: Sequence[int]) -> None:
            begun.set()
            blocked.wait(10)

        sampler = LocalSampler(driver)
        request = tiny.request("held", tiny.prompt(1, 9), 100, purpose="evaluation")
        task = asyncio.create_task(sampler.sample(request, hold))
        await asyncio.to_thread(begun.wait, 10)
        waiting = asyncio.create_task(sampler.sample(tiny.request("waiting", tiny.prompt(1, 9), 100)))
        await asyncio.sleep(0)
        task.cancel()
        waiting.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        blocked.set()
        await _until(lambda: driver.metrics().active == 0 and driver.metrics().waiting == 0)
        metrics = driver.metrics()
        assert metrics.tokens_sampled["evaluation"] == metrics.tokens_cancelled["evaluation"] == 2
        done = await _sample_all(driver, [tiny.request(f"r{i}", tiny.prompt(1, 9), 6) for i in range(8)])
        assert [len(each.token_ids) for each in done] == [6] * 8 and _balanced(driver)


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
        assert _gap(crossing, old) > 0.1  # later tokens are not the old policy's
        np.testing.assert_allclose(
            crossing.logprobs[:10], tiny.dense_logprobs(old, prompt, crossing.token_ids, crossing.law)[:10], atol=1e-5
        )
        # Nothing of the old weights is reused: not the prompt, not the completion that crossed the swap.
        following = np.concatenate([prompt, crossing.token_ids, [1, 2]])
        (after,) = await _sample_all(driver, [tiny.request("after", following, 10, seed=2)])
        assert after.cached_tokens == 0 and _gap(after, new) < 1e-5
        assert after.versions.tolist() == after.oldest_versions.tolist() == [5] * 10
        (again,) = await _sample_all(driver, [tiny.request("again", following, 10, seed=2)])
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


async def test_what_cannot_be_served_is_refused_at_once_in_a_sentence() -> None:
    with Driver(tiny.engine(max_queued=1), tiny.params()) as driver:
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
    hold = threading.Event()
    with Driver(tiny.engine(max_queued=1), tiny.params()) as driver:
        begun = threading.Event()

        def block(_: object) -> None:
            begun.set()
            hold.wait(10)

        first = driver.submit(tiny.request("a", [1], 4), block)
        await asyncio.to_thread(begun.wait, 20)
        second = driver.submit(tiny.request("b", [1], 4))
        with pytest.raises(EngineError, match="1 requests are waiting already"):
            driver.submit(tiny.request("c", [1], 4))
        hold.set()
        assert len((await asyncio.wrap_future(first)).token_ids) == 4
        assert len((await asyncio.wrap_future(second)).token_ids) == 4
    hold.clear()
    with Driver(tiny.engine(), tiny.params()) as driver:
        first = driver.submit(tiny.request("a", [1], 4), block)
        with pytest.raises(EngineError, match="open already"):
            driver.submit(tiny.request("a", [1], 4))
        hold.set()
        await asyncio.wrap_future(first)


async def test_a_passed_deadline_ends_a_request_and_frees_its_slot() -> None:
    with Driver(tiny.engine(request_deadline_s=0.2), tiny.params()) as driver:
        release = threading.Event()
        slow = LocalSampler(driver).sample(tiny.request("slow", [1], 100), lambda _: release.wait(0.3) and None)
        with pytest.raises(EngineError, match=r"deadline of 0\.2 s"):
            await asyncio.wait_for(slow, 20)
        await _until(lambda: driver.metrics().active == 0)
        assert driver.healthy and _balanced(driver) and driver.metrics().tokens_failed["train"] > 0


async def test_a_run_of_near_certain_tokens_is_a_repetition() -> None:
    sure = jax.tree.map(lambda x: x * 40 if x.ndim > 1 else x, tiny.params())
    with Driver(tiny.engine(repetition_tokens=6), sure) as driver:
        (done,) = await _sample_all(driver, [tiny.request("r", tiny.prompt(1, 4), 90, law=SamplingLaw(temperature=0))])
    assert done.finish_reason is FinishReason.REPETITION
    certain = np.exp(done.logprobs) > 0.99
    assert certain[-6:].all() or certain[-7:-1].all()
    assert len(done.token_ids) < 90


async def test_a_temperature_close_to_0_draws_the_likeliest_token_and_harms_nobody() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        cold, greedy = await _sample_all(
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
    await _until(lambda: not driver.healthy)
    with pytest.raises(EngineError, match="the engine failed"):
        driver.submit(tiny.request("late", [1]))
    assert _balanced(driver)
    driver.stop()


async def test_stopping_answers_every_waiter() -> None:
    driver = Driver(tiny.engine(), tiny.params()).start()
    sampler = LocalSampler(driver)
    tasks = [asyncio.create_task(sampler.sample(tiny.request(f"r{i}", [1, 2], 120))) for i in range(9)]
    await _until(lambda: driver.metrics().active > 0)
    await asyncio.to_thread(driver.stop)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert sum(isinstance(each, EngineError) for each in results) >= 5
    assert all(isinstance(each, EngineError | Completion) for each in results)
    driver.stop()
    assert not driver.healthy and _balanced(driver)


async def test_the_request_log_holds_what_was_prompted_and_drawn_even_of_cancelled_requests(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    with Driver(tiny.engine(), tiny.params(), request_log=log) as driver:
        (done,) = await _sample_all(driver, [tiny.request("done", tiny.prompt(1, 9), 6)])
        seen: list[int] = []
        task: asyncio.Future[Completion] = asyncio.wrap_future(
            driver.submit(tiny.request("gone", [4, 5], 100), lambda draw: seen.extend(draw.token_ids.tolist()))
        )
        await _until(lambda: bool(seen))
        task.cancel()
        await _until(lambda: driver.metrics().active == 0)
    found, gone = log.find("done"), log.find("gone")
    assert found is not None and found.sampled_ids.tolist() == done.token_ids.tolist()
    assert found.prompt_ids.tolist() == done.prompt_ids.tolist() and found.finish_reason == "length"
    assert gone is not None and (gone.finish_reason, gone.sampled_ids.tolist()) == ("cancelled", seen)
    log.close()


async def test_a_request_that_cannot_be_logged_is_not_returned_and_the_driver_says_so(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    log._file.close()
    log._file = io.FileIO("/dev/full", "r+b")  # refuses every write
    driver = Driver(tiny.engine(), tiny.params(), request_log=log).start()
    results: list[Completion | BaseException] = []
    for turn in range(3):
        sampling = LocalSampler(driver).sample(tiny.request(f"r{turn}", [1, 2], 4))
        results += await asyncio.wait_for(asyncio.gather(sampling, return_exceptions=True), 30)
        if turn == 0:
            with pytest.raises(EngineError, match="cannot be written"):
                log.flush()
    assert isinstance(results[0], Completion)  # accepted before the disk was found full, still to be found
    assert log.find("r0") is not None
    assert all(isinstance(each, EngineError) for each in results[1:]) and not driver.healthy and _balanced(driver)
    driver.stop()
    with pytest.raises(EngineError, match="cannot be written"):
        log.close()
