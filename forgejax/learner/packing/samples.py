"""The unit the learner trains on: one completion in its context (algorithm: s_k is the context, a_k the completion)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forgejax.learner.packing.config import PackConfig
from forgejax.types import TokenIds, Turn

NO_VERSION = -1
"""The behaviour version of tokens that no policy of this run drew."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A context that is given and the tokens after it that are trained.

    Per-token arrays are parallel to ``token_ids``. ``weight`` scales the sample's terms and its share of the
    normaliser; ``temperature`` is the one its tokens were drawn at.
    """

    request_id: str
    context_ids: TokenIds
    token_ids: TokenIds
    old_logp: NDArray[np.float32]
    versions: NDArray[np.int32]
    oldest_versions: NDArray[np.int32]
    advantage: float
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.context_ids) or not len(self.token_ids):
            raise ValueError(
                f"sample {self.request_id}: {len(self.context_ids)} context and {len(self.token_ids)} trained tokens; "
                "expected at least one of each"
            )
        if {len(self.old_logp), len(self.versions), len(self.oldest_versions)} != {len(self.token_ids)}:
            raise ValueError(f"sample {self.request_id}: its per-token arrays differ in length")
        if self.context_ids.min() < 0 or self.token_ids.min() < 0:
            raise ValueError(f"sample {self.request_id}: a token id is negative")
        if not self.temperature > 0.0:
            raise ValueError(f"sample {self.request_id}: temperature {self.temperature}; expected a positive one")

    @property
    def fed_ids(self) -> TokenIds:
        """What the policy reads: everything but the last token, which is only ever predicted."""
        return np.concatenate([self.context_ids, self.token_ids[:-1]], dtype=np.int32)

    @property
    def fed_tokens(self) -> int:
        return len(self.context_ids) + len(self.token_ids) - 1


def make_turn_sample(turn: Turn, advantage: float) -> Sample:
    """The sample of one trainable turn."""
    completion = turn.completion
    return Sample(
        request_id=completion.request_id,
        context_ids=np.asarray(completion.prompt_ids, np.int32),
        token_ids=np.asarray(completion.token_ids, np.int32),
        old_logp=np.asarray(completion.logprobs, np.float32),
        versions=np.asarray(completion.versions, np.int32),
        oldest_versions=np.asarray(completion.oldest_versions, np.int32),
        advantage=advantage,
        temperature=completion.law.temperature,
    )


def make_supervised_sample(
    request_id: str,
    context_ids: Sequence[int] | NDArray[np.integer],
    token_ids: Sequence[int] | NDArray[np.integer],
    weight: float = 1.0,
) -> Sample:
    """A sample to imitate, with advantage 1 and no behaviour policy; meant for ``loss = "sft"``."""
    count = len(token_ids)
    none = np.full(count, NO_VERSION, np.int32)
    return Sample(
        request_id=request_id,
        context_ids=np.asarray(context_ids, np.int32),
        token_ids=np.asarray(token_ids, np.int32),
        old_logp=np.zeros(count, np.float32),
        versions=none,
        oldest_versions=none,
        advantage=1.0,
        weight=weight,
    )


def find_untrainable_reason(turn: Turn, packing: PackConfig) -> str | None:
    """Why a turn's tokens cannot be trained, or None. A turn without tokens has nothing to train and no reason."""
    completion = turn.completion
    if turn.untrainable is not None:
        return turn.untrainable
    if not completion.law.trainable:
        return "sampling_law"
    if not np.isfinite(completion.logprobs).all():
        return "invalid_logprob"
    trained = len(completion.token_ids)
    if not packing.fits(len(completion.prompt_ids) + trained - 1, trained):
        return "too_long"
    return None
