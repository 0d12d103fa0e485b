"""What the jitted step takes: rows of packed prefix trees, of static shape."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import fields
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from forgejax.ops import TreeMeta

Array = np.ndarray | jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens_BT",
        "positions_BT",
        "samples_through_BT",
        "attention",
        "edge_src_BE",
        "edge_tgt_BE",
        "edge_temperature_BE",
        "term_edge_BM",
        "term_sample_BM",
        "term_mask_BM",
        "old_logp_BM",
        "advantage_BM",
        "weight_BM",
        "version_BM",
        "oldest_version_BM",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """B rows of T tokens, E edges and M terms, each dimension padded; a pytree whose every array begins with B.

    The arrays are numpy's or jax's, of the shapes and dtypes annotated, or what a tree transformation puts in their
    place. Indices count within their row, so that rows may lie on different devices. Padding: tokens see only
    themselves, edges are read at node 0 and belong to no term, terms have a false mask and weight 0.

    Attributes:
        tokens_BT: what each node is fed.
        positions_BT: depth in the tree.
        samples_through_BT: how many samples feed the token at this node; identical ones count each, and a group in
            several rows counts in each row what lies there. 0 on padding.
        attention: who sees whom; a ``SplitMeta`` on devices that share the length of rows.
        edge_src_BE: node at which the edge's log-probability is read.
        edge_tgt_BE: token predicted there.
        edge_temperature_BE: by which the logits are divided.
        term_edge_BM: edge of each trained token of each sample.
        term_sample_BM: which of the row's samples the term belongs to; padding has M - 1.
        term_mask_BM: false on padding.
        old_logp_BM: log-probability under the behaviour policy.
        advantage_BM: of the term's sample.
        weight_BM: the normaliser, counted on the unmerged samples of the whole step.
        version_BM: policy version that drew the token; -1: none of this run.
        oldest_version_BM: oldest version in the context the sampler drew it from.
    """

    tokens_BT: Annotated[Any, Int32[Array, "B T"]]
    positions_BT: Annotated[Any, Int32[Array, "B T"]]
    samples_through_BT: Annotated[Any, Int32[Array, "B T"]]
    attention: TreeMeta | Any
    edge_src_BE: Annotated[Any, Int32[Array, "B E"]]
    edge_tgt_BE: Annotated[Any, Int32[Array, "B E"]]
    edge_temperature_BE: Annotated[Any, Float32[Array, "B E"]]
    term_edge_BM: Annotated[Any, Int32[Array, "B M"]]
    term_sample_BM: Annotated[Any, Int32[Array, "B M"]]
    term_mask_BM: Annotated[Any, Bool[Array, "B M"]]
    old_logp_BM: Annotated[Any, Float32[Array, "B M"]]
    advantage_BM: Annotated[Any, Float32[Array, "B M"]]
    weight_BM: Annotated[Any, Float32[Array, "B M"]]
    version_BM: Annotated[Any, Int32[Array, "B M"]]
    oldest_version_BM: Annotated[Any, Int32[Array, "B M"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTrunk:
    """Prefixes that run once for several micro-batches of what follows them.

    Row r of ``trunk`` holds one chain of tokens from node 0 on, which is what every token in row r of each leaf batch
    sees first. The trunk's own terms are those of samples that end in it. Of a leaf batch, ``attention`` covers T
    queries and the trunk's keys before its own; everything else is of the leaf alone, node indices too.
    """

    trunk: PackedBatch
    leaves: tuple[PackedBatch, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a sample's terms lie: ``PackedStep.parts[batch]``, row ``row``, terms ``start`` to ``stop``."""

    request_id: str
    batch: int
    row: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackStats:
    """How much the trees saved, and how full and even the rows are. ``pairs`` are query-key pairs of attention.

    ``awaited_pairs`` is what the shards would do in all if each had as many as the busiest of its micro-batch.
    """

    samples: int = 0
    trained_tokens: int = 0
    tree_tokens: int = 0
    unmerged_tokens: int = 0
    tree_pairs: int = 0
    unmerged_pairs: int = 0
    awaited_pairs: int = 0
    padded_tokens: int = 0  # rows times row length

    def __add__(self, other: PackStats) -> PackStats:
        """The figures of both together."""
        return PackStats(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    @property
    def tree_token_ratio(self) -> float:
        """Tokens the unmerged samples would take, over tokens of the trees (repeated ancestors included)."""
        return self.unmerged_tokens / self.tree_tokens

    @property
    def attention_pair_ratio(self) -> float:
        return self.unmerged_pairs / self.tree_pairs

    @property
    def pair_imbalance(self) -> float:
        """How much longer attention takes than with pairs spread evenly over the shards; 1 is even."""
        return self.awaited_pairs / self.tree_pairs

    @property
    def row_fill(self) -> float:
        return self.tree_tokens / self.padded_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedStep:
    """Everything one optimizer step takes: its micro-batches, where each sample went, and what packing did."""

    batches: tuple[PackedBatch, ...]
    placements: tuple[Placement, ...]
    stats: PackStats
    trunks: tuple[PackedTrunk, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every micro-batch: ``batches``, then each trunk's own and its leaves."""
        parts = [Part(batch=batch) for batch in self.batches]
        for each in self.trunks:
            parts += [Part(batch=each.trunk), *(Part(batch=leaf, trunk=each.trunk) for leaf in each.leaves)]
        return tuple(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A micro-batch, and the batch whose rows its own rows continue, or None."""

    batch: PackedBatch
    trunk: PackedBatch | None = None
