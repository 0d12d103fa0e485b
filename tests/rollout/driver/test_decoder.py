"""Laws of who decodes when: turn by turn, without a thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forgejax.types import FinishReason
from tests.rollout import tiny
from tests.rollout.driving import gap
from tests.rollout.turns import Turns

SMALL: dict[str, Any] = {"kv_pages": 36, "slots": 4}  # of four tokens: a request of 128 takes 32
LONG: dict[str, Any] = {"max_context": 1024, "slots": 4, "prefill_tokens_per_step": 32}


def test_where_pages_run_out_the_youngest_waits_and_draws_what_it_would_have_drawn() -> None:
    requests = [tiny.request(f"r{i}", tiny.prompt(i, 20), 60, seed=i) for i in range(5)]
    small, large = Turns(**SMALL), Turns()
    for turns in (small, large):
        turns.ask(*requests)
    found, expected = small.finish(), large.finish()
    assert small.counters.preemptions >= 2 and large.counters.preemptions == 0
    for name, each in found.items():
        np.testing.assert_array_equal(each.token_ids, expected[name].token_ids)
        assert gap(each, tiny.params()) < 1e-5 and each.finish_reason is FinishReason.LENGTH
    assert next(iter(found)) == "r0"  # the oldest never gives way
    assert small.counters.requests == 5 and small.counters.sampled["train"] == 300


def test_a_preempted_request_keeps_what_it_drew_and_says_which_weights_its_later_tokens_saw() -> None:
    turns = Turns(**SMALL)
    first, second = turns.ask(*(tiny.request(f"r{i}", tiny.prompt(i, 50), 60, seed=i) for i in range(2)))
    while not turns.counters.preemptions:
        turns.take()
    drawn = second.join_ids()
    assert len(drawn) and second not in turns.scheduler.active.values() and first in turns.scheduler.active.values()
    turns.publish(tiny.params(1), 7)
    done = turns.finish()["r1"]
    np.testing.assert_array_equal(done.token_ids[: len(drawn)], drawn)
    ages = [(old, new) for old, new in zip(done.oldest_versions, done.versions, strict=True)]
    # Begun again, it is computed by the new weights from its first token on.
    assert ages == [(0, 0)] * len(drawn) + [(7, 7)] * (60 - len(drawn))
    whole = tiny.dense_logprobs(tiny.params(1), done.prompt_ids, done.token_ids, done.law)
    np.testing.assert_allclose(done.logprobs[len(drawn) :], whole[len(drawn) :], atol=1e-5)
    assert turns.ended["r0"].oldest_versions.tolist() == [0] * 60


def test_a_long_prompt_holds_no_stream_up_for_more_than_a_turns_tokens() -> None:
    turns = Turns(**LONG)
    (stream,) = turns.ask(tiny.request("stream", tiny.prompt(0, 9), 200, seed=1))
    turns.take()
    (long,) = turns.ask(tiny.request("long", tiny.prompt(1, 900), 4, seed=2))
    took = []
    while not long.drawn:
        computed, drawn = turns.counters.computed_tokens, stream.drawn
        turns.take()
        took.append(turns.counters.computed_tokens - computed)
        assert stream.drawn == drawn + 2
    assert max(took) <= 32 and sum(took) == 899 and len(took) == 29
    assert gap(turns.finish()["long"], tiny.params()) < 1e-5


def test_weights_that_come_amid_a_prompt_go_on_with_it_and_it_is_not_shared() -> None:
    turns = Turns(**LONG)
    (job,) = turns.ask(tiny.request("crossing", tiny.prompt(1, 100), 4, seed=2))
    turns.take()
    assert job.computed == 32
    turns.publish(tiny.params(1), 3)
    done = turns.finish()["crossing"]
    assert done.versions.tolist() == [3] * 4 and done.oldest_versions.tolist() == [0] * 4
    turns.ask(tiny.request("after", tiny.prompt(1, 100), 4, seed=2))
    after = turns.finish()["after"]
    assert after.cached_tokens == 0 and gap(after, tiny.params(1)) < 1e-5


def test_a_job_dropped_amid_its_prompt_leaves_no_page_held_and_its_chunks_are_found_again() -> None:
    turns = Turns(**LONG)
    turns.ask(tiny.request("gone", tiny.prompt(1, 300), 4))
    turns.take()
    turns.take()
    assert [job.request.request_id for job in turns.decoder.drop(list(turns.scheduler.active))] == ["gone"]
    turns.take()
    assert (turns.counters.held_pages, turns.counters.kept_pages) == (0, 16)
    turns.ask(tiny.request("again", tiny.prompt(1, 300), 4, seed=1))
    again = turns.finish()["again"]
    assert again.cached_tokens == 64 and gap(again, tiny.params()) < 1e-5


def test_each_distinct_token_is_computed_once() -> None:
    group = Turns(**LONG)
    group.ask(*(tiny.request(f"m{i}", tiny.prompt(0, 901), 6, seed=i) for i in range(16)))
    group.finish()
    assert group.counters.computed_tokens == 900  # the last one of a prompt is fed by the step that draws

    agents, rng = Turns(**LONG), np.random.default_rng(1)
    system, distinct = tiny.prompt(3, 203), 0
    texts = [np.concatenate([system, tiny.prompt(10 + i, 7)]) for i in range(8)]
    for turn in range(10):
        requests = [tiny.request(f"{turn}-{i}", text, 8, seed=i, session_id=str(i)) for i, text in enumerate(texts)]
        agents.ask(*requests)
        done = agents.finish()
        observed = rng.integers(0, 50, (8, 12)).astype(np.int32)
        texts = [
            np.concatenate([request.prompt_ids, done[request.request_id].token_ids, new])
            for request, new in zip(requests, observed, strict=True)
        ]
        distinct += 8 * (7 if turn == 0 else 12)
    assert agents.counters.computed_tokens <= 1.05 * (len(system) + distinct + 9 * 8)  # one a turn was drawn, never fed


def test_pages_that_are_held_for_no_request_are_told() -> None:
    turns = Turns()
    assert turns.decoder._slots.begin(2, tiny.prompt(1, 5)) is not None
    with pytest.raises(AssertionError, match="2 are held and no request is active"):
        turns.decoder.check_integrity()
