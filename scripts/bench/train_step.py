"""One optimizer step on merged prefix trees against the same samples unmerged, each a chain of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _harness import CompileCount, seconds, show
from _profile import profile

from forgejax.learner import PackConfig, PackedStep, Sample, StepConfig, make_train_step, pack
from forgejax.learner.tree import build_tree
from forgejax.models import PolicyConfig, abstract_policy, count_params, init_params

Groups = list[list[Sample]]
_PEAK_SIZE = 2048  # of the square product that utilisation is measured against
_ROW_LIMIT = 2048  # tokens of a row, unless one tree is larger


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


MODELS = {
    "tiny": PolicyConfig(),
    "20m": PolicyConfig(
        vocab_size=8192, num_layers=10, d_model=384, num_heads=6, num_kv_heads=3, head_dim=64, d_ff=1024
    ),
    "135m": PolicyConfig(
        vocab_size=49152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_ff=1536
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which samples, on which policy. ``profile`` shows, instead of the comparison, where the gradient of a merged
    step spends its time: shares of the threads' busy time by part of the model."""

    case: str = "grpo_p256_g8_r32"
    model: Literal["tiny", "20m", "135m"] = "20m"
    block_size: int = 64
    vocab_chunk: int = 2048
    repeats: int = 5
    profile: bool = False
    json: bool = False

    @property
    def policy(self) -> PolicyConfig:
        return MODELS[self.model]


def packed(groups: Groups, options: Options) -> PackedStep:
    """One step, in micro-batches of one row of the length that wastes the fewest tokens on padding."""
    block, most = options.block_size, _ROW_LIMIT // options.block_size

    def in_rows_of(blocks: int) -> PackedStep:
        # One normaliser over all samples, however they are grouped.
        return pack(groups, PackConfig(row_length=blocks * block, rows=1, block_size=block, loss_norm="batch"))

    longest = max(len(build_tree(group).tokens) for group in groups)
    fewest = -(-longest // block)
    steps = [in_rows_of(blocks) for blocks in range(fewest, max(fewest, most) + 1)]
    return min(steps, key=lambda step: (step.stats.padded_tokens, len(step.batches)))


def train_flops(options: Options, step: PackedStep) -> float:
    """FLOPs of forward and backward that the model asks for: recomputation and padding are not work."""
    policy = options.policy
    embeddings = (1 if policy.tied_embeddings else 2) * policy.vocab_size * policy.d_model
    weights = count_params(abstract_policy(policy)[1]) - embeddings
    rows = [(batch.term_edge[row], batch.term_mask[row]) for batch in step.batches for row in range(len(batch.tokens))]
    edges = sum(len(np.unique(edge[mask])) for edge, mask in rows)
    attention = 4 * policy.num_layers * policy.num_heads * policy.head_size * step.stats.tree_pairs
    return 3.0 * (2 * weights * step.stats.tree_tokens + 2 * policy.d_model * policy.vocab_size * edges + attention)


class Ours:
    """The step of the product, its programs compiled once for gradients and timings alike."""

    def __init__(self, options: Options) -> None:
        config = StepConfig(vocab_chunk=options.vocab_chunk)
        params = init_params(options.policy)
        self.step = make_train_step(abstract_policy(options.policy)[0], params, config)
        self.state = self.step.init(params)

    def gradient(self, packed_step: PackedStep) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self.accumulate(packed_step).grads)]

    def update(self, packed_step: PackedStep) -> Any:
        """One optimizer step, as the learner takes it, transfers included."""
        self.state, metrics = self.step.apply(self.state, self.accumulate(packed_step))
        return self.state, metrics

    def compiled(self, packed_step: PackedStep) -> str:
        """The HLO of the program that runs for each micro-batch."""
        accumulate: Any = self.step.accumulate
        start = self.step.start(self.state.params)
        return accumulate.lower(self.state.params, start, packed_step.batches[0], np.int32(0)).compile().as_text()

    def accumulate(self, packed_step: PackedStep) -> Any:
        accumulated = self.step.start(self.state.params)
        for batch in packed_step.batches:
            accumulated = self.step.accumulate(self.state.params, accumulated, jax.device_put(batch), np.int32(0))
        return accumulated


def relative(ours: list[np.ndarray], oracle: list[np.ndarray]) -> float:
    """Length of the difference over length of the oracle, in FP64."""
    wide = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(ours, oracle, strict=True)]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in wide) / sum(np.sum(b**2) for _, b in wide)))


def main(options: Options) -> None:
    if options.case not in CASES:
        raise SystemExit(f"unknown case {options.case!r}: expected one of {', '.join(CASES)}")
    groups = CASES[options.case](Draw(options.policy.vocab_size))
    merged, unmerged = packed(groups, options), packed([[sample] for group in groups for sample in group], options)
    ours = Ours(options)
    if options.profile:
        jax.block_until_ready(ours.accumulate(merged))
        result = profile(functools.partial(ours.accumulate, merged), ours.compiled(merged))
        show({"case": options.case, "model": options.model, **result}, options.json)
        return
    difference = relative(ours.gradient(merged), ours.gradient(unmerged))
    a = jax.random.normal(jax.random.key(0), (_PEAK_SIZE, _PEAK_SIZE))
    product = functools.partial(jax.jit(jnp.matmul), a, a)
    runs = functools.partial(ours.update, merged), functools.partial(ours.update, unmerged), product
    for run in runs:
        jax.block_until_ready(run())
    counted = CompileCount()  # everything has run: a compile from here on is a recompile
    merged_s, unmerged_s, matmul_s = seconds(*runs, repeats=options.repeats)
    show(
        {
            "case": options.case,
            "model": options.model,
            "samples": merged.stats.samples,
            "tree_tokens": merged.stats.tree_tokens,
            "token_ratio": merged.stats.tree_token_ratio,
            "pair_ratio": merged.stats.attention_pair_ratio,
            "row_fill_merged": merged.stats.row_fill,
            "row_fill_unmerged": unmerged.stats.row_fill,
            "merged_s": merged_s,
            "unmerged_s": unmerged_s,
            "merged_tokens_per_s": merged.stats.tree_tokens / merged_s,
            "unmerged_tokens_per_s": unmerged.stats.tree_tokens / unmerged_s,
            "speedup": unmerged_s / merged_s,
            "grad_rel_diff": difference,
            "compiles": counted.count,
            "matmul_gflops": 2 * _PEAK_SIZE**3 / matmul_s / 1e9,
            "mfu_vs_matmul": train_flops(options, merged) / merged_s / (2 * _PEAK_SIZE**3 / matmul_s),
        },
        options.json,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
