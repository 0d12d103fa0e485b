"""What the jitted step takes: rows of packed prefix trees, of static shape."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import fields
from typing import Any

import jax

from forgejax.ops import TreeMeta


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "positions",
        "samples_through",
        "attention",
        "edge_src",
        "edge_tgt",
        "edge_temperature",
        "term_edge",
        "term_sample",
        "term_mask",
        "old_logp",
        "advantage",
        "weight",
        "version",
        "oldest_version",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """B rows of T tokens, E edges and M terms, each dimension padded; a pytree whose every array begins with B. The
    arrays are numpy's or jax's, or what a tree transformation puts in their place.

    Indices count within their row, so that rows may lie on different devices. Padding: tokens see only themselves,
    edges are read at node 0 and belong to no term, terms have a false mask and weight 0.

    Attributes:
        tokens: [B, T] int32.
        positions: [B, T] int32 depth in the tree.
        samples_through: [B, T] int32 how many samples feed the token at this node; identical ones count each, and a
            group in several rows counts in each row what lies there. 0 on padding.
        attention: who sees whom; a ``SplitMeta`` on devices that share the length of rows.
        edge_src: [B, E] int32 node at which the edge's log-probability is read.
        edge_tgt: [B, E] int32 token predicted there.
        edge_temperature: [B, E] float32 by which the logits are divided.
        term_edge: [B, M] int32 edge of each trained token of each sample.
        term_sample: [B, M] int32 which of the row's samples the term belongs to; padding has M - 1.
        term_mask: [B, M] bool; false on padding.
        old_logp: [B, M] float32 log-probability under the behaviour policy.
        advantage: [B, M] float32.
        weight: [B, M] float32: the normaliser, counted on the unmerged samples of the whole step.
        version: [B, M] int32 policy version that drew the token; -1: none of this run.
        oldest_version: [B, M] int32 oldest version in the context the sampler drew it from.
    """

    tokens: Any
    positions: Any
    samples_through: Any
    attention: TreeMeta | Any
    edge_src: Any
    edge_tgt: Any
    edge_temperature: Any
    term_edge: Any
    term_sample: Any
    term_mask: Any
    old_logp: Any
    advantage: Any
    weight: Any
    version: Any
    oldest_version: Any


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
