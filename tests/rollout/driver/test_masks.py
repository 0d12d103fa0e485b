"""Requests under a grammar, beside others, through the driver."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.grammar import GrammarCompiler
from forgejax.rollout import Driver, LocalSampler
from forgejax.types import Completion, FinishReason, Grammar, SamplingLaw
from tests.rollout import tiny
from tests.rollout.driving import balanced, gap, sample_all

STOP = 3
LETTERS = [b"", b"", b"", b"", *(character.encode() for character in '{}[]":, -.0123456789abcdefnulltrs')]
WORDS = [*LETTERS, b'{"', b'":', b'"}', b"null"]
GRAMMARS = GrammarCompiler(WORDS)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["ab", "ba", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(schema=json.dumps(SCHEMA))


def text_of(completion: Completion) -> str:
    return b"".join(map(spell, completion.token_ids)).decode()


def spell(id_: int) -> bytes:
    return WORDS[id_] if id_ < len(WORDS) else b""


def replay(completion: Completion, grammar: Grammar, params: object) -> np.ndarray:
    """The log-prob of each token by brute force: the softmax of a dense forward pass over the allowed tokens."""
    matcher = GRAMMARS.start(grammar, frozenset({STOP}))
    logits = tiny.dense_logits(params, np.concatenate([completion.prompt_ids, completion.token_ids]))
    expected = []
    for row, id_ in zip(logits[len(completion.prompt_ids) - 1 :], completion.token_ids, strict=False):
        words = np.zeros(-(-tiny.POLICY.vocab_size // 32), np.uint32)
        matcher.fill(words)
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: tiny.POLICY.vocab_size].astype(bool)
        scaled = np.where(allowed, row.astype(np.float64) / (completion.law.temperature or 1.0), -np.inf)
        expected.append(scaled[id_] - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max())
        matcher.accept([int(id_)])
    return np.array(expected)


async def test_what_is_drawn_fits_the_schema_at_the_logprobs_of_the_allowed_tokens() -> None:
    params = tiny.params()
    laws = [SamplingLaw(temperature=temperature) for temperature in (1.0, 0.5, 2.0, 1.5, 1.0, 0.0)]
    requests = [
        tiny.request(f"r{i}", tiny.prompt(i, 3 + i), 110, seed=i, law=law, grammar=GRAMMAR, stop_ids={STOP})
        for i, law in enumerate(laws)
    ]
    with Driver(tiny.engine(), params, grammars=GRAMMARS) as driver:
        done = await sample_all(driver, requests)
        assert balanced(driver)
    for each in done:
        np.testing.assert_allclose(each.logprobs, replay(each, GRAMMAR, params), atol=1e-5)
    ended = [each for each in done if each.finish_reason is FinishReason.STOP]
    assert len(ended) >= 5  # the likeliest tokens alone may go on for ever
    for each in ended:
        assert each.token_ids[-1] == STOP
        jsonschema.validate(json.loads(text_of(each)), SCHEMA)
    assert len({text_of(each) for each in ended}) == len(ended)


async def test_neighbours_and_successors_of_a_masked_slot_draw_the_same_bits_as_without_it() -> None:
    params = tiny.params()
    plain = [
        tiny.request(f"p{i}", tiny.prompt(i, 4 + 3 * i), 20 + i, seed=i, law=SamplingLaw(temperature=0.5 + 0.5 * i))
        for i in range(3)
    ]
    masked = tiny.request("m", tiny.prompt(9, 6), 110, seed=9, grammar=GRAMMAR, stop_ids={STOP})
    with Driver(tiny.engine(), params, grammars=GRAMMARS) as driver:
        alone = await sample_all(driver, plain)
    with Driver(tiny.engine(), params, grammars=GRAMMARS) as driver:
        first, *beside = await sample_all(driver, [masked, *plain])
        after = await sample_all(driver, [replace(each, request_id=f"after {each.request_id}") for each in plain])
    for one, *others in zip(alone, beside, after, strict=True):
        for other in others:
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs.view(np.uint32), others[0].logprobs.view(np.uint32))
    assert max(gap(each, params) for each in [*beside, *after]) < 1e-5 < gap(first, params)


async def test_a_text_that_is_cut_by_its_limit_is_the_beginning_of_one() -> None:
    with Driver(tiny.engine(), tiny.params(), grammars=GRAMMARS) as driver:
        cut = tiny.request("cut", [5, 6], 5, seed=2, grammar=GRAMMAR, stop_ids={STOP})
        (done,) = await sample_all(driver, [cut])
    assert (done.finish_reason, len(done.token_ids)) == (FinishReason.LENGTH, 5)
    np.testing.assert_allclose(done.logprobs, replay(done, GRAMMAR, tiny.params()), atol=1e-5)


async def test_without_a_tokenizer_a_grammar_is_refused_and_so_is_one_that_cannot_be_compiled() -> None:
    asked = tiny.request("r", [5, 6], 9, grammar=GRAMMAR, stop_ids={STOP})
    bad = tiny.request("bad", [5, 6], 9, grammar=Grammar(schema='{"not": {}}'), stop_ids={STOP})
    refused = pytest.raises(EngineError, match=r"request r: .* given no tokenizer .* --tokenizer FOLDER")
    with Driver(tiny.engine(), tiny.params()) as driver, refused:
        await LocalSampler(driver).sample(asked)
    with Driver(tiny.engine(), tiny.params(), grammars=GRAMMARS) as driver:
        with pytest.raises(EngineError, match=r'request bad: .*Unimplemented keys: \["not"\]'):
            await LocalSampler(driver).sample(bad)
        with pytest.raises(EngineError, match="Unimplemented"):
            driver.submit(bad)
        (done,) = await sample_all(driver, [asked])  # the driver goes on
        assert len(done.token_ids) and balanced(driver)


async def test_a_grammar_that_leads_nowhere_loses_its_own_request_alone() -> None:
    grammar = Grammar(schema='{"const": "Zz"}')  # this vocabulary has no Z
    with Driver(tiny.engine(), tiny.params(), grammars=GRAMMARS) as driver:
        lost = tiny.request("lost", [5, 6], 110, grammar=grammar, stop_ids={STOP})
        other = tiny.request("other", [5, 6], 60, seed=1)
        results = await asyncio.gather(
            *(LocalSampler(driver).sample(each) for each in (lost, other)), return_exceptions=True
        )
        assert isinstance(results[0], EngineError) and "request lost" in str(results[0])
        assert isinstance(results[1], Completion) and len(results[1].token_ids) == 60
        assert driver.healthy and balanced(driver)


async def test_a_stop_string_ends_a_completion_at_its_token_and_nothing_behind_it_is_counted() -> None:
    """With four tokens a step, of which any may complete the string; its beginning may lie in earlier ones."""
    params = tiny.params()
    with Driver(tiny.engine(tokens_per_step=4), params, grammars=GRAMMARS) as driver:
        free = await sample_all(driver, [tiny.request(f"free{i}", tiny.prompt(i, 5), 60, seed=i) for i in range(6)])
        texts = [b"".join(map(spell, each.token_ids)).decode() for each in free]
        stops = [text[20 + i : 22 + i] for i, text in enumerate(texts)]
        sampled = driver.metrics().tokens_sampled["train"]
        cut = await sample_all(
            driver,
            [
                tiny.request(f"cut{i}", tiny.prompt(i, 5), 60, seed=i, stop_strings=("never", stop))
                for i, stop in enumerate(stops)
            ],
        )
        for whole, text, stop, each in zip(free, texts, stops, cut, strict=True):
            end, count = text.index(stop) + len(stop), len(each.token_ids)
            spelled = [len(b"".join(map(spell, whole.token_ids[: n + 1]))) for n in range(60)]
            assert count == 1 + next(n for n, size in enumerate(spelled) if size >= end)
            assert each.finish_reason is FinishReason.STOP
            np.testing.assert_array_equal(each.token_ids, whole.token_ids[:count])
            np.testing.assert_allclose(each.logprobs, whole.logprobs[:count], atol=1e-5)
        assert driver.metrics().tokens_sampled["train"] - sampled == sum(len(each.token_ids) for each in cut)
        assert len({len(each.token_ids) % 4 for each in cut}) > 1 and balanced(driver)
    with Driver(tiny.engine(), params) as driver, pytest.raises(EngineError, match=r"request s: .* stop strings"):
        driver.submit(tiny.request("s", [5], stop_strings=("x",)))
