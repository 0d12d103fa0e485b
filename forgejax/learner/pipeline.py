"""From finished groups to what the step takes: mapped over the data pipeline, in its prefetch thread. numpy only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from forgejax.errors import TrainingError
from forgejax.learner.credit.credit import CreditConfig, assign_credit
from forgejax.learner.packing.batch import PackedStep
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.pack import pack
from forgejax.types import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One optimizer step's data and its account.

    ``groups`` are the indices of the groups in it; ``untrained`` counts their sampled tokens that are not trained, by
    reason. Every sampled token of the groups is in ``untrained`` or in ``packed.stats.trained_tokens``.
    """

    packed: PackedStep
    groups: tuple[int, ...]
    untrained: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackGroups:
    """Groups to a TrainingBatch: credit, merge, pack. Deterministic, so that a resumed pipeline gives the same."""

    credit: CreditConfig
    packing: PackConfig
    row_shards: int = 1

    def __call__(self, groups: Sequence[Group]) -> TrainingBatch:
        """Raises TrainingError if no token of the groups can be trained (``make_judge`` drops such groups earlier)."""
        credits = [assign_credit(group, self.credit, self.packing) for group in groups]
        untrained: Counter[str] = Counter()
        for found in credits:
            untrained.update(found.untrained)
        kept = [found.samples for found in credits if found.samples]
        if not kept:
            raise TrainingError(
                f"none of {len(groups)} groups has a token to train ({dict(untrained)}): judge groups before batching"
            )
        return TrainingBatch(
            packed=pack(kept, self.packing, row_shards=self.row_shards),
            groups=tuple(group.dispatch.index for group in groups),
            untrained=dict(untrained),
        )
