"""One request on its way through the driver: what it has drawn, and what is over when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forgejax.errors import EngineError
from forgejax.grammar import StopWatch, TextMatcher
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.settings import SlotDraw
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import Completion, FinishReason, SampleRequest, TokenIds

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A run of newly drawn tokens of one request; the arrays are parallel."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    oldest_versions: NDArray[np.int32]


OnDraw = Callable[[Draw], bool | None]
"""Called in the driver's thread with each run; returning True ends the generation after the run's last token."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One open request. Only the driver's thread touches it after its submission."""

    request: SampleRequest
    prompt_ids: TokenIds
    budget: int  # tokens it may draw
    on_draw: OnDraw | None
    submitted_at: float
    matcher: TextMatcher | None = None  # of its grammar, if it has one
    watch: StopWatch | None = None  # for its stop strings, if it has some
    future: Future[Completion] = field(default_factory=Future)
    started_at: float | None = None
    order: int = -1  # of its first start among all jobs: the highest is the youngest
    seed: int | None = None  # of its draws, from its first start on
    computed: int = 0  # of ``known_ids``, those whose keys and values are there
    only_weights: PublishedWeights | None = None  # those that computed all its keys and values, if one set did
    oldest_version: int | None = None  # of the keys and values this job's next token will see
    cached_tokens: int = 0
    stopped: bool = False  # a stop string has ended it
    certain_run: int = 0  # tokens in a row above the repetition probability
    callback_error: Exception | None = None
    drawn: int = 0  # tokens in ``draws``
    draws: list[Draw] = field(default_factory=list)

    def start(self, weights: PublishedWeights, cached_tokens: int, now: float, *, oldest: int | None = None) -> None:
        """Enters that it has a slot, and that so many of ``known_ids`` were found, computed by these weights, or the
        first of them by older ones of version ``oldest``."""
        if self.started_at is None:
            self.started_at, self.cached_tokens = now, cached_tokens
        self.computed, self.only_weights = cached_tokens, weights if oldest is None else None
        self.oldest_version = oldest
        if oldest is None and len(self.prompt_ids) + self.drawn > 1:
            self.oldest_version = weights.version

    def compute(self, weights: PublishedWeights, count: int) -> None:
        """Enters that these weights computed ``count`` tokens more, before any was drawn."""
        self.computed += count
        self._see(weights)

    def known_ids(self) -> TokenIds:
        """The prompt and what was drawn behind it; the last one has not been fed."""
        return np.concatenate([self.prompt_ids, self.join_ids()])

    def cut(self, drawn: SlotDraw) -> SlotDraw:
        """What counts of a run of new tokens: nothing behind a stop string."""
        end = None if self.watch is None else self.watch.find_end(drawn.token_ids.tolist())
        if end is None:
            return drawn
        self.stopped = True
        return drawn.cut(end)

    def take(self, drawn: SlotDraw, weights: PublishedWeights, config: EngineConfig) -> FinishReason | None:
        """Adds what the weights drew, as ``cut`` left it, and tells the caller; says why it is over, if it is.

        Raises EngineError for a run of no tokens or of log-probs that are not finite.
        """
        draw = self._add(drawn, weights)
        if len(drawn.token_ids) == 0 or not np.isfinite(drawn.logprobs).all():
            raise EngineError(
                f"request {self.request.request_id}: policy version {weights.version} gave {len(drawn.token_ids)} "
                f"tokens with log-probs {drawn.logprobs.tolist()}; expected finite ones: are the published weights "
                "finite?"
            )
        if self.matcher is not None:
            self.matcher.accept(draw.token_ids.tolist())
        asked_to_stop = self.on_draw is not None and self._tell(self.on_draw, draw)
        if int(draw.token_ids[-1]) in self.request.stop_ids or self.stopped or asked_to_stop:
            return FinishReason.STOP
        if self.drawn >= self.budget:
            return FinishReason.LENGTH
        return FinishReason.REPETITION if self._repeats(draw, config) else None

    def join_ids(self) -> NDArray[np.int32]:
        """All tokens drawn so far."""
        return np.concatenate([np.zeros(0, np.int32), *(draw.token_ids for draw in self.draws)])

    def complete(self, reason: FinishReason, now: float) -> Completion:
        """What the caller gets: everything drawn so far."""

        def join(name: str, dtype: type[np.generic]) -> NDArray[np.generic]:
            return np.concatenate([np.zeros(0, dtype), *(getattr(draw, name) for draw in self.draws)])

        started_at = now if self.started_at is None else self.started_at
        return Completion(
            request_id=self.request.request_id,
            prompt_ids=self.prompt_ids,
            token_ids=self.join_ids(),
            logprobs=join("logprobs", np.float32),  # type: ignore[arg-type]
            versions=join("versions", np.int32),  # type: ignore[arg-type]
            oldest_versions=join("oldest_versions", np.int32),  # type: ignore[arg-type]
            finish_reason=reason,
            law=self.request.law,
            cached_tokens=self.cached_tokens,
            queued_s=started_at - self.submitted_at,
            generate_s=now - started_at,
        )

    def _add(self, drawn: SlotDraw, weights: PublishedWeights) -> Draw:
        count, version = len(drawn.token_ids), weights.version
        self._see(weights)
        draw = Draw(
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            versions=np.full(count, version, np.int32),
            oldest_versions=np.full(count, self.oldest_version, np.int32),
        )
        self.draws.append(draw)
        self.drawn += count
        return draw

    def _see(self, weights: PublishedWeights) -> None:
        """The next token sees keys and values of these weights."""
        if self.only_weights is not weights:
            self.only_weights = None
        version = weights.version
        self.oldest_version = version if self.oldest_version is None else min(self.oldest_version, version)

    def _tell(self, on_draw: OnDraw, draw: Draw) -> bool:
        """Calls the caller's callback; if it raises, only its own request is lost."""
        try:
            return on_draw(draw) is True
        except Exception as error:
            _logger.exception("request %s: its token callback failed", self.request.request_id)
            self.callback_error = error
            return True

    def _repeats(self, draw: Draw, config: EngineConfig) -> bool:
        certain = np.exp(draw.logprobs) > config.repetition_probability
        for each in certain:
            self.certain_run = self.certain_run + 1 if each else 0
            if self.certain_run >= config.repetition_tokens:
                return True
        return False
