"""Settings of the inference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forgejax.errors import ConfigError

_KEPT_TOKENS = 32_768  # for which the pool has room by default, beside what full slots take


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Shape and limits of one engine.

    ``max_context`` counts prompt and sampled tokens together. Keys and values lie in a pool of ``kv_pages`` pages;
    where requests need more than there are, the youngest of them waits and is computed again. No stream stands still
    for longer than ``prefill_tokens_per_step`` tokens of other prompts take, or one chunk.

    ``reuse``: with ``version`` a request finds what the weights that serve have computed, with ``session`` also what
    its own session had computed under older ones, up to ``max_kv_age`` versions back; each token says how old what it
    saw was.

    ``batch_invariant``: the bits of what is drawn depend on the request, its seed and the weights alone, not on what
    else the engine serves or has served. Every decode step then serves all slots, each over as many blocks of keys as
    the longest has, nothing is reused, and no request is computed again.
    """

    slots: int = 32  # completions decoded at once
    max_context: int = 512
    tokens_per_step: int = 4  # tokens each slot draws per dispatch; stop ids are checked on the device after each
    prefill_buckets: tuple[int, ...] = (16, 64, 256)  # padded chunk lengths; a longer prompt takes several chunks
    prefill_tokens_per_step: int = 512  # prompt tokens computed between two decode steps, so that none waits long
    page_tokens: int = 32
    kv_pages: int = 0  # 0: full slots, and 32,768 tokens more that are kept for later requests
    reuse: Literal["none", "version", "session"] = "version"  # whose keys and values a request may find
    max_kv_age: int = 1  # with reuse "session": versions that a session's own keys and values may be behind
    batch_invariant: bool = False
    speculation: Literal["off", "prompt_lookup"] = "off"  # what followed the last tokens before, checked all at once
    draft_tokens: int = 4  # of a slot at a time
    draft_ngram: int = 3  # tokens that must have come before, in the same order, for a draft
    max_stop_ids: int = 8  # per request
    max_biased_ids: int = 300  # tokens of a request whose logits are biased
    max_waiting: int = 4_096  # requests beyond those in slots; more are told to come again later
    max_restarts: int = 3  # of a failed engine, without a completed request in between
    request_deadline_s: float = 600.0  # from submission to the last token
    repetition_tokens: int = 3_000  # a generation ends after so many tokens in a row, each above the probability
    repetition_probability: float = 0.99
    seed: int = 0  # of requests that bring none

    def __post_init__(self) -> None:
        for name in ("slots", "tokens_per_step", "prefill_tokens_per_step", "page_tokens", "max_waiting"):
            self._at_least(name, 1)
        for name in (
            "max_kv_age",
            "draft_tokens",
            "draft_ngram",
            "max_stop_ids",
            "max_biased_ids",
            "repetition_tokens",
        ):
            self._at_least(name, 1)
        self._at_least("max_context", 2)
        for name in ("kv_pages", "max_restarts", "seed"):
            self._at_least(name, 0)
        if 0 < self.kv_pages < self.context_pages:
            raise ConfigError(
                f"engine.kv_pages is {self.kv_pages}; a request of engine.max_context {self.max_context} takes "
                f"{self.context_pages} pages of engine.page_tokens {self.page_tokens}: give as many at least"
            )
        if self.batch_invariant and 0 < self.kv_pages < self.slots * self.context_pages:
            raise ConfigError(
                f"engine.kv_pages is {self.kv_pages}; with engine.batch_invariant no request may wait for pages and be "
                f"computed again: give {self.slots * self.context_pages}, for engine.slots {self.slots}, or 0"
            )
        if self.batch_invariant and self.speculates:
            raise ConfigError(
                f'engine.speculation is "{self.speculation}" with engine.batch_invariant; what is checked together is '
                "rounded otherwise than what is drawn one by one: leave one of them out"
            )
        if not self.prefill_buckets or list(self.prefill_buckets) != sorted(set(self.prefill_buckets)):
            raise ConfigError(f"engine.prefill_buckets {self.prefill_buckets}: expected increasing chunk lengths")
        if self.prefill_buckets[0] < 1:
            raise ConfigError(f"engine.prefill_buckets {self.prefill_buckets}: expected positive chunk lengths")
        if not self.request_deadline_s > 0:
            raise ConfigError(f"engine.request_deadline_s is {self.request_deadline_s}; expected a positive time")
        if not 0.0 < self.repetition_probability < 1.0:
            raise ConfigError(f"engine.repetition_probability {self.repetition_probability}: expected one in (0, 1)")

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ConfigError(f"engine.{name} is {getattr(self, name)}; expected at least {least}")

    @property
    def context_pages(self) -> int:
        """Pages of one sequence at most."""
        return -(-self.max_context // self.page_tokens)

    @property
    def reuses(self) -> bool:
        """Whether a request may find keys and values of others: in other chunks, or decoded, they are other bits."""
        return self.reuse != "none" and not self.batch_invariant

    @property
    def pool_pages(self) -> int:
        """Pages of the pool, with the one that belongs to nobody."""
        kept = -(-_KEPT_TOKENS // self.page_tokens) if self.reuses else 0
        return (self.kv_pages or self.slots * self.context_pages + kept) + 1

    @property
    def speculates(self) -> bool:
        return self.speculation != "off"

    @property
    def step_room(self) -> int:
        """Tokens that a slot may draw in one step at most."""
        return max(self.tokens_per_step, self.draft_tokens + 1 if self.speculates else 1)

    def pick_rows(self, rows: int) -> int:
        """The slot count of the program that serves the first so many slots."""
        return min(bucket for bucket in self.decode_rows if bucket >= rows)

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Slot counts a decode program exists for: a few busy slots need not pay for all of them, unless their sums
        must be those of all."""
        if self.batch_invariant:
            return (self.slots,)
        return tuple(sorted({-(-self.slots // 16), -(-self.slots // 4), self.slots}))
