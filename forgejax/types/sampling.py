"""A request to the engine and what it draws: ids in; ids, log-probabilities and policy versions out.

Only numpy and the standard library are imported. Times are seconds.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]


Purpose = Literal["train", "evaluation", "probe"]


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the last of token_ids is a stop id or completes a stop string, or on_tokens asked to stop
    LENGTH = "length"  # max_tokens or the context length was reached
    REPETITION = "repetition"  # the run of near-certain tokens that marks a loop
    CANCELLED = "cancelled"  # the caller went away


@dataclass(frozen=True, kw_only=True)
class SamplingLaw:
    """The distribution tokens are drawn from: softmax((logits + logit_bias) / temperature), possibly truncated.

    A token is kept if it is among the ``top_k`` likeliest (0: all), among the fewest of those that hold ``top_p`` of
    their mass, and at least ``min_p`` times as likely as the likeliest. ``temperature = 0`` means greedy.
    ``logit_bias`` holds pairs of a token id and what is added to its logit, by increasing ids.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p}: expected a probability in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: expected 0 (off) or a positive count")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p {self.min_p}: expected 0 (off) to 1")
        ids = [id_ for id_, _ in self.logit_bias]
        if ids != sorted(set(ids)) or any(id_ < 0 for id_ in ids):
            raise ValueError(f"logit_bias of tokens {ids}: expected each token id once, in increasing order")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise ValueError(f"logit_bias {self.logit_bias}: expected finite numbers; -100 all but forbids a token")

    @property
    def trainable(self) -> bool:
        """Whether it draws from the whole policy at some temperature, so that the trainer can say how likely that was.

        A truncated, greedy or biased law does not.
        """
        whole = self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0
        return whole and self.temperature > 0.0 and not self.logit_bias


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """The texts a completion may be: JSON that ``schema``, the text of a JSON schema, describes, and nothing behind it.

    With ``thought_closing`` a thought comes first, free up to that tag: it has begun in the prompt, or it may begin
    with ``thought_opening`` where that is given. A completion that begins with one of ``free_openings`` (behind its
    thought) is no JSON and free from there on.
    """

    schema: str
    thought_opening: str = ""
    thought_closing: str = ""
    free_openings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.thought_opening and not self.thought_closing:
            raise ValueError(f"a thought opens with {self.thought_opening!r} and has no closing tag; give both")
        if "" in self.free_openings:
            raise ValueError("an empty free opening would allow every text; leave it out")


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One prompt for the engine: ids in, and nothing about chat or agents.

    With a ``grammar`` the law is that of the tokens which can still lead to one of its texts, and of ``stop_ids`` where
    the text is complete. ``stop_strings`` end the completion at the token whose text completes one of them, the last of
    ``token_ids``: what would have been drawn behind it is nowhere.
    """

    request_id: str
    session_id: str = ""  # requests of one session go to one engine, where their prefixes are
    prompt_ids: TokenIds
    max_tokens: int
    law: SamplingLaw = SamplingLaw()
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    grammar: Grammar | None = None
    seed: int | None = None
    purpose: Purpose = "train"
    owner: str = ""  # what its tokens are counted with: a group's attempt, an evaluation; "" is nobody
    repeatable: bool = False  # what was drawn may be thrown away and drawn anew: nobody has been shown it

    def __post_init__(self) -> None:
        if self.grammar is not None and not self.stop_ids:
            raise ValueError(f"request {self.request_id}: a grammar without stop ids could never end; give them")
        if "" in self.stop_strings:
            raise ValueError(f"request {self.request_id}: an empty stop string ends everything; leave it out")
        if len(self.prompt_ids) == 0:
            raise ValueError(f"request {self.request_id}: the prompt is empty; give at least one token id")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_tokens is {self.max_tokens}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the engine drew for one request. Arrays are parallel to ``token_ids``; a drawn stop id is included.

    ``logprobs[t]`` is the log-probability of ``token_ids[t]`` under the whole softmax of policy version
    ``versions[t]``, with the law's bias, at its temperature (at 1 where it is greedy), before any truncation, and under
    a grammar over the tokens that it allowed there;
    ``oldest_versions[t]`` is the oldest policy version in the KV that this token saw. ``queued_s`` is the time spent
    waiting for the engine before prefill began (no fault of the agent), ``generate_s`` the time from then to the end.
    """

    request_id: str
    prompt_ids: TokenIds
    token_ids: TokenIds
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    oldest_versions: NDArray[np.int32]
    finish_reason: FinishReason
    law: SamplingLaw
    cached_tokens: int = 0
    queued_s: float = 0.0
    generate_s: float = 0.0

    def __post_init__(self) -> None:
        sizes = {len(self.token_ids), len(self.logprobs), len(self.versions), len(self.oldest_versions)}
        if len(sizes) != 1:
            raise ValueError(f"completion {self.request_id}: per-token arrays differ in length: {sorted(sizes)}")


OnTokens = Callable[[Sequence[int]], bool | None]
"""Called with each run of newly drawn ids, in order; returning True ends the generation after the last of them."""


@runtime_checkable
class Sampler(Protocol):
    """The one door to an inference engine, in this process or behind a socket."""

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """Draws one completion. Cancelling the awaiting task cancels the request in the engine.

        Raises EngineError if the engine cannot serve it (too long a prompt, a dead engine, a passed deadline),
        OverloadedError if it cannot for now.
        """
        ...


class WeightSink(Protocol):
    """Where new policy weights go; each later token is drawn by them and carries their version."""

    def publish(self, params: Any, version: int) -> None: ...
