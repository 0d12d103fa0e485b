"""The shape of a micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from forgejax.errors import ConfigError

LossNorm = Literal["group", "batch"]
EDGE_BUCKETS = (0.25, 0.5, 0.75, 1.0)  # of the row length: each edge costs a row of logits
TERM_BUCKETS = (2, 16)  # of the row length: identical samples share edges but not terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Shape of a micro-batch, and what a row is thought to cost.

    ``rows`` is per row shard of the mesh. A row's cost, by which shards are balanced, is
    ``token_cost * tokens + pair_cost * query-key pairs``.
    """

    row_length: int = 512
    rows: int = 2
    block_size: int = 64
    token_cost: float = 1.0
    pair_cost: float = 0.005
    loss_norm: LossNorm = "group"

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.row_length < 2 or self.row_length % self.block_size:
            raise ConfigError(
                f"packing.row_length {self.row_length} is not a multiple of packing.block_size {self.block_size}; "
                "change one of them"
            )
        if self.rows < 1:
            raise ConfigError(f"packing.rows is {self.rows}; expected at least 1 row a shard")
        if min(self.token_cost, self.pair_cost) < 0 or self.token_cost + self.pair_cost == 0:
            raise ConfigError("packing.token_cost and packing.pair_cost: expected a positive cost, none negative")

    @property
    def term_limit(self) -> int:
        """M of the largest bucket."""
        return TERM_BUCKETS[-1] * self.row_length
