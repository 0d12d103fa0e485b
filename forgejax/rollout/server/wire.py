"""Requests and completions as JSON: what ``remote`` and ``server`` send each other.

``POST /generate`` takes one ``GenerateBody`` and answers with JSON lines: any number of ``{"draw": ...}`` as tokens are
drawn, ``{}`` now and then while nothing is, and at the end one ``{"end": ...}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from forgejax.types import Completion, FinishReason, Grammar, Purpose, SampleRequest, SamplingLaw

if TYPE_CHECKING:  # what sends requests needs no jax
    from forgejax.rollout.driver.job import Draw


INSTANCE_HEADER = "Forgejax-Instance"
"""The server process that a request is meant for; another one at its address refuses it."""


class LawBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``types.SamplingLaw``."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: dict[int, float] = {}


class GrammarBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``types.Grammar``; ``schema`` is JSON text."""

    schema: str
    thought_opening: str = ""
    thought_closing: str = ""
    free_openings: list[str] = []


class GenerateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``types.SampleRequest``; a request id left out is made up by the server, a session id left out is "".

    Prompt and reply fill the engine's ``max_context`` at most: a reply of fewer than ``max_tokens`` that ends there
    ends by ``length``.
    """

    prompt_ids: list[int]
    max_tokens: int
    request_id: str | None = None
    session_id: str = ""
    law: LawBody = LawBody()
    stop_ids: list[int] = []
    stop_strings: list[str] = []
    grammar: GrammarBody | None = None
    seed: int | None = None
    purpose: Purpose = "train"
    owner: str = ""


class DrawBody(msgspec.Struct, frozen=True):
    """``job.Draw``: parallel lists."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    oldest_versions: list[int]


class EndBody(msgspec.Struct, frozen=True):
    """What a Completion holds beyond its request and its draws."""

    finish_reason: FinishReason
    cached_tokens: int
    queued_s: float
    generate_s: float


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of an answer; all fields empty is a sign of life."""

    draw: DrawBody | None = None
    end: EndBody | None = None
    error: str | None = None


def encode_request(request: SampleRequest) -> bytes:
    law = request.law
    body = GenerateBody(
        request_id=request.request_id,
        session_id=request.session_id,
        prompt_ids=np.asarray(request.prompt_ids).tolist(),
        max_tokens=request.max_tokens,
        law=LawBody(
            temperature=law.temperature,
            top_p=law.top_p,
            top_k=law.top_k,
            min_p=law.min_p,
            logit_bias=dict(law.logit_bias),
        ),
        stop_ids=sorted(request.stop_ids),
        stop_strings=list(request.stop_strings),
        grammar=_encode_grammar(request.grammar),
        seed=request.seed,
        purpose=request.purpose,
        owner=request.owner,
    )
    return msgspec.json.encode(body)


def decode_request(body: bytes, made_up_id: str) -> SampleRequest:
    """The request in a body. Raises ValueError saying what is wrong with it."""
    given = msgspec.json.decode(body, type=GenerateBody)  # its errors are ValueErrors that name the field
    if any(not 0 <= token < 2**31 for token in given.prompt_ids):
        raise ValueError("prompt_ids: expected token ids from 0 to 2^31 - 1")
    return SampleRequest(
        request_id=given.request_id or made_up_id,
        session_id=given.session_id,
        prompt_ids=np.array(given.prompt_ids, np.int32),
        max_tokens=given.max_tokens,
        law=_decode_law(given.law),
        stop_ids=frozenset(given.stop_ids),
        stop_strings=tuple(given.stop_strings),
        grammar=_decode_grammar(given.grammar),
        seed=given.seed,
        purpose=given.purpose,
        owner=given.owner,
    )


def _decode_law(given: LawBody) -> SamplingLaw:
    return SamplingLaw(
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        logit_bias=tuple(sorted(given.logit_bias.items())),
    )


def _encode_grammar(grammar: Grammar | None) -> GrammarBody | None:
    if grammar is None:
        return None
    return GrammarBody(
        schema=grammar.schema,
        thought_opening=grammar.thought_opening,
        thought_closing=grammar.thought_closing,
        free_openings=list(grammar.free_openings),
    )


def _decode_grammar(given: GrammarBody | None) -> Grammar | None:
    if given is None:
        return None
    return Grammar(
        schema=given.schema,
        thought_opening=given.thought_opening,
        thought_closing=given.thought_closing,
        free_openings=tuple(given.free_openings),
    )


def encode_draw(draw: Draw) -> Line:
    return Line(
        draw=DrawBody(
            token_ids=draw.token_ids.tolist(),
            logprobs=draw.logprobs.tolist(),
            versions=draw.versions.tolist(),
            oldest_versions=draw.oldest_versions.tolist(),
        )
    )


def encode_end(completion: Completion) -> Line:
    return Line(
        end=EndBody(
            finish_reason=completion.finish_reason,
            cached_tokens=completion.cached_tokens,
            queued_s=completion.queued_s,
            generate_s=completion.generate_s,
        )
    )


def join_completion(request: SampleRequest, draws: list[DrawBody], end: EndBody) -> Completion:
    def join(name: str, dtype: Any) -> Any:
        return np.array([value for draw in draws for value in getattr(draw, name)], dtype)

    return Completion(
        request_id=request.request_id,
        prompt_ids=np.asarray(request.prompt_ids, np.int32),
        token_ids=join("token_ids", np.int32),
        logprobs=join("logprobs", np.float32),
        versions=join("versions", np.int32),
        oldest_versions=join("oldest_versions", np.int32),
        finish_reason=end.finish_reason,
        law=request.law,
        cached_tokens=end.cached_tokens,
        queued_s=end.queued_s,
        generate_s=end.generate_s,
    )
