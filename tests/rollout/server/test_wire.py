"""Laws of what travels between a sampler and a server."""

from __future__ import annotations

import json

import msgspec
import numpy as np

from forgejax.rollout.driver.job import Draw
from forgejax.rollout.server.wire import Line, decode_request, encode_draw, encode_end, encode_request, join_completion
from forgejax.types import Completion, FinishReason, Grammar, SampleRequest, SamplingLaw

REQUEST = SampleRequest(
    request_id="r1",
    session_id="s7",
    prompt_ids=np.array([4, 5, 6], np.int32),
    max_tokens=9,
    law=SamplingLaw(temperature=0.5, top_p=0.9, top_k=3, min_p=0.05, logit_bias=((2, -1.5), (40, 3.0))),
    stop_ids=frozenset({8, 2}),
    stop_strings=("END", "\n\n"),
    grammar=Grammar(schema='{"type": "null"}', thought_closing="</t>", free_openings=("<call>", "[c]")),
    seed=11,
    purpose="evaluation",
    owner="group-3.1",
)


def _same(one: SampleRequest, other: SampleRequest) -> bool:
    names = ("request_id", "session_id", "max_tokens", "law", "stop_ids", "stop_strings", "grammar", "seed", "purpose")
    return one.prompt_ids.tolist() == other.prompt_ids.tolist() and all(
        getattr(one, name) == getattr(other, name) for name in (*names, "owner")
    )


def test_a_request_arrives_as_it_was_sent() -> None:
    sent = encode_request(REQUEST)
    assert json.loads(sent)["session_id"] == "s7"
    assert _same(decode_request(sent, "made-up"), REQUEST)


def test_what_a_body_leaves_out_has_a_default_and_the_request_an_id_made_up() -> None:
    expected = SampleRequest(request_id="made-up", prompt_ids=np.array([1], np.int32), max_tokens=2)
    arrived = decode_request(b'{"prompt_ids": [1], "max_tokens": 2}', "made-up")
    assert arrived.session_id == "" and _same(arrived, expected)


def test_draws_and_an_end_are_the_completion_that_was_sent() -> None:
    ids, logprobs = np.array([3, 1, 2], np.int32), np.log(np.array([0.3, 0.1, 0.25], np.float32))
    versions, oldest = np.array([5, 5, 6], np.int32), np.array([4, 4, 4], np.int32)
    sent = Completion(
        request_id="r1",
        prompt_ids=REQUEST.prompt_ids,
        token_ids=ids,
        logprobs=logprobs,
        versions=versions,
        oldest_versions=oldest,
        finish_reason=FinishReason.LENGTH,
        law=REQUEST.law,
        cached_tokens=2,
        queued_s=0.25,
        generate_s=1.5,
    )
    draws = [
        Draw(token_ids=ids[part], logprobs=logprobs[part], versions=versions[part], oldest_versions=oldest[part])
        for part in (slice(0, 2), slice(2, 3))
    ]
    written = [msgspec.json.encode(line) for line in (*map(encode_draw, draws), encode_end(sent))]
    lines = [msgspec.json.decode(line, type=Line) for line in written]
    end = lines[-1].end
    assert end is not None and lines[-1].draw is None and msgspec.json.encode(Line()) == b"{}"
    arrived = join_completion(REQUEST, [line.draw for line in lines if line.draw is not None], end)
    for name in ("prompt_ids", "token_ids", "logprobs", "versions", "oldest_versions"):
        np.testing.assert_array_equal(getattr(arrived, name), getattr(sent, name))
    for name in ("request_id", "finish_reason", "law", "cached_tokens", "queued_s", "generate_s"):
        assert getattr(arrived, name) == getattr(sent, name)
