"""The shape of a micro-batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from forgejax.errors import ConfigError
from forgejax.sharding.topology import Platform

# Wide products feed a TPU's matrix unit; elsewhere small blocks leave out more of what no token sees.
_BLOCKS: dict[Platform, int] = {"cpu": 64, "gpu": 64, "tpu": 512}
LossNorm = Literal["group", "batch", "sample"]
EDGE_BUCKETS = (0.25, 0.5, 0.75, 1.0)  # of the row length: each edge costs a row of logits
TERM_BUCKETS = (2, 16)  # of the row length: identical samples share edges but not terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Shape of a micro-batch, and what a row is thought to cost.

    ``rows`` is per row shard of the mesh. ``block_size`` is that of attention; 0 leaves it to the platform, see ``on``.
    ``loss_norm``: each trained token weighs 1 over those of its task's ``group``, and tasks weigh alike; or 1 over
    those of the whole ``batch``; or each ``sample`` weighs alike in its group whatever its length, tasks as well. A
    row's cost, by which shards are balanced, is ``token_cost * tokens + pair_cost * query-key pairs``. ``trunks``:
    where rows would repeat a long prefix it may run once, in a pass before them, and samples of up to two rows can be
    trained; off on a mesh that splits rows by length.
    """

    row_length: int = 512
    rows: int = 2
    block_size: int = 0
    token_cost: float = 1.0
    pair_cost: float = 0.005
    loss_norm: LossNorm = "group"
    trunks: bool = True

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.block_size < 0:
            raise ConfigError(
                f"packing.row_length {self.row_length} and packing.block_size {self.block_size}: expected rows of at "
                "least 2 tokens, and blocks of any number of them or 0 for the platform's"
            )
        if self.row_length % self.block:
            raise ConfigError(
                f"packing.row_length {self.row_length} is not a multiple of packing.block_size {self.block_size}; "
                "change one of them"
            )
        if self.rows < 1:
            raise ConfigError(f"packing.rows is {self.rows}; expected at least 1 row a shard")
        costs = (self.token_cost, self.pair_cost)
        if not (all(0 <= cost < math.inf for cost in costs) and sum(costs) > 0):
            raise ConfigError(
                f"packing.token_cost {self.token_cost} and packing.pair_cost {self.pair_cost}: expected numbers of at "
                "least 0, and one above"
            )

    @property
    def block(self) -> int:
        """Tokens in a block of attention."""
        return self.block_size or math.gcd(self.row_length, _BLOCKS["cpu"])

    def on(self, platform: Platform, length_shards: int) -> PackConfig:
        """What holds for devices of a platform of which so many share the length of a row.

        A block size of 0 becomes the platform's, or its largest common divisor with what a device has of a row; where a
        row is shared there are no trunks.

        Raises:
            ConfigError: the blocks of a row cannot be shared out.
        """
        share, rest = divmod(self.row_length, length_shards)
        block = self.block_size or math.gcd(share, _BLOCKS[platform])
        if rest or share % block:
            raise ConfigError(
                f"packing.row_length {self.row_length} on a mesh with context = {length_shards}: expected a multiple "
                f"of {length_shards} x packing.block_size = {length_shards * block}; change one of the three"
            )
        return dataclasses.replace(self, block_size=block, trunks=self.trunks and length_shards == 1)

    def fits(self, fed: int, trained: int) -> bool:
        """Whether a sample of so many tokens can be packed.

        One that is too long for a row needs a trunk of a row at most, and no trained token in it.
        """
        return fed <= self.row_length or (self.trunks and fed <= 2 * self.row_length and trained <= self.row_length)

    @property
    def term_limit(self) -> int:
        """M of the largest bucket."""
        return TERM_BUCKETS[-1] * self.row_length
