"""One optimizer step on merged prefix trees against the same samples unmerged, each a chain of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro
from _harness import CompileCount, matmul_flops, seconds, show

from forgejax.learner import Learner, PackConfig, PackedStep, Sample, StepConfig, make_train_step, pack
from forgejax.models import PolicyConfig, abstract_policy, count_params, init_params

Groups = list[list[Sample]]


class Draw:
    """Samples of random tokens; groups are lists of them."""

    def __init__(self, vocab_size: int) -> None:
        self.rng = np.random.default_rng(0)
        self.vocab_size = vocab_size

    def ids(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab_size, count).astype(np.int32)

    def sample(self, context: np.ndarray, answer: np.ndarray) -> Sample:
        """A sample drawn by version 0, about as likely as the fresh policy finds it."""
        zeros = np.zeros(len(answer), np.int32)
        return Sample(
            request_id=f"r{self.rng.integers(2**62)}",
            context_ids=context.astype(np.int32),
            token_ids=answer,
            old_logp=self.rng.normal(-np.log(self.vocab_size), 0.1, len(answer)).astype(np.float32),
            versions=zeros,
            oldest_versions=zeros,
            advantage=float(self.rng.normal()),
        )

    def grpo(self, prompt: int, members: int, answer: int) -> Groups:
        context = self.ids(prompt)
        return [[self.sample(context, self.ids(answer)) for _ in range(members)]]

    def turns(self, members: int, turns: int, system: int, *, think: int, say: int, observe: int) -> Groups:
        """Agents whose thinking is stripped from the later context: with think = 0 each prompt extends the last."""
        shared, group = self.ids(system), []
        for _ in range(members):
            context = shared
            for _ in range(turns):
                said = self.ids(say)
                group.append(self.sample(context, np.concatenate([self.ids(think), said])))
                context = np.concatenate([context, said, self.ids(observe)])
        return [group]

    def ragged(self) -> Groups:
        groups: Groups = []
        for _ in range(4):
            context = self.ids(int(self.rng.integers(16, 256)))
            groups.append([self.sample(context, self.ids(int(self.rng.integers(4, 96)))) for _ in range(4)])
        return groups


CASES: dict[str, Callable[[Draw], Groups]] = {
    "grpo_p1024_g8_r32": lambda draw: draw.grpo(1024, 8, 32),
    "grpo_p256_g8_r32": lambda draw: draw.grpo(256, 8, 32),
    "multiturn_g8_t8": lambda draw: draw.turns(8, 8, 128, think=0, say=16, observe=16),
    "stripped_g4_t6": lambda draw: draw.turns(4, 6, 128, think=32, say=32, observe=32),
    "ragged": Draw.ragged,
    "chain": lambda draw: draw.grpo(768, 1, 256),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which samples, on which policy."""

    case: str = "grpo_p256_g8_r32"
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    block_size: int = 64
    repeats: int = 3
    json: bool = False


def packed(groups: Groups, options: Options, row_length: int, budget: int) -> PackedStep:
    """One step in rows just long enough, as many to a micro-batch as the budget of tokens holds."""
    config = PackConfig(
        row_length=row_length,
        rows=max(1, budget // row_length),
        block_size=options.block_size,
        loss_norm="batch",  # one normaliser over all samples, however they are grouped
    )
    return pack(groups, config)


def train_flops(options: Options, step: PackedStep) -> float:
    """FLOPs of forward and backward that the model asks for: recomputation and padding are not work."""
    policy = options.policy
    embeddings = (1 if policy.tied_embeddings else 2) * policy.vocab_size * policy.d_model
    weights = count_params(abstract_policy(policy)[1]) - embeddings
    rows = [(batch.term_edge[row], batch.term_mask[row]) for batch in step.batches for row in range(len(batch.tokens))]
    edges = sum(len(np.unique(edge[mask])) for edge, mask in rows)
    attention = 4 * policy.num_layers * policy.num_heads * policy.head_size * step.stats.tree_pairs
    return 3.0 * (2 * weights * step.stats.tree_tokens + 2 * policy.d_model * policy.vocab_size * edges + attention)


def gradient(options: Options, params: Any, step: PackedStep) -> list[np.ndarray]:
    train = make_train_step(abstract_policy(options.policy)[0], params, StepConfig())
    accumulated = train.start(params)
    for batch in step.batches:
        accumulated = train.accumulate(params, accumulated, jax.device_put(batch), np.int32(0))
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(accumulated.grads)]


def main(options: Options) -> None:
    if options.case not in CASES:
        raise SystemExit(f"unknown case {options.case!r}: expected one of {', '.join(CASES)}")
    groups = CASES[options.case](Draw(options.policy.vocab_size))
    chains = [[sample] for group in groups for sample in group]
    block = options.block_size
    longest = -(-max(chain[0].fed_tokens for chain in chains) // block) * block
    # The largest tree whole in one row, and for the chains rows that waste no more padding than one block each.
    probe = pack(groups, PackConfig(row_length=64 * longest, rows=1, block_size=block, loss_norm="batch"))
    row_length = max(longest, -(-probe.stats.tree_tokens // len(groups) // block) * block)
    merged = packed(groups, options, row_length, row_length)
    unmerged = packed(chains, options, longest, row_length)

    params = init_params(options.policy)
    ours, theirs = (gradient(options, params, step) for step in (merged, unmerged))
    difference = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(ours, theirs, strict=True)))
    norm = np.sqrt(sum(np.sum(b**2) for b in theirs))

    learner = Learner(abstract_policy(options.policy)[0], params, StepConfig())
    runs = tuple(functools.partial(learner.update, step.batches, 0) for step in (merged, unmerged))
    for run in runs:
        jax.block_until_ready(run())
    counted = CompileCount()
    merged_s, unmerged_s = seconds(*runs, repeats=options.repeats)
    compiles = counted.count
    show(
        {
            "case": options.case,
            "samples": merged.stats.samples,
            "tree_tokens": merged.stats.tree_tokens,
            "token_ratio": merged.stats.tree_token_ratio,
            "pair_ratio": merged.stats.attention_pair_ratio,
            "row_fill_merged": merged.stats.row_fill,
            "row_fill_unmerged": unmerged.stats.row_fill,
            "merged_s": merged_s,
            "unmerged_s": unmerged_s,
            "speedup": unmerged_s / merged_s,
            "grad_rel_diff": float(difference / norm),
            "compiles": compiles,  # while timing, after one step of each: a compile here would be a recompile
            "mfu_vs_matmul": train_flops(options, merged) / merged_s / matmul_flops(),
        },
        options.json,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
