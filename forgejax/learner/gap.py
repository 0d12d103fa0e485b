"""How far trainer and sampler are apart on the log-probability of tokens, by how deep in their context those stand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from forgejax.learner.packing.batch import PackedBatch, PackedStep

_BANDS = {"to_128": 128, "to_1k": 1024, "to_8k": 8192, "to_64k": 65536, "beyond": math.inf}
_SMALLEST, _BINS, _PER_DECADE = 1e-9, 88, 8  # of the histogram: up to 1e2


@dataclasses.dataclass(kw_only=True)
class GapFigures:
    """Sums over tokens, which add up over calls.

    ``total`` and ``largest`` are of |trainer - sampler|; ``ratios`` and ``squares`` sum the ratio of the probabilities
    and its square; ``counts`` is a histogram over eight bins a decade.
    """

    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0
    ratios: float = 0.0
    squares: float = 0.0
    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * (_BINS + 1))

    def add(self, differences: Float[np.ndarray, " N"]) -> None:
        """Counts trainer minus sampler of N tokens."""
        if not differences.size:
            return
        gaps, ratios = np.abs(differences), np.exp(np.clip(differences.astype(np.float64), -20.0, 20.0))
        self.tokens += gaps.size
        self.total += float(gaps.sum())
        self.largest = max(self.largest, float(gaps.max()))
        self.ratios += float(ratios.sum())
        self.squares += float((ratios**2).sum())
        bins = np.ceil(_PER_DECADE * np.log10(np.maximum(gaps, _SMALLEST) / _SMALLEST))
        found = np.bincount(np.clip(bins, 0, _BINS).astype(int), minlength=_BINS + 1)
        self.counts = [int(a + b) for a, b in zip(self.counts, found, strict=True)]

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0

    @property
    def p99(self) -> float:
        """What 99 % of the tokens do not exceed, to the next eighth of a decade."""
        if not self.tokens:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.counts), 0.99 * self.tokens))
        return min(float(_SMALLEST * 10 ** (index / _PER_DECADE)), self.largest)

    @property
    def ess(self) -> float:
        """Effective sample size of the ratios as importance weights, as a share of the tokens: 1 if all are 1."""
        return min(1.0, self.ratios**2 / (self.tokens * self.squares)) if self.tokens else 1.0


def count_by_depth(
    figures: Mapping[str, GapFigures], differences: Float[np.ndarray, " N"], depths: Int[np.ndarray, " N"]
) -> dict[str, GapFigures]:
    """``figures`` with trainer minus sampler of N tokens counted at their depths; bands in order, none without tokens.

    A token's depth is the number of tokens before it in its context.
    """
    counted, below = dict(figures), -1.0
    for name, limit in _BANDS.items():
        inside = differences[(depths > below) & (depths <= limit)]
        if inside.size:
            counted.setdefault(name, GapFigures()).add(inside)
        below = limit
    return {name: counted[name] for name in _BANDS if name in counted}


def find_fresh(
    scored: Sequence[np.ndarray], packed: PackedStep, version: int
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Trainer minus sampler of the terms drawn by ``version`` alone, over all rows of a packed step, and their depths.

    Args:
        scored: for each of the step's parts the trainer's log-probabilities [B, M] under the weights of ``version``.
        packed: the same terms with what the sampler recorded.
        version: tokens of other versions, or with older keys and values in their context, are left out.
    """
    found = [_fresh(scores, part.batch, version) for scores, part in zip(scored, packed.parts, strict=True)]
    if not found:
        return np.zeros(0), np.zeros(0, np.int32)
    return np.concatenate([differences for differences, _ in found]), np.concatenate([depths for _, depths in found])


def _fresh(scores: np.ndarray, batch: PackedBatch, version: int) -> tuple[np.ndarray, np.ndarray]:
    fresh = np.asarray(batch.term_mask_BM)
    for drawn in (batch.version_BM, batch.oldest_version_BM):
        fresh = fresh & (np.asarray(drawn) == version)
    source_BM = np.take_along_axis(np.asarray(batch.edge_src_BE), np.asarray(batch.term_edge_BM), axis=1)
    depth_BM = np.take_along_axis(np.asarray(batch.positions_BT), source_BM, axis=1) + 1
    return (scores - np.asarray(batch.old_logp_BM))[fresh], depth_BM[fresh]
