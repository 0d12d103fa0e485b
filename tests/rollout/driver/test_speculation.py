"""Laws of prompt lookup: the tokens are those without it, and it is left where it does not pay."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.errors import ConfigError
from forgejax.rollout import EngineConfig
from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.drafter import Drafter
from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.speculation import Speculation, StepKind
from forgejax.types import SamplingLaw
from tests.rollout import tiny
from tests.rollout.driver.test_masks import GRAMMAR, GRAMMARS, STOP, WORDS
from tests.rollout.driving import gap
from tests.rollout.turns import Turns

# As many pages of four tokens as let one request of the longest go on beside another: the youngest are preempted.
SMALL: dict[str, Any] = {"kv_pages": 36, "prefill_tokens_per_step": 32}
LOOKUP: dict[str, Any] = SMALL | {"speculation": "prompt_lookup", "draft_ngram": 1, "draft_tokens": 3}
PLAIN = StepKind(rows=4, masked=False)


def _job(prompt: list[int], budget: int = 90) -> Job:
    request = tiny.request("r", prompt, budget)
    return Job(request=request, prompt_ids=request.prompt_ids, budget=budget, on_draw=None, submitted_at=0.0)


def test_tokens_and_logprobs_are_those_without_it_under_every_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some draw what came before again (greedy, or biased to few tokens), some under a grammar or up to a string."""
    monkeypatch.setattr(Speculation, "_pays", lambda *_: True)  # whatever it costs here
    params = tiny.params()
    few = tuple((id_, 30.0) for id_ in (5, 9, 17))
    laws = [
        SamplingLaw(temperature=0.0),
        SamplingLaw(logit_bias=few),
        SamplingLaw(temperature=0.6),
        SamplingLaw(top_k=3, logit_bias=few),
        SamplingLaw(min_p=0.2),
        SamplingLaw(temperature=2.0, top_p=0.8),
    ]
    requests = [
        tiny.request(f"r{i}", [*tiny.prompt(i, 9), *tiny.prompt(i, 9)], 40 + i, seed=i, law=law)
        for i, law in enumerate(laws)
    ]
    requests += [
        tiny.request("g", tiny.prompt(7, 6), 60, seed=7, grammar=GRAMMAR, stop_ids={STOP}),
        tiny.request("id", tiny.prompt(8, 6), 60, seed=8, law=laws[1], stop_ids={17}),
        tiny.request("s", tiny.prompt(9, 6), 60, seed=9, law=laws[1], stop_strings=(3 * WORDS[5].decode(),)),
    ]
    found, counters = {}, {}
    for name, given_settings in {"off": SMALL, "on": LOOKUP}.items():
        turns = Turns(GRAMMARS, **given_settings)
        turns.ask(*requests)
        found[name], counters[name] = turns.finish(), turns.counters
    on = counters["on"]
    assert counters["off"].checked_steps == 0 < on.checked_steps <= on.steps
    assert 20 < on.accepted_tokens < on.drafted_tokens
    assert on.sampled["train"] == sum(len(each.token_ids) for each in found["on"].values())
    for request in requests:
        one, other = (of[request.request_id] for of in (found["off"], found["on"]))
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert one.finish_reason is other.finish_reason
        if not request.law.logit_bias and request.grammar is None:
            assert gap(other, params) < 1e-5
    assert found["on"]["s"].finish_reason == "stop" and len(found["on"]["id"].token_ids) < 60


def test_a_draft_is_what_followed_the_last_tokens_the_last_time_they_came() -> None:
    config = EngineConfig(speculation="prompt_lookup", draft_ngram=2, draft_tokens=3)
    drafter = Drafter(_job([1, 2, 3, 4, 1, 2, 5, 6, 7, 8, 1, 2]), config)
    assert drafter.draft() == [5, 6, 7]
    assert Drafter(_job([1, 2, 5, 1, 2]), config).draft() == [5, 1, 2]
    assert Drafter(_job([1, 2, 3, 2, 1]), config).draft() == [] == Drafter(_job([1]), config).draft()
    assert Drafter(_job([9, 7, 8, 7, 8]), config).draft() == [7, 8, 7]  # what is cut off there is gone on with
    assert Drafter(_job([4, 4, 4], budget=3), config).draft() == [4, 4]  # one token is drawn in any case


def test_a_request_whose_drafts_seldom_hold_good_is_no_longer_looked_up() -> None:
    drafter = Drafter(_job([4, 4, 4, 4, 4, 4]), EngineConfig(speculation="prompt_lookup"))
    assert drafter.draft()
    drafter.count(63, 2)
    assert drafter.draft()
    drafter.count(1, 0)
    assert drafter.draft() == []


def _proposals(*, plain_s: float, checked_s: float, accepted: int) -> list[bool]:
    """Of 80 steps for a request that can always be drafted for, which ones check drafts."""
    config, job = EngineConfig(slots=4, tokens_per_step=2, speculation="prompt_lookup"), _job([4] * 9)
    speculation, found = Speculation(config, Counters()), []
    for _ in range(80):
        checked = speculation.propose({0: job}, PLAIN) is not None
        seconds = checked_s if checked else plain_s
        speculation.time(PLAIN, checked=checked, seconds=seconds, drawn=1, plain_tokens=2)
        if checked:
            speculation.count(job, 4, 1 + accepted)
        found.append(checked)
    return found


def test_drafts_are_checked_where_that_gives_more_tokens_a_second_and_tried_again_now_and_then() -> None:
    # Five tokens in the time of three, where plain steps give two in the time of two.
    assert all(_proposals(plain_s=2.0, checked_s=3.0, accepted=4)[4:])
    # Five in the time of six: tried twice, once without its time, and again after 64 steps.
    refused = _proposals(plain_s=2.0, checked_s=6.0, accepted=4)
    assert sum(refused) == 3 and refused[-12:].count(True) == 1


def test_it_is_no_part_of_a_batch_invariant_engine() -> None:
    with pytest.raises(ConfigError, match=r"prompt_lookup.* with engine.batch_invariant"):
        EngineConfig(speculation="prompt_lookup", batch_invariant=True)


_LAWS = (SamplingLaw(), SamplingLaw(temperature=0.0), SamplingLaw(temperature=0.5, top_k=4), SamplingLaw(min_p=0.1))
_ASKED = st.tuples(st.just("ask"), st.integers(0, 2), st.sampled_from([1, 3, 4, 5, 33, 40, 64]), st.integers(1, 50))
_SCHEDULES = st.lists(
    st.one_of(
        _ASKED,
        st.tuples(st.just("turns"), st.integers(1, 9)),
        st.tuples(st.just("drop"), st.integers(0, 3)),
        st.tuples(st.just("publish")),
    ),
    min_size=3,
    max_size=14,
)


@functools.cache
def _params(version: int) -> Any:
    return tiny.params(version % 3)


@given(_SCHEDULES, st.sampled_from(["version", "session"]))
@settings(max_examples=25, deadline=None)
def test_logprobs_are_those_of_one_forward_pass_through_any_schedule(
    schedule: list[tuple[Any, ...]], reuse: str
) -> None:
    """Prompts in chunks over page boundaries, shared prefixes, preemption, drafts, dropped requests and new weights."""
    with mock.patch.object(Speculation, "_pays", return_value=True):
        turns = Turns(**LOOKUP, reuse=reuse)
        asked, gone = 0, set[str]()
        for what, *how in schedule:
            if what == "ask":
                text, length, most = how
                law = _LAWS[asked % len(_LAWS)]
                prompt, session = tiny.prompt(text, 64)[:length], str(text if reuse == "session" else asked)
                turns.ask(tiny.request(f"r{asked}", prompt, most, seed=asked, law=law, session_id=session))
                asked += 1
            elif what == "turns":
                for _ in range(how[0]):
                    turns.take()
            elif what == "drop":
                slots = [slot for slot in turns.scheduler.active if slot == how[0]]
                gone.update(job.request.request_id for job in turns.decoder.drop(slots))
                turns.decoder.check_integrity()
            else:
                version = turns.box.current.version + 1
                turns.publish(_params(version), version)
        done = turns.finish()
    assert set(done) | gone == {f"r{i}" for i in range(asked)} and turns.decoder._slots.cache.held == 0
    for each in done.values():
        for version in np.unique(each.versions):
            own = (each.versions == version) & (each.oldest_versions == version)
            expected = tiny.dense_logprobs(_params(int(version)), each.prompt_ids, each.token_ids, each.law)
            np.testing.assert_allclose(each.logprobs[own], expected[own], atol=1e-4)
        assert (each.oldest_versions <= each.versions).all()
